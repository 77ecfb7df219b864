// Half floats: the conversions that kernels use. Arithmetic on them is none of theirs.
#pragma once

#include "cuda_runtime.h"

inline uint32_t emulator_bits(float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, sizeof bits);
    return bits;
}
inline float emulator_float(uint32_t bits) {
    float x;
    std::memcpy(&x, &bits, sizeof x);
    return x;
}

// Rounds to nearest, ties to even.
struct alignas(2) __half {
    uint16_t bits;
    __half() = default;
    __half(float x) {
        uint32_t b = emulator_bits(x), sign = b >> 16 & 0x8000, magnitude = b & 0x7fffffff;
        if (magnitude > 0x7f800000) {
            bits = 0x7fff;
        } else if (magnitude < 0x38800000) {
            // A sum whose last bit is the smallest subnormal rounds to a multiple of it.
            bits = sign | (emulator_bits(emulator_float(magnitude) + 0.5f) - 0x3f000000);
        } else {
            uint32_t rounded = (magnitude + 0xfff + (magnitude >> 13 & 1) >> 13) - (112 << 10);
            bits = sign | (rounded > 0x7c00 ? 0x7c00 : rounded);
        }
    }
    operator float() const {
        uint32_t sign = uint32_t(bits & 0x8000) << 16, magnitude = bits & 0x7fff;
        if (magnitude < 0x400)
            return emulator_float(emulator_bits(magnitude * 0x1p-24f) | sign);
        if (magnitude >= 0x7c00)
            return emulator_float(sign | 0x7f800000 | (magnitude & 0x3ff) << 13);
        return emulator_float(sign | (magnitude + (112 << 10)) << 13);
    }
};
struct alignas(4) __half2 {
    __half x, y;
};
