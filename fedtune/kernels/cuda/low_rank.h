// Low-rank products of several adapters of different rank in one launch.
//
// A group is a run of tokens [token_offsets[g], token_offsets[g + 1]) with one adapter, whose ranks
// are the rows [rank_offsets[g], rank_offsets[g + 1]) of A (ranks, in) and B (ranks, out):
//
//     low[t]  = x[t] A_g^T                rounded to the type of x; zero beyond the group's rank
//     y[t]   += scale_g * low[t] B_g      one rounding
//
// The backward pass in x is the same with A and B exchanged: low' = g B^T, dx += scale low' A. The
// gradients of the factors are `low_rank_gradient`: row r of a group is
//
//     scale_g * sum over the group's tokens of left[t][r] * right[t]
//
// for dA with left = low', right = x, and for dB with left = low, right = g.
//
// A block takes 16 tokens and walks the groups that meet them. Its warps share the columns of x, add
// their parts of `low` in a fixed order, then share the columns of y. So the result of a token comes
// from that token and its adapter alone, whatever else is in the batch.
#pragma once

#include "fragments.h"

constexpr int LOW_RANK_WARPS = 8;        // at most, of a block; they divide the columns
constexpr int LOW_RANK_TOKENS = 16;      // of a block
template <class T>
constexpr int LOW_RANK_PASS = sizeof(T) == 2 ? 64 : 32;  // ranks whose sums fit; more read x again
constexpr int LOW_RANK_MOST = 128;       // ranks
constexpr int LOW_RANK_COLUMNS = 64;     // of y that a warp takes at a time
constexpr int LOW_RANK_STEP = 32;        // columns of x that a warp takes at a time

struct LowRank {
    void* y;
    void* low;
    const void* x;
    const void* a;
    const void* b;
    const int32_t* token_offsets;
    const int32_t* rank_offsets;
    const float* scales;
    int64_t tokens, in, out;
    int32_t groups, max_rank, slices;  // slices: blocks that share one tile of tokens, by columns
};

template <class T>
struct LowRankShared {
    float part[LOW_RANK_WARPS][LOW_RANK_TOKENS][LOW_RANK_PASS<T>];
    alignas(16) T low[LOW_RANK_TOKENS][LOW_RANK_MOST + 8];  // 8 more: rows start in other banks
};

// What one group has of a block's tokens.
struct Span {
    int64_t first;       // token of the block
    int64_t begin, end;  // tokens of the group
    int64_t first_rank;
    int rank;
    float scale;

    DEVICE bool has(int row) const { return first + row >= begin && first + row < end; }
};

DEVICE Span span_of(const LowRank& given, int group, int64_t first) {
    const int64_t rank = given.rank_offsets[group];
    return Span{
        first,
        given.token_offsets[group],
        given.token_offsets[group + 1],
        rank,
        int(given.rank_offsets[group + 1] - rank),
        given.scales[group],
    };
}

// The last group that starts at or before a token.
DEVICE int group_of(const LowRank& given, int64_t token) {
    int low = 0, high = given.groups - 1;
    while (low < high) {
        const int middle = (low + high + 1) / 2;
        if (given.token_offsets[middle] <= token) {
            low = middle;
        } else {
            high = middle - 1;
        }
    }
    return low;
}

template <class T>
struct TwoRows {
    Eight<T> top, bottom;
};

template <class T>
DEVICE void load_rows(
    PerLane<TwoRows<T>>& rows, const T* x, const Span& span, int64_t in, int64_t step, bool aligned) {
    FOR_LANES(lane) {
        const int g = lane / 4;
        const int64_t column = step + 8 * (lane % 4);
        const T* top = x + (span.first + g) * in + column;
        rows[lane].top = load_eight<T>(top, span.has(g) ? in - column : 0, aligned);
        rows[lane].bottom = load_eight<T>(top + 8 * in, span.has(g + 8) ? in - column : 0, aligned);
    }
}

