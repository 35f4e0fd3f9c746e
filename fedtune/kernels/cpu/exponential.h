// An exponential that the compiler turns into vectors.
#pragma once

#include "portable.h"

#include <math.h>

// e ** x for x <= 0, and not a number for that; 0 where float32 has no normal number for it. Relative
// error below 2e-7: x = n ln 2 + r, and a polynomial for e ** r with |r| <= ln 2 / 2 (Cephes, expf).
static inline float exponential(float x) {
    const float rounder = 12582912.0f;  // 1.5 * 2 ** 23: adding it leaves whole numbers
    const float shifted = x * 1.44269504f + rounder;
    const float n = shifted - rounder;
    const float r = (x - n * 0.693359375f) - n * -2.12194440e-4f;
    float power = 1.9875691500e-4f;
    power = power * r + 1.3981999507e-3f;
    power = power * r + 8.3334519073e-3f;
    power = power * r + 4.1665795894e-2f;
    power = power * r + 1.6666665459e-1f;
    power = power * r + 5.0000001201e-1f;
    power = power * r * r + r + 1.0f;
    const float scaled = power * float_of((bits_of(shifted) << 23) + 0x3f800000u);
    return x < -87.0f ? 0.0f : scaled;
}
