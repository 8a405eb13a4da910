// SPDX-License-Identifier: Apache-2.0
// x on its way to tensor cores that gather its columns: turned once for a launch, then copied window by window.
//
// A window is up to 256 columns of x [N, K]. In shared memory a column is its N values, which ldmatrix (transposed) takes
// as rows of 8, so that a lane may name any column as the k it wants. Eight columns of eight residues mod 8 lie in
// different banks.
//
// In device memory x has rows. Blocks need its windows again and again, so a launch turns each just once, into a scratch
// buffer that holds windows as shared memory does: every multiplying warp its share, when it begins. Feeding warps copy
// windows from there. The first windows of a block do not wait for that, its warps turn them for themselves; and where
// blocks do not begin, since others run that wait for them, a feeding warp turns what it needs.
#pragma once

#include "flashllm/bitmap.cuh"
#include "flashllm/portable.cuh"
#include "flashllm/ptx.cuh"

namespace flashllm {

// What the blocks of a launch know of each other, zero before and after it: of each window, how many pieces are turned;
// and how many blocks need no more. In sectors of their own, as many look.
constexpr int kCounterWords = 8;

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
    static constexpr int kOwnPieces = kWindowPieces / bitmap::kParts;  // of a window that four warps turn
    static constexpr int kFirstWindows = 1;  // that a block turns for itself: two take .5 us longer than the second is waited for
    static constexpr int kTogether = kN <= 16 ? 2 : 1;  // there are registers for so many pieces

    const unsigned short* x;
    int N, K;
    int windows, window_columns;  // of x; of one
    unsigned* counters;           // kCounterWords for the blocks, then for each window of each column block
    unsigned char* scratch;

    // Of workspace, for the counters: whole 128 bytes.
    FLASHLLM_DEVICE static unsigned counter_bytes(int windows) {
        return (static_cast<unsigned>(windows) * gridDim.y + 1 + 3) / 4 * 4 * kCounterWords * 4;
    }
    FLASHLLM_DEVICE unsigned char* window(int number) const {
        return scratch + (static_cast<long long>(blockIdx.y) * windows + number) * Window::kBytes;
    }

    // By the four multiplying warps, when they begin: turns the run's first windows to shared memory, which they may read
    // then, and their shares.
    FLASHLLM_DEVICE void begin(unsigned char* to, int first_window, int warp) const {
        const auto own = [&](int i) {  // piece i of this warp
            const int window = (first_window + i / kOwnPieces) % windows;
            return load(blockIdx.y * kN, window, warp * kOwnPieces + i % kOwnPieces);
        };
        const auto store_own = [&](int i, const Piece& piece) {
            store(to + i / kOwnPieces * Window::kBytes, warp * kOwnPieces + i % kOwnPieces, piece);
        };
        Piece first[kTogether];  // these loads before the first store
#pragma unroll
        for (int i = 0; i < kTogether; ++i) first[i] = own(i);
#pragma unroll 1
        for (int share = first_share(warp); share < pieces(); share += step()) {
            const int number = share / kWindowPieces, column_block = number / windows, piece = share % kWindowPieces;
            store(scratch + static_cast<long long>(number) * Window::kBytes, piece,
                  load(column_block * kN, number - column_block * windows, piece));
        }
#pragma unroll
        for (int i = 0; i < kTogether; ++i) store_own(i, first[i]);
#pragma unroll 1
        for (int i = kTogether; i < kFirstWindows * kOwnPieces; ++i) store_own(i, own(i));
        ptx::meet<bitmap::kTileThreads>(kWindowBarrier);
        if (first_share(warp) < pieces()) tell(warp);
    }

    // By a feeding warp: whether a window is turned, after so many looks at the most. Then copies may read it.
    FLASHLLM_DEVICE bool is_turned(int window, int looks) const {
        const unsigned* const own = counter(static_cast<int>(blockIdx.y) * windows + window);
        while (!__all_sync(0xffffffffu, ptx::has_reached(own, kWindowPieces))) {
            if (--looks <= 0) return false;
            ptx::look_again();
        }
        ptx::fence_async_proxy_global();
        return true;
    }

