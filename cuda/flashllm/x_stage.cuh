// SPDX-License-Identifier: Apache-2.0
// x on its way from device memory to the tensor cores: [kN][64] stages in shared memory, one for each tile of W.
//
// S is the compile-time shape of a kernel: kN columns of x per block of kBlockWarps warps, kStageBytes between stages.
#pragma once

#include "flashllm/portable.cuh"
#include "flashllm/ptx.cuh"

namespace flashllm {

constexpr int kStageK = 64;
constexpr int kStageRowBytes = kStageK * 2;  // 128: one row of a stage spans all 32 banks

// Walks x along K, one [kN][64] stage per tile, swizzled like an image; wraps to column 0 where a row of tiles
// ends. Rows beyond N and columns beyond K become zeros.
template <typename S, bool kAligned>
struct XLoader {
    static constexpr int kThreads = S::kBlockWarps * 32;
    static constexpr int kChunks = S::kN * 8;  // 16-byte chunks of a stage
    static constexpr int kTurns = (kChunks + kThreads - 1) / kThreads;

    const unsigned short* source;  // this thread's first chunk of the next stage
    const unsigned short* x;       // a valid address
    unsigned target;               // its place in stage 0
    int K, column, n_left;         // n_left: rows from this thread's first row on

    FLASHLLM_DEVICE XLoader(const unsigned short* x_, int n0, int N, int K_, int tile_k, unsigned stages)
        : XLoader(x_, n0, N, K_, tile_k, stages, threadIdx.x) {}

    // For threads whose numbers in the block do not start at 0.
    FLASHLLM_DEVICE XLoader(const unsigned short* x_, int n0, int N, int K_, int tile_k, unsigned stages, int thread)
        : x(x_), K(K_) {
        const int n = thread >> 3, chunk = thread & 7;
        n_left = N - n0 - n;
        column = tile_k * kStageK + chunk * 8;
        source = x + static_cast<long long>(n0 + n) * K + column;
        target = stages + n * kStageRowBytes + ((chunk ^ (n & 7)) << 4);
    }

    template <int kStage>
    FLASHLLM_DEVICE void load() {
        load(kStage * S::kStageBytes);
    }

    // Loads the next stage, to `offset` bytes after stage 0.
    FLASHLLM_DEVICE void load(unsigned offset) {
#pragma unroll
        for (int turn = 0; turn < kTurns; ++turn) {
            constexpr int kRows = kThreads / 8;  // rows of one turn
            const bool active = kChunks >= kThreads || threadIdx.x < kChunks;
            const bool inside = turn * kRows < n_left && column < K;
            const unsigned short* from = source + static_cast<long long>(turn * kRows) * K;
            constexpr int kOtherSwizzle = kRows % 8;  // fewer rows than 8: the swizzle changes every other turn
            const unsigned to = (target ^ (turn * kOtherSwizzle % 8 << 4)) + offset + turn * kRows * kStageRowBytes;
            if constexpr (kAligned) {
                ptx::copy_async16(active, to, inside ? from : x, inside ? 16u : 0u);
            } else if (active) {
                // K is not a multiple of 8: rows start at any 2-byte address, so 16-byte copies are impossible.
                unsigned pair[4];
#pragma unroll
                for (int j = 0; j < 4; ++j) {
                    const unsigned low = inside && column + 2 * j < K ? from[2 * j] : 0u;
                    const unsigned high = inside && column + 2 * j + 1 < K ? from[2 * j + 1] : 0u;
                    pair[j] = low | high << 16;
                }
                ptx::store_shared(to, make_uint4(pair[0], pair[1], pair[2], pair[3]));
            }
        }
        source += kStageK, column += kStageK;
        const int over = column - (K + kStageK - 1) / kStageK * kStageK;
        if (over >= 0) source += over - column, column = over;
    }
};

}  // namespace flashllm
