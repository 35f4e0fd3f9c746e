// Any CPU: a byte, or six bits, is one index into a table of the values of all its weights.

typedef struct {
    float quads[256][4];  // 2 bits: the weights of a byte
    float pairs[256][2];  // 4 bits: the weights of a byte; 3 bits: of two third bits, four others
} Levels;

static void make_levels(Levels *levels, const float *codebook, int bits) {
    for (int byte = 0; byte < 256 && bits == 2; byte++) {
        for (int i = 0; i < 4; i++) levels->quads[byte][i] = codebook[byte >> (6 - 2 * i) & 3];
    }
    for (int byte = 0; byte < 256 && bits == 4; byte++) {
        levels->pairs[byte][0] = codebook[byte >> 4];
        levels->pairs[byte][1] = codebook[byte & 15];
    }
    for (int six = 0; six < 64 && bits == 3; six++) {
        levels->pairs[six][0] = codebook[(six >> 2 & 3) | (six >> 3 & 4)];
        levels->pairs[six][1] = codebook[(six & 3) | (six >> 2 & 4)];
    }
}

static inline void unpack_2(const uint8_t *codes, const Levels *levels, float scale, int count,
                            float *out) {
    for (int i = 0; i < count; i += 4) {
        const float *values = levels->quads[codes[i / 4]];
        for (int j = 0; j < 4; j++) out[i + j] = values[j] * scale;
    }
}

static inline void unpack_3(const uint8_t *codes, const uint8_t *third_bits, const Levels *levels,
                            float scale, int count, float *out) {
    for (int i = 0; i < count; i += 8) {
        const uint32_t low = (uint32_t)codes[i / 4] << 8 | codes[i / 4 + 1];
        const uint32_t high = third_bits[i / 8];
        for (int j = 0; j < 8; j += 2) {
            const uint32_t six = (low >> (12 - 2 * j) & 15) | (high >> (6 - j) & 3) << 4;
            out[i + j] = levels->pairs[six][0] * scale;
            out[i + j + 1] = levels->pairs[six][1] * scale;
        }
    }
}

static inline void unpack_4(const uint8_t *codes, const Levels *levels, float scale, int count,
                            float *out) {
    for (int i = 0; i < count; i += 2) {
        const float *values = levels->pairs[codes[i / 2]];
        out[i] = values[0] * scale;
        out[i + 1] = values[1] * scale;
    }
}
