// Root-mean-square norm of float32 rows, and its gradient with respect to them.
//
// Sums are kept in lanes, which the compiler takes for a vector: it may not reorder a sum by itself.
#include "portable.h"

#include <math.h>

typedef struct {  // as in ../cuda/rms_norm.h
    const float *x, *weight;
    float *inverse_rms;     // written by the forward pass, read by the backward pass
    const float *gradient;  // backward only
    float *out;             // contiguous
    int64_t rows, columns, x_stride, gradient_stride;
    float epsilon, weight_offset;
    int32_t aligned;  // not needed here
} RmsNorm;

enum { LANES = 16 };

// The sum of left * right * (offset + weight), or of left * right without weights.
static inline float sum_of(const float *left, const float *right, const float *weight,
                           float offset, int64_t count) {
    float lanes[LANES] = {0.0f}, total = 0.0f;
    int64_t i = 0;
    for (; i + LANES <= count; i += LANES) {
        for (int j = 0; j < LANES; j++) {
            const float factor = weight ? offset + weight[i + j] : 1.0f;
            lanes[j] += left[i + j] * factor * right[i + j];
        }
    }
    for (; i < count; i++) total += left[i] * (weight ? offset + weight[i] : 1.0f) * right[i];
    for (int j = 0; j < LANES; j++) total += lanes[j];
    return total;
}

EXPORT void rms_norm_f32(const RmsNorm *given, int threads) {
    const int64_t n = given->columns;
    (void)threads;
#if defined(_OPENMP)
#pragma omp parallel for num_threads(threads) if (given->rows * n >= ENOUGH)
#endif
    for (int64_t row = 0; row < given->rows; row++) {
        const float *const x = given->x + row * given->x_stride, *const weight = given->weight;
        float *const out = given->out + row * n;
        const float mean = sum_of(x, x, NULL, 0.0f, n) / (float)n;
        const float inverse = 1.0f / sqrtf(mean + given->epsilon);
        for (int64_t i = 0; i < n; i++) {
            out[i] = x[i] * inverse * (given->weight_offset + weight[i]);
        }
        given->inverse_rms[row] = inverse;
    }
}

// With h = gradient * (weight_offset + weight) and s = inverse_rms:
// dx = s * (h - x * s * s * mean(h * x)).
EXPORT void rms_norm_backward_f32(const RmsNorm *given, int threads) {
    const int64_t n = given->columns;
    const float offset = given->weight_offset;
    (void)threads;
#if defined(_OPENMP)
#pragma omp parallel for num_threads(threads) if (given->rows * n >= ENOUGH)
#endif
    for (int64_t row = 0; row < given->rows; row++) {
        const float *const x = given->x + row * given->x_stride, *const weight = given->weight;
        const float *const gradient = given->gradient + row * given->gradient_stride;
        float *const out = given->out + row * n;
        const float inverse = given->inverse_rms[row];
        const float mean = sum_of(gradient, x, weight, offset, n) / (float)n;
        const float along = mean * inverse * inverse;
        for (int64_t i = 0; i < n; i++) {
            out[i] = inverse * (gradient[i] * (offset + weight[i]) - x[i] * along);
        }
    }
}
