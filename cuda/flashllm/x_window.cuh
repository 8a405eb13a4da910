// SPDX-License-Identifier: Apache-2.0
// x on its way to tensor cores that gather its columns: windows of K in shared memory, one column of x after another.
//
// A window is up to 256 columns of x [N, K]. In shared memory a column is its N values, which ldmatrix (transposed) takes
// as rows of 8, so that a lane may name any column as the k it wants. Columns are an odd number of 16-byte units apart:
// eight columns of eight residues mod 8 lie in different banks.
//
// The four warps of a block write a window together, 64 columns each: a warp copies its columns, rows of x, to a place of
// its own by cp.async, and from there transposed to the window, one window ahead of the products. Barriers count the
// warps that have written a window, and those that have done with it.
#pragma once

#include "flashllm/portable.cuh"
#include "flashllm/ptx.cuh"
#include "flashllm/warp_arrival.cuh"

namespace flashllm {

// kWindows: places for windows. kAligned: K is a multiple of 8 and x 16-byte aligned.
template <int kN, int kWindows, bool kAligned>
struct XWindows {
    static constexpr int kWarps = 4;
    static constexpr int kWarpColumns = 64;
    static constexpr int kColumnBytes = (kN / 8 | 1) * 16;
    static constexpr unsigned kWindowBytes = kWarps * kWarpColumns * kColumnBytes;
    static constexpr int kRowBytes = kWarpColumns * 2;  // 128 of a warp's place: all 32 banks; chunks are swizzled
    static constexpr int kRows = 4;                     // that one turn of the warp's 16-byte chunks takes
    static constexpr unsigned kBytes = kWindows * kWindowBytes + kWarps * kN * kRowBytes;
    static_assert(kN % (2 * kRows) == 0, "the swizzle has two forms");
    static_assert(kColumnBytes < 256, "an address is base + column * kColumnBytes by one 8-bit multiply-add");

    const unsigned short* x;       // a valid address
    const unsigned short* source;  // this lane's first chunk of the next window
    unsigned base, barriers;       // shared addresses: of the windows; of full and empty of each, landed of each warp
    int K, window_columns, n_left;
    int column;                    // of the lane's chunk
    int warp;                      // this one's number, known to be uniform
    int windows, written = 0;      // of the run
    int place = 0, next_place = 0;  // of the window in use, of the one to be written next
    unsigned parity = 0, next_parity = 0, landed_parity = 0;

    // `window`: of the run's first tile; `windows_`: of the run. Then a barrier of the block.
    FLASHLLM_DEVICE XWindows(const unsigned short* x_, int n0, int N, int K_, int window_columns_, int window,
                             int windows_, int warp_, unsigned base_, unsigned barriers_)
        : x(x_), base(base_), barriers(barriers_), K(K_), window_columns(window_columns_), warp(warp_),
          windows(windows_) {
        const int lane = threadIdx.x & 31, n = lane >> 3;
        n_left = N - n0 - n;
        column = window * window_columns + within();
        source = x + static_cast<long long>(n0 + n) * K + column;
    }

    // By one thread; then a barrier of the block.
    FLASHLLM_DEVICE static void init(unsigned barriers) {
        for (int i = 0; i < 2 * kWindows; ++i) ptx::mbarrier_init(barriers + i * 8, kWarps * kWarpArrivals);
        for (int i = 0; i < kWarps; ++i) ptx::mbarrier_init(barriers + (2 * kWindows + i) * 8, 32);
    }

    FLASHLLM_DEVICE unsigned full(int i) const { return barriers + i * 16; }
    FLASHLLM_DEVICE unsigned empty(int i) const { return full(i) + 8; }
    FLASHLLM_DEVICE unsigned landed() const { return barriers + kWindows * 16 + warp * 8; }
    FLASHLLM_DEVICE int within() const { return warp * kWarpColumns + (threadIdx.x & 7) * 8; }
    FLASHLLM_DEVICE unsigned warp_place() const { return base + kWindows * kWindowBytes + warp * (kN * kRowBytes); }

    // Asks for this warp's columns of the next window. Rows beyond N and columns beyond K or the window become zeros.
    FLASHLLM_DEVICE void ask() {
        const int lane = threadIdx.x & 31;
        const bool inside = within() < window_columns && column < K;
        const unsigned short* from = source;
#pragma unroll
        for (int turn = 0; turn < kN / kRows; ++turn, from += static_cast<long long>(kRows) * K) {
            const unsigned chunk = (lane & 7) ^ (lane >> 3 | (turn & 1) * kRows);
            const unsigned to = warp_place() + (turn * kRows + (lane >> 3)) * kRowBytes + chunk * 16;
            const bool real = inside && turn * kRows < n_left;
            if constexpr (kAligned) {
                ptx::copy_async16(true, to, real ? from : x, real ? 16u : 0u);
            } else {
                // K is no multiple of 8: rows start at any 2-byte address, so 16-byte copies are out.
                unsigned pair[4];
#pragma unroll
                for (int j = 0; j < 4; ++j) {
                    const unsigned low = real && column + 2 * j < K ? from[2 * j] : 0u;
                    const unsigned high = real && column + 2 * j + 1 < K ? from[2 * j + 1] : 0u;
                    pair[j] = low | high << 16;
                }
                ptx::store_shared(to, make_uint4(pair[0], pair[1], pair[2], pair[3]));
            }
        }
        if constexpr (kAligned) {
            ptx::mbarrier_arrive_after_copies(landed());
        } else {
            ptx::mbarrier_arrive(landed());  // the other arrival waits for asynchronous copies, not for stores
        }
        source += window_columns, column += window_columns;
        if (column - within() >= K) source -= column - within(), column = within();  // the next row of tiles
    }

    // Writes this warp's columns of the next window, and asks for those of the one after.
    FLASHLLM_DEVICE void write() {
        const int lane = threadIdx.x & 31, row = lane & 7, matrix = lane >> 3;
        ptx::mbarrier_wait(landed(), landed_parity);
        landed_parity ^= 1;
        if (written >= kWindows) ptx::mbarrier_wait(empty(next_place), next_parity ^ 1);
        const unsigned to = base + next_place * kWindowBytes + (warp * kWarpColumns + lane) * kColumnBytes;
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const unsigned from = warp_place() + row * kRowBytes + (((half * 4 + matrix) ^ row) << 4);
            unsigned block[kN / 8][4];  // all loads before the first store: one latency, not kN / 8
#pragma unroll
            for (int n = 0; n < kN / 8; ++n) ptx::load_matrix_x4_transposed(block[n], from + n * 8 * kRowBytes);
#pragma unroll
            for (int n = 0; n < kN / 8; ++n) ptx::store_matrix_x4(to + half * 32 * kColumnBytes + n * 16, block[n]);
        }
        warp_arrive(full(next_place));
        if (++next_place == kWindows) next_place = 0, next_parity ^= 1;
        if (++written < windows) ask();
    }

    // Waits until the window in use is there for all; its shared address.
    FLASHLLM_DEVICE unsigned enter() const {
        ptx::mbarrier_wait(full(place), parity);
        return base + place * kWindowBytes;
    }

    // This warp has done with it.
    FLASHLLM_DEVICE void leave() {
        warp_arrive(empty(place));
        if (++place == kWindows) place = 0, parity ^= 1;
    }
};

}  // namespace flashllm
