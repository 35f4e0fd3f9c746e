// silu(gate) * up of float32 rows, and its gradients.
#include "exponential.h"

typedef struct {  // as in ../cuda/swiglu.h
    float *gate, *up;
    float *other;  // forward: the result; backward: the gradient of the result
    int64_t rows, columns, gate_stride, up_stride, other_stride;
    int32_t aligned;  // not needed here
} Swiglu;

enum { PIECE = 2048 };  // of a row: where all is one row, threads take pieces of it

static inline float sigmoid(float x) {
    const float small = exponential(-fabsf(x));  // in 0 .. 1
    const float share = 1.0f / (1.0f + small);
    return x < 0.0f ? small * share : share;
}

static void forward(const float *gate, const float *up, float *out, int64_t count) {
    for (int64_t i = 0; i < count; i++) out[i] = gate[i] * sigmoid(gate[i]) * up[i];
}

// Written over gate and up.
static void backward(float *gate, float *up, const float *gradient, int64_t count) {
    for (int64_t i = 0; i < count; i++) {
        const float x = gate[i], share = sigmoid(x), through = gradient[i] * share;
        gate[i] = up[i] * through * (1.0f + x * (1.0f - share));
        up[i] = through * x;
    }
}

static inline void swiglu(const Swiglu *given, int threads, int is_backward) {
    const int64_t columns = given->columns, pieces = (columns + PIECE - 1) / PIECE;
    (void)threads;
#if defined(_OPENMP)
#pragma omp parallel for num_threads(threads) if (given->rows * columns >= ENOUGH)
#endif
    for (int64_t job = 0; job < given->rows * pieces; job++) {
        const int64_t row = job / pieces, start = job % pieces * PIECE;
        const int64_t left = columns - start, count = left < PIECE ? left : PIECE;
        float *const gate = given->gate + row * given->gate_stride + start;
        float *const up = given->up + row * given->up_stride + start;
        float *const other = given->other + row * given->other_stride + start;
        if (is_backward) {
            backward(gate, up, other, count);
        } else {
            forward(gate, up, other, count);
        }
    }
}

EXPORT void swiglu_f32(const Swiglu *given, int threads) { swiglu(given, threads, 0); }
EXPORT void swiglu_backward_f32(const Swiglu *given, int threads) { swiglu(given, threads, 1); }
