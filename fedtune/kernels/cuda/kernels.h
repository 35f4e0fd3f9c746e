// Every kernel: its name, arguments, team, most threads in a block, and body.
#pragma once

#include "cross_entropy.h"
#include "dequantise.h"
#include "rms_norm.h"
#include "rotate.h"
#include "swiglu.h"

#define FOR_DTYPES(MAKE) MAKE(float, f32) MAKE(bf16, bf16) MAKE(f16, f16)

// With a second dtype, which is the same or float.
#define FOR_PAIRS(MAKE)          \
    MAKE(float, float, f32_f32)  \
    MAKE(bf16, bf16, bf16_bf16)  \
    MAKE(bf16, float, bf16_f32)  \
    MAKE(f16, f16, f16_f16)      \
    MAKE(f16, float, f16_f32)

#define DEQUANTISE(T, NAME)                                               \
    KERNEL(dequantise_2_##NAME, Dequantise, Block, 256, dequantise<2, T>) \
    KERNEL(dequantise_3_##NAME, Dequantise, Block, 256, dequantise<3, T>) \
    KERNEL(dequantise_4_##NAME, Dequantise, Block, 256, dequantise<4, T>) \
    KERNEL(dequantise_8_##NAME, Dequantise, Block, 256, dequantise<8, T>)
FOR_DTYPES(DEQUANTISE)

#define CROSS_ENTROPY(T, NAME) \
    KERNEL(cross_entropy_##NAME, CrossEntropy, Block, 512, cross_entropy<T>)
FOR_DTYPES(CROSS_ENTROPY)

#define SWIGLU(T, NAME)                                     \
    KERNEL(swiglu_##NAME, Swiglu, Block, 256, swiglu<T>)    \
    KERNEL(swiglu_backward_##NAME, Swiglu, Block, 256, swiglu_backward<T>)
FOR_DTYPES(SWIGLU)

#define RMS_NORM(T, W, NAME)                                                              \
    KERNEL(rms_norm_##NAME, RmsNorm, Block, 512, rms_norm<T, W>)                         \
    KERNEL(rms_norm_short_##NAME, RmsNorm, Warp, 256, rms_norm<T, W>)                     \
    KERNEL(rms_norm_backward_##NAME, RmsNorm, Block, 512, rms_norm_backward<T, W>)       \
    KERNEL(rms_norm_backward_short_##NAME, RmsNorm, Warp, 256, rms_norm_backward<T, W>)
FOR_PAIRS(RMS_NORM)

#define ROTATE(T, C, NAME) KERNEL(rotate_##NAME, Rotate, Block, 256, rotate<T, C>)
FOR_PAIRS(ROTATE)
