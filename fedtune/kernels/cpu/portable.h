// What the sources share.
#pragma once

#include <stdint.h>
#include <string.h>

#define EXPORT __attribute__((visibility("default")))

static inline uint32_t bits_of(float value) {
    uint32_t bits;
    memcpy(&bits, &value, 4);
    return bits;
}

static inline float float_of(uint32_t bits) {
    float value;
    memcpy(&value, &bits, 4);
    return value;
}

enum { ENOUGH = 65536 };  // numbers that are worth the start of threads; chosen
