// The compiler's part for nvcc.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#define DEVICE __device__ __forceinline__
#define SHARED __shared__
#define UNROLL _Pragma("unroll")

DEVICE float float_of_bits(uint32_t bits) { return __uint_as_float(bits); }
DEVICE uint32_t bits_of_float(float value) { return __float_as_uint(value); }
DEVICE float float_of_half(uint16_t bits) { return __half2float(__ushort_as_half(bits)); }
DEVICE uint16_t half_of_float(float value) { return __half_as_ushort(__float2half_rn(value)); }
DEVICE uint16_t bfloat_of_float(float value) {
    return __bfloat16_as_ushort(__float2bfloat16_rn(value));
}
DEVICE uint32_t halves_of_floats(float low, float high) {  // one instruction for the two
    const __half2 pair = __floats2half2_rn(low, high);
    uint32_t word;
    memcpy(&word, &pair, 4);
    return word;
}
DEVICE uint32_t bfloats_of_floats(float low, float high) {
    const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
    uint32_t word;
    memcpy(&word, &pair, 4);
    return word;
}

// Rounded on their own: never contracted to a fused multiply-add.
DEVICE float product(float a, float b) { return __fmul_rn(a, b); }
DEVICE float sum(float a, float b) { return __fadd_rn(a, b); }
DEVICE float exponential(float x) { return __expf(x); }  // error below 2e-6 relative for |x| < 30
DEVICE float logarithm(float x) { return logf(x); }
DEVICE float root(float x) { return sqrtf(x); }
DEVICE float quotient(float a, float b) { return __fdividef(a, b); }  // 0 if b is above 2 ** 126
DEVICE float larger(float a, float b) { return fmaxf(a, b); }

template <class V>
DEVICE V& as(void* address) {  // memory as a V, at a multiple of V's alignment
    return *reinterpret_cast<V*>(address);
}
template <class V>
DEVICE const V& as(const void* address) {
    return *reinterpret_cast<const V*>(address);
}

template <class T>
DEVICE T read_once(const void* from) {  // leaves the caches to what is read again
    return __ldcs(reinterpret_cast<const T*>(from));
}
template <class T>
DEVICE T read_only(const T* from) {  // what nothing writes while the kernel runs
    return __ldg(from);
}
template <class V>
DEVICE void write_once(void* to, const V& value) {  // 16 bytes; leaves the caches to others
    static_assert(sizeof(V) == 16);
    uint4 words;
    memcpy(&words, &value, 16);
    __stcs(reinterpret_cast<uint4*>(to), words);
}

DEVICE float sum_of_warp(float value) {
    UNROLL for (int step = 16; step > 0; step /= 2) {
        value += __shfl_xor_sync(0xffffffffu, value, step);
    }
    return value;
}
DEVICE float largest_of_warp(float value) {
    UNROLL for (int step = 16; step > 0; step /= 2) {
        value = fmaxf(value, __shfl_xor_sync(0xffffffffu, value, step));
    }
    return value;
}

// A block; its threads are a multiple of 32. Every thread must call sync, sum and largest.
struct Block {
    DEVICE int64_t index() const { return blockIdx.x; }
    DEVICE int64_t count() const { return gridDim.x; }
    DEVICE int thread() const { return int(threadIdx.x); }
    DEVICE int threads() const { return int(blockDim.x); }
    DEVICE void sync() const { __syncthreads(); }

    DEVICE float sum(float value) const {
        __shared__ float partial[32];
        value = sum_of_warp(value);
        __syncthreads();  // an earlier result may still be read
        if (threadIdx.x % 32 == 0) partial[threadIdx.x / 32] = value;
        __syncthreads();
        return sum_of_warp(threadIdx.x % 32 < blockDim.x / 32 ? partial[threadIdx.x % 32] : 0.0f);
    }
    DEVICE float largest(float value) const {
        __shared__ float partial[32];
        value = largest_of_warp(value);
        __syncthreads();
        if (threadIdx.x % 32 == 0) partial[threadIdx.x / 32] = value;
        __syncthreads();
        const float lowest = __int_as_float(0xff800000);  // minus infinity
        return largest_of_warp(threadIdx.x % 32 < blockDim.x / 32 ? partial[threadIdx.x % 32]
                                                                  : lowest);
    }
};

// One warp of a block: for rows too short to occupy a block.
struct Warp {
    DEVICE int64_t index() const {
        return blockIdx.x * int64_t(blockDim.x / 32) + threadIdx.x / 32;
    }
    DEVICE int64_t count() const { return gridDim.x * int64_t(blockDim.x / 32); }
    DEVICE int thread() const { return int(threadIdx.x % 32); }
    DEVICE int threads() const { return 32; }
    DEVICE void sync() const { __syncwarp(); }
    DEVICE float sum(float value) const { return sum_of_warp(value); }
    DEVICE float largest(float value) const { return largest_of_warp(value); }
};

// Threads that a multiprocessor holds at most.
#if __CUDA_ARCH__ == 750
#define MOST_RESIDENT 1024
#elif __CUDA_ARCH__ == 860 || __CUDA_ARCH__ == 890 || __CUDA_ARCH__ >= 1200
#define MOST_RESIDENT 1536
#else
#define MOST_RESIDENT 2048
#endif

// Arguments of a kernel are one struct, which the launcher packs (fedtune/kernels/driver.py).
#define KERNEL(NAME, ARGUMENTS, TEAM, THREADS, ...)                                   \
    extern "C" __global__ void __launch_bounds__(THREADS) NAME(const ARGUMENTS given) { \
        __VA_ARGS__(TEAM{}, given);                                                    \
    }
// Of few enough registers that blocks of THREADS fill a multiprocessor.
#define FULL_KERNEL(NAME, ARGUMENTS, TEAM, THREADS, ...)                                \
    extern "C" __global__ void __launch_bounds__(THREADS, MOST_RESIDENT / THREADS)      \
        NAME(const ARGUMENTS given) {                                                  \
        __VA_ARGS__(TEAM{}, given);                                                    \
    }
