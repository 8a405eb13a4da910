// SPDX-License-Identifier: Apache-2.0
// Pairs up the columns of a dense matrix [M, K] on the device and fills their slots, and the way back; see
// cuda/flashllm/slot24.cuh. What becomes of the slots is in bitmap.cu.
//
// slot24_mark finds the rows in which each column has an element; slot24_pair forms the pairs from that alone, once for
// each window size that is tried; slot24_fill writes slots and picks. A warp takes one part of one window. The same
// bytes as from src/flashllm/formats/slot24_encode.py.
#include "flashllm/portable.cuh"
#include "flashllm/slot24.cuh"
#include "flashllm/slot24_pairs.cuh"
#include "flashllm/source.cuh"

namespace flashllm {
namespace slot24 {

constexpr int kThreads = bitmap::kTileThreads;
constexpr int kBlocks = 8;  // per SM: 64 registers, where a compiler left alone aims for fewer and spills

// Row of the matrix for row `bit` of a part of a strip.
FLASHLLM_DEVICE int row_of(int strip, int part, int bit) {
    return strip * bitmap::kTileM + (bit >> 4) * 64 + part * 16 + (bit & 15);
}

// The window and the part that a warp has; the grid is strips x windows.
struct Place {
    int lane, part, strip, number, windows;  // number of the window in the strip, of `windows`
    int width;                               // columns of the matrix in it
    long long column;                        // the first of them

