// SPDX-License-Identifier: Apache-2.0
// Value rows of a bitmap on their way from device memory to the warps that decode them (docs/formats/bitmap.md).
//
// The shared memory of a block has a ring of value rows for each of the four parts of a tile, and stages for what else
// a tile needs. One warp, the feeder, loads both, as far ahead as there is room, and announces them on one barrier per
// tile. The four other warps decode; each releases a tile when it has read all that the tile needs, and with it the
// rows that no stream needs any more. The warps of a block synchronize nowhere else while they walk their run of tiles.
#pragma once

#include "flashllm/bitmap.cuh"
#include "flashllm/portable.cuh"
#include "flashllm/ptx.cuh"
#include "flashllm/warp_arrival.cuh"

namespace flashllm {

// A pointer wraps once per mask word, and within a word it loads fewer rows ahead than the stream has elements there.
constexpr int kMirrorRows = 16;
static_assert(bitmap::kStreamElements == 2 * kMirrorRows, "a mask word is half of a stream's elements");

constexpr int kThreads = bitmap::kTileThreads + bitmap::kLanes;  // the last warp feeds
constexpr int kMaxChainSteps = 384;  // see tiled_csl.cu: tensor cores truncate

// A block computes kN columns of x by four warps, each with a part of 2 x 16 rows. A step is 16 columns of a tile.
template <int kN_>
struct PartShape {
    static constexpr int kN = kN_;
    static constexpr int kM = bitmap::kTileM;
    static constexpr int kBlockWarps = bitmap::kParts;
    static constexpr int kSlices = 1;
    static constexpr int kRowFragments = 2;
    static constexpr int kColumnFragments = kN / 8;
    static constexpr int kMaxChain = kMaxChainSteps / (bitmap::kTileK / 16);  // tiles

    FLASHLLM_DEVICE static int row(int i) { return i * 64 + static_cast<int>(threadIdx.x >> 5) * 16; }
    FLASHLLM_DEVICE static int slice() { return 0; }
};

// A place in the cycle of kStages stages, and the parity of the current phase of its barriers.
template <int kStages>
struct Cycle {
    int stage = 0;
    unsigned parity = 0;
    FLASHLLM_DEVICE void advance() {
        if (++stage == kStages) stage = 0, parity ^= 1;
    }
};

// Two barriers per stage. `full`: all that a tile needs has arrived; `empty`: the other warps have released the tile.
struct StageBarriers {
    unsigned base;  // shared address
    FLASHLLM_DEVICE unsigned full(int stage) const { return base + stage * 16; }
    FLASHLLM_DEVICE unsigned empty(int stage) const { return full(stage) + 8; }

    // By one thread, before a barrier of the block. The feeder arrives `arrivals` times per tile; `warps` warps
    // multiply.
    FLASHLLM_DEVICE void init(int stages, unsigned arrivals, int warps = bitmap::kParts) const {
        for (int i = 0; i < stages; ++i) {
            ptx::mbarrier_init(full(i), arrivals);
            ptx::mbarrier_init(empty(i), warps * kWarpArrivals);
        }
        ptx::mbarrier_init_fence();
    }

    // Called by a multiplying warp when all its lanes have read the stage, and the value rows that only this tile and
    // those before it needed.
    FLASHLLM_DEVICE void release(int stage) const { warp_arrive(empty(stage)); }
};

// Rows are numbered as in the matrix. Row r of a part lies at place (r - origin) % kRing, and the rows at the first
// kMirrorRows places lie once more after the last place, so that a pointer may run that far past the end before it
// wraps.
//
// No weight can deadlock the ring. When all tiles before one are released and the front is at row f, streams need rows
// from f - kSlack on. Tiles that are loaded together move the front by at most kMoves and read one row past it, and
// rows are loaded in whole chunks. So at most kSlack + kMoves + 1 + kChunkRows rows have to be present at one time.
template <int kRing, int kMoves = bitmap::kStreamElements>
struct ValueRing {
    static constexpr int kRows = kRing;
    static constexpr unsigned kWrapBytes = kRing * bitmap::kRowBytes;
    static constexpr unsigned kPartBytes = (kRing + kMirrorRows) * bitmap::kRowBytes;
    static constexpr unsigned kBytes = bitmap::kParts * kPartBytes;
    static_assert(kRing % bitmap::kChunkRows == 0 && kMirrorRows == bitmap::kChunkRows, "mirrored is the first chunk");
    static_assert(kRing >= bitmap::kSlack + kMoves + 1 + bitmap::kChunkRows,
                  "or a full tile of a stream could wait for rows that wait for the slowest stream");

