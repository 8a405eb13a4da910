// SPDX-License-Identifier: Apache-2.0
// Pairs up the columns of a dense matrix [M, K] on the device and fills their slots, and decodes to the dense matrix;
// see cuda/flashllm/slot24.cuh. The encoding of the slots themselves is in bitmap.cu.
//
// slot24_mark finds the rows in which each column has an element; slot24_pair forms the pairs from that alone, once for
// each arrangement that is tried; slot24_fill writes slots and picks. A warp pairs the columns of one
// band of one window, or fills 32 rows of it. The bytes are the same as those from
// src/flashllm/formats/slot24_encode.py. slot24_decode goes the whole way back, starting from the bitmap.
#include "flashllm/bitmap_rows.cuh"
#include "flashllm/portable.cuh"
#include "flashllm/ptx.cuh"
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

// A window, by its number in the grid of strips x windows.
struct Place {
    int strip, number, windows;  // number of the window in the strip, out of `windows`
    int width;                   // columns of the matrix in it
    long long column;            // the first of them

    FLASHLLM_DEVICE Place(int K, int window, unsigned of_all) {
        windows = (K + window - 1) / window;
        strip = static_cast<int>(of_all) / windows, number = static_cast<int>(of_all) % windows;
        column = static_cast<long long>(number) * window;
        width = static_cast<int>(min(static_cast<long long>(window), K - column));
    }
    // The strip's masks [4][K], from the window's first column on.
    FLASHLLM_DEVICE const unsigned* masks(const unsigned* all, int K) const {
        return all + static_cast<long long>(strip) * bitmap::kParts * K + column;
    }
};

// A quarter of the rows of a tile, which one warp fills: a band of 32, or half of one of 64. Bit 16 i + a of
// its masks is row a of its i-th 16 rows, as stored.
template <int kPartRows>
struct Quarter {
    using Shape = Bands<kPartRows>;
    static constexpr bool kTall = Shape::kHalves == 2;
    int number;

    FLASHLLM_DEVICE int band() const { return number / Shape::kHalves; }
    // Row of the tile.
    FLASHLLM_DEVICE int row(int bit) const { return kTall ? number * 32 + bit : row_of(number, bit); }
    // The part of a tile that has this slot of the window; the row and the slot as they are stored.
    FLASHLLM_DEVICE int part(int slot) const { return kTall ? band() * 2 + (slot >> 5 & 1) : number; }
    FLASHLLM_DEVICE int stored_row(int bit, int slot) const { return row_of(part(slot), bit); }
    FLASHLLM_DEVICE int stored_slot(int slot) const {
        return kTall ? (slot & 0x4f) | (slot & 0x10) << 1 | (number & 1) << 4 : slot;
    }
    // Index in the picks of a window, [tile][part][lane] of two words, of the word for a slot in rows a = g mod 8.
    FLASHLLM_DEVICE int pick_word(int slot, int g) const {
        const int at = stored_slot(slot);
        return ((at >> 6) * bitmap::kTileThreads + part(slot) * 32 + g * 4 + (at >> 3 & 3)) * 2 + (at >> 5 & 1);
    }
    // Index of a byte in the columns of a window.
    FLASHLLM_DEVICE int column_byte(int slot, int side) const {
        const int tile = slot / bitmap::kTileK;
        return (tile * Shape::kBands + band()) * Shape::kBandColumnBytes + Shape::column_byte(slot, side);
    }
    // The rows of a column, from the strip's masks, which are for bands of 32.
    FLASHLLM_DEVICE unsigned rows(const unsigned* masks, int K, int column) const {
        const unsigned* const own = masks + static_cast<long long>(kTall ? (number & 1) * 2 : number) * K + column;
        if constexpr (!kTall) return own[0];
        const int shift = band() * 16;
        return (own[0] >> shift & 0xffffu) | own[K] >> shift << 16;
    }
};

