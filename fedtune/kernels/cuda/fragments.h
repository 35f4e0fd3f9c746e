// A warp's share of a small matrix product, for tensor cores and for the CPU.
//
// C (16 x 8) += A (16 x 16) B (16 x 8), float32 sums, with the operands spread over the 32 lanes of a
// warp as PTX's mma.m16n8k16 wants them (PTX ISA, "Matrix Fragments for mma.m16n8k16"). With
// g = lane / 4 and q = lane % 4:
//
//     A: pair 0 = A[g][2q, 2q+1]    pair 1 = A[g+8][2q, 2q+1]   pair 2, 3 = the same at columns + 8
//     B: pair 0 = B[2q, 2q+1][g]    pair 1 = B[2q+8, 2q+9][g]
//     C: 0, 1   = C[g][2q, 2q+1]    2, 3   = C[g+8][2q, 2q+1]
//
// Which rows, columns and summands of the caller's matrices stand at these places is the caller's
// choice, as long as it is the same for both operands: the kernels here choose so that every load
// from memory is 16 consecutive bytes of one row, and no operand passes through shared memory.
//
// nvcc compiles a body once per lane. On the CPU one thread is a whole warp: it holds the values of
// all 32 lanes (`PerLane`, `FOR_LANES`), so that the placing of every element is tested without a GPU.
#pragma once

#include "portable.h"

#ifdef __CUDACC__
#define FOR_LANES(lane) for (int lane = int(threadIdx.x % 32), once = 1; once; once = 0)
template <class Team>
DEVICE int warp_of(const Team& team) {
    return team.thread() / 32;
}
template <class Team>
DEVICE int warps_of(const Team& team) {
    return team.threads() / 32;
}
#else
#define FOR_LANES(lane) for (int lane = 0; lane < 32; lane++)
template <class Team>
DEVICE int warp_of(const Team& team) {
    return team.thread();
}
template <class Team>
DEVICE int warps_of(const Team& team) {
    return team.threads();
}
#endif

// ---------------------------------------------------------------- operands

template <class T>
struct alignas(2 * sizeof(T)) Pair {
    T low, high;
};
template <class T>
struct alignas(16) Eight {
    T at[8];
};
template <class T>
struct Left {
    Pair<T> pair[4];
};
template <class T>
struct Right {
    Pair<T> pair[2];
};
struct Sums {
    float at[4];
};

// A value that every lane of a warp has of its own.
#ifdef __CUDACC__
template <class V>
struct PerLane {
    V value;
    DEVICE V& operator[](int) { return value; }
    DEVICE const V& operator[](int) const { return value; }
};
#else
template <class V>
struct PerLane {
    V values[32];
    V& operator[](int lane) { return values[lane]; }
    const V& operator[](int lane) const { return values[lane]; }
};
#endif

DEVICE void clear(PerLane<Sums>& c) {
    FOR_LANES(lane) {
        UNROLL for (int i = 0; i < 4; i++) c[lane].at[i] = 0.0f;
    }
}

DEVICE Pair<float> pair_of(float low, float high, float) { return {low, high}; }
DEVICE Pair<bf16> pair_of(float low, float high, bf16) {
    const uint32_t word = bfloats_of_floats(low, high);
    Pair<bf16> pair;
    memcpy(&pair, &word, 4);
    return pair;
}
DEVICE Pair<f16> pair_of(float low, float high, f16) {
    const uint32_t word = halves_of_floats(low, high);
    Pair<f16> pair;
    memcpy(&pair, &word, 4);
    return pair;
}

// A row of consecutive 8s can be read 16 bytes at a time.
DEVICE bool in_sixteens(const void* start, int64_t row_bytes) {
    return reinterpret_cast<uintptr_t>(start) % 16 == 0 && row_bytes % 16 == 0;
}

template <class V>
DEVICE V read_as(const uint8_t* from) {  // at a multiple of V's size
    return as<V>(from);
}

// Eight consecutive values, of which the first `valid` are there; the others are zero, unread.
template <class T, class F>
DEVICE Eight<T> load_eight(const F* from, int64_t valid, bool aligned) {
    Eight<T> out;
    if (aligned && valid >= 8) {
        const Eight<F> raw = as<Eight<F>>(from);
        if constexpr (sizeof(T) == sizeof(F)) {
            memcpy(&out, &raw, sizeof(out));
        } else {
            UNROLL for (int i = 0; i < 4; i++) {
                const Pair<T> pair = pair_of(
                    to_float(raw.at[2 * i]), to_float(raw.at[2 * i + 1]), T{});
                out.at[2 * i] = pair.low;
                out.at[2 * i + 1] = pair.high;
            }
        }
    } else {
        UNROLL for (int i = 0; i < 8; i++) {
            out.at[i] = rounded<T>(i < valid ? to_float(from[i]) : 0.0f);
        }
    }
    return out;
}

