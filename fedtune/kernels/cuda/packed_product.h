// y = x W^T for few tokens; W is unpacked on its way into the product and never stored.
//
// W lies as fedtune/kernels/packed.py says. A row must hold a multiple of 256 weights, so that it
// starts at a whole byte, a whole block and a multiple of 16 bytes of codes.
//
// A warp takes 32 rows of W and every so many-th step of 128 columns. In a step a lane unpacks 32
// consecutive weights of each of four rows and feeds them to eight products of depth 16 in the order
// in which they lie: product s takes weights 4s to 4s + 3, and the same columns of x. A weight is
// rounded to the type of x, as in an unpacked panel, so that the two differ only in the order in
// which float32 sums are taken.
#pragma once

#include "fragments.h"

constexpr int PACKED_PRODUCT_WARPS = 8;   // at most, of a block; they divide the columns
constexpr int PACKED_PRODUCT_ROWS = 32;   // of W, of a block
constexpr int PACKED_PRODUCT_STEP = 128;  // columns that a warp takes at a time

struct PackedProduct {
    void* y;        // (tokens, out)
    const void* x;  // (tokens, in), at a multiple of 16 bytes
    const uint8_t* codes;
    const uint8_t* scale_codes;
    const float* scale_steps;
    const float* scale_offset;
    const float* codebook;
    int64_t third_bits;  // byte of `codes` at which the plane of third bits starts (3 bits only)
    int64_t tokens, in, out;
    int32_t block_shift;  // a block has 2 ** block_shift weights
};

struct alignas(8) TwoWords {
    uint32_t word[2];
};

// The codes of 32 consecutive weights as they lie in memory.
template <int BITS>
struct Run {
    uint32_t word[BITS];
};

template <int BITS>
DEVICE Run<BITS> read_run(const PackedProduct& given, int64_t weight) {
    Run<BITS> run;
    if constexpr (BITS < 4) {
        const TwoWords two = read_as<TwoWords>(given.codes + weight / 4);
        run.word[0] = two.word[0];
        run.word[1] = two.word[1];
        if constexpr (BITS == 3) {
            run.word[2] = read_as<uint32_t>(given.codes + given.third_bits + weight / 8);
        }
    } else {
        UNROLL for (int i = 0; i < BITS / 4; i++) {
            const Words four = read_as<Words>(given.codes + weight / 8 * BITS + 16 * i);
            UNROLL for (int j = 0; j < 4; j++) run.word[4 * i + j] = four.word[j];
        }
    }
    return run;
}

// Field i of a run of fields of BITS bits: bytes ascend, the first of a byte in its highest bits.
template <int BITS>
DEVICE uint32_t field_of(const uint32_t* words, int i) {
    constexpr int A_BYTE = 8 / BITS;
    const int byte = i / A_BYTE;
    return words[byte / 4] >> (byte % 4 * 8 + 8 - BITS * (i % A_BYTE + 1)) & ((1u << BITS) - 1u);
}

template <int BITS>
DEVICE uint32_t code_in(const Run<BITS>& run, int i) {
    if constexpr (BITS == 3) {
        return field_of<2>(run.word, i) | field_of<1>(run.word + 2, i) << 2;
    } else {
        return field_of<BITS>(run.word, i);
    }
}

DEVICE float scale_at(const PackedProduct& given, int64_t weight) {
    const int64_t block = weight >> given.block_shift;
    const float code = float(given.scale_codes[block]);
    return sum(*given.scale_offset, product(code, given.scale_steps[block / 256]));
}

