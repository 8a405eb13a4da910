// SPDX-License-Identifier: Apache-2.0
// The arithmetic of a tensor-core step: 16 exact products per output (where a is sparse, those of its stored elements)
// are added to the output, and the sum is truncated, not rounded, to fp32, as the hardware does. (The hardware's
// products also lose a few low bits before the addition, which is not modelled.)
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

// Nearest fp32 towards zero. fp32 lacks the 29 low mantissa bits; a NaN keeps its quiet bit.
Floats truncate(Doubles value) {
    return __builtin_convertvector((Doubles)((Longs)value & ~0x1fffffffll), Floats);
}

// b[8][kDepth], widened and transposed.
template <unsigned kDepth>
struct Columns {
    alignas(32) double of[kDepth][8];

    Columns(Value type, const std::uint16_t* b) {
        double rows[8 * kDepth];
        widen(type, b, 8 * kDepth, rows);
        for (unsigned k = 0; k < kDepth; ++k) {
            for (unsigned n = 0; n < 8; ++n) of[k][n] = rows[n * kDepth + k];
        }
    }
};

// c[8] += 16 products: element k of a with column place(k) of b.
template <unsigned kDepth, typename Place>
void add_row(float* c, const double* a, const Columns<kDepth>& b, Place place) {
    for (unsigned half = 0; half < 8; half += 4) {
        Floats narrow;
        std::memcpy(&narrow, c + half, sizeof narrow);
        Doubles even = __builtin_convertvector(narrow, Doubles), odd = {};
        for (unsigned k = 0; k < 16; k += 2) {
            even += a[k] * *reinterpret_cast<const Doubles*>(&b.of[place(k)][half]);
            odd += a[k + 1] * *reinterpret_cast<const Doubles*>(&b.of[place(k + 1)][half]);
        }
        narrow = truncate(even + odd);
        std::memcpy(c + half, &narrow, sizeof narrow);
    }
}

}  // namespace

void multiply_add(Value type, float* c, unsigned columns, const std::uint16_t* a, const std::uint16_t* b) {
    double wide_a[16 * 16];
    widen(type, a, 16 * 16, wide_a);
    for (unsigned first = 0; first < columns; first += 8) {
        const Columns<16> columns_b(type, b + first * 16);
        for (unsigned m = 0; m < 16; ++m) {
            add_row(c + m * columns + first, wide_a + m * 16, columns_b, [](unsigned k) { return k; });
        }
    }
}

void multiply_add_sparse(Value type, float* c, const std::uint16_t* a, const std::uint16_t* b,
                         const unsigned char (*place)[16]) {
    double wide_a[16 * 16];
    widen(type, a, 16 * 16, wide_a);
    const Columns<32> columns_b(type, b);
    for (unsigned m = 0; m < 16; ++m) {
        add_row(c + m * 8, wide_a + m * 16, columns_b, [=](unsigned k) { return place[m][k]; });
    }
}

}  // namespace emu
