// Every kernel: its name, arguments, team, most threads in a block, and body.
#pragma once

#include "dequantise.h"

#define FOR_DTYPES(MAKE) MAKE(float, f32) MAKE(bf16, bf16) MAKE(f16, f16)

#define DEQUANTISE(T, NAME)                                                  \
    KERNEL(dequantise_2_##NAME, Dequantise, Block, 256, dequantise<2, T>)    \
    KERNEL(dequantise_3_##NAME, Dequantise, Block, 256, dequantise<3, T>)    \
    KERNEL(dequantise_4_##NAME, Dequantise, Block, 256, dequantise<4, T>)    \
    KERNEL(dequantise_8_##NAME, Dequantise, Block, 256, dequantise<8, T>)
FOR_DTYPES(DEQUANTISE)

#include "low_rank.h"
#include "packed_product.h"

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
