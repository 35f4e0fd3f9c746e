// Root-mean-square normalisation of rows, and its gradient with respect to the rows.
#pragma once

#include "portable.h"

struct RmsNorm {
    const void* x;  // row r starts at r * x_stride
    const void* weight;
    float* inverse_rms;    // written by the forward pass, read by the backward pass
    const void* gradient;  // backward only; row r starts at r * gradient_stride
    void* out;             // contiguous
    int64_t rows;
    int64_t columns;
    int64_t x_stride;
    int64_t gradient_stride;
    float epsilon;
    float weight_offset;
    int32_t aligned;  // every row, and the weight, start at a multiple of 16 bytes
};

// A team takes a row. The second pass reads what the first left in the cache.
template <class T, class W, class Team>
DEVICE void rms_norm(const Team& team, const RmsNorm& given) {
    constexpr int V = WIDTH<T>;
    const W* const weights = static_cast<const W*>(given.weight);
    const int64_t n = given.columns, stride = int64_t(team.threads()) * V;
    for (int64_t row = team.index(); row < given.rows; row += team.count()) {
        const T* const x = static_cast<const T*>(given.x) + row * given.x_stride;
        T* const out = static_cast<T*>(given.out) + row * n;
        float value[V], weight[V];
        float squares = 0.0f;
        for (int64_t i = int64_t(team.thread()) * V; i < n; i += stride) {
            read(x + i, n - i, given.aligned, value);
            UNROLL for (int j = 0; j < V; j++) squares += value[j] * value[j];
        }
        const float inverse = 1.0f / root(team.sum(squares) / float(n) + given.epsilon);
        if (team.thread() == 0) given.inverse_rms[row] = inverse;
        for (int64_t i = int64_t(team.thread()) * V; i < n; i += stride) {
            read(x + i, n - i, given.aligned, value);
            read_run<V>(weights + i, n - i, given.aligned, weight);
            UNROLL for (int j = 0; j < V; j++) {
                // As in transformers: Llama rounds before it multiplies, Gemma after.
                const float normal = value[j] * inverse;
                value[j] = given.weight_offset == 0.0f
                               ? to_float(rounded<T>(normal)) * weight[j]
                               : normal * (given.weight_offset + weight[j]);
            }
            write(out + i, n - i, given.aligned, value);
        }
    }
}

// With h = gradient * (weight_offset + weight) and s = inverse_rms:
// dx = s * (h - x * s * s * mean(h * x)).
template <class T, class W, class Team>
DEVICE void rms_norm_backward(const Team& team, const RmsNorm& given) {
    constexpr int V = WIDTH<T>;
    const W* const weights = static_cast<const W*>(given.weight);
    const int64_t n = given.columns, stride = int64_t(team.threads()) * V;
    for (int64_t row = team.index(); row < given.rows; row += team.count()) {
        const T* const x = static_cast<const T*>(given.x) + row * given.x_stride;
        const T* const gradient =
            static_cast<const T*>(given.gradient) + row * given.gradient_stride;
        T* const out = static_cast<T*>(given.out) + row * n;
        const float inverse = given.inverse_rms[row];
        float value[V], weight[V], h[V];
        float products = 0.0f;
        for (int64_t i = int64_t(team.thread()) * V; i < n; i += stride) {
            read(x + i, n - i, given.aligned, value);
            read(gradient + i, n - i, given.aligned, h);
            read_run<V>(weights + i, n - i, given.aligned, weight);
            UNROLL for (int j = 0; j < V; j++) {
                products += h[j] * (given.weight_offset + weight[j]) * value[j];
            }
        }
        const float along = team.sum(products) / float(n) * inverse * inverse;
        for (int64_t i = int64_t(team.thread()) * V; i < n; i += stride) {
            read(x + i, n - i, given.aligned, value);
            read(gradient + i, n - i, given.aligned, h);
            read_run<V>(weights + i, n - i, given.aligned, weight);
            UNROLL for (int j = 0; j < V; j++) {
                value[j] =
                    inverse * (h[j] * (given.weight_offset + weight[j]) - value[j] * along);
            }
            write(out + i, n - i, given.aligned, value);
        }
    }
}
