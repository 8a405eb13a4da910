// SPDX-License-Identifier: Apache-2.0
// Pairs up the columns of a dense matrix [M, K] on the device and fills their slots, and the way back; see
// cuda/flashllm/slot24.cuh. What becomes of the slots is in bitmap.cu.
//
// slot24_mark finds the rows in which each column has an element; slot24_pair forms the pairs from that alone, once for
// each arrangement that is tried; slot24_fill writes slots and picks. A warp pairs the columns of one
// band of one window, or fills 32 rows of it. The same bytes as from src/flashllm/formats/slot24_encode.py.
#include "flashllm/portable.cuh"
#include "flashllm/slot24.cuh"
#include "flashllm/slot24_groups.cuh"
#include "flashllm/slot24_pairs.cuh"
#include "flashllm/source.cuh"

namespace flashllm {
namespace slot24 {

constexpr int kThreads = bitmap::kTileThreads;
constexpr int kBlocks = 8;  // per SM: 64 registers, where a compiler left alone aims for fewer and spills

// Row of a tile for row `bit` of a band of 32.
FLASHLLM_DEVICE int row_of(int band, int bit) { return (bit >> 4) * 64 + band * 16 + (bit & 15); }

// The window that a block has; the grid is strips x windows.
struct Place {
    int strip, number, windows;  // number of the window in the strip, of `windows`
    int width;                   // columns of the matrix in it
    long long column;            // the first of them

    FLASHLLM_DEVICE Place(int K, int window) {
        windows = (K + window - 1) / window;
        strip = static_cast<int>(blockIdx.x) / windows, number = static_cast<int>(blockIdx.x) % windows;
        column = static_cast<long long>(number) * window;
        width = static_cast<int>(min(static_cast<long long>(window), K - column));
    }
    // The strip's masks [4][K], from the window's first column on.
    FLASHLLM_DEVICE const unsigned* masks(const unsigned* all, int K) const {
        return all + static_cast<long long>(strip) * bitmap::kParts * K + column;
    }
};

// A quarter of the rows of a tile, which one warp fills or spreads: a band of 32, or half of one of 64. Bit 16 i + a of
// its masks is row a of its 16 rows i, as stored.
template <int kPartRows>
struct Quarter {
    using Shape = Bands<kPartRows>;
    static constexpr bool kTall = Shape::kHalves == 2;
    int number;

