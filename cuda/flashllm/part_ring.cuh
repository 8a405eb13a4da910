// SPDX-License-Identifier: Apache-2.0
// One part's value rows of a bitmap (docs/formats/bitmap.md) on their way from device memory to the warp that decodes it.
//
// Every warp of a block has a ring of value rows of its own and fills it itself, by bulk copies of 16 rows (before sm_90:
// cp.async) as far ahead as the ring has room: no warp waits for another. Rows are numbered from `origin`, where a chunk
// begins. Row r lies at place r % kRing, and rows at the first places once more behind the last, so that a pointer may
// run kMirrorRows over the end before it wraps.
#pragma once

#include "flashllm/bitmap.cuh"
#include "flashllm/portable.cuh"
#include "flashllm/ptx.cuh"

namespace flashllm {

constexpr int kMirrorRows = 16;  // a pointer wraps once per mask word: 16 elements of a stream
constexpr int kFirstRows = 48;   // value rows that a warp asks for at once
static_assert(bitmap::kStreamElements == 2 * kMirrorRows, "a mask word is half of a stream's elements");

template <int kRing>
struct PartRing {
    static constexpr int kChunks = kRing / bitmap::kChunkRows;
    static constexpr unsigned kWrapBytes = kRing * bitmap::kRowBytes;
    static constexpr unsigned kBytes = kWrapBytes + kMirrorRows * bitmap::kRowBytes;
    static constexpr unsigned kBarrierBytes = kChunks * 8;
    static_assert(kRing % bitmap::kChunkRows == 0 && kMirrorRows == bitmap::kChunkRows, "mirrored is the first chunk");
    static_assert(kRing >= bitmap::kSlack + bitmap::kStreamElements + bitmap::kChunkRows,
                  "or a full tile of a stream could wait for rows that wait for the slowest stream");
#if __CUDA_ARCH__ >= 900
    static constexpr unsigned kArrivals = 1;
#else
    static constexpr unsigned kArrivals = bitmap::kLanes;
#endif

    unsigned base, barriers;      // shared addresses: of the ring, of a barrier for each of its chunks
    const unsigned char* source;  // the part's rows of the next chunk
    int origin, stop;             // the first row copied, in the matrix; rows to copy in all
    int copied = 0, landed = 0;
    unsigned copy_place = 0, land_place = 0, parity = 0;

    FLASHLLM_DEVICE PartRing(unsigned rings, unsigned all_barriers, const unsigned char* values, int first_row,
                             int end_row)
        : origin(first_row - first_row % bitmap::kChunkRows), stop(end_row - origin) {
        const int part = threadIdx.x >> 5;
        base = rings + part * kBytes, barriers = all_barriers + part * kBarrierBytes;
        source = values + static_cast<long long>(origin / bitmap::kChunkRows) * bitmap::kChunkBytes +
                 part * bitmap::kPartChunkBytes;
        if ((threadIdx.x & 31) == 0) {
            for (int i = 0; i < kChunks; ++i) ptx::mbarrier_init(barriers + i * 8, kArrivals);
            ptx::mbarrier_init_fence();
        }
        __syncwarp();
    }

    // Starts the copies of all rows below `limit`, in whole chunks.
    FLASHLLM_DEVICE void refill(int limit) {
        while (copied + bitmap::kChunkRows <= limit && copied < stop) {
            const int lane = threadIdx.x & 31;
            const unsigned barrier = barriers + copy_place / (bitmap::kPartChunkBytes / 8);
#if __CUDA_ARCH__ >= 900
            if (lane == 0) {
                ptx::mbarrier_expect(barrier, bitmap::kPartChunkBytes);
                ptx::bulk_copy(base + copy_place, source, bitmap::kPartChunkBytes, barrier);
            }
#else
#pragma unroll
            for (int i = lane * 16; i < bitmap::kPartChunkBytes; i += bitmap::kLanes * 16) {
                ptx::copy_async16(true, base + copy_place + i, source + i, 16);
            }
            ptx::mbarrier_arrive_after_copies(barrier);
#endif
            copied += bitmap::kChunkRows;
            source += bitmap::kChunkBytes;
            copy_place += bitmap::kPartChunkBytes;
            if (copy_place == kWrapBytes) copy_place = 0;
        }
    }

