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
    int32_t aligned;  // rows are whole runs of 16 bytes, and all start at a multiple of 16 bytes
};

// A run of a row: 16 bytes of it in one access, or, of any other row, what is there.
template <bool WHOLE, class T>
DEVICE Words fetch_of(const T* from, int64_t count) {
    if constexpr (WHOLE) return as<Words>(from);
    return fetch(from, count, false);
}
template <int V, bool WHOLE, class W>
DEVICE Fetched<V, W> fetch_run_of(const W* from, int64_t count) {
    Fetched<V, W> run;
    UNROLL for (int part = 0; part < V / WIDTH<W>; part++) {
        const int start = part * WIDTH<W>;
        run.words[part] = fetch_of<WHOLE>(from + start, count - start);
    }
    return run;
}

// The runs of 16 bytes of a row that a thread keeps between the two passes. A thread with more reads
// the others again, from the cache.
template <int KEPT, class Team, class Work>
DEVICE void for_kept(const Team& team, int64_t n, int width, Work work) {
    UNROLL for (int s = 0; s < KEPT; s++) {
        const int64_t i = (int64_t(s) * team.threads() + team.thread()) * width;
        if (i < n) work(s, i);
    }
}
template <int KEPT, class Team, class Work>
DEVICE void for_others(const Team& team, int64_t n, int width, Work work) {
    const int64_t stride = int64_t(team.threads()) * width;
    for (int64_t i = KEPT * stride + int64_t(team.thread()) * width; i < n; i += stride) work(i);
}

// A team takes a row.
template <bool WHOLE, class T, class W, int KEPT, class Team>
DEVICE void rms_norm_rows(const Team& team, const RmsNorm& given) {
    constexpr int V = WIDTH<T>;
    const W* const weights = static_cast<const W*>(given.weight);
    const int64_t n = given.columns;
    for (int64_t row = team.index(); row < given.rows; row += team.count()) {
        const T* const x = static_cast<const T*>(given.x) + row * given.x_stride;
        T* const out = static_cast<T*>(given.out) + row * n;
        Words kept[KEPT];
        float squares = 0.0f;
        const auto measure = [&](const Words& words) {
            float value[V];
            decode(words, value, T{});
            UNROLL for (int j = 0; j < V; j++) squares += value[j] * value[j];
        };
        for_kept<KEPT>(team, n, V, [&](int s, int64_t i) {
            kept[s] = fetch_of<WHOLE>(x + i, n - i);
        });
        for_kept<KEPT>(team, n, V, [&](int s, int64_t) { measure(kept[s]); });
        for_others<KEPT>(
            team, n, V, [&](int64_t i) { measure(fetch_of<WHOLE>(x + i, n - i)); });
        const float inverse = 1.0f / root(team.sum(squares) / float(n) + given.epsilon);
        if (team.thread() == 0) given.inverse_rms[row] = inverse;
        const auto normalise = [&](int64_t i, const Words& words) {
            float value[V], weight[V];
            decode(words, value, T{});
            decode(fetch_run_of<V, WHOLE>(weights + i, n - i), weight);
            UNROLL for (int j = 0; j < V; j++) {
                // As in transformers: Llama rounds before it multiplies, Gemma after.
                const float normal = value[j] * inverse;
                value[j] = given.weight_offset == 0.0f
                               ? to_float(rounded<T>(normal)) * weight[j]
                               : normal * (given.weight_offset + weight[j]);
            }
            write(out + i, n - i, WHOLE, value);
        };
        for_kept<KEPT>(team, n, V, [&](int s, int64_t i) { normalise(i, kept[s]); });
        for_others<KEPT>(
            team, n, V, [&](int64_t i) { normalise(i, fetch_of<WHOLE>(x + i, n - i)); });
    }
}

// With h = gradient * (weight_offset + weight) and s = inverse_rms:
// dx = s * (h - x * s * s * mean(h * x)).
template <bool WHOLE, class T, class W, int KEPT, class Team>
DEVICE void rms_norm_backward_rows(const Team& team, const RmsNorm& given) {
    constexpr int V = WIDTH<T>;
    struct Run {
        Words x, gradient;
        Fetched<V, W> weight;
    };
    const W* const weights = static_cast<const W*>(given.weight);
    const int64_t n = given.columns;
    for (int64_t row = team.index(); row < given.rows; row += team.count()) {
        const T* const x = static_cast<const T*>(given.x) + row * given.x_stride;
        const T* const gradient =
            static_cast<const T*>(given.gradient) + row * given.gradient_stride;
        T* const out = static_cast<T*>(given.out) + row * n;
        const auto fetch_all = [&](int64_t i) {
            return Run{fetch_of<WHOLE>(x + i, n - i), fetch_of<WHOLE>(gradient + i, n - i),
                       fetch_run_of<V, WHOLE>(weights + i, n - i)};
        };
        Run kept[KEPT];
        float value[V], weight[V], h[V];
        const auto decode_all = [&](const Run& run) {
            decode(run.x, value, T{});
            decode(run.gradient, h, T{});
            decode(run.weight, weight);
            UNROLL for (int j = 0; j < V; j++) h[j] *= given.weight_offset + weight[j];
        };
        float products = 0.0f;
        const auto measure = [&](const Run& run) {
            decode_all(run);
            UNROLL for (int j = 0; j < V; j++) products += h[j] * value[j];
        };
        for_kept<KEPT>(team, n, V, [&](int s, int64_t i) { kept[s] = fetch_all(i); });
        const float inverse = given.inverse_rms[row];
        for_kept<KEPT>(team, n, V, [&](int s, int64_t) { measure(kept[s]); });
        for_others<KEPT>(team, n, V, [&](int64_t i) { measure(fetch_all(i)); });
        const float along = team.sum(products) / float(n) * inverse * inverse;
        const auto finish = [&](int64_t i, const Run& run) {
            decode_all(run);
            UNROLL for (int j = 0; j < V; j++) value[j] = inverse * (h[j] - value[j] * along);
            write(out + i, n - i, WHOLE, value);
        };
        for_kept<KEPT>(team, n, V, [&](int s, int64_t i) { finish(i, kept[s]); });
        for_others<KEPT>(team, n, V, [&](int64_t i) { finish(i, fetch_all(i)); });
    }
}

// Rows that are not whole runs are rare, and a thread keeps one run: their checks would cost all
// others registers, and so threads.
template <class T, class W, int KEPT, class Team>
DEVICE void rms_norm(const Team& team, const RmsNorm& given) {
    if (given.aligned) {
        rms_norm_rows<true, T, W, KEPT>(team, given);
    } else {
        rms_norm_rows<false, T, W, 1>(team, given);
    }
}
template <class T, class W, int KEPT, class Team>
DEVICE void rms_norm_backward(const Team& team, const RmsNorm& given) {
    if (given.aligned) {
        rms_norm_backward_rows<true, T, W, KEPT>(team, given);
    } else {
        rms_norm_backward_rows<false, T, W, 1>(team, given);
    }
}
