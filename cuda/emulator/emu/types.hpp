// SPDX-License-Identifier: Apache-2.0
// CUDA's built-in vector types on a host, with CUDA's sizes and alignments.
#pragma once

#include <cstdint>
#include <cstring>

#define FLASHLLM_VECTORS(scalar, name, align2, align4)                                                    \
    struct alignas(align2) name##2 { scalar x, y; };                                                      \
    struct name##3 { scalar x, y, z; };                                                                   \
    struct alignas(align4) name##4 { scalar x, y, z, w; };                                                \
    inline name##2 make_##name##2(scalar x, scalar y) { return {x, y}; }                                  \
    inline name##3 make_##name##3(scalar x, scalar y, scalar z) { return {x, y, z}; }                     \
    inline name##4 make_##name##4(scalar x, scalar y, scalar z, scalar w) { return {x, y, z, w}; }

FLASHLLM_VECTORS(unsigned short, ushort, 4, 8)
FLASHLLM_VECTORS(short, short, 4, 8)
FLASHLLM_VECTORS(unsigned, uint, 8, 16)
FLASHLLM_VECTORS(int, int, 8, 16)
FLASHLLM_VECTORS(float, float, 8, 16)
#undef FLASHLLM_VECTORS

struct dim3 {
    unsigned x = 1, y = 1, z = 1;
};