// One warp's part of x A^T, for the ranks from `pass` on.
template <class T, class F>
DEVICE void shrink(float (*part)[LOW_RANK_PASS<T>], int warp, int warps, const T* x, const F* a,
                   const Span& span, int pass, int64_t in, bool aligned) {
    PerLane<Sums> sums[LOW_RANK_PASS<T> / 8];
    UNROLL for (int j = 0; j < LOW_RANK_PASS<T> / 8; j++) clear(sums[j]);
    const int ranks = span.rank - pass < LOW_RANK_PASS<T> ? span.rank - pass : LOW_RANK_PASS<T>;
    const F* const factor = a + (span.first_rank + pass) * in;
    const int64_t stride = warps * LOW_RANK_STEP;
    PerLane<TwoRows<T>> rows;
    constexpr bool AHEAD = sizeof(T) == 2;  // registers do not hold two steps of float32
    if constexpr (AHEAD) load_rows(rows, x, span, in, int64_t(warp) * LOW_RANK_STEP, aligned);
    for (int64_t step = int64_t(warp) * LOW_RANK_STEP; step < in; step += stride) {
        if constexpr (!AHEAD) load_rows(rows, x, span, in, step, aligned);
        PerLane<Left<T>> left[2];
        FOR_LANES(lane) {
            UNROLL for (int h = 0; h < 2; h++) {
                UNROLL for (int p = 0; p < 4; p++) {
                    const Eight<T>& row = p % 2 ? rows[lane].bottom : rows[lane].top;
                    const int i = 4 * h + p / 2 * 2;
                    left[h][lane].pair[p] = Pair<T>{row.at[i], row.at[i + 1]};
                }
            }
        }
        // Arrives while this step multiplies.
        if constexpr (AHEAD) load_rows(rows, x, span, in, step + stride, aligned);
        UNROLL for (int j = 0; j < LOW_RANK_PASS<T> / 8; j++) {
            if (8 * j < ranks) {
                PerLane<Right<T>> right[2];
                FOR_LANES(lane) {
                    const int rank = 8 * j + lane / 4;
                    const int64_t column = step + 8 * (lane % 4);
                    const Eight<T> row = load_eight<T>(
                        factor + rank * in + column, rank < ranks ? in - column : 0, aligned);
                    UNROLL for (int p = 0; p < 4; p++) {
                        right[p / 2][lane].pair[p % 2] = Pair<T>{row.at[2 * p], row.at[2 * p + 1]};
                    }
                }
                multiply_add(sums[j], left[0], right[0]);
                multiply_add(sums[j], left[1], right[1]);
            }
        }
    }
    UNROLL for (int j = 0; j < LOW_RANK_PASS<T> / 8; j++) {
        FOR_LANES(lane) {
            UNROLL for (int i = 0; i < 4; i++) {
                part[lane / 4 + i / 2 * 8][8 * j + lane % 4 * 2 + i % 2] = sums[j][lane].at[i];
            }
        }
    }
}

// Adds the warps' parts, keeps `low` for the expansion, and writes it where asked.
template <class T, class Team>
DEVICE void gather(LowRankShared<T>& shared, const Team& team, T* low, const Span& span, int pass,
                   int max_rank) {
    for (int i = team.thread(); i < LOW_RANK_TOKENS * LOW_RANK_PASS<T>; i += team.threads()) {
        const int row = i / LOW_RANK_PASS<T>, column = i % LOW_RANK_PASS<T>, rank = pass + column;
        float total = 0.0f;
        if (rank < span.rank) {
            for (int warp = 0; warp < warps_of(team); warp++) total += shared.part[warp][row][column];
        }
        shared.low[row][rank] = rounded<T>(total);
        if (low != nullptr && rank < max_rank && span.has(row)) {
            low[(span.first + row) * max_rank + rank] = rounded<T>(total);
        }
    }
}

// One warp's columns of y += scale * low B. A lane ends with 16 consecutive columns of two tokens.
template <class T, class F>
DEVICE void expand(const LowRankShared<T>& shared, int64_t part, int64_t parts, T* y, const F* b,
                   const Span& span, int64_t out, bool aligned) {
    for (int64_t start = part * LOW_RANK_COLUMNS; start < out; start += parts * LOW_RANK_COLUMNS) {
        PerLane<Sums> sums[8];
        UNROLL for (int j = 0; j < 8; j++) clear(sums[j]);
        for (int r = 0; r < span.rank; r += 16) {
            PerLane<Left<T>> left;
            PerLane<Eight<T>> rows[4];  // of ranks 2q, 2q + 1, 2q + 8, 2q + 9
            FOR_LANES(lane) {
                const int g = lane / 4, q = lane % 4;
                UNROLL for (int p = 0; p < 4; p++) {
                    left[lane].pair[p] = as<Pair<T>>(
                        &shared.low[g + p % 2 * 8][r + 2 * q + p / 2 * 8]);
                    const int rank = r + 2 * q + p % 2 + p / 2 * 8;
                    const int64_t column = start + 8 * g;
                    rows[p][lane] = load_eight<T>(b + (span.first_rank + rank) * out + column,
                                                  rank < span.rank ? out - column : 0, aligned);
                }
            }
            UNROLL for (int j = 0; j < 8; j++) {
                PerLane<Right<T>> right;
                FOR_LANES(lane) {
                    right[lane].pair[0] = Pair<T>{rows[0][lane].at[j], rows[1][lane].at[j]};
                    right[lane].pair[1] = Pair<T>{rows[2][lane].at[j], rows[3][lane].at[j]};
                }
                multiply_add(sums[j], left, right);
            }
        }
        FOR_LANES(lane) {
            UNROLL for (int p = 0; p < 4; p++) {
                const int row = lane / 4 + p / 2 * 8;
                const int64_t column = start + lane % 4 * 16 + p % 2 * 8;
                if (span.has(row) && column < out) {
                    T* const place = y + (span.first + row) * out + column;
                    Eight<T> values = load_eight<T>(place, out - column, aligned);
                    UNROLL for (int j = 0; j < 8; j++) {
                        values.at[j] = rounded<T>(
                            to_float(values.at[j]) + span.scale * sums[j][lane].at[p]);
                    }
                    store_eight(place, values, out - column, aligned);
                }
            }
        }
    }
}

