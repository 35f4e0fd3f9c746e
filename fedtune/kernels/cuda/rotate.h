// Rotary position embedding in place, in transformers' convention of two halves.
#pragma once

#include "portable.h"

struct Rotate {
    void* x;          // (tokens, heads, 2 * half)
    const void* cos;  // (tokens, 2 * half), contiguous
    const void* sin;
    int64_t tokens;
    int64_t token_stride;
    int64_t head_stride;
    int32_t heads;
    int32_t half;
    int32_t inverse;  // the transpose of the rotation: its backward pass
    int32_t aligned;  // all that is read or written in runs starts at a multiple of 16 bytes
};

// A team takes a token; a thread, WIDTH<T> pairs of a head. C is the dtype of cos and sin.
template <class T, class C, class Team>
DEVICE void rotate(const Team& team, const Rotate& given) {
    constexpr int V = WIDTH<T>;
    const int half = given.half;
    const int runs = (half + V - 1) / V;
    for (int64_t token = team.index(); token < given.tokens; token += team.count()) {
        const C* const cos = static_cast<const C*>(given.cos) + token * 2 * half;
        const C* const sin = static_cast<const C*>(given.sin) + token * 2 * half;
        for (int job = team.thread(); job < given.heads * runs; job += team.threads()) {
            const int i = job % runs * V, count = half - i;
            T* const x = static_cast<T*>(given.x) + token * given.token_stride +
                         job / runs * given.head_stride + i;
            // The transpose takes the sine of the other half, with the other sign.
            const C* const sin_of_first = given.inverse ? sin + half : sin;
            const C* const sin_of_second = given.inverse ? sin : sin + half;
            const float sign = given.inverse ? -1.0f : 1.0f;
            float first[V], second[V], turned[V], cosine[V], sine[V];
            read(x, count, given.aligned, first);
            read(x + half, count, given.aligned, second);
            read_run<V>(cos + i, count, given.aligned, cosine);
            read_run<V>(sin_of_first + i, count, given.aligned, sine);
            UNROLL for (int j = 0; j < V; j++) {
                turned[j] = first[j] * cosine[j] - sign * second[j] * sine[j];
            }
            read_run<V>(cos + half + i, count, given.aligned, cosine);
            read_run<V>(sin_of_second + i, count, given.aligned, sine);
            UNROLL for (int j = 0; j < V; j++) {
                second[j] = second[j] * cosine[j] + sign * first[j] * sine[j];
            }
            write(x, count, given.aligned, turned);
            write(x + half, count, given.aligned, second);
        }
    }
}