// Loads, with the whole block, the words that a window has in all its parts.
template <int kWords>
FLASHLLM_DEVICE void load_window(unsigned (&target)[kWords], const unsigned* source) {
    const unsigned* const own = source + static_cast<long long>(blockIdx.x) * kWords;
#pragma unroll
    for (int i = threadIdx.x; i < kWords; i += kThreads) target[i] = own[i];
}
template <int kPartRows>
inline constexpr int kColumnWords = kWindowTiles * Bands<kPartRows>::kColumnBytes / 4;
constexpr int kPickWords = kWindowTiles * kPickBytes / 4;

// The pick bits of one slot from its rows: bits 0, 8, 16, 24 of `rows`, which belong to the lane, become bits 0, 16, 1,
// 17.
FLASHLLM_DEVICE unsigned to_picks(unsigned rows) {
    const unsigned two = (rows & 0x01010101u) | (rows >> 15 & 0x202u);
    return (two & 0x3u) | (two & 0x300u) << 8;
}

constexpr int kDecodeParts = 2;  // parts of a window that a block decodes: two bands of 32 rows, or one of 64
constexpr int kStageRows = kDecodeParts * 32;
constexpr int kStagePitch = 2 * kPairs + 8;  // columns from row to row: rows of a fragment begin 4 banks apart
constexpr int kStageVectors = kStageRows * kStagePitch / 8;
constexpr int kPartRowBytes = bitmap::kRowsOf<kWindowTiles> * bitmap::kRowBytes;  // value rows of a part of a window
static_assert(kDecodeParts * kPartRowBytes <= kStageVectors * 16, "value rows are where the stage is later");

// The columns of a lane's slots, which are 2t, 2t+1, 2t+8, 2t+9 of every step.
template <int kPartRows>
struct LaneColumns {
    static constexpr int kPartSteps = Bands<kPartRows>::kPartSteps;
    unsigned words[2][kPartSteps];

    // columns: those of this part of the tile.
    FLASHLLM_DEVICE LaneColumns(const unsigned* columns, int lane) {
#pragma unroll
        for (int half = 0; half < 2; ++half)
#pragma unroll
            for (int i = 0; i < kPartSteps; i += 2) {
                const unsigned* const from = columns + (half * 4 + (lane & 3)) * kPartSteps + i;
                const uint2 two = *reinterpret_cast<const uint2*>(from);
                words[half][i] = two.x, words[half][i + 1] = two.y;
            }
    }
    // The column on `side` of slot 8 half + 2t + e of the step.
    FLASHLLM_DEVICE unsigned at(int step, int half, int e, int side) const {
        const int byte = (2 * e + side) * kPartSteps + step;
        return words[half][byte / 4] >> byte % 4 * 8 & 0xff;
    }
};

// Stores the slots of a lane that have a value to the stage, each in the column that its pick names. a: decoded values,
// by step as stored, first or second 16 rows, fragment register; half: which of the block's two parts they belong to.
template <int kPartRows>
FLASHLLM_DEVICE void scatter_slots(unsigned char* stage, const unsigned (&a)[4][2][4], uint2 mask, uint2 pick,
                                   const LaneColumns<kPartRows>& columns, int half, int lane) {
    // Where bands have 64 rows, the steps as stored alternate between the first and the second 32 of them.
    constexpr bool kTall = kPartRows == 64;
    const int own_row = (kTall ? 0 : half * 32) + (lane >> 2);
#pragma unroll
    for (int s = 0; s < 4; ++s)
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            const unsigned word = __shfl_sync(kWarp, s < 2 ? pick.x : pick.y, (lane & ~3) + s % 2 * 2 + h);
            const unsigned right = word >> (lane & 3) * 4, stored = s < 2 ? mask.x : mask.y;
#pragma unroll
            for (int e = 0; e < 2; ++e) {
                // Opaque, or the compiler would compute the places again for every row.
                const auto place = [&](int side) {
                    const int column = static_cast<int>(columns.at(kTall ? s / 2 : s, h, e, side));
                    return ptx::opaque((own_row * kStagePitch + column) * 2);
                };
                const int left_place = place(0), right_place = place(1);
#pragma unroll
                for (int i = 0; i < 2; ++i)
#pragma unroll
                    for (int b = 0; b < 2; ++b) {
                        const bool is_right = (right >> (16 * b + 2 * e + i) & 1) != 0;
                        const bool is_stored = (stored >> ((2 * b + e) * 8 + s % 2 * 4 + i * 2 + h) & 1) != 0;
                        const int row = (kTall ? s % 2 * 32 : 0) + i * 16 + b * 8;
                        const int byte = row * kStagePitch * 2 + (is_right ? right_place : left_place);
                        const auto value = static_cast<unsigned short>(a[s][i][2 * h + b] >> 16 * e);
                        if (is_stored) *reinterpret_cast<unsigned short*>(stage + byte) = value;
                    }
            }
        }
}

}  // namespace slot24