template <class T>
DEVICE void store_eight(T* to, const Eight<T>& from, int64_t valid, bool aligned) {
    if (aligned && valid >= 8) {
        as<Eight<T>>(to) = from;
    } else {
        UNROLL for (int i = 0; i < 8; i++) {
            if (i < valid) to[i] = from.at[i];
        }
    }
}

// ---------------------------------------------------------------- the product

// Whether there is a product of this type. Kernels of a type that has none are empty, and
// fedtune/kernels/low_rank.py and packed_product.py do not launch them.
template <class T>
constexpr bool RUNS = true;
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
template <>
constexpr bool RUNS<bf16> = false;
#endif

#ifdef __CUDACC__

template <class P>
DEVICE uint32_t word_of(const P& pair) {
    static_assert(sizeof(P) == 4, "a pair of 16-bit values");
    uint32_t word;
    memcpy(&word, &pair, 4);
    return word;
}

// Without tensor cores, for float32: a lane fetches the rows and columns that it lacks from its
// neighbours. The loop stays a loop: the code of a kernel holds this many times.
DEVICE void exchanged_product(Sums& c, const Left<float>& a, const Right<float>& b) {
    const int lane = int(threadIdx.x % 32), g = lane / 4, q = lane % 4;
#pragma unroll 1
    for (int from = 0; from < 4; from++) {
        UNROLL for (int i = 0; i < 4; i++) {
            const Pair<float>& top = a.pair[i / 2 * 2];
            const Pair<float>& bottom = a.pair[i / 2 * 2 + 1];
            const Pair<float>& right = b.pair[i / 2];
            const float own = i % 2 ? right.high : right.low;
            const float a0 = __shfl_sync(0xffffffffu, i % 2 ? top.high : top.low, 4 * g + from);
            const float a1 =
                __shfl_sync(0xffffffffu, i % 2 ? bottom.high : bottom.low, 4 * g + from);
            const float b0 = __shfl_sync(0xffffffffu, own, 8 * q + from);
            const float b1 = __shfl_sync(0xffffffffu, own, 8 * q + 4 + from);
            c.at[0] += a0 * b0;
            c.at[1] += a0 * b1;
            c.at[2] += a1 * b0;
            c.at[3] += a1 * b1;
        }
    }
}

#define TENSOR_CORES(TYPE)                                                                    \
    asm volatile(                                                                             \
        "mma.sync.aligned.m16n8k16.row.col.f32." TYPE "." TYPE ".f32 "                        \
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"                     \
        : "+f"(c.at[0]), "+f"(c.at[1]), "+f"(c.at[2]), "+f"(c.at[3])                          \
        : "r"(word_of(a.pair[0])), "r"(word_of(a.pair[1])), "r"(word_of(a.pair[2])),          \
          "r"(word_of(a.pair[3])), "r"(word_of(b.pair[0])), "r"(word_of(b.pair[1])))

DEVICE void lane_product(Sums& c, const Left<float>& a, const Right<float>& b) {
    exchanged_product(c, a, b);
}
DEVICE void lane_product(Sums& c, const Left<bf16>& a, const Right<bf16>& b) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
    TENSOR_CORES("bf16");
#endif  // others have none: RUNS<bf16> is false
}
DEVICE void lane_product(Sums& c, const Left<f16>& a, const Right<f16>& b) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
    TENSOR_CORES("f16");
#else  // sm_75 has half the depth: pairs 0, 1 and then 2, 3 stand as its own operand does
    UNROLL for (int half = 0; half < 2; half++) {
        asm volatile(
            "mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 "
            "{%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"
            : "+f"(c.at[0]), "+f"(c.at[1]), "+f"(c.at[2]), "+f"(c.at[3])
            : "r"(word_of(a.pair[2 * half])), "r"(word_of(a.pair[2 * half + 1])),
              "r"(word_of(b.pair[half])));
    }
#endif
}
#undef TENSOR_CORES

template <class T>
DEVICE void multiply_add(
    PerLane<Sums>& c, const PerLane<Left<T>>& a, const PerLane<Right<T>>& b) {
    lane_product(c.value, a.value, b.value);
}

#else

template <class T>
DEVICE void multiply_add(
    PerLane<Sums>& c, const PerLane<Left<T>>& a, const PerLane<Right<T>>& b) {
    for (int lane = 0; lane < 32; lane++) {
        for (int i = 0; i < 4; i++) {
            const int row = lane / 4 + 8 * (i / 2), column = 2 * (lane % 4) + i % 2;
            for (int k = 0; k < 16; k++) {
                const Pair<T>& l = a[4 * (row % 8) + k % 8 / 2].pair[row / 8 + k / 8 * 2];
                const Pair<T>& r = b[4 * column + k % 8 / 2].pair[k / 8];
                c[lane].at[i] +=
                    to_float(k % 2 ? l.high : l.low) * to_float(k % 2 ? r.high : r.low);
            }
        }
    }
}

#endif
