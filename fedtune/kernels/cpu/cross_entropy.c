// The cross-entropy of each row of float32 logits, and its gradient written over the logits.
//
// A row is read three times while it lies in the cache. Sums are kept in lanes, which the compiler
// takes for a vector: it may not reorder a sum by itself.
#include "exponential.h"

enum { LANES = 16, RUN = 1024 };  // a run is summed in float32, and runs in float64

static float largest_of(const float *row, int64_t count) {
    float lanes[LANES], largest = -INFINITY;
    for (int j = 0; j < LANES; j++) lanes[j] = -INFINITY;
    int64_t i = 0;
    for (; i + LANES <= count; i += LANES) {
        for (int j = 0; j < LANES; j++) lanes[j] = row[i + j] > lanes[j] ? row[i + j] : lanes[j];
    }
    for (; i < count; i++) largest = row[i] > largest ? row[i] : largest;
    for (int j = 0; j < LANES; j++) largest = lanes[j] > largest ? lanes[j] : largest;
    return largest;
}

// Writes e ** (value - shift) over the row, and returns the sum.
static double exponentials(float *row, int64_t count, float shift) {
    double total = 0.0;
    for (int64_t start = 0; start < count; start += RUN) {
        const int64_t end = start + RUN < count ? start + RUN : count;
        float lanes[LANES] = {0.0f};
        int64_t i = start;
        for (; i + LANES <= end; i += LANES) {
            for (int j = 0; j < LANES; j++) {
                row[i + j] = exponential(row[i + j] - shift);
                lanes[j] += row[i + j];
            }
        }
        for (; i < end; i++) {
            row[i] = exponential(row[i] - shift);
            lanes[0] += row[i];
        }
        for (int j = 0; j < LANES; j++) total += (double)lanes[j];
    }
    return total;
}

static float row_loss(float *row, int64_t count, int64_t target, float weight) {
    const int counts = target >= 0 && target < count;
    float loss = 0.0f;
    if (counts) {
        const float largest = largest_of(row, count), at_target = row[target];
        const float shift = largest == -INFINITY ? 0.0f : largest;
        const double total = exponentials(row, count, shift);
        loss = (float)(log(total) + (double)(shift - at_target));
        const float share = row[target] / (float)total, factor = weight / (float)total;
        for (int64_t i = 0; i < count; i++) row[i] *= factor;
        row[target] = (share - 1.0f) * weight;
    }
    // Whatever the logits were: not a number times 0 is not 0.
    if (!counts || weight == 0.0f) memset(row, 0, sizeof(float) * (size_t)count);
    return loss;
}

typedef struct {  // as in ../cuda/cross_entropy.h
    float *logits;
    const int64_t *targets;
    const float *weights;
    float *losses;
    int64_t rows, vocabulary, row_stride;
} CrossEntropy;

EXPORT void cross_entropy_f32(const CrossEntropy *given, int threads) {
    const int64_t rows = given->rows, vocabulary = given->vocabulary;
    (void)threads;
#if defined(_OPENMP)
#pragma omp parallel for num_threads(threads) if (rows * vocabulary >= ENOUGH)
#endif
    for (int64_t row = 0; row < rows; row++) {
        float *const first = given->logits + row * given->row_stride;
        given->losses[row] = row_loss(first, vocabulary, given->targets[row], given->weights[row]);
    }
}
