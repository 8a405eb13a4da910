// SPDX-License-Identifier: Apache-2.0
// x on its way to tensor cores that gather its columns: turned once for a launch, then copied window by window.
//
// A window is up to 256 columns of x [N, K]. In shared memory a column is its N values, which ldmatrix (transposed) takes
// as rows of 8, so that a lane may name any column as the k it wants. Eight columns of eight residues mod 8 lie in
// different banks.
//
// In device memory x has rows. Blocks need its windows again and again, so a launch turns each just once, into a scratch
// buffer that holds windows as shared memory does. The multiplying warps do that while their first tile is on its way;
// feeding warps wait until all is turned, and copy. The first window of a block does not wait so long: its warps turn it for
// themselves. Shares go to blocks by tickets, in the order in which they begin, and if some do not begin, feeding warps
// take theirs: a launch waits for no block that has not begun.
#pragma once

#include "flashllm/bitmap.cuh"
#include "flashllm/portable.cuh"
#include "flashllm/ptx.cuh"

namespace flashllm {

// What the blocks of a launch know of each other's work, zero before and after it. Each in a line of its own: many ask.
struct TurnCounters {
    unsigned tickets;
    unsigned pad_0[31];
    unsigned turned;  // pieces
    unsigned pad_1[31];
    unsigned through;  // blocks
    unsigned pad_2[31];
};
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

    // By the four multiplying warps, when they begin: turns the run's first window to shared memory, which they may read
    // then, and the block's share of x. `ticket`: a word of shared memory.
    FLASHLLM_DEVICE void begin(unsigned char* to, int n0, int window, unsigned ticket, int warp) const {
        constexpr int kOwn = kWindowPieces / bitmap::kParts;
        const unsigned drawn = threadIdx.x == 0 ? atomicAdd(&counters->tickets, 1u) : 0;
#pragma unroll
        for (int i = 0; i < kOwn; ++i) turn_piece(to, n0, window, warp * kOwn + i);
        if (threadIdx.x == 0) ptx::store_shared(ticket, drawn);
        ptx::meet<bitmap::kTileThreads>(kWindowBarrier);
        turn_share(ptx::load_shared4(ticket), warp);
    }

    // By a feeding warp: waits until all of x is turned. Then copies may read it.
    FLASHLLM_DEVICE void wait() const {
        constexpr int kLooks = 64;  // tens of microseconds: blocks that have drawn tickets are through with them
        for (int look = 1; !__all_sync(0xffffffffu, ptx::has_reached(&counters->turned, pieces())); ++look) {
            if (look == kLooks) help();
            ptx::look_again();
        }
        ptx::fence_async_proxy_global();
    }

    // By a feeding warp, when its block has drawn its ticket and waited: the last one leaves zeros.
    FLASHLLM_DEVICE void leave() const {
        if ((threadIdx.x & 31) == 0 && atomicAdd(&counters->through, 1u) == gridDim.x * gridDim.y - 1) {
            counters->tickets = counters->turned = counters->through = 0;
        }
    }

private:
    FLASHLLM_DEVICE int pieces() const { return windows * kWindowPieces * static_cast<int>(gridDim.y); }
    // Pieces of a share: so many that half of the blocks are enough for all.
    FLASHLLM_DEVICE int share() const {
        const int enough = static_cast<int>(gridDim.x * gridDim.y + 1) / 2;
        return (pieces() / bitmap::kParts + enough - 1) / enough * bitmap::kParts;
    }

    // Turns one warp's part of a share.
    FLASHLLM_DEVICE void turn_share(unsigned ticket, int warp) const {
        const int own = share();
        if (ticket > static_cast<unsigned>((pieces() - 1) / own)) return;
        const int begin = static_cast<int>(ticket) * own, end = min(begin + own, pieces());
        unsigned turned = 0;
#pragma unroll 1
        for (int piece = begin + warp; piece < end; piece += bitmap::kParts, ++turned) {
            const int number = piece / kWindowPieces, column_block = number / windows;
            turn_piece(scratch + static_cast<long long>(number) * Window::kBytes, column_block * kN,
                       number - column_block * windows, piece % kWindowPieces);
        }
        __threadfence();
        __syncwarp();
        if ((threadIdx.x & 31) == 0) atomicAdd(&counters->turned, turned);
    }

    // Turns the shares for which nobody has drawn tickets.
    FLASHLLM_DEVICE void help() const {
        while (true) {
            const unsigned drawn = (threadIdx.x & 31) == 0 ? atomicAdd(&counters->tickets, 1u) : 0;
            const unsigned ticket = __shfl_sync(0xffffffffu, drawn, 0);
            if (ticket > static_cast<unsigned>((pieces() - 1) / share())) return;
#pragma unroll 1
            for (int warp = 0; warp < bitmap::kParts; ++warp) turn_share(ticket, warp);
        }
    }
};

}  // namespace flashllm
