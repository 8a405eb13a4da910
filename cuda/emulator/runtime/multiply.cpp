// SPDX-License-Identifier: Apache-2.0
// The arithmetic of a tensor-core step: 16 exact products per output are added to it and the sum is cut off, not
// rounded, to fp32, as the hardware does. (Its products lose a few low bits before the addition too; not modelled.)
#if defined(__F16C__)
#include <immintrin.h>
#endif

#include "emu/half.hpp"
#include "runtime/state.hpp"

namespace emu {

namespace {

typedef double Doubles __attribute__((vector_size(32)));
typedef float Floats __attribute__((vector_size(16)));
typedef long long Longs __attribute__((vector_size(32)));

void widen(Value type, const std::uint16_t* bits, unsigned count, double* to) {
    if (type == Value::bf16) {
        for (unsigned i = 0; i < count; ++i) to[i] = bf16_to_float(bits[i]);
        return;
    }
#if defined(__F16C__)
    for (unsigned i = 0; i < count; i += 8) {
        const __m256 wide = _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(bits + i)));
        _mm256_storeu_pd(to + i, _mm256_cvtps_pd(_mm256_castps256_ps128(wide)));
        _mm256_storeu_pd(to + i + 4, _mm256_cvtps_pd(_mm256_extractf128_ps(wide, 1)));
    }
#else
    for (unsigned i = 0; i < count; ++i) to[i] = fp16_to_float(bits[i]);
#endif
}

// Nearest fp32 towards zero. The 29 low mantissa bits are what fp32 has not; a NaN keeps its quiet bit.
Floats truncate(Doubles value) {
    return __builtin_convertvector((Doubles)((Longs)value & ~0x1fffffffll), Floats);
}

}  // namespace

void multiply_add(Value type, float* c, unsigned columns, const std::uint16_t* a, const std::uint16_t* b) {
    double wide_a[16 * 16], rows_b[8 * 16];
    widen(type, a, 16 * 16, wide_a);
    for (unsigned first = 0; first < columns; first += 8) {
        widen(type, b + first * 16, 8 * 16, rows_b);
        alignas(32) double columns_b[16][8];
        for (unsigned k = 0; k < 16; ++k) {
            for (unsigned n = 0; n < 8; ++n) columns_b[k][n] = rows_b[n * 16 + k];
        }
        for (unsigned row = 0; row < 16; ++row) {
            const double* row_a = wide_a + row * 16;
            for (unsigned half = 0; half < 8; half += 4) {
                float* place = c + row * columns + first + half;
                Floats narrow;
                std::memcpy(&narrow, place, sizeof narrow);
                Doubles even = __builtin_convertvector(narrow, Doubles), odd = {};
                for (unsigned k = 0; k < 16; k += 2) {
                    even += row_a[k] * *reinterpret_cast<const Doubles*>(&columns_b[k][half]);
                    odd += row_a[k + 1] * *reinterpret_cast<const Doubles*>(&columns_b[k + 1][half]);
                }
                narrow = truncate(even + odd);
                std::memcpy(place, &narrow, sizeof narrow);
            }
        }
    }
}

}  // namespace emu