    FLASHLLM_DEVICE int band() const { return number / Shape::kHalves; }
    // Row of the tile.
    FLASHLLM_DEVICE int row(int bit) const { return kTall ? number * 32 + bit : row_of(number, bit); }
    // Part of a tile that has a slot of the window; row and slot as they are stored.
    FLASHLLM_DEVICE int part(int slot) const { return kTall ? band() * 2 + (slot >> 5 & 1) : number; }
    FLASHLLM_DEVICE int stored_row(int bit, int slot) const { return row_of(part(slot), bit); }
    FLASHLLM_DEVICE int stored_slot(int slot) const {
        return kTall ? (slot & 0x4f) | (slot & 0x10) << 1 | (number & 1) << 4 : slot;
    }
    // Word in the picks of a window, [tile][part][lane] of two, of a slot in rows a = g mod 8.
    FLASHLLM_DEVICE int pick_word(int slot, int g) const {
        const int at = stored_slot(slot);
        return ((at >> 6) * bitmap::kTileThreads + part(slot) * 32 + g * 4 + (at >> 3 & 3)) * 2 + (at >> 5 & 1);
    }
    // Byte in the columns of a window.
    FLASHLLM_DEVICE int column_byte(int slot, int side) const {
        const int tile = slot / bitmap::kTileK;
        return (tile * Shape::kBands + band()) * Shape::kBandColumnBytes + Shape::column_byte(slot, side);
    }
    // Rows of a column: out of the strip's masks, which are of bands of 32.
    FLASHLLM_DEVICE unsigned rows(const unsigned* masks, int K, int column) const {
        const unsigned* const own = masks + static_cast<long long>(kTall ? (number & 1) * 2 : number) * K + column;
        if constexpr (!kTall) return own[0];
        const int shift = band() * 16;
        return (own[0] >> shift & 0xffffu) | own[K] >> shift << 16;
    }
};

// Words that a window has in all parts, loaded by the whole block.
template <int kWords>
FLASHLLM_DEVICE void load_window(unsigned (&target)[kWords], const unsigned* source) {
    const unsigned* const own = source + static_cast<long long>(blockIdx.x) * kWords;
#pragma unroll
    for (int i = threadIdx.x; i < kWords; i += kThreads) target[i] = own[i];
}
template <int kPartRows>
inline constexpr int kColumnWords = kWindowTiles * Bands<kPartRows>::kColumnBytes / 4;
constexpr int kPickWords = kWindowTiles * kPickBytes / 4;

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

// Grid: strips x 4 bands of 32 rows x groups of 128 columns. a [M, K], `pitch` elements from row to row. masks
// [strips][4][K]: a bit for each row of the band in which the column has an element; totals[5]: added to, nnz and what
// rounding did.
template <typename Source>
__global__ void __launch_bounds__(slot24::kThreads)
slot24_mark(const typename Source::Element* __restrict__ a, long long pitch, unsigned* __restrict__ masks,
            unsigned long long* __restrict__ totals, int M, int K) {
    const unsigned columns = static_cast<unsigned>(K), groups = (columns + slot24::kThreads - 1) / slot24::kThreads;
    const unsigned column = blockIdx.x % groups * slot24::kThreads + threadIdx.x, both = blockIdx.x / groups;
    const int strip = static_cast<int>(both / bitmap::kParts), band = static_cast<int>(both % bitmap::kParts);
    source::Rounding rounding;
    unsigned mask = 0;
    if (column < columns) {
#pragma unroll 8
        for (int bit = 0; bit < 32; ++bit) {
            const int row = strip * bitmap::kTileM + slot24::row_of(band, bit);
            const typename Source::Element element = a[min(row, M - 1) * pitch + column];  // many loads at a time
            if (row < M && source::is_stored(Source::convert(element, rounding))) mask |= 1u << bit;
        }
        masks[static_cast<long long>(both) * K + column] = mask;
    }
    source::add_warp_sum(__popc(mask), totals);
    if constexpr (Source::kRounds) rounding.add_warp_to(totals + 1);
}

// Grid: strips x windows; a warp for each band. columns [tiles][4][32][steps]. *failed must be 0 and becomes 1 when the
// columns of some band of some window do not pair up, or not so that groups have at most kGroupValues values; then what
// `columns` holds is of no use.
template <int kPartRows, int kGroupValues>
__global__ void __launch_bounds__(slot24::Bands<kPartRows>::kBands * 32, slot24::kBlocks * kPartRows / 32)
slot24_pair(const unsigned* __restrict__ masks, unsigned* __restrict__ columns, int* failed, int K, int window) {
    using Shape = slot24::Bands<kPartRows>;
    using Problem = typename slot24::ProblemFor<kPartRows, kGroupValues>::Type;
    __shared__ Problem problems[Shape::kBands];
    const slot24::Place at(K, window);
    const int lane = threadIdx.x & 31, band = threadIdx.x >> 5;
    // One lane reads for all: another warp may write in between.
    const int already = lane == 0 ? *static_cast<const volatile int*>(failed) : 0;
    if (__shfl_sync(slot24::kWarp, already, 0) != 0) return;
    Problem& p = problems[band];
    const auto rows_of = [&](int column) {
        const unsigned* const own = at.masks(masks, K);
        slot24::Rows<kPartRows> rows = 0;
#pragma unroll
        for (int half = Shape::kHalves - 1; half >= 0; --half) {
            rows <<= 16, rows <<= 16;  // by 32 at one time would be more than a word has
            rows |= slot24::Quarter<kPartRows>{band * Shape::kHalves + half}.rows(own, K, column);
        }
        return rows;
    };
    slot24::load_problem(p, rows_of, at.width, window, lane);
    bool paired;
    if constexpr (kGroupValues < bitmap::kGroup) {
        paired = slot24::pair_in_groups(p, window, lane);
    } else {
        paired = slot24::match(p.columns, lane);
        if (paired) slot24::arrange(p, window, lane);
    }
    if (!paired) {
        if (lane == 0) *static_cast<volatile int*>(failed) = 1;
        return;
    }
    for (int tile = 0; tile < slot24::kWindowTiles; ++tile) {
        const long long to = (static_cast<long long>(blockIdx.x) * slot24::kWindowTiles + tile) * Shape::kBands + band;
        columns[to * 32 + lane] = reinterpret_cast<const unsigned*>(p.listed)[tile * 32 + lane];
    }
}

// Grid: strips x windows. slots, as they are stored, [rows of whole tiles, 128 * windows], and picks [tiles][4][32][2]
// from masks and columns as the kernels above leave them. A lane has four neighbouring slots.
template <typename Source, int kPartRows>
__global__ void __launch_bounds__(slot24::kThreads, slot24::kBlocks)
slot24_fill(const typename Source::Element* __restrict__ a, long long pitch, const unsigned* __restrict__ masks,
            const unsigned* __restrict__ columns, unsigned short* __restrict__ slots, unsigned* __restrict__ picks, int M,
            int K, int window) {
    constexpr int kOwn = slot24::kPairs / bitmap::kLanes;
    __shared__ unsigned listed[slot24::kColumnWords<kPartRows>];
    __shared__ unsigned right_rows[bitmap::kParts][slot24::kPairs];
    const slot24::Place at(K, window);
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
    const slot24::Quarter<kPartRows> quarter{warp};
    slot24::load_window(listed, columns);
    __syncthreads();
    const unsigned char* const column_of = reinterpret_cast<const unsigned char*>(listed);
    const unsigned* const own = at.masks(masks, K);
    int column[2][kOwn];
    unsigned rows[2][kOwn];
#pragma unroll
    for (int j = 0; j < kOwn; ++j) {
        const int slot = lane * kOwn + j;
#pragma unroll
        for (int side = 0; side < 2; ++side) {
            const int listed_column = column_of[quarter.column_byte(slot, side)];
            column[side][j] = listed_column < at.width ? listed_column : 0;
            rows[side][j] = listed_column < at.width ? quarter.rows(own, K, listed_column) : 0;
        }
        right_rows[warp][slot] = rows[1][j];
    }
    __syncwarp();
    source::Rounding rounding;  // counted before
    const long long width = static_cast<long long>(at.windows) * slot24::kPairs;
    const int first_row = at.strip * bitmap::kTileM + quarter.stored_row(0, lane * kOwn);
    unsigned short* const to = slots + first_row * width + at.number * slot24::kPairs + quarter.stored_slot(lane * kOwn);
#pragma unroll 4
    for (int bit = 0; bit < 32; ++bit) {
        const int row = at.strip * bitmap::kTileM + quarter.row(bit);
        const typename Source::Element* const from = a + min(row, M - 1) * pitch + at.column;
        unsigned short value[kOwn];
#pragma unroll
        for (int j = 0; j < kOwn; ++j) {  // without branches: many loads at a time
            const bool right = (rows[1][j] >> bit & 1) != 0;
            const unsigned short bits = Source::convert(from[right ? column[1][j] : column[0][j]], rounding);
            value[j] = ((rows[0][j] | rows[1][j]) >> bit & 1) != 0 ? bits : static_cast<unsigned short>(0);
        }
        const ushort4 all = make_ushort4(value[0], value[1], value[2], value[3]);
        *reinterpret_cast<ushort4*>(to + slot24::row_of(0, bit) * width) = all;
    }
    unsigned* const picked = picks + static_cast<long long>(blockIdx.x) * slot24::kPickWords;
#pragma unroll
    for (int i = 0; i < slot24::kPairs / 32; ++i) {
        const int slot = i * 32 + (lane & 3) * 8;
        unsigned word = 0;
#pragma unroll
        for (int j = 0; j < 8; ++j) word |= slot24::to_picks(right_rows[warp][slot + j] >> (lane >> 2)) << 2 * j;
        picked[quarter.pick_word(slot, lane >> 2)] = word;
    }
}

// Grid: strips x windows. Dense w [M, K] from slots, picks and columns.
template <int kPartRows>
__global__ void __launch_bounds__(slot24::kThreads, slot24::kBlocks)
slot24_spread(const unsigned short* __restrict__ slots, const unsigned* __restrict__ picks,
              const unsigned* __restrict__ columns, unsigned short* __restrict__ w, int M, int K, int window) {
    constexpr int kOwn = 2 * slot24::kPairs / bitmap::kLanes;
    __shared__ unsigned listed[slot24::kColumnWords<kPartRows>];
    __shared__ unsigned words[slot24::kPickWords];
    __shared__ unsigned right_rows[bitmap::kParts][slot24::kPairs];
    __shared__ unsigned char slot_of[bitmap::kParts][2 * slot24::kPairs];
    const slot24::Place at(K, window);
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
    const slot24::Quarter<kPartRows> quarter{warp};
    slot24::load_window(listed, columns);
    slot24::load_window(words, picks);
    __syncthreads();
#pragma unroll 1  // this loop and the other: unrolled, they spill
    for (int slot = lane; slot < slot24::kPairs; slot += 32) {
        for (int side = 0; side < 2; ++side) {
            const int column = reinterpret_cast<const unsigned char*>(listed)[quarter.column_byte(slot, side)];
            if (column < at.width) slot_of[warp][column] = static_cast<unsigned char>(slot);
        }
        unsigned rows = 0;
        for (int g = 0; g < 8; ++g) {
            rows |= slot24::from_picks(words[quarter.pick_word(slot, g)] >> 2 * (slot & 7)) << g;
        }
        right_rows[warp][slot] = rows;
    }
    __syncwarp();
    const long long width = static_cast<long long>(at.windows) * slot24::kPairs;
    long long place[kOwn];  // of the column's slot, from the warp's first row on
    unsigned rows[kOwn];    // in which the slot may have the column's value
#pragma unroll
    for (int j = 0; j < kOwn; ++j) {
        const int column = j * 32 + lane, slot = column < at.width ? slot_of[warp][column] : 0;
        place[j] = (quarter.stored_row(0, slot) - quarter.stored_row(0, 0)) * width + quarter.stored_slot(slot);
        rows[j] = (column & 4) != 0 ? right_rows[warp][slot] : ~right_rows[warp][slot];
    }
    const int first_row = at.strip * bitmap::kTileM + quarter.stored_row(0, 0);
    const unsigned short* const from = slots + first_row * width + at.number * slot24::kPairs;
#pragma unroll 1
    for (int bit = 0; bit < 32; ++bit) {
        const int row = at.strip * bitmap::kTileM + quarter.row(bit);
        const unsigned short* const here = from + slot24::row_of(0, bit) * width;
        unsigned short* const to = w + static_cast<long long>(row) * K + at.column + lane;
        unsigned short value[kOwn];
#pragma unroll
        for (int j = 0; j < kOwn; ++j) {
            const unsigned short bits = here[place[j]];
            value[j] = (rows[j] >> bit & 1) != 0 ? bits : static_cast<unsigned short>(0);
        }
#pragma unroll
        for (int j = 0; j < kOwn; ++j) {
            if (row < M && j * 32 + lane < at.width) to[j * 32] = value[j];
        }
    }
}

}  // namespace flashllm
