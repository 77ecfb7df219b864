// Upper halves of floats: the conversions that kernels use.
#pragma once

#include "cuda_fp16.h"

// Rounds to nearest, ties to even.
struct alignas(2) __nv_bfloat16 {
    uint16_t bits;
    __nv_bfloat16() = default;
    __nv_bfloat16(float x) {
        uint32_t b = emulator_bits(x);
        bits = (b & 0x7fffffff) > 0x7f800000 ? 0x7fff : (b + 0x7fff + (b >> 16 & 1)) >> 16;
    }
    operator float() const { return emulator_float(uint32_t(bits) << 16); }
};
struct alignas(4) __nv_bfloat162 {
    __nv_bfloat16 x, y;
};
