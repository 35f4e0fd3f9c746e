// 16 weights at a time: the levels of a block, scaled once, lie in one register.
#include <immintrin.h>

typedef struct {
    __m512 values;  // of up to 4 bits, repeated to be 16
} Levels;

static void make_levels(Levels *levels, const float *codebook, int bits) {
    float repeated[16];
    const int count = 1 << bits;
    for (int i = 0; i < 16; i++) repeated[i] = codebook[i % count];
    levels->values = _mm512_loadu_ps(repeated);
}

static inline __m512i word_at(const uint8_t *from) {  // the same 4 bytes in every place
    uint32_t word;
    memcpy(&word, from, 4);
    return _mm512_set1_epi32((int)word);
}

static inline void unpack_2(const uint8_t *codes, const Levels *levels, float scale, int count,
                            float *out) {
    const __m512i places = _mm512_setr_epi32(6, 4, 2, 0, 14, 12, 10, 8, 22, 20, 18, 16, 30, 28,
                                             26, 24);
    const __m512 scaled = _mm512_mul_ps(levels->values, _mm512_set1_ps(scale));
    for (int i = 0; i < count; i += 16) {
        // A lookup reads the lowest four bits alone: two of the code and two that change nothing.
        const __m512i index = _mm512_srlv_epi32(word_at(codes + i / 4), places);
        _mm512_storeu_ps(out + i, _mm512_permutexvar_ps(index, scaled));
    }
}

static inline void unpack_3(const uint8_t *codes, const uint8_t *third_bits, const Levels *levels,
                            float scale, int count, float *out) {
    const __m512i places = _mm512_setr_epi32(6, 4, 2, 0, 14, 12, 10, 8, 22, 20, 18, 16, 30, 28,
                                             26, 24);
    const __m512i third_places = _mm512_setr_epi32(7, 6, 5, 4, 3, 2, 1, 0, 15, 14, 13, 12, 11, 10,
                                                   9, 8);
    const __m512i third = _mm512_set1_epi32(4);
    const __m512 scaled = _mm512_mul_ps(levels->values, _mm512_set1_ps(scale));
    for (int i = 0; i < count; i += 16) {
        uint16_t bits;
        memcpy(&bits, third_bits + i / 8, 2);
        const __m512i high = _mm512_srlv_epi32(_mm512_set1_epi32(bits << 2), third_places);
        const __m512i low = _mm512_srlv_epi32(word_at(codes + i / 4), places);
        // Bit 2 of `high`, all others of `low`.
        const __m512i index = _mm512_ternarylogic_epi32(third, high, low, 0xca);
        _mm512_storeu_ps(out + i, _mm512_permutexvar_ps(index, scaled));
    }
}

static inline void unpack_4(const uint8_t *codes, const Levels *levels, float scale, int count,
                            float *out) {
    const __m512i places = _mm512_setr_epi32(4, 0, 4, 0, 4, 0, 4, 0, 4, 0, 4, 0, 4, 0, 4, 0);
    const __m512 scaled = _mm512_mul_ps(levels->values, _mm512_set1_ps(scale));
    for (int i = 0; i < count; i += 16) {
        const __m128i bytes = _mm_loadl_epi64((const __m128i *)(codes + i / 2));
        const __m512i twice = _mm512_cvtepu8_epi32(_mm_unpacklo_epi8(bytes, bytes));
        const __m512i index = _mm512_srlv_epi32(twice, places);
        _mm512_storeu_ps(out + i, _mm512_permutexvar_ps(index, scaled));
    }
}