    FLASHLLM_DEVICE Place(int K, int window) : lane(threadIdx.x & 31), part(threadIdx.x >> 5) {
        windows = (K + window - 1) / window;
        strip = static_cast<int>(blockIdx.x) / windows, number = static_cast<int>(blockIdx.x) % windows;
        column = static_cast<long long>(number) * window;
        width = static_cast<int>(min(static_cast<long long>(window), K - column));
    }
    // Index in picks and columns [tiles][4][32] for tile 0 or 1 of the window.
    FLASHLLM_DEVICE long long word(int tile) const {
        return ((static_cast<long long>(blockIdx.x) * kWindowTiles + tile) * bitmap::kParts + part) * 32 + lane;
    }
    // Index in the masks [strips][4][K] of the first column.
    FLASHLLM_DEVICE long long mask(int K) const {
        return (static_cast<long long>(strip) * bitmap::kParts + part) * K + column;
    }
    // Index of the first slot in a row.
    FLASHLLM_DEVICE long long slot(int row) const { return (static_cast<long long>(row) * windows + number) * kPairs; }
};

// Pick bits of one slot out of its rows, of which bits 0, 8, 16, 24 belong to the lane: bits 0, 16, 1, 17; and back.
FLASHLLM_DEVICE unsigned to_picks(unsigned rows) {
    const unsigned two = (rows & 0x01010101u) | (rows >> 15 & 0x202u);
    return (two & 0x3u) | (two & 0x300u) << 8;
}
FLASHLLM_DEVICE unsigned from_picks(unsigned picks) {
    const unsigned two = (picks & 0x3u) | (picks >> 8 & 0x300u);
    return (two | two << 15) & 0x01010101u;
}

}  // namespace slot24

// Grid: strips x 4 parts x groups of 128 columns. a [M, K], `pitch` elements from row to row. masks [strips][4][K]: a
// bit for each row of the part in which the column has an element; totals[4]: added to, what rounding did.
template <typename Source>
__global__ void __launch_bounds__(slot24::kThreads)
slot24_mark(const typename Source::Element* __restrict__ a, long long pitch, unsigned* __restrict__ masks,
            unsigned long long* __restrict__ totals, int M, int K) {
    const unsigned columns = static_cast<unsigned>(K), groups = (columns + slot24::kThreads - 1) / slot24::kThreads;
    const unsigned column = blockIdx.x % groups * slot24::kThreads + threadIdx.x, both = blockIdx.x / groups;
    const int strip = static_cast<int>(both / bitmap::kParts), part = static_cast<int>(both % bitmap::kParts);
    source::Rounding rounding;
    unsigned mask = 0;
    if (column < columns) {
#pragma unroll 8
        for (int bit = 0; bit < slot24::kPartRows; ++bit) {
            const int row = slot24::row_of(strip, part, bit);
            const typename Source::Element element = a[min(row, M - 1) * pitch + column];  // many loads at a time
            if (row < M && source::is_stored(Source::convert(element, rounding))) mask |= 1u << bit;
        }
        masks[static_cast<long long>(both) * K + column] = mask;
    }
    if constexpr (Source::kRounds) rounding.add_warp_to(totals);
}

// Grid: strips x windows. columns [tiles][4][32]. *failed must be 0 and becomes 1 when the columns of some part of some
// window do not pair up; then what `columns` holds is of no use.
__global__ void __launch_bounds__(slot24::kThreads, slot24::kBlocks)
slot24_pair(const unsigned* __restrict__ masks, unsigned* __restrict__ columns, int* failed, int K, int window) {
    __shared__ slot24::Problem problems[bitmap::kParts];
    const slot24::Place at(K, window);
    // One lane reads for all: another warp may write in between.
    const int already = at.lane == 0 ? *static_cast<const volatile int*>(failed) : 0;
    if (__shfl_sync(slot24::kWarp, already, 0) != 0) return;
    slot24::Problem& p = problems[at.part];
    slot24::load_problem(p, masks + at.mask(K), at.width, window, at.lane);
    if (!slot24::match(p, at.lane)) {
        if (at.lane == 0) *static_cast<volatile int*>(failed) = 1;
        return;
    }
    slot24::arrange(p, window, at.lane);
    for (int tile = 0; tile < slot24::kWindowTiles; ++tile) {
        columns[at.word(tile)] = reinterpret_cast<const unsigned*>(p.listed)[tile * 32 + at.lane];
    }
}

// Grid: strips x windows. slots [M, 128 * windows] and picks [tiles][4][32] from masks and columns as the kernels above
// leave them. A lane has four neighbouring slots.
template <typename Source>
__global__ void __launch_bounds__(slot24::kThreads, slot24::kBlocks)
slot24_fill(const typename Source::Element* __restrict__ a, long long pitch, const unsigned* __restrict__ masks,
            const unsigned* __restrict__ columns, unsigned short* __restrict__ slots, uint2* __restrict__ picks, int M,
            int K, int window) {
    constexpr int kOwn = slot24::kPairs / bitmap::kLanes;
    __shared__ unsigned listed[bitmap::kParts][slot24::kWindowTiles * bitmap::kLanes];
    __shared__ unsigned right_rows[bitmap::kParts][slot24::kPairs];
    const slot24::Place at(K, window);
    for (int tile = 0; tile < slot24::kWindowTiles; ++tile) {
        listed[at.part][tile * 32 + at.lane] = columns[at.word(tile)];
    }
    __syncwarp();
    const unsigned char* const column_of = reinterpret_cast<const unsigned char*>(listed[at.part]);
    const unsigned* const own = masks + at.mask(K);
    int column[2][kOwn];
    unsigned rows[2][kOwn];
#pragma unroll
    for (int j = 0; j < kOwn; ++j) {
        const int slot = at.lane * kOwn + j;
#pragma unroll
        for (int side = 0; side < 2; ++side) {
            const int listed_column = column_of[slot24::listed_at(slot, side)];
            column[side][j] = listed_column < at.width ? listed_column : 0;
            rows[side][j] = listed_column < at.width ? own[listed_column] : 0;
        }
        right_rows[at.part][slot] = rows[1][j];
    }
    __syncwarp();
    source::Rounding rounding;  // counted before
#pragma unroll 4
    for (int bit = 0; bit < slot24::kPartRows; ++bit) {
        const int row = slot24::row_of(at.strip, at.part, bit);
        const typename Source::Element* const from = a + min(row, M - 1) * pitch + at.column;
        unsigned short value[kOwn];
#pragma unroll
        for (int j = 0; j < kOwn; ++j) {  // without branches: many loads at a time
            const bool right = (rows[1][j] >> bit & 1) != 0;
            const unsigned short bits = Source::convert(from[right ? column[1][j] : column[0][j]], rounding);
            value[j] = ((rows[0][j] | rows[1][j]) >> bit & 1) != 0 ? bits : static_cast<unsigned short>(0);
        }
        const ushort4 all = make_ushort4(value[0], value[1], value[2], value[3]);
        if (row < M) *reinterpret_cast<ushort4*>(slots + at.slot(row) + at.lane * kOwn) = all;
    }
    for (int tile = 0; tile < slot24::kWindowTiles; ++tile) {
        unsigned words[2] = {};
#pragma unroll
        for (int v = 0; v < 2; ++v) {
            const unsigned* const mine = right_rows[at.part] + tile * bitmap::kTileK + v * 32 + (at.lane & 3) * 8;
#pragma unroll
            for (int i = 0; i < 8; ++i) words[v] |= slot24::to_picks(mine[i] >> (at.lane >> 2)) << 2 * i;
        }
        picks[at.word(tile)] = make_uint2(words[0], words[1]);
    }
}

// Grid: strips x windows. Dense w [M, K] from slots, picks and columns.
__global__ void __launch_bounds__(slot24::kThreads, slot24::kBlocks)
slot24_spread(const unsigned short* __restrict__ slots, const uint2* __restrict__ picks,
              const unsigned* __restrict__ columns, unsigned short* __restrict__ w, int M, int K, int window) {
    constexpr int kOwn = 2 * slot24::kPairs / bitmap::kLanes;
    __shared__ unsigned words[bitmap::kParts][2][slot24::kWindowTiles][bitmap::kLanes];
    __shared__ unsigned right_rows[bitmap::kParts][slot24::kPairs];
    __shared__ unsigned char slot_of[bitmap::kParts][2 * slot24::kPairs];
    const slot24::Place at(K, window);
    for (int tile = 0; tile < slot24::kWindowTiles; ++tile) {
        const uint2 pick = picks[at.word(tile)];
        words[at.part][0][tile][at.lane] = pick.x, words[at.part][1][tile][at.lane] = pick.y;
        const unsigned listed = columns[at.word(tile)];
        for (int step = 0; step < slot24::kSteps; ++step) {
            const int column = listed >> 8 * step & 0xff, slot = tile * bitmap::kTileK + step * 16 + at.lane / 2;
            if (column < at.width) slot_of[at.part][column] = static_cast<unsigned char>(slot);
        }
    }
    __syncwarp();
    for (int slot = at.lane; slot < slot24::kPairs; slot += 32) {
        unsigned rows = 0;
        for (int g = 0; g < 8; ++g) {
            const unsigned word = words[at.part][slot >> 5 & 1][slot >> 6][g * 4 + (slot >> 3 & 3)];
            rows |= slot24::from_picks(word >> 2 * (slot & 7)) << g;
        }
        right_rows[at.part][slot] = rows;
    }
    __syncwarp();
    int slot[kOwn];
    unsigned rows[kOwn];  // in which the slot may have the column's value
#pragma unroll
    for (int j = 0; j < kOwn; ++j) {
        const int column = j * 32 + at.lane;
        slot[j] = column < at.width ? slot_of[at.part][column] : 0;
        rows[j] = (column & 4) != 0 ? right_rows[at.part][slot[j]] : ~right_rows[at.part][slot[j]];
    }
#pragma unroll 2
    for (int bit = 0; bit < slot24::kPartRows; ++bit) {
        const int row = slot24::row_of(at.strip, at.part, bit);
        const unsigned short* const from = slots + at.slot(min(row, M - 1));
        unsigned short* const to = w + static_cast<long long>(row) * K + at.column + at.lane;
        unsigned short value[kOwn];
#pragma unroll
        for (int j = 0; j < kOwn; ++j) {
            const unsigned short bits = from[slot[j]];
            value[j] = (rows[j] >> bit & 1) != 0 ? bits : static_cast<unsigned short>(0);
        }
#pragma unroll
        for (int j = 0; j < kOwn; ++j) {
            if (row < M && j * 32 + at.lane < at.width) to[j * 32] = value[j];
        }
    }
}

}  // namespace flashllm
