// What the kernel bodies need from a compiler. nvcc makes GPU kernels of them; g++ makes loops that
// run the same text on a CPU, so that the tests check the arithmetic without a GPU.
//
// A body is a function template over a Team: threads that share memory and can meet. It works for
// any number of teams and any number of threads (`for (i = team.index(); ...; i += team.count())`),
// because an emulated team is smaller than one on a GPU.
#pragma once

#include <cstdint>
#include <cstring>

struct bf16 {
    uint16_t bits;
};
struct f16 {
    uint16_t bits;
};

#ifdef __CUDACC__
#include "on_gpu.h"
#else
#include "on_cpu.h"
#endif

// ---------------------------------------------------------------- values of 16 and 32 bits

DEVICE float to_float(float value) { return value; }
DEVICE float to_float(bf16 value) { return float_of_bits(uint32_t(value.bits) << 16); }
DEVICE float to_float(f16 value) { return float_of_half(value.bits); }

template <class T>
DEVICE T rounded(float value);
template <>
DEVICE float rounded<float>(float value) {
    return value;
}
template <>
DEVICE bf16 rounded<bf16>(float value) {
    return bf16{bfloat_of_float(value)};
}
template <>
DEVICE f16 rounded<f16>(float value) {
    return f16{half_of_float(value)};
}

// ---------------------------------------------------------------- 16 bytes at a time

template <class T>
constexpr int WIDTH = 16 / int(sizeof(T));  // values in 16 bytes

struct alignas(16) Words {
    uint32_t word[4];
};

DEVICE void decode(const Words& words, float (&value)[4], float) {
    UNROLL for (int i = 0; i < 4; i++) value[i] = float_of_bits(words.word[i]);
}
DEVICE void decode(const Words& words, float (&value)[8], bf16) {
    UNROLL for (int i = 0; i < 4; i++) {
        value[2 * i] = float_of_bits(words.word[i] << 16);
        value[2 * i + 1] = float_of_bits(words.word[i] & 0xffff0000u);
    }
}
DEVICE void decode(const Words& words, float (&value)[8], f16) {
    UNROLL for (int i = 0; i < 4; i++) {
        value[2 * i] = float_of_half(uint16_t(words.word[i] & 0xffffu));
        value[2 * i + 1] = float_of_half(uint16_t(words.word[i] >> 16));
    }
}

DEVICE Words encode(const float (&value)[4], float) {
    Words words;
    UNROLL for (int i = 0; i < 4; i++) words.word[i] = bits_of_float(value[i]);
    return words;
}
DEVICE Words encode(const float (&value)[8], bf16) {
    Words words;
    UNROLL for (int i = 0; i < 4; i++) {
        words.word[i] = bfloats_of_floats(value[2 * i], value[2 * i + 1]);
    }
    return words;
}
DEVICE Words encode(const float (&value)[8], f16) {
    Words words;
    UNROLL for (int i = 0; i < 4; i++) {
        words.word[i] = halves_of_floats(value[2 * i], value[2 * i + 1]);
    }
    return words;
}

// 16 bytes of memory, to be decoded later: a thread that fetches several runs before it decodes the
// first waits for memory once. `count` values are there, the others are zero.
template <class T>
DEVICE Words fetch(const T* from, int64_t count, bool aligned) {
    if (aligned && count >= WIDTH<T>) return as<Words>(from);
    float value[WIDTH<T>];
    UNROLL for (int i = 0; i < WIDTH<T>; i++) value[i] = i < count ? to_float(from[i]) : 0.0f;
    return encode(value, T{});
}

// V values of a dtype of which 16 bytes hold V or half as many.
template <int V, class T>
struct Fetched {
    Words words[V / WIDTH<T>];
};

template <int V, class T>
DEVICE Fetched<V, T> fetch_run(const T* from, int64_t count, bool aligned) {
    Fetched<V, T> run;
    UNROLL for (int part = 0; part < V / WIDTH<T>; part++) {
        const int start = part * WIDTH<T>;
        run.words[part] = fetch(from + start, count - start, aligned);
    }
    return run;
}

template <int V, class T>
DEVICE void decode(const Fetched<V, T>& run, float (&value)[V]) {
    UNROLL for (int part = 0; part < V / WIDTH<T>; part++) {
        float some[WIDTH<T>];
        decode(run.words[part], some, T{});
        UNROLL for (int i = 0; i < WIDTH<T>; i++) value[part * WIDTH<T> + i] = some[i];
    }
}

// One 16-byte access where all of the `count` are there and the address is a multiple of 16.
template <class T>
DEVICE void write(T* to, int64_t count, bool aligned, const float (&value)[WIDTH<T>]) {
    if (aligned && count >= WIDTH<T>) {
        as<Words>(to) = encode(value, T{});
    } else {
        UNROLL for (int i = 0; i < WIDTH<T>; i++) {
            if (i < count) to[i] = rounded<T>(value[i]);
        }
    }
}

// The run of memory that starts at value `i` of a row of n, at a multiple of 16 bytes; i may be
// below 0, and i + WIDTH<T> above n: such values are `fill`, and are not written.
template <class T>
DEVICE Words read_within(const T* row, int64_t i, int64_t n, float fill) {
    if (i >= 0 && i + WIDTH<T> <= n) return as<Words>(row + i);
    float value[WIDTH<T>];
    UNROLL for (int j = 0; j < WIDTH<T>; j++) {
        value[j] = i + j >= 0 && i + j < n ? to_float(row[i + j]) : fill;
    }
    return encode(value, T{});
}

template <class T>
DEVICE void write_within(T* row, int64_t i, int64_t n, const float (&value)[WIDTH<T>]) {
    if (i >= 0 && i + WIDTH<T> <= n) {
        as<Words>(row + i) = encode(value, T{});
    } else {
        UNROLL for (int j = 0; j < WIDTH<T>; j++) {
            if (i + j >= 0 && i + j < n) row[i + j] = rounded<T>(value[j]);
        }
    }
}
