// Block-quantised weights to floats. The layout is that of fedtune/kernels/packed.py.
#pragma once

#include "portable.h"

struct Dequantise {
    const uint8_t* codes;
    const uint8_t* scale_codes;
    const float* scale_steps;
    const float* scale_offset;
    const float* codebook;
    void* out;
    int64_t third_bits;   // byte of `codes` at which the plane of third bits starts (3 bits only)
    int64_t first;        // first weight; a multiple of 256
    int64_t count;        // weights
    int32_t block_shift;  // a block has 2 ** block_shift weights
    int32_t aligned;      // `out` is at a multiple of 16 bytes
};

// The codes of V (4 or 8) consecutive weights as they lie in memory.
struct Codes {
    uint32_t low, high;  // high: weights 4 to 7 of 8-bit codes, or the third bits of 3-bit codes
};

template <int BITS, int V>
DEVICE Codes read_codes(const uint8_t* codes, int64_t third_bits, int64_t weight) {
    constexpr int LOW_BITS = BITS == 3 ? 2 : BITS;
    const uint8_t* from = codes + weight / 8 * LOW_BITS + weight % 8 * LOW_BITS / 8;
    Codes read{0, 0};
    if constexpr (V * LOW_BITS == 64) {
        read.low = read_once<uint32_t>(from);
        read.high = read_once<uint32_t>(from + 4);
    } else if constexpr (V * LOW_BITS == 32) {
        read.low = read_once<uint32_t>(from);
    } else if constexpr (V * LOW_BITS == 16) {
        read.low = read_once<uint16_t>(from);
    } else {
        read.low = read_once<uint8_t>(from);
    }
    if constexpr (BITS == 3) {
        const uint32_t byte = read_once<uint8_t>(codes + third_bits + weight / 8);
        read.high = V == 8 || weight % 8 != 0 ? byte : byte >> 4;
    }
    return read;
}

template <int BITS, int V>
DEVICE uint32_t code_of(const Codes& codes, int i) {  // of weight i of the V
    if constexpr (BITS == 8) return (i < 4 ? codes.low : codes.high) >> (8 * (i % 4)) & 255u;
    if constexpr (BITS == 4) return codes.low >> (8 * (i / 2) + 4 * (1 - i % 2)) & 15u;
    const uint32_t low = codes.low >> (8 * (i / 4) + 2 * (3 - i % 4)) & 3u;
    if constexpr (BITS == 3) return low | (codes.high >> (V - 1 - i) & 1u) << 2;
    return low;
}

// A thread unpacks STEPS times 16 bytes of output, whose loads are all in flight together; the
// threads of a team stand side by side, so that every access of a warp is one run of memory. The
// codebook is in shared memory. Up to 16 levels lie in as many banks, so that no two threads of a
// warp wait for each other; of 256 levels, every thread of a warp has its own copy in its own bank.
template <int BITS, class T, class Team>
DEVICE void dequantise(const Team& team, const Dequantise& given) {
    constexpr int V = WIDTH<T>;
    constexpr int STEPS = 4;
    constexpr int LEVELS = 1 << BITS;
    constexpr int COPIES = BITS == 8 ? 32 : 1;
    SHARED float codebook[LEVELS * COPIES];
    const float* const levels = codebook + team.thread() % COPIES;

    const int64_t tile = int64_t(team.threads()) * V * STEPS;
    T* const out = static_cast<T*>(given.out);
    bool ready = false;
    for (int64_t start = team.index() * tile; start < given.count; start += team.count() * tile) {
        Codes codes[STEPS];
        uint32_t scale_code[STEPS];
        float scale_step[STEPS];
        UNROLL for (int s = 0; s < STEPS; s++) {
            const int64_t i = start + (int64_t(s) * team.threads() + team.thread()) * V;
            if (i < given.count) {
                const int64_t block = (given.first + i) >> given.block_shift;
                codes[s] = read_codes<BITS, V>(given.codes, given.third_bits, given.first + i);
                scale_code[s] = given.scale_codes[block];
                scale_step[s] = given.scale_steps[block / 256];
            }
        }
        const float scale_offset = *given.scale_offset;
        if (!ready) {  // after the first loads are on their way
            for (int i = team.thread(); i < LEVELS * COPIES; i += team.threads()) {
                codebook[i] = given.codebook[i / COPIES];
            }
            team.sync();
            ready = true;
        }
        UNROLL for (int s = 0; s < STEPS; s++) {
            const int64_t i = start + (int64_t(s) * team.threads() + team.thread()) * V;
            if (i < given.count) {
                const float scale = sum(scale_offset, product(float(scale_code[s]), scale_step[s]));
                float value[V];
                UNROLL for (int j = 0; j < V; j++) {
                    value[j] = product(levels[code_of<BITS, V>(codes[s], j) * COPIES], scale);
                }
                write(out + i, given.count - i, given.aligned, value);
            }
        }
    }
}
