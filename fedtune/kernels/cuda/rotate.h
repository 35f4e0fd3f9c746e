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

// A team takes a token. A thread takes WIDTH<T> pairs of a head, the same ones of every so many-th
// head, so that it reads their angles once. C is the dtype of cos and sin.
template <class T, class C, class Team>
DEVICE void rotate(const Team& team, const Rotate& given) {
    constexpr int V = WIDTH<T>, STEPS = 2;
    const int half = given.half, runs = (half + V - 1) / V;
    // As many heads at once as threads allow; with fewer threads than runs, one.
    const int at_once = team.threads() / runs > 0 ? team.threads() / runs : 1;
    const int first_head = team.thread() / runs;
    if (first_head >= at_once) return;  // no thread of a team waits for another
    // The transpose takes the sine of the other half, with the other sign.
    const float sign = given.inverse ? -1.0f : 1.0f;
    const int sine_of_first = given.inverse ? half : 0;
    for (int64_t token = team.index(); token < given.tokens; token += team.count()) {
        const C* const cos = static_cast<const C*>(given.cos) + token * 2 * half;
        const C* const sin = static_cast<const C*>(given.sin) + token * 2 * half;
        T* const heads = static_cast<T*>(given.x) + token * given.token_stride;
        for (int run = team.thread() % runs; run < runs; run += team.threads()) {
            const int i = run * V, count = half - i;
            const auto angles = [&](const C* of) {
                return fetch_run<V>(of + i, count, given.aligned);
            };
            const Fetched<V, C> cosines[2] = {angles(cos), angles(cos + half)};
            const Fetched<V, C> sines[2] = {
                angles(sin + sine_of_first), angles(sin + half - sine_of_first)};
            for (int head = first_head; head < given.heads; head += STEPS * at_once) {
                Words first_words[STEPS], second_words[STEPS];
                UNROLL for (int s = 0; s < STEPS; s++) {
                    if (head + s * at_once < given.heads) {
                        const T* const x = heads + (head + s * at_once) * given.head_stride + i;
                        first_words[s] = fetch(x, count, given.aligned);
                        second_words[s] = fetch(x + half, count, given.aligned);
                    }
                }
                UNROLL for (int s = 0; s < STEPS; s++) {
                    if (head + s * at_once < given.heads) {
                        T* const x = heads + (head + s * at_once) * given.head_stride + i;
                        float first[V], second[V], turned[V], cosine[V], sine[V];
                        decode(first_words[s], first, T{});
                        decode(second_words[s], second, T{});
                        decode(cosines[0], cosine);
                        decode(sines[0], sine);
                        UNROLL for (int j = 0; j < V; j++) {
                            turned[j] = first[j] * cosine[j] - sign * second[j] * sine[j];
                        }
                        decode(cosines[1], cosine);
                        decode(sines[1], sine);
                        UNROLL for (int j = 0; j < V; j++) {
                            second[j] = second[j] * cosine[j] + sign * first[j] * sine[j];
                        }
                        write(x, count, given.aligned, turned);
                        write(x + half, count, given.aligned, second);
                    }
                }
            }
        }
    }
}