// Consecutive teams share a tile of tokens, `slices` of them; each computes `low` for itself.
template <class T, class F, class Team>
DEVICE void low_rank_tiles(const Team& team, const LowRank& given) {
    SHARED LowRankShared<T> shared;
    T* const y = static_cast<T*>(given.y);
    const T* const x = static_cast<const T*>(given.x);
    const F* const a = static_cast<const F*>(given.a);
    const F* const b = static_cast<const F*>(given.b);
    const bool in_aligned = in_sixteens(x, given.in * int64_t(sizeof(T))) &&
                            in_sixteens(a, given.in * int64_t(sizeof(F)));
    const bool out_aligned = in_sixteens(y, given.out * int64_t(sizeof(T))) &&
                             in_sixteens(b, given.out * int64_t(sizeof(F)));
    const int warp = warp_of(team), warps = warps_of(team);
    const int64_t tiles = (given.tokens + LOW_RANK_TOKENS - 1) / LOW_RANK_TOKENS;
    for (int64_t i = team.index(); i < tiles * given.slices; i += team.count()) {
        const int64_t first = i / given.slices * LOW_RANK_TOKENS, slice = i % given.slices;
        T* const low = slice == 0 ? static_cast<T*>(given.low) : nullptr;
        for (int group = group_of(given, first); group < given.groups; group++) {
            const Span span = span_of(given, group, first);
            if (span.begin >= first + LOW_RANK_TOKENS || span.begin >= given.tokens) break;
            if (span.end <= first || span.end == span.begin) continue;
            const int ranks = span.rank > given.max_rank ? span.rank : given.max_rank;
            for (int pass = 0; pass < ranks; pass += LOW_RANK_PASS<T>) {
                if (pass < span.rank) {
                    shrink(shared.part[warp], warp, warps, x, a, span, pass, given.in, in_aligned);
                }
                team.sync();
                gather(shared, team, low, span, pass, given.max_rank);
                team.sync();
            }
            if (span.rank > 0) {
                expand(shared, slice * warps + warp, int64_t(given.slices) * warps, y, b, span,
                       given.out, out_aligned);
            }
            team.sync();  // the next group overwrites what this one still reads
        }
    }
}

template <class T, class F, class Team>
DEVICE void low_rank(const Team& team, const LowRank& given) {
    if constexpr (RUNS<T>) low_rank_tiles<T, F>(team, given);
}

// ---------------------------------------------------------------- gradients of the factors

constexpr int GRADIENT_WARPS = 4;   // at most, of a block; they divide the tokens
constexpr int GRADIENT_RANKS = 32;  // of a block

struct LowRankGradient {
    float* out;         // (ranks, columns)
    const void* left;   // (tokens, max_rank)
    const void* right;  // (tokens, columns)
    const int32_t* token_offsets;
    const int32_t* rank_offsets;
    const float* scales;
    int64_t columns;
    int32_t groups, max_rank;
};

template <class T>
DEVICE Pair<T> load_pair(const T* from, int valid, bool aligned) {
    if (aligned && valid >= 2) return as<Pair<T>>(from);
    const T zero = rounded<T>(0.0f);
    return Pair<T>{valid > 0 ? from[0] : zero, valid > 1 ? from[1] : zero};
}

