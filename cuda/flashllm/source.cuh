// SPDX-License-Identifier: Apache-2.0
// What encoders read: elements of a dense matrix as 16-bit patterns, and counts of what rounding changed.
// Host side: src/flashllm/encode/source.py.
#pragma once

#include "flashllm/portable.cuh"

namespace flashllm {
namespace source {

// Whether an element with this pattern is stored: all but zeros of either sign.
FLASHLLM_DEVICE bool is_stored(unsigned short bits) { return (bits & 0x7fffu) != 0; }

FLASHLLM_DEVICE void add_warp_sum(int value, unsigned long long* total) {
    for (int lanes = 16; lanes > 0; lanes /= 2) value += __shfl_xor_sync(0xffffffffu, value, lanes);
    if ((threadIdx.x & 31) == 0 && value > 0) atomicAdd(total, static_cast<unsigned long long>(value));
}

// What rounding to 16 bits did to the nonzero elements of the source; mirrors RoundingReport.
enum RoundingField { kTotal, kChanged, kBecameZero, kBecameInfinite, kRoundingFields };
struct Rounding {
    int field[kRoundingFields] = {};
    FLASHLLM_DEVICE void add(unsigned source, unsigned infinity, unsigned short bits, bool exact, bool source_finite) {
        const unsigned magnitude = bits & 0x7fffu;
        field[kTotal] += (source & 0x7fffffffu) != 0;
        field[kChanged] += !exact;
        field[kBecameZero] += !exact && magnitude == 0;
        field[kBecameInfinite] += source_finite && magnitude == infinity;
    }
    // Adds the counts of a whole warp to totals[kRoundingFields].
    FLASHLLM_DEVICE void add_warp_to(unsigned long long* totals) const {
        for (int i = 0; i < kRoundingFields; ++i) add_warp_sum(field[i], totals + i);
    }
};

// A source defines how an element is read and how it becomes a 16-bit pattern. 16-bit sources keep every bit; float32
// is rounded to nearest, ties to even, and a NaN becomes the quiet NaN of the same sign.
struct Bits16 {
    using Element = unsigned short;
    using Pair = unsigned;
    static constexpr bool kRounds = false;
    static FLASHLLM_DEVICE Element low(Pair pair) { return static_cast<Element>(pair); }
    static FLASHLLM_DEVICE Element high(Pair pair) { return static_cast<Element>(pair >> 16); }
    static FLASHLLM_DEVICE unsigned short convert(Element bits, Rounding&) { return bits; }
};

struct Float32 {
    using Element = unsigned;
    using Pair = uint2;
    static constexpr bool kRounds = true;
    static FLASHLLM_DEVICE Element low(Pair pair) { return pair.x; }
    static FLASHLLM_DEVICE Element high(Pair pair) { return pair.y; }
};

struct Float32ToBf16 : Float32 {
    static FLASHLLM_DEVICE unsigned short convert(Element f, Rounding& rounding) {
        const unsigned magnitude = f & 0x7fffffffu;
        const bool is_nan = magnitude > 0x7f800000u;
        const unsigned rounded = is_nan ? (f >> 16 & 0x8000u) | 0x7fc0u : (f + 0x7fffu + (f >> 16 & 1u)) >> 16;
        const bool exact = is_nan || (f & 0xffffu) == 0;
        rounding.add(f, 0x7f80u, static_cast<unsigned short>(rounded), exact, magnitude < 0x7f800000u);
        return static_cast<unsigned short>(rounded);
    }
};

struct Float32ToFp16 : Float32 {
    static FLASHLLM_DEVICE unsigned short convert(Element f, Rounding& rounding) {
        const unsigned magnitude = f & 0x7fffffffu;
        unsigned rounded;
        bool exact;
        if (magnitude > 0x7f800000u) {         // NaN
            rounded = 0x7e00u;
            exact = true;
        } else if (magnitude >= 0x477ff000u) { // from 65520 on: the tie between 65504 and 65536, which is infinity, is even
            rounded = 0x7c00u;
            exact = magnitude == 0x7f800000u;
        } else if (magnitude >= 0x38800000u) { // normal: 13 bits fall off, the exponent bias drops from 127 to 15
            rounded = (magnitude + 0xfffu + (magnitude >> 13 & 1u) - 0x38000000u) >> 13;
            exact = (magnitude & 0x1fffu) == 0;
        } else if (magnitude > 0x33000000u) {  // subnormal: a multiple of 2^-24
            const unsigned significand = (magnitude & 0x7fffffu) | 0x800000u;
            const unsigned shift = 126u - (magnitude >> 23);
            const unsigned lost = significand & ((1u << shift) - 1u);
            const unsigned half = 1u << (shift - 1u);
            rounded = significand >> shift;
            rounded += lost > half || (lost == half && (rounded & 1u));
            exact = lost == 0;
        } else {                               // up to 2^-25, the tie between 0 and 2^-24: zero is even
            rounded = 0;
            exact = magnitude == 0;
        }
        rounded |= f >> 16 & 0x8000u;
        rounding.add(f, 0x7c00u, static_cast<unsigned short>(rounded), exact, magnitude < 0x7f800000u);
        return static_cast<unsigned short>(rounded);
    }
};

}  // namespace source
}  // namespace flashllm