    unsigned base;  // shared address
    int origin;     // the first row copied: a chunk begins there

    // For tiles that start with the front at `first_front`, where up to `lag` rows behind the front are needed.
    FLASHLLM_DEVICE ValueRing(unsigned base, int first_front, int lag)
        : base(base), origin(max(first_front - lag, 0) / bitmap::kChunkRows * bitmap::kChunkRows) {}

    FLASHLLM_DEVICE unsigned part(int part) const { return base + part * kPartBytes; }
};

// What a lane needs to know before its first tile, `first`. All loads are issued before anything is waited for, and
// without branches, which would make loads wait, so this costs one latency. Streams stand at the front at tile
// `restart`, where the format's run begins, and at every kPlaceTiles-th tile where the places say; from the last such
// tile on, masks are counted.
struct StreamsBegin {
    static constexpr int kCounted = bitmap::kPlaceTiles - 1;
    int tiles;         // whose masks are counted
    int front;         // before these tiles
    int first_front;   // after them, where the block begins
    bitmap::Places at, coming;
    uint2 masks[kCounted];

    // For lane `thread` of a tile. end: one past the block's last tile.
    FLASHLLM_DEVICE StreamsBegin(const unsigned char* masks_, const int* fronts, const unsigned* places, int first, int end,
                                 int restart, int thread) {
        const int stored = first / bitmap::kPlaceTiles * bitmap::kPlaceTiles, known = max(stored, restart);
        tiles = first - known;
        front = __ldg(fronts + known), first_front = __ldg(fronts + first);
        const unsigned stood = __ldg(places + stored / bitmap::kPlaceTiles * bitmap::kTileThreads + thread);
        coming = bitmap::Places::behind(places, first, end, thread);
        const uint2* before = reinterpret_cast<const uint2*>(masks_) +
                              static_cast<long long>(known) * bitmap::kTileThreads + thread;
#pragma unroll
        for (int i = 0; i < kCounted; ++i) masks[i] = __ldg(before + min(i, tiles) * bitmap::kTileThreads);
        at = {known == restart ? bitmap::Places::own().packed : stood};
    }
};

// Shared addresses of the next values of a lane's two streams. Each stream has the column of some lane, so the 32
// streams of either half lie in different banks.
template <typename Ring>
struct Streams {
    unsigned low, high, begin;  // begin: start of the part's ring
    bitmap::Places coming;      // at the next tile where streams trade columns; loaded early, so nothing waits for it

    FLASHLLM_DEVICE Streams(const Ring& ring, const StreamsBegin& from, int part)
        : begin(ring.part(part)), coming(from.coming) {
        int low_row = from.front - ring.origin - from.at.lag(0), high_row = from.front - ring.origin - from.at.lag(1);
#pragma unroll
        for (int i = 0; i < StreamsBegin::kCounted; ++i) {
            const uint2 mask = from.masks[i];
            const unsigned counted = i < from.tiles ? ~0u : 0u;
            low_row += __popc(mask.x & bitmap::kLowBits & counted) + __popc(mask.y & bitmap::kLowBits & counted);
            high_row += __popc(mask.x & bitmap::kHighBits & counted) + __popc(mask.y & bitmap::kHighBits & counted);
        }
        low = begin + low_row * bitmap::kRowBytes + from.at.column_byte(0);
        high = begin + high_row * bitmap::kRowBytes + from.at.column_byte(1);
    }

    // At the start of a run both streams continue at the front, each in its own column.
    FLASHLLM_DEVICE void restart(const Ring& ring, int front) {
        const unsigned row = begin + (front - ring.origin) % Ring::kRows * bitmap::kRowBytes;
        low = row + bitmap::Places::own().column_byte(0);
        high = row + bitmap::Places::own().column_byte(1);
    }

    // Called before tile `next` of the matrix, a multiple of kPlaceTiles: streams trade columns, and each continues
    // where another one stood.
    FLASHLLM_DEVICE void trade(const unsigned* places, int next, int end, int thread) {
        low = __shfl_sync(0xffffffffu, low, coming.giver(0));
        high = __shfl_sync(0xffffffffu, high, coming.giver(1));
        coming = bitmap::Places::behind(places, next, end, thread);
    }

