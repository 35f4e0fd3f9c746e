// 8 weights at a time: the levels of a block, scaled once, lie in one register or two.
#include <immintrin.h>

typedef struct {
    __m256 low, high;  // the first and the second 8 levels, of up to 4 bits, repeated to be 16
} Levels;

static void make_levels(Levels *levels, const float *codebook, int bits) {
    float repeated[16];
    const int count = 1 << bits;
    for (int i = 0; i < 16; i++) repeated[i] = codebook[i % count];
    levels->low = _mm256_loadu_ps(repeated);
    levels->high = _mm256_loadu_ps(repeated + 8);
}

static inline void unpack_2(const uint8_t *codes, const Levels *levels, float scale, int count,
                            float *out) {
    const __m256i places = _mm256_setr_epi32(6, 4, 2, 0, 14, 12, 10, 8);
    const __m256 scaled = _mm256_mul_ps(levels->low, _mm256_set1_ps(scale));
    for (int i = 0; i < count; i += 8) {
        uint16_t word;
        memcpy(&word, codes + i / 4, 2);
        // A lookup reads the lowest three bits alone: two of the code, one that changes nothing.
        const __m256i index = _mm256_srlv_epi32(_mm256_set1_epi32(word), places);
        _mm256_storeu_ps(out + i, _mm256_permutevar8x32_ps(scaled, index));
    }
}

static inline void unpack_3(const uint8_t *codes, const uint8_t *third_bits, const Levels *levels,
                            float scale, int count, float *out) {
    const __m256i places = _mm256_setr_epi32(6, 4, 2, 0, 14, 12, 10, 8);
    const __m256i third_places = _mm256_setr_epi32(7, 6, 5, 4, 3, 2, 1, 0);
    const __m256i third = _mm256_set1_epi32(4), others = _mm256_set1_epi32(3);
    const __m256 scaled = _mm256_mul_ps(levels->low, _mm256_set1_ps(scale));
    for (int i = 0; i < count; i += 8) {
        uint16_t word;
        memcpy(&word, codes + i / 4, 2);
        const __m256i low = _mm256_srlv_epi32(_mm256_set1_epi32(word), places);
        const __m256i high =
            _mm256_srlv_epi32(_mm256_set1_epi32(third_bits[i / 8] << 2), third_places);
        const __m256i index =
            _mm256_or_si256(_mm256_and_si256(high, third), _mm256_and_si256(low, others));
        _mm256_storeu_ps(out + i, _mm256_permutevar8x32_ps(scaled, index));
    }
}

static inline void unpack_4(const uint8_t *codes, const Levels *levels, float scale, int count,
                            float *out) {
    const __m256i places = _mm256_setr_epi32(4, 0, 12, 8, 20, 16, 28, 24);
    const __m256 factor = _mm256_set1_ps(scale);
    const __m256 low = _mm256_mul_ps(levels->low, factor);
    const __m256 high = _mm256_mul_ps(levels->high, factor);
    for (int i = 0; i < count; i += 8) {
        uint32_t word;
        memcpy(&word, codes + i / 2, 4);
        const __m256i index = _mm256_srlv_epi32(_mm256_set1_epi32((int)word), places);
        // Bit 3 as the sign, by which a blend chooses.
        const __m256 upper = _mm256_castsi256_ps(_mm256_slli_epi32(index, 28));
        const __m256 value = _mm256_blendv_ps(_mm256_permutevar8x32_ps(low, index),
                                              _mm256_permutevar8x32_ps(high, index), upper);
        _mm256_storeu_ps(out + i, value);
    }
}
