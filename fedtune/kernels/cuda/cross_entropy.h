// The cross-entropy of each row of logits, and its gradient written over the logits.
#pragma once

#include "portable.h"

struct CrossEntropy {
    void* logits;            // row r starts at r * row_stride
    const int64_t* targets;  // outside 0 .. vocabulary - 1: the row has no loss
    const float* weights;
    float* losses;
    int64_t rows;
    int64_t vocabulary;
    int64_t row_stride;
};

// One team takes a row: it reads the row once for the largest logit and the sum of exponentials
// (rescaled whenever the largest grows), and once more to write the gradient. Rows may start at any
// address: the runs of 16 bytes are those of memory, and the first and last are partly of the row.
template <class T, class Team>
DEVICE void cross_entropy(const Team& team, const CrossEntropy& given) {
    constexpr int V = WIDTH<T>;
    constexpr int STEPS = 4;
    const float minus_infinity = float_of_bits(0xff800000u);
    const int64_t n = given.vocabulary;
    const int64_t stride = int64_t(team.threads()) * V;

    for (int64_t row = team.index(); row < given.rows; row += team.count()) {
        T* const logits = static_cast<T*>(given.logits) + row * given.row_stride;
        const int64_t target = given.targets[row];
        const bool counts = target >= 0 && target < n;
        const float weight = counts ? given.weights[row] : 0.0f;
        const float target_logit = counts ? to_float(logits[target]) : 0.0f;
        const int64_t lead = int64_t(reinterpret_cast<uintptr_t>(logits) % 16 / sizeof(T));
        const int64_t begin = int64_t(team.thread()) * V - lead;

        float largest = minus_infinity, total = 0.0f;
        for (int64_t start = begin; start < n; start += STEPS * stride) {
            Words words[STEPS];
            float value[V];
            UNROLL for (int s = 0; s < STEPS; s++) {
                words[s] = read_within(logits, start + s * stride, n, minus_infinity);
            }
            float higher = largest;
            UNROLL for (int s = 0; s < STEPS; s++) {
                decode(words[s], value, T{});
                UNROLL for (int j = 0; j < V; j++) higher = larger(higher, value[j]);
            }
            if (higher > largest) {
                total *= exponential(largest - higher);
                largest = higher;
            }
            const float shift = largest == minus_infinity ? 0.0f : largest;
            float part = 0.0f;  // summed on its own, so that long rows lose no digits
            UNROLL for (int s = 0; s < STEPS; s++) {
                decode(words[s], value, T{});
                UNROLL for (int j = 0; j < V; j++) part += exponential(value[j] - shift);
            }
            total += part;
        }
        const float row_largest = team.largest(largest);
        const float shift = row_largest == minus_infinity ? 0.0f : row_largest;
        // A thread that saw no logit above minus infinity has nothing to add.
        total = team.sum(largest == minus_infinity ? total : total * exponential(largest - shift));

        const float factor = weight / total;
        for (int64_t start = begin; start < n; start += STEPS * stride) {
            Words words[STEPS];
            if (weight != 0.0f) {
                UNROLL for (int s = 0; s < STEPS; s++) {
                    words[s] = read_within(logits, start + s * stride, n, minus_infinity);
                }
            }
            UNROLL for (int s = 0; s < STEPS; s++) {
                float value[V] = {};
                if (weight != 0.0f) {
                    decode(words[s], value, T{});
                    UNROLL for (int j = 0; j < V; j++) {
                        value[j] = exponential(value[j] - shift) * factor;
                    }
                }
                write_within(logits, start + s * stride, n, value);
            }
        }
        team.sync();  // the gradient at the target lies before it is corrected
        if (team.thread() == 0) {
            given.losses[row] = counts ? shift + logarithm(total) - target_logit : 0.0f;
            if (weight != 0.0f) {
                const float share = exponential(target_logit - shift) / total;
                logits[target] = rounded<T>((share - 1.0f) * weight);
            }
        }
    }
}
