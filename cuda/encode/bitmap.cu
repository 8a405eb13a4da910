// SPDX-License-Identifier: Apache-2.0
// Encodes a dense matrix [M, K] on the device as masks and value streams, and decodes it; see cuda/flashllm/bitmap.cuh.
//
// Encoding takes four launches: count the stored elements of every stream of every tile; walk the tiles of every run to
// place its streams, which depend on other runs only for the row where all of them begin; join the runs; write masks
// and values. The bytes are the same as those from src/flashllm/formats/bitmap_encode.py.
#include "flashllm/bitmap.cuh"
#include "flashllm/bitmap_rows.cuh"
#include "flashllm/portable.cuh"
#include "flashllm/runs.cuh"
#include "flashllm/source.cuh"

namespace flashllm {
namespace bitmap {

constexpr int kThreads = kTileThreads;
constexpr int kStreamBytes = kStreams * kParts;  // one byte per stream of a tile

using source::is_stored;

// The elements of a lane in one tile: two streams, one for each half of the steps. Element (s, i, b, e), which is
// number 8 s + 4 i + 2 b + e of its stream, lies in step s, in the i-th 16 rows, in row b of two that are eight apart,
// and in column e of two.
struct LaneElements {
    int M, K, row, column;  // row and column of element 0

    FLASHLLM_DEVICE LaneElements(int M, int K) : M(M), K(K) {
        const int tiles_k = (K + kTileK - 1) / kTileK, lane = threadIdx.x & 31, part = threadIdx.x >> 5;
        row = static_cast<int>(blockIdx.x) / tiles_k * kTileM + part * 16 + (lane >> 2);
        column = static_cast<int>(blockIdx.x) % tiles_k * kTileK + (lane & 3) * 2;
    }
    FLASHLLM_DEVICE int row_of(int element) const { return row + (element >> 2 & 1) * 64 + (element >> 1 & 1) * 8; }
    FLASHLLM_DEVICE int column_of(int element, int stream) const {
        return column + (element >> 3) * 16 + stream * 8 + (element & 1);
    }
    FLASHLLM_DEVICE bool inside(int element, int stream) const {
        return row_of(element) < M && column_of(element, stream) < K;
    }
};

// The pattern of one element, zero outside the matrix.
template <typename Source>
FLASHLLM_DEVICE unsigned short pattern(const typename Source::Element* a, long long pitch, const LaneElements& at,
                                       int element, int stream, source::Rounding& rounding) {
    const bool inside = at.inside(element, stream);
    const long long index = inside ? at.row_of(element) * pitch + at.column_of(element, stream) : 0;
    return inside ? Source::convert(a[index], rounding) : static_cast<unsigned short>(0);
}

// Stored elements of both streams of a lane as bits, in stream order.
template <typename Source>
FLASHLLM_DEVICE uint2 find_stored(const typename Source::Element* a, long long pitch, const LaneElements& at,
                                  source::Rounding& rounding) {
    uint2 stored = make_uint2(0, 0);
#pragma unroll 4
    for (int element = 0; element < kStreamElements; ++element) {
        if (is_stored(pattern<Source>(a, pitch, at, element, 0, rounding))) stored.x |= 1u << element;
        if (is_stored(pattern<Source>(a, pitch, at, element, 1, rounding))) stored.y |= 1u << element;
    }
    return stored;
}

// The bit of an element (0..31) of a stream in its mask word, which is word element / 16.
FLASHLLM_DEVICE int mask_bit(int element, int stream) {
    return (element & 3) * 8 + (element >> 3 & 1) * 4 + (element >> 2 & 1) * 2 + stream;
}

// The first zero of a stream that lies in a group (four neighbours) with fewer than kValues elements: one bit, or none.
template <int kValues>
FLASHLLM_DEVICE unsigned first_room(unsigned bits) {
    unsigned room = ~bits;
    if constexpr (kValues == 2) {
        const unsigned pairs = bits - (bits >> 1 & 0x55555555u);               // elements in each pair of neighbours
        const unsigned groups = (pairs & 0x33333333u) + (pairs >> 2 & 0x33333333u);  // and in each four
        room &= ~(((groups >> 1 | groups >> 2) & 0x11111111u) * 0xfu);
    }
    return room & (0u - room);
}

// Lags and columns of all streams of a run, kept by one warp: a lane has those of the streams with its number, in every
// part and half.
struct Columns {
    int lag[kParts][2] = {};
    int lane[kParts][2];   // whose column the stream has
    int giver[kParts][2];  // whose stream had that column before