// Grid: strips x 4 bands of 32 rows x groups of 128 columns. a [M, K], `pitch` elements from row to row. masks
// [strips][4][K]: a bit for each row of the band in which the column has an element; totals[5] is added to: nnz, then
// what rounding did.
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
            const typename Source::Element element = a[min(row, M - 1) * pitch + column];  // many loads in flight
            if (row < M && source::is_stored(Source::convert(element, rounding))) mask |= 1u << bit;
        }
        masks[static_cast<long long>(both) * K + column] = mask;
    }
    source::add_warp_sum(__popc(mask), totals);
    if constexpr (Source::kRounds) rounding.add_warp_to(totals + 1);
}

// Grid: strips x windows; one warp per band. columns [tiles][4][32][steps]. *failed must be 0 and becomes 1 when the
// columns of some band of some window do not pair up, or not so that groups have at most kGroupValues values; then the
// contents of `columns` are of no use.
template <int kPartRows, int kGroupValues>
__global__ void __launch_bounds__(slot24::Bands<kPartRows>::kBands * 32, slot24::kBlocks * kPartRows / 32)
slot24_pair(const unsigned* __restrict__ masks, unsigned* __restrict__ columns, int* failed, int K, int window) {
    using Shape = slot24::Bands<kPartRows>;
    using Problem = typename slot24::ProblemFor<kPartRows, kGroupValues>::Type;
    __shared__ Problem problems[Shape::kBands];
    const slot24::Place at(K, window, blockIdx.x);
    const int lane = threadIdx.x & 31, band = threadIdx.x >> 5;
    // One lane reads for the whole warp, since another warp may write between two reads.
    const int already = lane == 0 ? *static_cast<const volatile int*>(failed) : 0;
    if (__shfl_sync(slot24::kWarp, already, 0) != 0) return;
    Problem& p = problems[band];
    const auto rows_of = [&](int column) {
        const unsigned* const own = at.masks(masks, K);
        slot24::Rows<kPartRows> rows = 0;
#pragma unroll
        for (int half = Shape::kHalves - 1; half >= 0; --half) {
            rows <<= 16, rows <<= 16;  // one shift by 32 is undefined for a 32-bit word
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

// Grid: strips x windows. Writes slots, as they are stored, [rows of whole tiles, 128 * windows], and picks
// [tiles][4][32][2], from masks and columns as the kernels above leave them. A lane has four neighbouring slots.
template <typename Source, int kPartRows>
__global__ void __launch_bounds__(slot24::kThreads, slot24::kBlocks)
slot24_fill(const typename Source::Element* __restrict__ a, long long pitch, const unsigned* __restrict__ masks,
            const unsigned* __restrict__ columns, unsigned short* __restrict__ slots, unsigned* __restrict__ picks, int M,
            int K, int window) {
    constexpr int kOwn = slot24::kPairs / bitmap::kLanes;
    __shared__ unsigned listed[slot24::kColumnWords<kPartRows>];
    __shared__ unsigned right_rows[bitmap::kParts][slot24::kPairs];
    const slot24::Place at(K, window, blockIdx.x);
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
        for (int j = 0; j < kOwn; ++j) {  // without branches: many loads in flight
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

// Grid: strips x windows x halves of their parts; one warp per part of each tile. Writes dense w [M, K]. Dynamic shared
// memory: kStageVectors vectors of 16 bytes. The arrays read first are not __restrict__, as in bitmap_decode.
template <int kPartRows>
__global__ void __launch_bounds__(slot24::kThreads)
slot24_decode(const uint2* masks, const unsigned short* __restrict__ values, const int* fronts,
              const bitmap::Places* places, const uint2* picks, const unsigned* columns, unsigned short* w, int M,
              int K, int window, int runs, int row_cost) {
    using Columns = slot24::LaneColumns<kPartRows>;
    FLASHLLM_DYNAMIC_SHARED(shared);
    const unsigned rows = ptx::shared_address(shared), number = blockIdx.x / 2;
    const slot24::Place at(K, window, number);
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, half = warp & 1;
    const int first_part = static_cast<int>(blockIdx.x % 2) * slot24::kDecodeParts, part = first_part + half;
    const int first = static_cast<int>(number) * slot24::kWindowTiles, tile = first + (warp >> 1);
    const int begin_row = max(fronts[first] - bitmap::kSlack, 0);
    const int end_row = fronts[first + slot24::kWindowTiles] + bitmap::kReadAhead;
    const int thread = part * bitmap::kLanes + lane;
    const long long own = static_cast<long long>(tile) * bitmap::kTileThreads + thread;
    const uint2 mask = masks[own], pick = picks[own];
    const Columns own_columns(columns + (own - lane) / 4 * Columns::kPartSteps, lane);
    const Runs all = bitmap::runs_of(M, at.windows * slot24::kWindowTiles, runs, row_cost);
    const int restart = bitmap::begin_of_run(all, tile);
    const bitmap::Position position = bitmap::position_at(masks, fronts, places, tile, restart, thread);
    constexpr int kBytes = slot24::kPartRowBytes;
    bitmap::copy_rows<slot24::kThreads, slot24::kDecodeParts, kBytes>(rows, values, first_part, begin_row, end_row);
    ptx::copy_async_commit();
    unsigned low = position.address(0, rows + half * kBytes, begin_row);
    unsigned high = position.address(1, rows + half * kBytes, begin_row);
    ptx::copy_async_wait<0>();
    __syncthreads();
    unsigned a[4][2][4];  // step as stored, first or second 16 rows, fragment register
    bitmap::decode_step<0, bitmap::kGroup>(a[0], low, high, mask.x);
    bitmap::decode_step<1, bitmap::kGroup>(a[1], low, high, mask.x);
    bitmap::decode_step<0, bitmap::kGroup>(a[2], low, high, mask.y);
    bitmap::decode_step<1, bitmap::kGroup>(a[3], low, high, mask.y);
    __syncthreads();
    for (int i = threadIdx.x; i < slot24::kStageVectors; i += slot24::kThreads) ptx::store_shared_zero16(rows + i * 16);
    __syncthreads();
    slot24::scatter_slots(shared, a, mask, pick, own_columns, half, lane);
    __syncthreads();
    const bool vectors = K % 8 == 0 && reinterpret_cast<unsigned long long>(w) % 16 == 0;
    const auto row_at = [&](int staged) {
        const int of_part = first_part + staged / 32, bit = staged % 32;
        return at.strip * bitmap::kTileM + (kPartRows == 64 ? of_part * 32 + bit : slot24::row_of(of_part, bit));
    };
    const unsigned short* const stage = reinterpret_cast<const unsigned short*>(shared);
    if (vectors) {
#pragma unroll 4
        for (int staged = warp; staged < slot24::kStageRows; staged += slot24::kThreads / 32) {
            const int row = row_at(staged);
            const uint4 eight = *reinterpret_cast<const uint4*>(stage + staged * slot24::kStagePitch + lane * 8);
            unsigned short* const to = w + static_cast<long long>(row) * K + at.column + lane * 8;
            if (row < M && lane * 8 < at.width) *reinterpret_cast<uint4*>(to) = eight;
        }
    } else {
#pragma unroll 1
        for (int staged = warp; staged < slot24::kStageRows; staged += slot24::kThreads / 32) {
            const int row = row_at(staged), width = row < M ? at.width : 0;
            const unsigned short* const from = stage + staged * slot24::kStagePitch;
            unsigned short* const to = w + static_cast<long long>(row) * K + at.column;
#pragma unroll 1
            for (int column = lane; column < width; column += 32) to[column] = from[column];
        }
    }
}

}  // namespace flashllm
