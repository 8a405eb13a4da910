// SPDX-License-Identifier: Apache-2.0
// x on its way to tensor cores that gather its columns: turned once for a launch, then copied window by window.
//
// A window is up to 256 columns of x [N, K]. In shared memory a column is its N values, which ldmatrix (transposed) takes
// as rows of 8, so that a lane may name any column as the k it wants. Eight columns of eight residues mod 8 lie in
// different banks.
//
// In device memory x has rows. Blocks need its windows again and again, so a launch turns each just once, 32 columns at a
// time, into a scratch buffer that holds windows as shared memory does. Feeding warps do that when they have asked for all
// else, wait until all is turned, and copy. The first window of a block does not wait so long: its other warps turn it
// for themselves. Pieces go to warps by tickets, in the order in which they ask: a launch waits for no block that has not
// begun.
#pragma once

#include "flashllm/bitmap.cuh"
#include "flashllm/portable.cuh"
#include "flashllm/ptx.cuh"

namespace flashllm {

// What the blocks of a launch know of each other's work, zero before and after it.
struct TurnCounters {
    unsigned tickets, turned, passed;
};
constexpr int kTurnBytes = 128;     // of workspace, for them
constexpr int kWindowBarrier = 3;  // a named barrier: two are for slices (epilogue.cuh)

// A window of kN rows of x, in shared memory and in the scratch buffer.
template <int kN_>
struct XWindow {
    static constexpr int kN = kN_;
    static constexpr int kColumns = 256;
    static constexpr int kUnits = kN / 8;  // 16 bytes: a column's values of 8 rows
    // Columns are an odd number of units apart; two at N = 16, and those of rights swapped: as good, and smaller.
    static constexpr bool kSwaps = kUnits == 2;
    static constexpr int kColumnBytes = kSwaps ? 32 : (kUnits | 1) * 16;
    static constexpr unsigned kBytes = kColumns * kColumnBytes;
    static_assert(kColumnBytes < 256, "an address is base + column * kColumnBytes by one 8-bit multiply-add");

    // Where unit 0 of a column lies, from the begin of the column.
    FLASHLLM_DEVICE static unsigned first_unit(int column) { return kSwaps ? column << 2 & 16 : 0; }
    // Unit j, from unit 0.
    FLASHLLM_DEVICE static unsigned unit(unsigned first, int j) { return kSwaps ? first ^ j * 16u : first + j * 16; }
};

template <int kN>
struct XTurn {
    using Window = XWindow<kN>;
    static constexpr int kPieceColumns = bitmap::kLanes;
    static constexpr int kWindowPieces = Window::kColumns / kPieceColumns;

    const unsigned short* x;
    int N, K;
    int windows, window_columns;  // of x; of one
    TurnCounters* counters;
    unsigned char* scratch;

    FLASHLLM_DEVICE const unsigned char* window(int number) const {
        return scratch + (static_cast<long long>(blockIdx.y) * windows + number) * Window::kBytes;
    }

    // Turns a piece of a window, for rows of x from n0 on. Rows beyond N and columns beyond K or the window become zeros.
    FLASHLLM_DEVICE void turn_piece(unsigned char* to, int n0, int window, int piece) const {
        const int within = piece * kPieceColumns + static_cast<int>(threadIdx.x & 31);
        const int column = window * window_columns + within;
        const bool inside = within < window_columns && column < K;
        const unsigned short* const from = x + static_cast<long long>(n0) * K + column;
        unsigned values[kN / 2];
#pragma unroll
        for (int n = 0; n < kN; n += 2) {
            const unsigned low = inside && n0 + n < N ? from[static_cast<long long>(n) * K] : 0u;
            const unsigned high = inside && n0 + n + 1 < N ? from[static_cast<long long>(n + 1) * K] : 0u;
            values[n / 2] = low | high << 16;
        }
        to += within * Window::kColumnBytes;
#pragma unroll
        for (int j = 0; j < Window::kUnits; ++j) {
            *reinterpret_cast<uint4*>(to + Window::unit(Window::first_unit(within), j)) =
                make_uint4(values[j * 4], values[j * 4 + 1], values[j * 4 + 2], values[j * 4 + 3]);
        }
    }

    // By the four multiplying warps: a window to shared memory, which they may read then.
    FLASHLLM_DEVICE void turn_window(unsigned char* to, int n0, int window, int warp) const {
        constexpr int kOwn = kWindowPieces / bitmap::kParts;
#pragma unroll
        for (int i = 0; i < kOwn; ++i) turn_piece(to, n0, window, warp * kOwn + i);
        ptx::meet<bitmap::kTileThreads>(kWindowBarrier);
    }

    // By a feeding warp: turns pieces until none is left and waits until all are turned. Then copies may read them.
    FLASHLLM_DEVICE void turn_all() const {
        const int lane = threadIdx.x & 31;
        const unsigned pieces = static_cast<unsigned>(windows * kWindowPieces) * gridDim.y;
        while (true) {
            unsigned piece = lane == 0 ? atomicAdd(&counters->tickets, 1u) : 0;
            piece = __shfl_sync(0xffffffffu, piece, 0);
            if (piece >= pieces) break;
            const int number = static_cast<int>(piece / kWindowPieces), column_block = number / windows;
            unsigned char* const to = scratch + static_cast<long long>(number) * Window::kBytes;
            turn_piece(to, column_block * kN, number - column_block * windows, static_cast<int>(piece % kWindowPieces));
            __threadfence();
            __syncwarp();
            if (lane == 0) atomicAdd(&counters->turned, 1u);
        }
        if (lane == 0) {
            ptx::wait_global(&counters->turned, pieces);
            // The last to have seen all it needs leaves zeros.
            if (atomicAdd(&counters->passed, 1u) == gridDim.x * gridDim.y - 1) *counters = {0, 0, 0};
        }
        __syncwarp();
        ptx::fence_async_proxy_global();
    }
};

}  // namespace flashllm
