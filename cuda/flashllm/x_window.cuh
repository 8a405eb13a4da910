// SPDX-License-Identifier: Apache-2.0
// x on its way to tensor cores that gather its columns: windows of K in shared memory, one column of x after another.
//
// A window is up to 256 columns of x [N, K]. In shared memory a column is the N values that ldmatrix (transposed) takes
// as rows of 8, so that a lane may name any column as the k it wants. Columns are an odd number of 16-byte units apart:
// eight columns of eight residues mod 8 lie in different banks.
#pragma once

#include "flashllm/portable.cuh"
#include "flashllm/ptx.cuh"

namespace flashllm {

constexpr int kWindowColumns = 256;  // room of a window: any byte names a column

template <int kN>
struct XWindow {
    static constexpr int kColumnBytes = (kN / 8 | 1) * 16;
    static constexpr int kBytes = kWindowColumns * kColumnBytes;
    static_assert(kColumnBytes < 256, "an address is base + column * kColumnBytes by one 8-bit multiply-add");
};

// One warp brings windows: kUnits units of 64 columns of all rows of x at a time by cp.async, to where it writes them
// transposed from when they have landed. Rows beyond N and columns beyond K or beyond the window's become zeros.
template <int kN, int kUnits, bool kAligned>
struct XWindowLoader {
    static constexpr int kUnitColumns = 64;
    static constexpr int kUnitRowBytes = kUnitColumns * 2;  // 128: one row is all 32 banks; chunks are swizzled
    static constexpr int kUnitBytes = kN * kUnitRowBytes;
    static constexpr int kWindowUnits = kWindowColumns / kUnitColumns;
    static constexpr int kRounds = kWindowUnits / kUnits;  // of a window
    static constexpr int kRows = 4;  // of a unit that one turn of the warp's 16-byte chunks takes
    static_assert(kWindowUnits % kUnits == 0 && kN % (2 * kRows) == 0, "whole rounds, and the swizzle has two forms");

    const unsigned short* x;       // a valid address
    const unsigned short* source;  // this lane's first chunk of the next round
    unsigned units;                // shared address
    int K, window_columns, n_left;
    int within, column;  // of that chunk, in its window and in x
    int round = 0;       // the next one asked for, of its window

    FLASHLLM_DEVICE XWindowLoader(const unsigned short* x_, int n0, int N, int K_, int window_columns_, int window,
                                  unsigned units_)
        : x(x_), units(units_), K(K_), window_columns(window_columns_) {
        const int lane = threadIdx.x & 31, n = lane >> 3;
        n_left = N - n0 - n;
        within = (lane & 7) * 8;
        column = window * window_columns + within;
        source = x + static_cast<long long>(n0 + n) * K + column;
        ask();
    }

    // Asks for the next round of units.
    FLASHLLM_DEVICE void ask() {
        const int lane = threadIdx.x & 31;
        const unsigned short* from = source;
#pragma unroll
        for (int turn = 0; turn < kN / kRows; ++turn, from += static_cast<long long>(kRows) * K) {
            const unsigned chunk = (lane & 7) ^ (lane >> 3 | (turn & 1) * kRows);
            const unsigned target = units + (turn * kRows + (lane >> 3)) * kUnitRowBytes + chunk * 16;
#pragma unroll
            for (int unit = 0; unit < kUnits; ++unit) {
                const int over = unit * kUnitColumns;
                const bool real = turn * kRows < n_left && within + over < window_columns && column + over < K;
                if constexpr (kAligned) {
                    ptx::copy_async16(true, target + unit * kUnitBytes, real ? from + over : x, real ? 16u : 0u);
                } else {
                    // K is no multiple of 8: rows start at any 2-byte address, so 16-byte copies are out.
                    unsigned pair[4];
#pragma unroll
                    for (int j = 0; j < 4; ++j) {
                        const unsigned low = real && column + over + 2 * j < K ? from[over + 2 * j] : 0u;
                        const unsigned high = real && column + over + 2 * j + 1 < K ? from[over + 2 * j + 1] : 0u;
                        pair[j] = low | high << 16;
                    }
                    ptx::store_shared(target + unit * kUnitBytes, make_uint4(pair[0], pair[1], pair[2], pair[3]));
                }
            }
        }
        ptx::copy_async_commit();
        const bool last = ++round == kRounds;
        if (last) round = 0;
        // On to the next round, window or, with column 0, row of tiles.
        const int step = last ? window_columns - (kRounds - 1) * kUnits * kUnitColumns : kUnits * kUnitColumns;
        source += step, column += step;
        within = last ? (lane & 7) * 8 : within + step;
        if (last && column - within >= K) source -= column - within, column = within;
    }

    // Writes the next window to `target`, and asks for what follows. The lanes' stores are done on return.
    FLASHLLM_DEVICE void write(unsigned target) {
        const int lane = threadIdx.x & 31, row = lane & 7, matrix = lane >> 3;
        target += lane * XWindow<kN>::kColumnBytes;
#pragma unroll 1
        for (int i = 0; i < kRounds; ++i) {
            ptx::copy_async_wait<0>();
            __syncwarp();
#pragma unroll
            for (int half = 0; half < 2 * kUnits; ++half) {  // of a unit: 32 columns
                const unsigned from = units + half / 2 * kUnitBytes + row * kUnitRowBytes +
                                      (((half % 2 * 4 + matrix) ^ row) << 4);
                unsigned block[kN / 8][4];  // all loads before the first store: one latency, not kN / 8
#pragma unroll
                for (int n = 0; n < kN / 8; ++n) ptx::load_matrix_x4_transposed(block[n], from + n * 8 * kUnitRowBytes);
#pragma unroll
                for (int n = 0; n < kN / 8; ++n) {
                    ptx::store_matrix_x4(target + half * 32 * XWindow<kN>::kColumnBytes + n * 16, block[n]);
                }
            }
            target += kUnits * kUnitColumns * XWindow<kN>::kColumnBytes;
            __syncwarp();  // all have read the units before they are written again
            ask();
        }
    }
};

}  // namespace flashllm
