// Rotary position embedding of float32 heads in place, in transformers' convention of two halves.
#include "portable.h"

typedef struct {  // as in ../cuda/rotate.h
    float *x;                // (tokens, heads, 2 * half)
    const float *cos, *sin;  // (tokens, 2 * half), contiguous
    int64_t tokens, token_stride, head_stride;
    int32_t heads, half;
    int32_t inverse;  // the transpose of the rotation: its backward pass
    int32_t aligned;  // not needed here
} Rotate;

static inline void turn(float *restrict first, float *restrict second, const float *restrict cos,
                        const float *restrict sin_first, const float *restrict sin_second,
                        float sign, int half) {
    for (int i = 0; i < half; i++) {
        const float a = first[i], b = second[i];
        first[i] = a * cos[i] - sign * b * sin_first[i];
        second[i] = b * cos[half + i] + sign * a * sin_second[i];
    }
}

EXPORT void rotate_f32(const Rotate *given, int threads) {
    const int half = given->half;
    // The transpose takes the sine of the other half, with the other sign.
    const float sign = given->inverse ? -1.0f : 1.0f;
    (void)threads;
#if defined(_OPENMP)
#pragma omp parallel for num_threads(threads) if (given->tokens * given->heads * half >= ENOUGH)
#endif
    for (int64_t token = 0; token < given->tokens; token++) {
        const float *const cos = given->cos + token * 2 * half;
        const float *const sin = given->sin + token * 2 * half;
        const float *const sin_first = given->inverse ? sin + half : sin;
        const float *const sin_second = given->inverse ? sin : sin + half;
        for (int head = 0; head < given->heads; head++) {
            float *const x = given->x + token * given->token_stride + head * given->head_stride;
            turn(x, x + half, cos, sin_first, sin_second, sign, half);
        }
    }
}
