// Block-quantised weights to floats on a CPU. The layout is that of fedtune/kernels/packed.py.
//
// A device that has a C compiler makes a shared object of this file; fedtune/kernels/native.py
// says how, and calls it. No fused multiply-adds (-ffp-contract=off): every path gives these bits.
#include "portable.h"

#if defined(__F16C__)
#include <immintrin.h>
#endif
#if defined(__AVX512F__)
#include "unpack_avx512.h"
#elif defined(__AVX2__)
#include "unpack_avx2.h"
#else
#include "unpack_plain.h"
#endif

enum { SUPERBLOCK_SHIFT = 8, LONGEST_BLOCK = 128 };
enum { FLOAT32, BFLOAT16, FLOAT16 };

typedef struct {
    const uint8_t *codes;
    const uint8_t *third_bits;  // the second plane of 3-bit codes
    const uint8_t *scale_codes;
    const float *scale_steps;
    const float *codebook;
    float scale_offset;
    void *out;
    int64_t first;  // weight, a multiple of 256, that `out` begins with
    int64_t count;  // weights of `out`
    int bits;
    int block;  // weights of a block: 32, 64 or 128
    int dtype;
} Task;

// To the nearest, ties to even; without branches, for the compiler to vectorise.
static inline void round_to_bfloat16(const float *values, uint16_t *out, int count) {
    for (int i = 0; i < count; i++) {
        const uint32_t bits = bits_of(values[i]);
        const uint32_t rounded = (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16;
        out[i] = (uint16_t)((bits & 0x7fffffffu) > 0x7f800000u ? 0x7fc0u : rounded);
    }
}

static inline uint16_t float16_of(float value) {
    const uint32_t bits = bits_of(value), sign = bits >> 16 & 0x8000u, size = bits & 0x7fffffffu;
    // The exponent's bias goes from 127 to 15; a carry out of the fraction raises it.
    const uint32_t normal = (size - (112u << 23) + 0xfffu + (size >> 13 & 1u)) >> 13;
    // Beside 0.5, a float32 keeps multiples of 2 ** -24 alone: the adder rounds.
    const uint32_t small = bits_of(float_of(size) + 0.5f) - 0x3f000000u;
    const uint32_t large = size > 0x7f800000u ? 0x7e00u : 0x7c00u;
    const uint32_t rounded = size < (113u << 23) ? small : normal;
    return (uint16_t)((size >= 0x477ff000u ? large : rounded) | sign);
}

static inline void round_to_float16(const float *values, uint16_t *out, int count) {
    int done = 0;
#if defined(__F16C__)
    for (; done + 8 <= count; done += 8) {
        const __m256 eight = _mm256_loadu_ps(values + done);
        const __m128i halves = _mm256_cvtps_ph(eight, _MM_FROUND_TO_NEAREST_INT);
        _mm_storeu_si128((__m128i *)(out + done), halves);
    }
#elif defined(__aarch64__) && defined(__ARM_FP16_FORMAT_IEEE)
    for (; done < count; done++) {
        const __fp16 half = (__fp16)values[done];
        memcpy(out + done, &half, 2);
    }
#endif
    for (int i = done; i < count; i++) out[i] = float16_of(values[i]);
}

// A gather, and 16 registers of 16 levels, take as long.
static inline void unpack_8(const uint8_t *codes, const float *codebook, float scale, int count,
                            float *out) {
    for (int i = 0; i < count; i++) out[i] = codebook[codes[i]] * scale;
}

static inline void unpack_block(const Task *task, const Levels *levels, int64_t index, int bits,
                                float *out) {
    const int count = task->block;
    const int64_t weight = index * count;
    // A product, then a sum: both are rounded.
    const float step = task->scale_codes[index] * task->scale_steps[index >> SUPERBLOCK_SHIFT];
    const float scale = task->scale_offset + step;
    if (bits == 2) unpack_2(task->codes + weight / 4, levels, scale, count, out);
    if (bits == 3) {
        unpack_3(task->codes + weight / 4, task->third_bits + weight / 8, levels, scale, count,
                 out);
    }
    if (bits == 4) unpack_4(task->codes + weight / 2, levels, scale, count, out);
    if (bits == 8) unpack_8(task->codes + weight, task->codebook, scale, count, out);
}

// Blocks `begin` up to `end`, counted from the first weight of `out`.
static inline void unpack_blocks(const Task *task, const Levels *levels, int64_t begin,
                                 int64_t end, int bits) {
    const int64_t block = task->block, skipped = task->first / block;
    float values[LONGEST_BLOCK];
    for (int64_t i = begin; i < end; i++) {
        const int64_t start = i * block, left = task->count - start;
        const int count = (int)(left < block ? left : block);
        if (task->dtype == FLOAT32 && count == block) {
            unpack_block(task, levels, skipped + i, bits, (float *)task->out + start);
            continue;
        }
        unpack_block(task, levels, skipped + i, bits, values);
        if (task->dtype == FLOAT32) {
            memcpy((float *)task->out + start, values, sizeof(float) * (size_t)count);
        } else if (task->dtype == BFLOAT16) {
            round_to_bfloat16(values, (uint16_t *)task->out + start, count);
        } else {
            round_to_float16(values, (uint16_t *)task->out + start, count);
        }
    }
}

static void unpack_part(const Task *task, const Levels *levels, int64_t begin, int64_t end) {
    switch (task->bits) {
        case 2: unpack_blocks(task, levels, begin, end, 2); break;
        case 3: unpack_blocks(task, levels, begin, end, 3); break;
        case 4: unpack_blocks(task, levels, begin, end, 4); break;
        default: unpack_blocks(task, levels, begin, end, 8); break;
    }
}

EXPORT void fedtune_dequantise(const uint8_t *codes, int64_t third_bits,
                               const uint8_t *scale_codes, const float *scale_steps,
                               const float *scale_offset, const float *codebook, void *out,
                               int64_t first, int64_t count, int bits, int block, int dtype,
                               int threads) {
    const Task task = {codes, codes + third_bits, scale_codes, scale_steps, codebook,
                       *scale_offset, out, first, count, bits, block, dtype};
    Levels levels;
    make_levels(&levels, codebook, bits);  // of 8 bits: not used
    const int64_t blocks = (count + block - 1) / block;
    if (threads < 2) {
        unpack_part(&task, &levels, 0, blocks);
        return;
    }
#if defined(_OPENMP)
#pragma omp parallel for num_threads(threads) schedule(static)
#endif
    for (int i = 0; i < threads; i++) {
        unpack_part(&task, &levels, blocks * i / threads, blocks * (i + 1) / threads);
    }
}
