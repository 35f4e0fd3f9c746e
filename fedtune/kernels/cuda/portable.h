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

// A run of WIDTH<T> values. `count` are there, the others are `fill`; one 16-byte access where all
// are there and `aligned` says that the address is a multiple of 16.
template <class T>
DEVICE void read(const T* from, int64_t count, bool aligned, float (&value)[WIDTH<T>],
                 float fill = 0.0f) {
    if (aligned && count >= WIDTH<T>) {
        decode(*reinterpret_cast<const Words*>(from), value, T{});
    } else {
        UNROLL for (int i = 0; i < WIDTH<T>; i++) {
            value[i] = i < count ? to_float(from[i]) : fill;
        }
    }
}

template <class T>
DEVICE void write(T* to, int64_t count, bool aligned, const float (&value)[WIDTH<T>]) {
    if (aligned && count >= WIDTH<T>) {
        *reinterpret_cast<Words*>(to) = encode(value, T{});
    } else {
        UNROLL for (int i = 0; i < WIDTH<T>; i++) {
            if (i < count) to[i] = rounded<T>(value[i]);
        }
    }
}

// V values of a dtype of which 16 bytes hold V or half as many.
template <int V, class T>
DEVICE void read_run(const T* from, int64_t count, bool aligned, float (&value)[V]) {
    if constexpr (V == WIDTH<T>) {
        read(from, count, aligned, value);
    } else {
        static_assert(V == 2 * WIDTH<T>);
        float half[V / 2];
        UNROLL for (int part = 0; part < 2; part++) {
            const int start = part * V / 2;
            read(from + start, count - start, aligned, half);
            UNROLL for (int j = 0; j < V / 2; j++) value[start + j] = half[j];
        }
    }
}

// The run of memory that starts at value `i` of a row of n, at a multiple of 16 bytes; i may be
// below 0, and i + WIDTH<T> above n: such values are `fill`, and are not written.
template <class T>
DEVICE Words read_within(const T* row, int64_t i, int64_t n, float fill) {
    if (i >= 0 && i + WIDTH<T> <= n) return *reinterpret_cast<const Words*>(row + i);
    float value[WIDTH<T>];
    UNROLL for (int j = 0; j < WIDTH<T>; j++) {
        value[j] = i + j >= 0 && i + j < n ? to_float(row[i + j]) : fill;
    }
    return encode(value, T{});
}

template <class T>
DEVICE void write_within(T* row, int64_t i, int64_t n, const float (&value)[WIDTH<T>]) {
    if (i >= 0 && i + WIDTH<T> <= n) {
        *reinterpret_cast<Words*>(row + i) = encode(value, T{});
    } else {
        UNROLL for (int j = 0; j < WIDTH<T>; j++) {
            if (i + j >= 0 && i + j < n) row[i + j] = rounded<T>(value[j]);
        }
    }
}