// One warp's part of the products of 16 * TILES tokens with 32 rows of W.
template <int BITS, int TILES, int COPIES, class T>
DEVICE void packed_part(float (*part)[PACKED_PRODUCT_ROWS], const float* codebook, int warp,
                        int warps, int64_t first_row, const PackedProduct& given) {
    const T* const x = static_cast<const T*>(given.x);
    PerLane<Sums> sums[TILES][4];
    UNROLL for (int t = 0; t < TILES; t++) {
        UNROLL for (int n = 0; n < 4; n++) clear(sums[t][n]);
    }
    for (int64_t step = int64_t(warp) * PACKED_PRODUCT_STEP; step < given.in;
         step += warps * PACKED_PRODUCT_STEP) {
        PerLane<Run<BITS>> runs[4];
        PerLane<float> scales[4];
        FOR_LANES(lane) {
            UNROLL for (int n = 0; n < 4; n++) {
                const int64_t row = first_row + 8 * n + lane / 4;
                const int64_t there = row < given.out ? row : given.out - 1;
                const int64_t weight = there * given.in + step + lane % 4 * 32;
                runs[n][lane] = read_run<BITS>(given, weight);
                scales[n][lane] = scale_at(given, weight);
            }
        }
        UNROLL for (int s = 0; s < 4; s++) {  // two products each: 8 columns of a lane
            PerLane<Left<T>> left[TILES][2];
            FOR_LANES(lane) {
                UNROLL for (int t = 0; t < TILES; t++) {
                    const int64_t token = 16 * t + lane / 4;
                    const T* const place = x + token * given.in + step + lane % 4 * 32 + 8 * s;
                    const Eight<T> top = load_eight<T>(place, token < given.tokens ? 8 : 0, true);
                    const Eight<T> bottom = load_eight<T>(
                        place + 8 * given.in, token + 8 < given.tokens ? 8 : 0, true);
                    UNROLL for (int h = 0; h < 2; h++) {
                        UNROLL for (int p = 0; p < 4; p++) {
                            const Eight<T>& row = p % 2 ? bottom : top;
                            const int i = 4 * h + p / 2 * 2;
                            left[t][h][lane].pair[p] = Pair<T>{row.at[i], row.at[i + 1]};
                        }
                    }
                }
            }
            UNROLL for (int h = 0; h < 2; h++) {
                UNROLL for (int n = 0; n < 4; n++) {
                    PerLane<Right<T>> right;
                    FOR_LANES(lane) {
                        const float* const levels = codebook + lane % COPIES;
                        const Run<BITS>& run = runs[n][lane];
                        UNROLL for (int p = 0; p < 2; p++) {
                            const int i = 8 * s + 4 * h + 2 * p;
                            right[lane].pair[p] = pair_of(
                                product(levels[code_in(run, i) * COPIES], scales[n][lane]),
                                product(levels[code_in(run, i + 1) * COPIES], scales[n][lane]),
                                T{});
                        }
                    }
                    UNROLL for (int t = 0; t < TILES; t++) {
                        multiply_add(sums[t][n], left[t][h], right);
                    }
                }
            }
        }
    }
    UNROLL for (int t = 0; t < TILES; t++) {
        UNROLL for (int n = 0; n < 4; n++) {
            FOR_LANES(lane) {
                UNROLL for (int i = 0; i < 4; i++) {
                    part[16 * t + lane / 4 + i / 2 * 8][8 * n + lane % 4 * 2 + i % 2] =
                        sums[t][n][lane].at[i];
                }
            }
        }
    }
}

// A team takes 32 rows of W and all tokens, at most 16 * TILES. Up to 16 levels lie in as many banks
// of the shared memory; of 256 levels there are as many copies as leave room for the sums.
template <int BITS, int TILES, class T, class Team>
DEVICE void packed_tiles(const Team& team, const PackedProduct& given) {
    constexpr int COPIES = BITS == 8 ? 8 : 1;
    SHARED float codebook[(1 << BITS) * COPIES];
    SHARED float part[PACKED_PRODUCT_WARPS][16 * TILES][PACKED_PRODUCT_ROWS];
    for (int i = team.thread(); i < (1 << BITS) * COPIES; i += team.threads()) {
        codebook[i] = given.codebook[i / COPIES];
    }
    team.sync();
    const int64_t tiles = (given.out + PACKED_PRODUCT_ROWS - 1) / PACKED_PRODUCT_ROWS;
    for (int64_t tile = team.index(); tile < tiles; tile += team.count()) {
        const int64_t first_row = tile * PACKED_PRODUCT_ROWS;
        const int warp = warp_of(team);
        packed_part<BITS, TILES, COPIES, T>(
            part[warp], codebook, warp, warps_of(team), first_row, given);
        team.sync();
        for (int i = team.thread(); i < 16 * TILES * PACKED_PRODUCT_ROWS; i += team.threads()) {
            const int64_t token = i / PACKED_PRODUCT_ROWS;
            const int64_t row = first_row + i % PACKED_PRODUCT_ROWS;
            if (token < given.tokens && row < given.out) {
                float total = 0.0f;
                for (int w = 0; w < warps_of(team); w++) {
                    total += part[w][token][i % PACKED_PRODUCT_ROWS];
                }
                static_cast<T*>(given.y)[token * given.out + row] = rounded<T>(total);
            }
        }
        team.sync();
    }
}

template <int BITS, int TILES, class T, class Team>
DEVICE void packed_product(const Team& team, const PackedProduct& given) {
    if constexpr (RUNS<T>) packed_tiles<BITS, TILES, T>(team, given);
}