    // Returns when `rows` rows have landed. They must have been asked for.
    FLASHLLM_DEVICE void wait(int rows) {
        while (landed < rows) {
            ptx::mbarrier_wait(barriers + land_place / (bitmap::kPartChunkBytes / 8), parity);
            if (land_place == 0) {
                const unsigned from = base + (threadIdx.x & 31) * 16;
#pragma unroll
                for (unsigned i = 0; i < bitmap::kPartChunkBytes; i += 512) {
                    ptx::store_shared(from + i + kWrapBytes, ptx::load_shared(from + i));
                }
                __syncwarp();
            }
            landed += bitmap::kChunkRows;
            land_place += bitmap::kPartChunkBytes;
            if (land_place == kWrapBytes) land_place = 0, parity ^= 1;
        }
    }
};

// The next values of the two streams of one lane, as shared addresses.
template <int kRing>
struct Streams {
    unsigned even, odd, end;

    // Where the streams stand before tile `first` is stored every kLagTiles tiles; from there on masks are counted.
    FLASHLLM_DEVICE Streams(const PartRing<kRing>& ring, const unsigned char* masks, const int* fronts,
                            const unsigned short* lags, int first) {
        const int lane = threadIdx.x & 31;
        const int back = first % bitmap::kLagTiles;  // tiles since the lags were stored
        const unsigned lag = __ldg(lags + first / bitmap::kLagTiles * bitmap::kTileThreads + threadIdx.x);
        const int stored = __ldg(fronts + first - back) - ring.origin;
        int even_row = stored - static_cast<int>(lag & 0xff), odd_row = stored - static_cast<int>(lag >> 8);
        const uint2* before = reinterpret_cast<const uint2*>(masks) +
                              static_cast<long long>(first - back) * bitmap::kTileThreads + threadIdx.x;
#pragma unroll
        for (int i = 0; i < bitmap::kLagTiles - 1; ++i) {
            if (i >= back) break;
            const uint2 mask = __ldg(before + i * bitmap::kTileThreads);
            even_row += __popc(mask.x & bitmap::kEvenBits) + __popc(mask.y & bitmap::kEvenBits);
            odd_row += __popc(mask.x & bitmap::kOddBits) + __popc(mask.y & bitmap::kOddBits);
        }
        even = ring.base + lane * 4 + even_row * bitmap::kRowBytes;
        odd = ring.base + lane * 4 + 2 + odd_row * bitmap::kRowBytes;
        end = ring.base + PartRing<kRing>::kWrapBytes;
    }

    // Before each mask word.
    FLASHLLM_DEVICE void wrap() {
        if (even >= end) even -= PartRing<kRing>::kWrapBytes;
        if (odd >= end) odd -= PartRing<kRing>::kWrapBytes;
    }
};

// The fronts behind the tiles of a run, one after another: a lane holds one of 32.
struct Fronts {
    const int* fronts;  // of the run's first tile
    int count, tile = 0;
    int set, next_set;

    FLASHLLM_DEVICE Fronts(const int* fronts, int count) : fronts(fronts), count(count), set(load(1)), next_set(load(33)) {}

    FLASHLLM_DEVICE int load(int behind) const {
        return __ldg(fronts + min(behind + static_cast<int>(threadIdx.x & 31), count));
    }

    FLASHLLM_DEVICE int next() {
        const int front = __shfl_sync(0xffffffffu, set, tile & 31);
        if ((tile++ & 31) == 31) set = next_set, next_set = load(tile + 33);
        return front;
    }
};

}  // namespace flashllm
