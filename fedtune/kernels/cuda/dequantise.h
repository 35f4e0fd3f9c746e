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
    const uint8_t* from = codes + (weight >> 3) * LOW_BITS;
    if constexpr (V == 4) from += (weight & 4) * LOW_BITS >> 3;
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
        const uint32_t byte = read_once<uint8_t>(codes + third_bits + (weight >> 3));
        read.high = V == 8 || (weight & 4) != 0 ? byte : byte >> 4;
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

// The codes of V consecutive weights of one block, and what their scale is made of.
struct Part {
    Codes codes;
    uint32_t scale_code;
    float scale_step;
};

template <int BITS, int V>
DEVICE Part read_part(const Dequantise& given, int64_t i) {
    const int64_t weight = given.first + i, block = weight >> given.block_shift;
    return Part{read_codes<BITS, V>(given.codes, given.third_bits, weight),
                read_only(given.scale_codes + block), read_only(given.scale_steps + (block >> 8))};
}

template <int BITS, int COPIES, int V>
DEVICE void unpack(const Part& part, float scale_offset, const float* levels, float (&value)[V]) {
    const float scale = sum(scale_offset, product(float(part.scale_code), part.scale_step));
    UNROLL for (int j = 0; j < V; j++) {
        value[j] = product(levels[code_of<BITS, V>(part.codes, j) * COPIES], scale);
    }
}

// A thread unpacks two times 16 bytes of output, whose loads are in flight together; the threads of
// a team stand side by side, so that every access of a warp is one run of memory. A tile that lies
// in `out` as a whole asks no thread where it ends, and streams past the caches. The codebook is in
// shared memory. Up to 16 levels lie in as many banks, so that no two threads of a warp wait for
// each other; of 256 levels, every thread of a warp has its own copy in its own bank.
//
// Times on an H200, 4 bits to bf16, of matrices of 4096 x 14336 and 14336 x 16384, as shares of the
// rate of a copy: 90 % and 95 %; with four times 16 bytes 88 % and 93 %, with one 88 % and 87 %;
// with an end asked for at every step 88 % and 94 %, with stores that stay in the caches as well
// 77 % and 82 %; with as many teams as run at once, each taking many tiles, 80 % and 83 %.
template <int BITS, class T, class Team>
DEVICE void dequantise(const Team& team, const Dequantise& given) {
    constexpr int V = WIDTH<T>;
    constexpr int STEPS = 2;
    constexpr int LEVELS = 1 << BITS;
    constexpr int COPIES = BITS == 8 ? 32 : 1;
    SHARED float codebook[LEVELS * COPIES];
    const float* const levels = codebook + team.thread() % COPIES;

    const int stride = team.threads() * V;
    const int64_t tile = int64_t(stride) * STEPS;
    bool ready = false;
    const auto prepare = [&]() {
        if (ready) return;
        for (int i = team.thread(); i < LEVELS * COPIES; i += team.threads()) {
            codebook[i] = given.codebook[i / COPIES];
        }
        team.sync();
        ready = true;
    };
    for (int64_t start = team.index() * tile; start < given.count; start += team.count() * tile) {
        const int64_t own = start + team.thread() * V;
        T* const out = static_cast<T*>(given.out) + own;
        float value[V];
        if (given.aligned && start + tile <= given.count) {
            Part parts[STEPS];
            UNROLL for (int s = 0; s < STEPS; s++) {
                parts[s] = read_part<BITS, V>(given, own + s * stride);
            }
            const float scale_offset = read_only(given.scale_offset);
            prepare();  // after the first loads are on their way
            UNROLL for (int s = 0; s < STEPS; s++) {
                unpack<BITS, COPIES>(parts[s], scale_offset, levels, value);
                write_once(out + s * stride, encode(value, T{}));
            }
        } else {
            prepare();
            for (int s = 0; s < STEPS; s++) {
                const int64_t left = given.count - own - s * stride;
                if (left <= 0) break;
                const Part part = read_part<BITS, V>(given, own + s * stride);
                unpack<BITS, COPIES>(part, read_only(given.scale_offset), levels, value);
                write(out + s * stride, left, false, value);
            }
        }
    }
}