    FLASHLLM_DEVICE Columns() {
        for (int part = 0; part < kParts; ++part) {
            lane[part][0] = lane[part][1] = giver[part][0] = giver[part][1] = threadIdx.x;
        }
    }

    FLASHLLM_DEVICE Places places(int part) const {
        return {Places::pack(giver[part][0], lane[part][0], lag[part][0]) |
                Places::pack(giver[part][1], lane[part][1], lag[part][1]) << 16};
    }

    // The stream with the most values to come, `total`, gets the column that is furthest behind, and so on. Among
    // equals the lower lane comes first.
    FLASHLLM_DEVICE void trade(const int (&total)[kParts][2]) {
        __shared__ unsigned char lags[kLanes], streams[kLanes];  // by column
        __shared__ unsigned char ordered[kLanes];                // columns, the one furthest behind first
#pragma unroll  // otherwise the arrays could not stay in registers
        for (int i = 0; i < 2 * kParts; ++i) {
            int(&own_lag)[2] = lag[i / 2], (&own_lane)[2] = lane[i / 2];
            lags[own_lane[i % 2]] = static_cast<unsigned char>(own_lag[i % 2]);
            streams[own_lane[i % 2]] = static_cast<unsigned char>(threadIdx.x);
            __syncwarp();
            ordered[rank((kSlack - lags[threadIdx.x]) * kLanes + threadIdx.x)] = static_cast<unsigned char>(threadIdx.x);
            constexpr int kMost = kStreamElements * kPlaceTiles;
            const int place = rank((kMost - total[i / 2][i % 2]) * kLanes + threadIdx.x);
            __syncwarp();
            own_lane[i % 2] = ordered[place];
            own_lag[i % 2] = lags[ordered[place]];
            giver[i / 2][i % 2] = streams[ordered[place]];
            __syncwarp();
        }
    }

private:
    // How many lanes have a lower key.
    FLASHLLM_DEVICE static int rank(int key) {
        int lower = 0;
#pragma unroll 8
        for (int lane = 0; lane < kLanes; ++lane) lower += __shfl_sync(0xffffffffu, key, lane) < key;
        return lower;
    }
};

constexpr int kDecodeThreads = kPlaceTiles * kLanes;
constexpr int kDecodeBlocks = 5;  // per SM: 48 registers, where a compiler left alone takes a few more

// Exchanges, between two lanes whose numbers differ only in bit kLane, the y of the lower for the x of the upper.
template <int kLane>
FLASHLLM_DEVICE void exchange(unsigned& x, unsigned& y) {
    const bool upper = (threadIdx.x & kLane) != 0;
    const unsigned got = __shfl_xor_sync(0xffffffffu, upper ? x : y, kLane);
    if (upper) x = got;
    else y = got;
}

// Of the 32 columns of a row from `column` on, stores those below K. Lane t of four has columns 2t and 2t+1 of each
// eight. With `vectors` it stores the t-th eight, so that the four lanes write two whole sectors.
FLASHLLM_DEVICE void store_row(unsigned short* row, unsigned (&words)[4], int K, int column, bool vectors) {
    const int t = threadIdx.x & 3;
    if (vectors) {
        exchange<1>(words[0], words[1]), exchange<1>(words[2], words[3]);
        exchange<2>(words[0], words[2]), exchange<2>(words[1], words[3]);
        const uint4 eight = make_uint4(words[0], words[1], words[2], words[3]);
        if (column + t * 8 < K) *reinterpret_cast<uint4*>(row + column + t * 8) = eight;
        return;
    }
#pragma unroll
    for (int j = 0; j < 4; ++j) {
        const int at = column + j * 8 + t * 2;
        if (at < K) row[at] = static_cast<unsigned short>(words[j]);
        if (at + 1 < K) row[at + 1] = static_cast<unsigned short>(words[j] >> 16);
    }
}

}  // namespace bitmap

// Grid: tiles. a [M, K], `pitch` elements from row to row. counts [tiles][4][64]: stored elements of every stream;
// totals[5] is added to: nnz, then what rounding did.
template <typename Source>
__global__ void __launch_bounds__(bitmap::kThreads)
bitmap_count(const typename Source::Element* __restrict__ a, long long pitch, unsigned char* __restrict__ counts,
             unsigned long long* __restrict__ totals, int M, int K) {
    source::Rounding rounding;
    const uint2 stored = bitmap::find_stored<Source>(a, pitch, bitmap::LaneElements(M, K), rounding);
    const int low = __popc(stored.x), high = __popc(stored.y);
    unsigned char* target = counts + (static_cast<long long>(blockIdx.x) * bitmap::kThreads + threadIdx.x) * 2;
    target[0] = static_cast<unsigned char>(low), target[1] = static_cast<unsigned char>(high);
    source::add_warp_sum(low + high, totals);
    if constexpr (Source::kRounds) rounding.add_warp_to(totals + 1);
}

// Grid: runs, one warp each. Replaces the counts by the lag of every stream behind the front when the tile begins.
// fronts [tiles]: rows from the beginning of the run to the front; lengths [runs]: rows of the run; places: those of
// every kPlaceTiles-th tile.
__global__ void __launch_bounds__(bitmap::kLanes)
bitmap_place(unsigned char* __restrict__ counts, int* __restrict__ fronts, int* __restrict__ lengths,
             bitmap::Places* __restrict__ places, int tiles_m, int tiles_k, int runs, int row_cost) {
    const Runs all{tiles_m, tiles_k, row_cost, static_cast<unsigned>(runs)};
    const int first = static_cast<int>(all.first_tile(blockIdx.x));
    const int end = static_cast<int>(all.first_tile(blockIdx.x + 1));
    // A lane has 16 bits per part: a byte for either half of the steps.
    unsigned short* const streams = reinterpret_cast<unsigned short*>(counts) + threadIdx.x;
    const auto at = [](int tile, int part) { return static_cast<long long>(tile * bitmap::kParts + part) * bitmap::kLanes; };
    bitmap::Columns columns;
    int front = 0;
    for (int tile = first, next; tile < end; tile = next) {
        // The tiles up to the next trade of columns are loaded together, as the walk is one chain of dependent steps.
        next = min((tile | (bitmap::kPlaceTiles - 1)) + 1, end);
        unsigned short batch[bitmap::kPlaceTiles][bitmap::kParts];
#pragma unroll
        for (int i = 0; i < bitmap::kPlaceTiles; ++i)
#pragma unroll
            for (int part = 0; part < bitmap::kParts; ++part) batch[i][part] = streams[at(min(tile + i, end - 1), part)];
        if (tile % bitmap::kPlaceTiles == 0) {
            if (tile != first) {
                const int coming = min(next, (tile / tiles_k + 1) * tiles_k) - tile;  // in this row of tiles
                int total[bitmap::kParts][2] = {};
#pragma unroll
                for (int i = 0; i < bitmap::kPlaceTiles; ++i)
#pragma unroll
                    for (int part = 0; part < bitmap::kParts; ++part) {
                        total[part][0] += i < coming ? batch[i][part] & 0xff : 0;
                        total[part][1] += i < coming ? batch[i][part] >> 8 : 0;
                    }
                columns.trade(total);
            }
#pragma unroll
            for (int part = 0; part < bitmap::kParts; ++part) {
                places[at(tile / bitmap::kPlaceTiles, part) + threadIdx.x] = columns.places(part);
            }
        }
#pragma unroll
        for (int i = 0; i < bitmap::kPlaceTiles; ++i) {
            if (tile + i >= next) break;
            int ahead[bitmap::kParts][2], gain = 0;  // not max(gain, -lag): CUDA 13.2 drops that sign in VIMNMX3 for sm_90
#pragma unroll
            for (int part = 0; part < bitmap::kParts; ++part) {
                const int(&lag)[2] = columns.lag[part];
                streams[at(tile + i, part)] = static_cast<unsigned short>(lag[0] | lag[1] << 8);
                ahead[part][0] = (batch[i][part] & 0xff) - lag[0], ahead[part][1] = (batch[i][part] >> 8) - lag[1];
                gain = max(gain, max(ahead[part][0], ahead[part][1]));
            }
            if (threadIdx.x == 0) fronts[tile + i] = front;
#pragma unroll
            for (int lanes = 16; lanes > 0; lanes /= 2) gain = max(gain, __shfl_xor_sync(0xffffffffu, gain, lanes));
            front += gain;
#pragma unroll
            for (int part = 0; part < bitmap::kParts; ++part)
#pragma unroll
                for (int half = 0; half < 2; ++half) {
                    columns.lag[part][half] = min(gain - ahead[part][half], bitmap::kSlack);
                }
        }
    }
    if (threadIdx.x == 0) lengths[blockIdx.x] = front;
}

// Grid: runs, one warp each. Adds the rows of the preceding runs to the fronts that bitmap_place leaves, and sets the
// last front, [tiles].
__global__ void __launch_bounds__(bitmap::kLanes)
bitmap_join(const int* __restrict__ lengths, int* __restrict__ fronts, int tiles_m, int tiles_k, int runs,
            int row_cost) {
    const Runs all{tiles_m, tiles_k, row_cost, static_cast<unsigned>(runs)};
    const int lane = threadIdx.x, run = static_cast<int>(blockIdx.x), end = static_cast<int>(all.first_tile(run + 1));
    int begin = 0;
    for (int before = lane; before < run; before += bitmap::kLanes) begin += lengths[before];
    for (int lanes = 16; lanes > 0; lanes /= 2) begin += __shfl_xor_sync(0xffffffffu, begin, lanes);
    for (int tile = static_cast<int>(all.first_tile(run)) + lane; tile < end; tile += bitmap::kLanes) {
        fronts[tile] += begin;
    }
    if (lane == 0 && run == runs - 1) fronts[end] = begin + lengths[run];
}

// Grid: tiles. No group has more than kGroupValues elements. lags and places are as bitmap_place leaves them, fronts as
// bitmap_join does. Writes masks, and values, which must already be zero where no stream has a value.
template <typename Source, int kGroupValues>
__global__ void __launch_bounds__(bitmap::kThreads)
bitmap_write(const typename Source::Element* __restrict__ a, long long pitch, const unsigned char* __restrict__ lags,
             const int* __restrict__ fronts, uint2* __restrict__ masks, unsigned short* __restrict__ values,
             const bitmap::Places* __restrict__ places, int M, int K, int runs, int row_cost) {
    const int part = threadIdx.x >> 5;
    const bitmap::LaneElements at(M, K);
    source::Rounding rounding;  // counted before
    const uint2 stored = bitmap::find_stored<Source>(a, pitch, at, rounding);
    const long long tile = blockIdx.x;
    const int front = fronts[tile], end = fronts[tile + 1];
    const unsigned char* lag = lags + (tile * bitmap::kThreads + threadIdx.x) * 2;
    const Runs all = bitmap::runs_of(M, (K + bitmap::kTileK - 1) / bitmap::kTileK, runs, row_cost);
    const int number = static_cast<int>(tile), restart = bitmap::begin_of_run(all, number);
    const bitmap::Places stood = bitmap::places_before(places, number, restart, threadIdx.x);
    uint2 mask = make_uint2(0, 0);
#pragma unroll 1
    for (int stream = 0; stream < 2; ++stream) {
        unsigned bits = stream == 0 ? stored.x : stored.y;
        int row = front - lag[stream];
        // Zeros let the stream catch up: at its first places without an element, in groups that have room.
        for (int missing = end - bitmap::kSlack - (row + __popc(bits)); missing > 0; --missing) {
            bits |= bitmap::first_room<kGroupValues>(bits);
        }
#pragma unroll 1
        for (int element = 0; element < bitmap::kStreamElements; ++element) {
            if ((bits >> element & 1) == 0) continue;
            const unsigned short value = bitmap::pattern<Source>(a, pitch, at, element, stream, rounding);
            values[bitmap::value_index(row, part, stood.lane(stream), stream)] = bitmap::is_stored(value) ? value : 0;
            const unsigned bit = 1u << bitmap::mask_bit(element, stream);
            if (element < 16) mask.x |= bit;
            else mask.y |= bit;
            ++row;
        }
    }
    masks[tile * bitmap::kThreads + threadIdx.x] = mask;
}

// Grid: parts of groups of kPlaceTiles tiles, one warp per tile. Decodes masks, values, fronts and places to dense
// [M, K]. Dynamic shared memory: the value rows of the part. The arrays read first are not __restrict__, because the
// compiler moves loads of data that nobody writes past the barrier, where their latency adds to that of the copies.
__global__ void __launch_bounds__(bitmap::kDecodeThreads, bitmap::kDecodeBlocks)
bitmap_decode(const uint2* masks, const unsigned short* __restrict__ values, const int* fronts,
              const bitmap::Places* places, unsigned short* w, int M, int K, int runs, int row_cost) {
    FLASHLLM_DYNAMIC_SHARED(shared);
    const unsigned rows = ptx::shared_address(shared);
    const Runs all = bitmap::runs_of(M, (K + bitmap::kTileK - 1) / bitmap::kTileK, runs, row_cost);
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
    const int part = static_cast<int>(blockIdx.x % bitmap::kParts), thread = part * bitmap::kLanes + lane;
    const int first = static_cast<int>(blockIdx.x / bitmap::kParts) * bitmap::kPlaceTiles;
    const int end = min(first + bitmap::kPlaceTiles, all.tiles_m * all.tiles_k);
    const int tile = min(first + warp, end - 1);  // a warp without one takes the last, and stores nothing
    const int begin_row = max(fronts[first] - bitmap::kSlack, 0), end_row = fronts[end] + bitmap::kReadAhead;
    const uint2 mask = masks[static_cast<long long>(tile) * bitmap::kTileThreads + thread];
    const int restart = bitmap::begin_of_run(all, tile);
    const bitmap::Position at = bitmap::position_at(masks, fronts, places, tile, restart, thread);
    bitmap::copy_rows<bitmap::kDecodeThreads, 1, 0>(rows, values, part, begin_row, end_row);
    ptx::copy_async_commit();
    unsigned low = at.address(0, rows, begin_row), high = at.address(1, rows, begin_row);
    ptx::copy_async_wait<0>();
    __syncthreads();
    const unsigned tile_row = static_cast<unsigned>(tile) / all.tiles_k;
    const int row = static_cast<int>(tile_row) * bitmap::kTileM + part * 16 + (lane >> 2);
    const int column = (tile - static_cast<int>(tile_row) * all.tiles_k) * bitmap::kTileK;
    const int rows_there = first + warp < end ? M : 0;
    const bool vectors = K % 8 == 0 && reinterpret_cast<unsigned long long>(w) % 16 == 0;
#pragma unroll
    for (int word = 0; word < 2; ++word) {
        const unsigned flags = word == 0 ? mask.x : mask.y;
        unsigned a[2][2][4];  // step, first or second 16 rows, fragment register
        bitmap::decode_step<0, bitmap::kGroup>(a[0], low, high, flags);
        bitmap::decode_step<1, bitmap::kGroup>(a[1], low, high, flags);
#pragma unroll
        for (int i = 0; i < 2; ++i)
#pragma unroll
            for (int b = 0; b < 2; ++b) {
                unsigned words[4] = {a[0][i][b], a[0][i][2 + b], a[1][i][b], a[1][i][2 + b]};
                const int to = row + i * 64 + b * 8, width = to < rows_there ? K : 0;
                bitmap::store_row(w + static_cast<long long>(to) * K, words, width, column + word * 32, vectors);
            }
    }
}

}  // namespace flashllm
