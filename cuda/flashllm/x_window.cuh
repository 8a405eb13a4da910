// SPDX-License-Identifier: Apache-2.0
// An image of x (x_images.cuh) for kernels that gather its columns: 256 columns, one after another.
//
// A column is its kN values, which ldmatrix (transposed) reads as rows of 8, so that a lane may address any column as
// the k that it wants. Eight columns with different residues mod 8 lie in different banks.
#pragma once

#include "flashllm/portable.cuh"
#include "flashllm/x_images.cuh"

namespace flashllm {

template <int kN_>
struct XWindow {
    static constexpr int kN = kN_;
    static constexpr int kColumns = 256;
    static constexpr int kUnits = kN / 8;  // of 16 bytes: a column's values in 8 rows
    // Columns are an odd number of units apart. At N = 16 they are two apart, with the units of rights swapped: as
    // good, and smaller. At N = 64 four such planes of 16 rows lie one after another.
    static constexpr bool kSwaps = kN == 16 || kN == 64;
    static constexpr int kColumnBytes = kSwaps ? 32 : (kUnits | 1) * 16;
    static constexpr unsigned kPlaneBytes = kColumns * kColumnBytes;
    static constexpr unsigned kBytes = kN == 64 ? 4 * kPlaneBytes : kPlaneBytes;
    static_assert(kColumnBytes < 256, "an address is base + column * kColumnBytes by one 8-bit multiply-add");

    static constexpr int kPieceColumns = 32;  // a lane has one
    static constexpr int kPieces = kColumns / kPieceColumns;
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
    static constexpr int kTogether = kN <= 32 ? 2 : 1;  // as many pieces as there are registers for
#else
    static constexpr int kTogether = kN <= 16 ? 2 : 1;  // sm_100a would spill
#endif

    // Offset of unit 0 from the start of its column.
    FLASHLLM_DEVICE static unsigned first_unit(int column) { return kSwaps ? column << 2 & 16 : 0; }
    // Unit j, given where unit 0 is.
    FLASHLLM_DEVICE static unsigned unit(unsigned first, int j) {
        return kSwaps ? (first ^ (j & 1) * 16u) + (j >> 1) * kPlaneBytes : first + j * 16;
    }

    struct Piece {
        unsigned values[kN / 2];
    };

    FLASHLLM_DEVICE static Piece load(const XPart& part, int piece) {
        const int column = piece * kPieceColumns + static_cast<int>(threadIdx.x & 31);
        const unsigned short* from = part.x + column;
        const int rows = column < part.width ? part.rows : 0;
        Piece out;
#pragma unroll
        for (int n = 0; n < kN; n += 2) {
            const unsigned low = n < rows ? load_coherent(from) : 0u;
            from += part.K;
            const unsigned high = n + 1 < rows ? load_coherent(from) : 0u;
            from += part.K;
            out.values[n / 2] = low | high << 16;
        }
        return out;
    }

    FLASHLLM_DEVICE static void store(unsigned char* window, int piece, const Piece& column) {
        const int number = piece * kPieceColumns + static_cast<int>(threadIdx.x & 31);
        window += number * kColumnBytes;
        const auto& values = column.values;
#pragma unroll
        for (int j = 0; j < kUnits; ++j) {
            *reinterpret_cast<uint4*>(window + unit(first_unit(number), j)) =
                make_uint4(values[j * 4], values[j * 4 + 1], values[j * 4 + 2], values[j * 4 + 3]);
        }
    }

    FLASHLLM_DEVICE static void publish() {}
};

}  // namespace flashllm
