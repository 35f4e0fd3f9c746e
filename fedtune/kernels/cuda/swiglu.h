// silu(gate) * up, and its gradients.
#pragma once

#include "portable.h"

struct Swiglu {
    void* gate;  // row r starts at r * gate_stride, and so on
    void* up;
    void* other;  // forward: the result; backward: the gradient of the result
    int64_t rows;
    int64_t columns;
    int64_t gate_stride;
    int64_t up_stride;
    int64_t other_stride;
    int32_t aligned;  // every row of all three starts at a multiple of 16 bytes
};

// Calls work(row, column) for runs of V values; a team takes STEPS runs for each thread at a time.
template <int V, int STEPS, class Team, class Work>
DEVICE void for_runs(const Team& team, int64_t rows, int64_t columns, Work work) {
    const int64_t tile = int64_t(team.threads()) * V * STEPS;
    const int64_t tiles = (columns + tile - 1) / tile;
    for (int64_t job = team.index(); job < rows * tiles; job += team.count()) {
        const int64_t row = job / tiles;
        work(row, job % tiles * tile + int64_t(team.thread()) * V);
    }
}

DEVICE float sigmoid(float x) { return quotient(1.0f, 1.0f + exponential(-x)); }

template <class T, class Team>
DEVICE void swiglu(const Team& team, const Swiglu& given) {
    constexpr int V = WIDTH<T>, STEPS = 2;
    const int64_t stride = int64_t(team.threads()) * V;
    for_runs<V, STEPS>(team, given.rows, given.columns, [&](int64_t row, int64_t column) {
        const T* const gates = static_cast<const T*>(given.gate) + row * given.gate_stride;
        const T* const ups = static_cast<const T*>(given.up) + row * given.up_stride;
        T* const out = static_cast<T*>(given.other) + row * given.other_stride;
        Words gate_words[STEPS], up_words[STEPS];
        UNROLL for (int s = 0; s < STEPS; s++) {
            const int64_t i = column + s * stride;
            gate_words[s] = fetch(gates + i, given.columns - i, given.aligned);
            up_words[s] = fetch(ups + i, given.columns - i, given.aligned);
        }
        UNROLL for (int s = 0; s < STEPS; s++) {
            const int64_t i = column + s * stride;
            float gate[V], up[V];
            decode(gate_words[s], gate, T{});
            decode(up_words[s], up, T{});
            UNROLL for (int j = 0; j < V; j++) gate[j] *= sigmoid(gate[j]) * up[j];
            write(out + i, given.columns - i, given.aligned, gate);
        }
    });
}

// Written over gate and up.
template <class T, class Team>
DEVICE void swiglu_backward(const Team& team, const Swiglu& given) {
    constexpr int V = WIDTH<T>, STEPS = 2;
    const int64_t stride = int64_t(team.threads()) * V;
    for_runs<V, STEPS>(team, given.rows, given.columns, [&](int64_t row, int64_t column) {
        T* const gates = static_cast<T*>(given.gate) + row * given.gate_stride;
        T* const ups = static_cast<T*>(given.up) + row * given.up_stride;
        const T* const gradients = static_cast<const T*>(given.other) + row * given.other_stride;
        Words gate_words[STEPS], up_words[STEPS], gradient_words[STEPS];
        UNROLL for (int s = 0; s < STEPS; s++) {
            const int64_t i = column + s * stride;
            gate_words[s] = fetch(gates + i, given.columns - i, given.aligned);
            up_words[s] = fetch(ups + i, given.columns - i, given.aligned);
            gradient_words[s] = fetch(gradients + i, given.columns - i, given.aligned);
        }
        UNROLL for (int s = 0; s < STEPS; s++) {
            const int64_t i = column + s * stride;
            float gate[V], up[V], gradient[V];
            decode(gate_words[s], gate, T{});
            decode(up_words[s], up, T{});
            decode(gradient_words[s], gradient, T{});
            UNROLL for (int j = 0; j < V; j++) {
                const float x = gate[j], share = sigmoid(x), times = gradient[j];
                gate[j] = times * up[j] * share * (1.0f + x * (1.0f - share));
                up[j] = times * x * share;
            }
            write(gates + i, given.columns - i, given.aligned, gate);
            write(ups + i, given.columns - i, given.aligned, up);
        }
    });
}
