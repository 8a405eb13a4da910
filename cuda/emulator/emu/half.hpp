// SPDX-License-Identifier: Apache-2.0
// fp16 and bf16 as bit patterns: conversion to and from fp32, rounding to nearest, ties to even.
#pragma once

#include "emu/cuda.hpp"

namespace emu {

inline float fp16_to_float(std::uint16_t bits) {
    // An exponent shifted into place is 112 too small: one multiplication corrects it, subnormals included.
    std::uint32_t wide = (bits & 0x7fffu) << 13;
    float value = bit_cast<float>(wide) * 0x1p112f;
    wide = bit_cast<std::uint32_t>(value);
    if ((bits & 0x7c00u) == 0x7c00u) wide |= 0x7f800000u;
    return bit_cast<float>(wide | (bits & 0x8000u) << 16);
}

inline float bf16_to_float(std::uint16_t bits) { return bit_cast<float>(static_cast<std::uint32_t>(bits) << 16); }

inline std::uint16_t float_to_fp16(float value) {
    const std::uint32_t bits = bit_cast<std::uint32_t>(value), sign = bits >> 16 & 0x8000u;
    std::uint32_t magnitude = bits & 0x7fffffffu;
    if (magnitude > 0x7f800000u) return 0x7fffu;  // what the GPU makes of every NaN
    if (magnitude >= 0x477ff000u) return static_cast<std::uint16_t>(sign | 0x7c00u);
    if (magnitude < 0x38800000u) {
        // Adding 0.5 puts the multiples of 2^-24 into the last mantissa bits; the addition rounds.
        const float shifted = bit_cast<float>(magnitude) + 0.5f;
        return static_cast<std::uint16_t>(sign | (bit_cast<std::uint32_t>(shifted) - 0x3f000000u));
    }
    magnitude += 0xfffu + (magnitude >> 13 & 1u) - 0x38000000u;
    return static_cast<std::uint16_t>(sign | magnitude >> 13);
}

inline std::uint16_t float_to_bf16(float value) {
    const std::uint32_t bits = bit_cast<std::uint32_t>(value);
    if ((bits & 0x7fffffffu) > 0x7f800000u) return 0x7fffu;
    return static_cast<std::uint16_t>((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16);
}

}  // namespace emu

struct __half {
    std::uint16_t bits;
};
struct alignas(4) __half2 {
    __half x, y;
};
struct __nv_bfloat16 {
    std::uint16_t bits;
};
struct alignas(4) __nv_bfloat162 {
    __nv_bfloat16 x, y;
};

inline __half __float2half_rn(float value) { return {emu::float_to_fp16(value)}; }
inline __half __float2half(float value) { return {emu::float_to_fp16(value)}; }
inline float __half2float(__half value) { return emu::fp16_to_float(value.bits); }
inline unsigned short __half_as_ushort(__half value) { return value.bits; }
inline __half __ushort_as_half(unsigned short bits) { return {bits}; }
inline __nv_bfloat16 __float2bfloat16_rn(float value) { return {emu::float_to_bf16(value)}; }
inline __nv_bfloat16 __float2bfloat16(float value) { return {emu::float_to_bf16(value)}; }
inline float __bfloat162float(__nv_bfloat16 value) { return emu::bf16_to_float(value.bits); }
inline unsigned short __bfloat16_as_ushort(__nv_bfloat16 value) { return value.bits; }
inline __nv_bfloat16 __ushort_as_bfloat16(unsigned short bits) { return {bits}; }