// One warp's part of left^T right: every `warps`-th 16 tokens of the group.
template <class T>
DEVICE void gradient_part(float (*part)[LOW_RANK_COLUMNS], int warp, int warps, const T* left,
                          const T* right, const Span& span, int first_rank, int64_t start,
                          int64_t columns, int max_rank, bool aligned, bool paired) {
    constexpr int TILES = GRADIENT_RANKS / 16;
    PerLane<Sums> sums[TILES][8];
    UNROLL for (int m = 0; m < TILES; m++) {
        UNROLL for (int j = 0; j < 8; j++) clear(sums[m][j]);
    }
    for (int64_t first = span.begin + 16 * warp; first < span.end; first += 16 * warps) {
        PerLane<Eight<T>> rows[4];  // of tokens 2q, 2q + 1, 2q + 8, 2q + 9
        PerLane<Left<T>> l[TILES];
        FOR_LANES(lane) {
            const int g = lane / 4, q = lane % 4;
            const int64_t column = start + 8 * g;
            Pair<T> factors[TILES][4];
            UNROLL for (int p = 0; p < 4; p++) {
                const int64_t token = first + 2 * q + p % 2 + p / 2 * 8;
                const bool there = token < span.end;
                rows[p][lane] = load_eight<T>(
                    right + token * columns + column, there ? columns - column : 0, aligned);
                UNROLL for (int m = 0; m < TILES; m++) {
                    const int rank = first_rank + 16 * m + 2 * g;
                    factors[m][p] = load_pair(
                        left + token * max_rank + rank, there ? span.rank - rank : 0, paired);
                }
            }
            // Row g of the product is rank 2g, row g + 8 is rank 2g + 1.
            UNROLL for (int m = 0; m < TILES; m++) {
                UNROLL for (int h = 0; h < 2; h++) {
                    const Pair<T>&one = factors[m][2 * h], &two = factors[m][2 * h + 1];
                    l[m][lane].pair[2 * h] = Pair<T>{one.low, two.low};
                    l[m][lane].pair[2 * h + 1] = Pair<T>{one.high, two.high};
                }
            }
        }
        UNROLL for (int j = 0; j < 8; j++) {
            PerLane<Right<T>> r;
            FOR_LANES(lane) {
                r[lane].pair[0] = Pair<T>{rows[0][lane].at[j], rows[1][lane].at[j]};
                r[lane].pair[1] = Pair<T>{rows[2][lane].at[j], rows[3][lane].at[j]};
            }
            UNROLL for (int m = 0; m < TILES; m++) multiply_add(sums[m][j], l[m], r);
        }
    }
    UNROLL for (int m = 0; m < TILES; m++) {
        UNROLL for (int j = 0; j < 8; j++) {
            FOR_LANES(lane) {
                UNROLL for (int i = 0; i < 4; i++) {
                    const int rank = 16 * m + lane / 4 * 2 + i / 2;
                    part[rank][lane % 4 * 16 + i % 2 * 8 + j] = sums[m][j][lane].at[i];
                }
            }
        }
    }
}

// A team takes 64 columns and 32 ranks of one group.
template <class T, class Team>
DEVICE void low_rank_gradient_tiles(const Team& team, const LowRankGradient& given) {
    SHARED float part[GRADIENT_WARPS][GRADIENT_RANKS][LOW_RANK_COLUMNS];
    const T* const left = static_cast<const T*>(given.left);
    const T* const right = static_cast<const T*>(given.right);
    const bool aligned = in_sixteens(right, given.columns * int64_t(sizeof(T)));
    const bool paired = given.max_rank % 2 == 0 &&
                        reinterpret_cast<uintptr_t>(left) % sizeof(Pair<T>) == 0;
    const int warp = warp_of(team), warps = warps_of(team);
    const int64_t tiles = (given.columns + LOW_RANK_COLUMNS - 1) / LOW_RANK_COLUMNS;
    const int64_t passes = (given.max_rank + GRADIENT_RANKS - 1) / GRADIENT_RANKS;
    for (int64_t i = team.index(); i < tiles * passes * given.groups; i += team.count()) {
        const int group = int(i / tiles / passes), first_rank = int(i / tiles % passes) * GRADIENT_RANKS;
        const int64_t start = i % tiles * LOW_RANK_COLUMNS;
        const int64_t row = given.rank_offsets[group];
        const Span span{0, given.token_offsets[group], given.token_offsets[group + 1], row,
                        int(given.rank_offsets[group + 1] - row), given.scales[group]};
        if (first_rank >= span.rank) continue;
        gradient_part(part[warp], warp, warps, left, right, span, first_rank, start, given.columns,
                      given.max_rank, aligned, paired);
        team.sync();
        for (int k = team.thread(); k < GRADIENT_RANKS * LOW_RANK_COLUMNS; k += team.threads()) {
            const int rank = k / LOW_RANK_COLUMNS, column = k % LOW_RANK_COLUMNS;
            if (first_rank + rank < span.rank && start + column < given.columns) {
                float total = 0.0f;
                for (int w = 0; w < warps; w++) total += part[w][rank][column];
                given.out[(row + first_rank + rank) * given.columns + start + column] =
                    span.scale * total;
            }
        }
        team.sync();
    }
}

template <class T, class Team>
DEVICE void low_rank_gradient(const Team& team, const LowRankGradient& given) {
    if constexpr (RUNS<T>) low_rank_gradient_tiles<T>(team, given);
}