    // Advances past the elements of a tile that another warp decodes.
    FLASHLLM_DEVICE void skip(uint2 mask) {
        low += (__popc(mask.x & bitmap::kLowBits) + __popc(mask.y & bitmap::kLowBits)) * bitmap::kRowBytes;
        high += (__popc(mask.x & bitmap::kHighBits) + __popc(mask.y & bitmap::kHighBits)) * bitmap::kRowBytes;
    }

    // Called before each mask word.
    FLASHLLM_DEVICE void wrap() {
        if (low >= begin + Ring::kWrapBytes) low -= Ring::kWrapBytes;
        if (high >= begin + Ring::kWrapBytes) high -= Ring::kWrapBytes;
    }
};

// In lane l, the front after tile `tile` + l of a run of `count` tiles whose fronts start at `fronts`.
FLASHLLM_DEVICE int front_behind(const int* fronts, int count, int tile) {
    return __ldg(fronts + min(tile + static_cast<int>(threadIdx.x & 31) + 1, count));
}

// Fronts that the feeder needs before anything else, loaded together: one latency instead of two. (Opaque, or the
// compiler might move the loads to where the values are used.)
struct FirstFronts {
    int begin;      // front where the run begins
    int set, next;  // fronts of the run's first 32 tiles and of the 32 after them, as the feeder keeps them

    FLASHLLM_DEVICE FirstFronts(const int* fronts, int count) {
        const int at_begin = ptx::opaque(__ldg(fronts));
        set = ptx::opaque(front_behind(fronts, count, 0));
        next = ptx::opaque(front_behind(fronts, count, 32));
        begin = ptx::uniform(at_begin);
    }
};

// Bytes that a tile needs besides value rows.
struct Piece {
    unsigned target;  // shared address
    const unsigned char* source;
    int bytes;  // a multiple of 16
};

// The feeder's side: its place in the run, and the copies. All lanes of one warp execute it. It loads steps of
// kStepTiles tiles, one stage per step; a run may begin in the middle of its first step.
//
// One warp does this for four and runs beside them, so each instruction counts: addresses advance by additions, and
// value rows are copied in whole chunks, since copying few rows takes as long as copying many.
template <typename Ring, int kStages, int kStepTiles = 1>
struct Feeder {
#if __CUDA_ARCH__ >= 900
    static constexpr unsigned kArrivals = 1;  // at `full`, by bring()
#else
    static constexpr unsigned kArrivals = bitmap::kLanes;
#endif

    Ring ring;
    StageBarriers barriers;
    const unsigned char* chunk;  // the next one to copy
    unsigned place = 0;          // where it goes, in bytes from the start of a part's ring
    const int* fronts;           // of the run's first tile
    int count;                   // tiles of the run
    int phase;                   // tiles of the first step that lie before the run

    int step = 0;  // the next one to load
    int last;      // its last tile, counted from the run's first
    int done = 0;  // steps that all warps have released
    int done_front;
    int rows;  // copies are issued for the rows below this one
    Cycle<kStages> filled, emptied;
    // In lane l, the front after tile 32 i + l: of the 32 tiles before those of `last`, of these, and of the next 32.
    int before_set = 0, front_set, next_set;

    FLASHLLM_DEVICE Feeder(const Ring& ring, const StageBarriers& barriers, const unsigned char* values,
                           const int* fronts, int count, int phase, const FirstFronts& first)
        : ring(ring), barriers(barriers),
          chunk(values + static_cast<long long>(ring.origin / bitmap::kChunkRows) * bitmap::kChunkBytes),
          fronts(fronts), count(count), phase(phase), last(last_of(0)), done_front(first.begin), rows(ring.origin),
          front_set(first.set), next_set(first.next) {}

    FLASHLLM_DEVICE int last_of(int step) const {
        return kStepTiles == 1 ? step : min((step + 1) * kStepTiles - phase, count) - 1;
    }
    FLASHLLM_DEVICE bool more() const { return (kStepTiles == 1 ? step : step * kStepTiles - phase) < count; }

    // The row below which the next step needs value rows, rounded up to whole chunks. A stream that has no values left
    // still reads two more, which it does not use.
    FLASHLLM_DEVICE int needed() const {
        const int end = __shfl_sync(0xffffffffu, front_set, last & 31) + 1;
        return end < rows ? rows : (end | (bitmap::kChunkRows - 1)) + 1;
    }

