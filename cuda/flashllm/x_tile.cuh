// SPDX-License-Identifier: Apache-2.0
// An image of x (x_images.cuh) for tensor cores that read the columns of a tile in order: [kN][64], each row across all
// 32 banks, with 16-byte chunks swizzled as ldmatrix and wgmma need them.
#pragma once

#include "flashllm/portable.cuh"
#include "flashllm/ptx.cuh"
#include "flashllm/x_images.cuh"

namespace flashllm {

// kAligned: K is a multiple of 8 and x 16-byte aligned.
template <int kN_, bool kAligned>
struct XTile {
    static constexpr int kN = kN_;
    static constexpr int kColumns = bitmap::kTileK;
    static constexpr int kRowBytes = kColumns * 2;
    static constexpr unsigned kBytes = kN * kRowBytes;
    static constexpr int kPieceRows = 4;  // a lane has 16 bytes
    static constexpr int kPieces = kN / kPieceRows;
    static constexpr int kTogether = !kAligned ? 1 : 12;  // as many pieces as there are registers for

    struct Piece {
        uint4 values;
    };

    FLASHLLM_DEVICE static Piece load(const XPart& part, int piece) {
        const int lane = threadIdx.x & 31, row = piece * kPieceRows + (lane >> 3), column = (lane & 7) * 8;
        const unsigned short* const from = part.x + static_cast<long long>(row) * part.K + column;
        const int left = row < part.rows ? part.width - column : 0;
        if constexpr (kAligned) {
            return {left > 0 ? load_coherent(reinterpret_cast<const uint4*>(from)) : make_uint4(0, 0, 0, 0)};
        } else {
            unsigned pairs[4];
#pragma unroll
            for (int j = 0; j < 4; ++j) {
                const unsigned low = 2 * j < left ? load_coherent(from + 2 * j) : 0u;
                const unsigned high = 2 * j + 1 < left ? load_coherent(from + 2 * j + 1) : 0u;
                pairs[j] = low | high << 16;
            }
            return {make_uint4(pairs[0], pairs[1], pairs[2], pairs[3])};
        }
    }

    FLASHLLM_DEVICE static void store(unsigned char* tile, int piece, const Piece& chunk) {
        const int lane = threadIdx.x & 31, row = piece * kPieceRows + (lane >> 3);
        *reinterpret_cast<uint4*>(tile + row * kRowBytes + ((lane & 7) ^ (row & 7)) * 16) = chunk.values;
    }

    // Makes stores to shared memory visible to wgmma too.
    FLASHLLM_DEVICE static void publish() {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
        ptx::fence_async_proxy();
#endif
    }
};

}  // namespace flashllm
