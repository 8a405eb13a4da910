// SPDX-License-Identifier: Apache-2.0
// Positions of the streams of a bitmap at any tile, and value rows in shared memory: for encoders and decoders, which
// process tiles in any order instead of one after the other as the product does.
#pragma once

#include "flashllm/bitmap.cuh"
#include "flashllm/portable.cuh"
#include "flashllm/ptx.cuh"
#include "flashllm/runs.cuh"

namespace flashllm {
namespace bitmap {

constexpr int kStreams = 2 * kLanes;
constexpr int kReadAhead = 2;  // rows that decode_group reads from a stream's next value on, needed or not

// Value rows that the streams of a part can read in kTiles consecutive tiles.
template <int kTiles>
inline constexpr int kRowsOf = kSlack + kTiles * kStreamElements + kReadAhead;

// Index of a 16-bit value: value row `row` of a part, in the column of this lane and stream.
FLASHLLM_DEVICE long long value_index(int row, int part, int lane, int stream) {
    const long long chunk = row / kChunkRows, in_chunk = row % kChunkRows;
    return ((chunk * kParts + part) * kChunkRows + in_chunk) * kStreams + lane * 2 + stream;
}

// The runs of a matrix of M rows with tiles_k tiles in each row of tiles.
FLASHLLM_DEVICE Runs runs_of(int M, int tiles_k, int runs, int row_cost) {
    return {(M + kTileM - 1) / kTileM, tiles_k, row_cost, static_cast<unsigned>(runs)};
}

// The first tile of the run that contains `tile`.
FLASHLLM_DEVICE int begin_of_run(const Runs& runs, int tile) {
    return static_cast<int>(runs.first_tile(runs.run_of(static_cast<unsigned>(tile))));
}

// Where the streams of a lane last continued, at or before `tile`, in the run that begins at tile `restart`. `thread`
// is the index in [part][lane].
FLASHLLM_DEVICE Places places_before(const Places* places, int tile, int restart, int thread) {
    if (restart >= tile / kPlaceTiles * kPlaceTiles) return Places::own();
    return places[static_cast<long long>(tile / kPlaceTiles) * kTileThreads + thread];
}

// The rows of the next values of a lane's two streams, and their columns.
struct Position {
    int row[2];
    Places places;

    // Shared address of the next value, if value row `begin` lies at shared address `rows`.
    FLASHLLM_DEVICE unsigned address(int stream, unsigned rows, int begin) const {
        return rows + static_cast<unsigned>(row[stream] - begin) * kRowBytes + places.column_byte(stream);
    }
};

// The position at the start of `tile`, in the run that begins at tile `restart`.
FLASHLLM_DEVICE Position position_at(const uint2* masks, const int* fronts, const Places* stored, int tile, int restart,
                                     int thread) {
    const int first = max(tile / kPlaceTiles * kPlaceTiles, restart);
    Position position{{fronts[first], fronts[first]}, places_before(stored, tile, restart, thread)};
    const uint2* const own = masks + static_cast<long long>(tile) * kTileThreads + thread;
    uint2 before[kPlaceTiles - 1];  // loaded together, at constant offsets
#pragma unroll
    for (int i = 0; i < kPlaceTiles - 1; ++i) {
        before[i] = make_uint2(0, 0);
        if (i < tile - first) before[i] = *(own - (i + 1) * kTileThreads);
    }
#pragma unroll
    for (int i = 0; i < kPlaceTiles - 1; ++i) {
        position.row[0] += __popc((before[i].x & kLowBits) | (before[i].y & kLowBits) << 1);
        position.row[1] += __popc((before[i].x & kHighBits) | (before[i].y & kHighBits) >> 1);
    }
    position.row[0] -= position.places.lag(0), position.row[1] -= position.places.lag(1);
    return position;
}

// Starts copying value rows [begin, end) of kCount parts, the first of which is `part`, to shared memory, with all
// kThreads threads; does not commit. kBytes: distance between parts in shared memory.
template <int kThreads, int kCount, int kBytes>
FLASHLLM_DEVICE void copy_rows(unsigned address, const unsigned short* values, int part, int begin, int end) {
    constexpr int kPieces = kRowBytes / 16, kStep = kThreads / kPieces;
    static_assert(kStep % kChunkRows == 0, "a thread's rows have the same place in their chunks");
    const int thread = threadIdx.x, first = begin + thread / kPieces, piece = thread % kPieces;
    const unsigned short* source = values + value_index(first, part, piece * 4, 0);
    unsigned target = address + threadIdx.x * 16;
#pragma unroll 4
    for (int row = first; row < end; row += kStep) {
#pragma unroll
        for (int i = 0; i < kCount; ++i) {
            ptx::copy_async16(true, target + i * kBytes, source + i * (kPartChunkBytes / 2), 16);
        }
        source += kStep / kChunkRows * (kChunkBytes / 2), target += kStep * kRowBytes;
    }
}

}  // namespace bitmap
}  // namespace flashllm