    // By a feeding warp: whether all windows of its column block are.
    FLASHLLM_DEVICE bool all_are_turned() const {
        bool all = true;
        for (int i = threadIdx.x & 31; i < windows; i += 32) {
            all &= ptx::has_reached(counter(static_cast<int>(blockIdx.y) * windows + i), kWindowPieces);
        }
        ptx::fence_async_proxy_global();
        return __all_sync(0xffffffffu, all);
    }

    // By a feeding warp: turns a window, no matter who else may.
    FLASHLLM_DEVICE void turn(int number) const {
#pragma unroll 1
        for (int i = 0; i < kWindowPieces; ++i) store(window(number), i, load(blockIdx.y * kN, number, i));
        ptx::fence_async_proxy_global();
        __syncwarp();
    }

    // By a feeding warp that needs no more of x, and whose block has turned its share: the last one leaves zeros.
    FLASHLLM_DEVICE void leave() const {
        __threadfence();
        __syncwarp();
        const unsigned before = (threadIdx.x & 31) == 0 ? atomicAdd(counters, 1u) : 0;
        if (__shfl_sync(0xffffffffu, before, 0) != gridDim.x * gridDim.y - 1) return;
        for (int i = threadIdx.x & 31; i <= windows * static_cast<int>(gridDim.y); i += 32) counters[i * kCounterWords] = 0;
    }

private:
    FLASHLLM_DEVICE int pieces() const { return windows * kWindowPieces * static_cast<int>(gridDim.y); }
    // The first piece of a warp's share, and how far it is to the next.
    FLASHLLM_DEVICE int first_share(int warp) const {
        return static_cast<int>(blockIdx.y * gridDim.x + blockIdx.x) * bitmap::kParts + warp;
    }
    FLASHLLM_DEVICE int step() const { return static_cast<int>(gridDim.x * gridDim.y) * bitmap::kParts; }
    FLASHLLM_DEVICE unsigned* counter(int window) const { return counters + (window + 1) * kCounterWords; }

    // Counts the pieces of a warp's share.
    FLASHLLM_DEVICE void tell(int warp) const {
        __threadfence();
        __syncwarp();
        if ((threadIdx.x & 31) != 0) return;
        for (int share = first_share(warp); share < pieces(); share += step()) {
            atomicAdd(counter(share / kWindowPieces), 1u);
        }
    }

    struct Piece {
        unsigned values[kN / 2];
    };

    // The lane's column of a piece of a window, for rows of x from n0 on. Rows beyond N and columns beyond K or the window
    // are zeros.
    FLASHLLM_DEVICE Piece load(int n0, int window, int piece) const {
        const int within = piece * kPieceColumns + static_cast<int>(threadIdx.x & 31);
        const int column = window * window_columns + within;
        const bool inside = within < window_columns && column < K;
        const unsigned short* from = x + static_cast<long long>(n0) * K + column;
        const int rows = inside ? N - n0 : 0;
        Piece out;
#pragma unroll
        for (int n = 0; n < kN; n += 2) {
            const unsigned low = n < rows ? *from : 0u;
            from += K;
            const unsigned high = n + 1 < rows ? *from : 0u;
            from += K;
            out.values[n / 2] = low | high << 16;
        }
        return out;
    }

    FLASHLLM_DEVICE static void store(unsigned char* window, int piece, const Piece& column) {
        const int within = piece * kPieceColumns + static_cast<int>(threadIdx.x & 31);
        window += within * Window::kColumnBytes;
        const auto& values = column.values;
#pragma unroll
        for (int j = 0; j < Window::kUnits; ++j) {
            *reinterpret_cast<uint4*>(window + Window::unit(Window::first_unit(within), j)) =
                make_uint4(values[j * 4], values[j * 4 + 1], values[j * 4 + 2], values[j * 4 + 3]);
        }
    }
};

}  // namespace flashllm
