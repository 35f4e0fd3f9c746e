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
