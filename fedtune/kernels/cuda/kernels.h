// Every kernel: its name, arguments, team, most threads in a block, and body.
#pragma once

#include "cross_entropy.h"
#include "dequantise.h"
#include "low_rank.h"
#include "packed_product.h"
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

#define DEQUANTISE(T, NAME)                                                    \
    FULL_KERNEL(dequantise_2_##NAME, Dequantise, Block, 128, dequantise<2, T>) \
    FULL_KERNEL(dequantise_3_##NAME, Dequantise, Block, 128, dequantise<3, T>) \
    FULL_KERNEL(dequantise_4_##NAME, Dequantise, Block, 128, dequantise<4, T>) \
    KERNEL(dequantise_8_##NAME, Dequantise, Block, 512, dequantise<8, T>)
FOR_DTYPES(DEQUANTISE)

#define CROSS_ENTROPY(T, NAME) \
    KERNEL(cross_entropy_##NAME, CrossEntropy, Block, 512, cross_entropy<T>)
FOR_DTYPES(CROSS_ENTROPY)

#define SWIGLU(T, NAME)                                     \
    KERNEL(swiglu_##NAME, Swiglu, Block, 256, swiglu<T>)    \
    KERNEL(swiglu_backward_##NAME, Swiglu, Block, 256, swiglu_backward<T>)
FOR_DTYPES(SWIGLU)

#define RMS_NORM(T, W, NAME)                                                                \
    KERNEL(rms_norm_##NAME, RmsNorm, Block, 512, rms_norm<T, W, 4>)                        \
    KERNEL(rms_norm_short_##NAME, RmsNorm, Warp, 256, rms_norm<T, W, 4>)                    \
    KERNEL(rms_norm_backward_##NAME, RmsNorm, Block, 512, rms_norm_backward<T, W, 2>)      \
    KERNEL(rms_norm_backward_short_##NAME, RmsNorm, Warp, 256, rms_norm_backward<T, W, 4>)
FOR_PAIRS(RMS_NORM)

#define ROTATE(T, C, NAME) KERNEL(rotate_##NAME, Rotate, Block, 256, rotate<T, C>)
FOR_PAIRS(ROTATE)

KERNEL(low_rank_f32, LowRank, Block, 128, low_rank<float, float>)
KERNEL(low_rank_bf16, LowRank, Block, 256, low_rank<bf16, bf16>)
KERNEL(low_rank_f16, LowRank, Block, 256, low_rank<f16, f16>)
KERNEL(low_rank_bf16_f32, LowRank, Block, 256, low_rank<bf16, float>)
KERNEL(low_rank_f16_f32, LowRank, Block, 256, low_rank<f16, float>)

#define LOW_RANK_GRADIENT(T, NAME) \
    KERNEL(low_rank_gradient_##NAME, LowRankGradient, Block, 128, low_rank_gradient<T>)
FOR_DTYPES(LOW_RANK_GRADIENT)

// Of 16 and of 32 tokens at most.
#define PACKED_PRODUCT(BITS, T, NAME)                                                        \
    KERNEL(packed_product_##BITS##_1_##NAME, PackedProduct, Block, 256, packed_product<BITS, 1, T>) \
    KERNEL(packed_product_##BITS##_2_##NAME, PackedProduct, Block, 256, packed_product<BITS, 2, T>)
#define PACKED_PRODUCTS(T, NAME) \
    PACKED_PRODUCT(2, T, NAME)   \
    PACKED_PRODUCT(3, T, NAME)   \
    PACKED_PRODUCT(4, T, NAME)   \
    PACKED_PRODUCT(8, T, NAME)
PACKED_PRODUCTS(bf16, bf16)
PACKED_PRODUCTS(f16, f16)