    // Whether there is room for the next step, which needs the rows below `need`: a free stage, and places of rows that
    // are behind every stream of the first unreleased tile.
    FLASHLLM_DEVICE bool has_room(int need) const {
        return step - done < kStages && need - Ring::kRows <= done_front - bitmap::kSlack;
    }

    // Waits until one more step is released. All lanes wait, since each of them writes where the step has been read.
    FLASHLLM_DEVICE void wait_release() {
        ptx::mbarrier_wait(barriers.empty(emptied.stage), emptied.parity);
        emptied.advance();
        const int tile = last_of(done);
        done_front = __shfl_sync(0xffffffffu, tile >> 5 == last >> 5 ? front_set : before_set, tile & 31);
        ++done;
    }

    FLASHLLM_DEVICE unsigned barrier() const { return barriers.full(filled.stage); }

    // Copies the pieces and the value rows below `need`, and arrives at the step's barrier for them and (sm_90) for
    // `more` bytes, which the caller copies.
    template <int kPieces>
    FLASHLLM_DEVICE void bring(const Piece (&pieces)[kPieces], int need, [[maybe_unused]] unsigned more = 0) {
#if __CUDA_ARCH__ >= 900
        const unsigned full = barrier();
        const unsigned chunks = static_cast<unsigned>(need - rows) / bitmap::kChunkRows;
        const bool mirrors = place == 0 ? chunks != 0 : place + chunks * bitmap::kPartChunkBytes > ring.kWrapBytes;
        unsigned bytes = (chunks + mirrors) * bitmap::kChunkBytes + more;
#pragma unroll
        for (int i = 0; i < kPieces; ++i) bytes += pieces[i].bytes;
        if (ptx::elect()) {
            ptx::mbarrier_expect(full, bytes);
#pragma unroll
            for (int i = 0; i < kPieces; ++i) ptx::bulk_copy(pieces[i].target, pieces[i].source, pieces[i].bytes, full);
        }
        // Rows at the first places are copied twice, by the same code: the feeder's instructions have to be fetched
        // beside those of the other warps, and unrolled copies cost more than they save (8 %).
        unsigned mirror = 0;
#pragma unroll 1
        while (rows < need) {
            if (ptx::elect()) {
#pragma unroll
                for (int part = 0; part < bitmap::kParts; ++part) {
                    ptx::bulk_copy(ring.part(part) + place + mirror, chunk + part * bitmap::kPartChunkBytes,
                                   bitmap::kPartChunkBytes, full);
                }
            }
            mirror = place == 0 && mirror == 0 ? ring.kWrapBytes : 0;
            if (mirror != 0) continue;
            next_chunk();
        }
#else
        const int lane = threadIdx.x & 31;
#pragma unroll
        for (int i = 0; i < kPieces; ++i) {
            for (int at = lane * 16; at < pieces[i].bytes; at += bitmap::kLanes * 16) {
                ptx::copy_async16(true, pieces[i].target + at, pieces[i].source + at, 16);
            }
        }
#pragma unroll 1
        for (; rows < need; next_chunk()) {
#pragma unroll
            for (int part = 0; part < bitmap::kParts; ++part) {
#pragma unroll
                for (int i = 0; i < bitmap::kPartChunkBytes; i += bitmap::kLanes * 16) {
                    const unsigned char* const from = chunk + part * bitmap::kPartChunkBytes + i + lane * 16;
                    const unsigned to = ring.part(part) + place + i + lane * 16;
                    ptx::copy_async16(true, to, from, 16);
                    ptx::copy_async16(place == 0, to + ring.kWrapBytes, from, 16);
                }
            }
        }
        ptx::mbarrier_arrive_after_copies(barrier());
#endif
    }

    FLASHLLM_DEVICE void next_chunk() {
        rows += bitmap::kChunkRows;
        chunk += bitmap::kChunkBytes;
        place += bitmap::kPartChunkBytes;
        if (place == ring.kWrapBytes) place = 0;
    }

    FLASHLLM_DEVICE void advance() {
        filled.advance();
        const int next = last_of(++step);
        if (next >> 5 != last >> 5) {
            before_set = front_set, front_set = next_set, next_set = front_behind(fronts, count, (next | 31) + 1);
        }
        last = next;
    }
};

}  // namespace flashllm
