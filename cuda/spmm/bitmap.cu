// SPDX-License-Identifier: Apache-2.0
// y[N, M] = x[N, K] @ W[M, K]^T with W as a bitmap and value streams: decoded straight into tensor-core fragments.
//
// The tiles of W are dealt to the blocks in contiguous runs (stream_k.cuh), and the values of a run are one contiguous
// stream. Four warps of a block multiply, one for each part of a tile; a fifth feeds them (value_ring.cuh). Per tile, a
// multiplying warp
//   waits      for the tile's barrier: x, masks and value rows are there,
//   decodes    its masks, 16 groups of four elements per lane, into A fragments (bitmap.cuh),
//   multiplies them by x on tensor cores, and
//   releases   the tile, and with it the value rows that no stream needs any more.
// The warps of a block synchronize nowhere else until its run ends. No element of W is written to shared memory once it
// is decoded, and nothing is counted, scanned or scattered.
#include "flashllm/bitmap.cuh"
#include "flashllm/chains.cuh"
#include "flashllm/epilogue.cuh"
#include "flashllm/ptx.cuh"
#include "flashllm/stream_k.cuh"
#include "flashllm/value_ring.cuh"
#include "flashllm/x_images.cuh"
#include "flashllm/x_stage.cuh"
#include "flashllm/x_tile.cuh"

namespace flashllm {

// Shared memory of a block: rings of value rows, stages of x and masks, barriers.
template <int kN, int kRing, int kStages_, bool kAligned>
struct Layout {
    static constexpr int kStages = kStages_;
    using Ring = ValueRing<kRing>;
    using Feed = Feeder<Ring, kStages>;
    using Tile = XTile<kN, kAligned>;
    using Images = XImages<Tile, kStages, 8>;  // of the first tiles, one for each stage
    static constexpr unsigned kStageBytes = Tile::kBytes + bitmap::kMaskBytes;
    static constexpr unsigned kBarriersAt = Ring::kBytes + kStages * kStageBytes;

    unsigned base;  // shared address

    FLASHLLM_DEVICE unsigned x(int stage) const { return base + Ring::kBytes + stage * kStageBytes; }
    FLASHLLM_DEVICE unsigned masks(int stage) const { return x(stage) + Tile::kBytes; }
    FLASHLLM_DEVICE StageBarriers barriers() const { return {base + kBarriersAt}; }
};

constexpr int kXRowBytes = bitmap::kTileK * 2;  // of x in a stage

// Fragments of two k16 steps for 8 columns of x, from k = 32 kWord of a stage on.
template <int kWord>
FLASHLLM_DEVICE void load_narrow_x(unsigned (&b)[2][1][2], unsigned stage) {
    const int lane = threadIdx.x & 31;
    unsigned quad[4];
    ptx::load_matrix_x4(quad, stage + (lane & 7) * kXRowBytes + ((kWord * 4 + (lane >> 3)) ^ (lane & 7)) * 16);
    b[0][0][0] = quad[0], b[0][0][1] = quad[1], b[1][0][0] = quad[2], b[1][0][1] = quad[3];
}

// Fragments of k16 step kStep (0..3) for 16 or more columns of x.
template <typename S, int kStep>
FLASHLLM_DEVICE void load_x(unsigned (&b)[S::kColumnFragments][2], unsigned stage) {
    const int lane = threadIdx.x & 31;
    const unsigned row = stage + ((lane & 7) + (lane >> 4) * 8) * kXRowBytes;
    const unsigned chunk = ((kStep * 2 + (lane >> 3 & 1)) ^ (lane & 7)) << 4;
#pragma unroll
    for (int j = 0; j < S::kColumnFragments; j += 2) {
        unsigned quad[4];
        ptx::load_matrix_x4(quad, row + j * 8 * kXRowBytes + chunk);
        b[j][0] = quad[0], b[j][1] = quad[1];
        b[j + 1][0] = quad[2], b[j + 1][1] = quad[3];
    }
}

// One k16 step of a mask word: decodes the A fragments of both groups of 16 rows and multiplies them.
template <typename T, typename S, int kStep, typename Values>
FLASHLLM_DEVICE void multiply_step(Accumulators<S>& sum, Values& streams, unsigned mask,
                                   const unsigned (&b)[S::kColumnFragments][2]) {
    unsigned a[2][4];
    bitmap::decode_step<kStep, bitmap::kGroup>(a, streams.low, streams.high, mask);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
#pragma unroll
        for (int j = 0; j < S::kColumnFragments; ++j) ptx::mma_m16n8k16<T>(sum[i][j], a[i], b[j][0], b[j][1]);
    }
}

// Half a tile: one mask word per lane, 32 columns.
template <typename T, typename S, int kWord, typename Values>
FLASHLLM_DEVICE void multiply_word(Accumulators<S>& sum, Values& streams, unsigned mask, unsigned stage) {
    if constexpr (S::kN == 8) {
        unsigned b[2][1][2];
        load_narrow_x<kWord>(b, stage);
        multiply_step<T, S, 0>(sum, streams, mask, b[0]);
        multiply_step<T, S, 1>(sum, streams, mask, b[1]);
    } else {
        unsigned b[S::kColumnFragments][2];
        load_x<S, 2 * kWord>(b, stage);
        multiply_step<T, S, 0>(sum, streams, mask, b);
        load_x<S, 2 * kWord + 1>(b, stage);
        multiply_step<T, S, 1>(sum, streams, mask, b);
    }
}

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
// A k16 step of a tile on the warpgroup's tensor cores, which read x from shared memory; all four warps take part.
// Starts its products and returns when those of the previous step are done: the fragments of two steps are live.
template <typename T, typename S, int kStep, typename Values>
FLASHLLM_DEVICE void start_step(Accumulators<S>& sum, Values& streams, unsigned mask, unsigned stage_operand) {
    unsigned a[2][4];
    bitmap::decode_step<kStep % 2, bitmap::kGroup>(a, streams.low, streams.high, mask);
    ptx::warpgroup_begin();
#pragma unroll
    for (int i = 0; i < 2; ++i) ptx::warpgroup_mma<T>(sum[i], a[i], stage_operand + kStep * 32 / 16);
    ptx::warpgroup_commit();
    ptx::warpgroup_wait<1>();
}
#endif

// x of the tiles of a run, for few columns: lanes copy its rows. x of the first tiles, one for each stage, is copied by
// the multiplying warps, since the previous launch may still be writing x; the feeder need not wait for that and fills
// the ring meanwhile. Once a tile is released, the multiplying warps have waited, and the feeder may copy x.
template <typename S, typename L, bool kAligned>
struct XByRows {
    struct OneWarp : S {
        static constexpr int kBlockWarps = 1;
        static constexpr int kStageBytes = L::kStageBytes;
    };
    using Loader = XLoader<OneWarp, kAligned>;
    static constexpr unsigned kArrivals = bitmap::kLanes;  // every lane arrives for its part of x
    static constexpr unsigned kCopied = 0;                 // bytes that bulk copies bring
    static_assert(L::kStages <= bitmap::kParts, "each multiplying warp brings x of at most one of the first tiles");

    const unsigned short* x;
    int n0, N, K, tiles_k, tile_k;  // tile_k: the run's first tile in its row

    FLASHLLM_DEVICE Loader loader(const L& layout, int tile) const {
        return Loader(x, n0, N, K, (tile_k + tile) % tiles_k, layout.x(0), static_cast<int>(threadIdx.x & 31));
    }
    FLASHLLM_DEVICE static void bring(const L& layout, Loader& from, int stage) {
        const unsigned full = layout.barriers().full(stage);
        from.load(stage * L::kStageBytes);
        if constexpr (kAligned) {
            ptx::mbarrier_arrive_after_copies(full);
        } else {
#if __CUDA_ARCH__ >= 900
            ptx::fence_async_proxy();
#endif
            ptx::mbarrier_arrive(full);  // ordinary stores: an arrival for copies does not release them
        }
    }

    // Called by the multiplying warps.
    FLASHLLM_DEVICE int begin(const L& layout, int count, int warp) const {
        if (warp < min(L::kStages, count)) {
            Loader from = loader(layout, warp);
            bring(layout, from, warp);
        }
        return 0;
    }
    FLASHLLM_DEVICE void finish(const L&, int, unsigned char*, int) const {}

    // The feeder's side: x from tile kStages on.
    struct Feed {
        Loader from;
        FLASHLLM_DEVICE Feed(const L& layout, const XByRows& x) : from(x.loader(layout, L::kStages)) {}
        FLASHLLM_DEVICE void before(const L& layout, const typename L::Feed&, int stage) { bring(layout, from, stage); }
        FLASHLLM_DEVICE void after(const L&, const typename L::Feed&, int) {}
        FLASHLLM_DEVICE void leave(typename L::Feed&) {}
    };
};

// The same for many columns, where copying rows would keep the feeder from its other work: it copies images (sm_90a).
template <typename L>
struct XByImages {
    static constexpr unsigned kArrivals = 0;
    static constexpr unsigned kCopied = L::Tile::kBytes;

    typename L::Images images;
    int tile_k;

    FLASHLLM_DEVICE auto begin(const L&, int, int warp) const { return images.begin(tile_k, warp); }
    template <typename Begun>
    FLASHLLM_DEVICE void finish(const L&, const Begun& begun, unsigned char* shared, int warp) const {
        images.finish(begun, shared + L::Ring::kBytes, L::kStageBytes, tile_k, warp);
    }

    struct Feed {
        const typename L::Images& images;
        int tile_k;
        bool all = false;  // all images are laid out

        FLASHLLM_DEVICE Feed(const L&, const XByImages& x)
            : images(x.images), tile_k((x.tile_k + L::kStages) % x.images.images) {}

        FLASHLLM_DEVICE void before(const L&, const typename L::Feed&, int) {}
        // Bulk copies are issued after bring() has announced their bytes.
        FLASHLLM_DEVICE void after(const L& layout, const typename L::Feed& feed, int stage) {
            constexpr int kLooks = 64;  // tens of microseconds: if that is not enough, some blocks have not begun
            if (feed.step == L::kStages) ptx::grid_dependency_wait();
            if (!all) all = images.are_there();
            if (!all && !images.is_there(tile_k, kLooks)) images.lay_out(tile_k);
            const unsigned char* const from = images.image(tile_k);
            if (ptx::elect()) ptx::bulk_copy(layout.x(stage), from, L::Tile::kBytes, feed.barrier());
            if (++tile_k == images.images) tile_k = 0;
        }
        FLASHLLM_DEVICE void leave(typename L::Feed& feed) {
            while (feed.done == 0) feed.wait_release();
            ptx::grid_dependency_wait();
            images.leave();
        }
    };
};

// Which of the two a kernel uses; decided by measurement.
template <typename S, typename L, bool kAligned, bool kImages>
struct XFor {
    using Type = XByRows<S, L, kAligned>;
    FLASHLLM_DEVICE static Type make(const unsigned short* x, int n0, int N, int K, int tiles_k, int tile_k, unsigned*,
                                     unsigned char*) {
        return {x, n0, N, K, tiles_k, tile_k};
    }
};
template <typename S, typename L, bool kAligned>
struct XFor<S, L, kAligned, true> {
    using Type = XByImages<L>;
    FLASHLLM_DEVICE static Type make(const unsigned short* x, int, int N, int K, int tiles_k, int tile_k, unsigned* counters,
                                     unsigned char* scratch) {
        return {{x, N, K, tiles_k, bitmap::kTileK, counters, scratch}, tile_k};
    }
};

// The feeding warp's loop: masks and value rows, and x from the first tile on whose stage has been used before.
template <typename X, typename L>
FLASHLLM_DEVICE void feed_tiles(const L& layout, typename L::Feed feed, typename X::Feed x, const unsigned char* masks) {
    for (; feed.more(); feed.advance(), masks += bitmap::kMaskBytes) {
        const int need = feed.needed();
        while (!feed.has_room(need)) feed.wait_release();
        const int stage = feed.filled.stage;
        const bool brings_x = feed.step >= L::kStages;
        const Piece pieces[] = {{layout.masks(stage), masks, bitmap::kMaskBytes}};
        if (brings_x) x.before(layout, feed, stage);
        feed.bring(pieces, need, brings_x ? X::kCopied : 0);
        if (brings_x) x.after(layout, feed, stage);
    }
    x.leave(feed);
}

// Grid (G, ceil(N / kN)). workspace: the counters of x_images.cuh where it is used, then what stream_k.cuh needs.
// scratch: see x_images.cuh. masks, values, fronts, places: see docs/formats/bitmap.md. kRing: value rows that the ring
// of a part holds. kStages: tiles for which there is room for x and masks. kWarpgroup: wgmma instead of mma.sync.
// kAligned: K is a multiple of 8 and x is 16-byte aligned.
template <typename T, int kN, int kRing, int kStages, int kMinBlocks, bool kWarpgroup, bool kAligned>
__global__ void __launch_bounds__(kThreads, kMinBlocks)
spmm_bitmap(const T* x, const unsigned char* __restrict__ masks, const unsigned char* __restrict__ values,
            const int* __restrict__ fronts, const unsigned* __restrict__ places, T* __restrict__ y,
            unsigned char* workspace, unsigned char* scratch, int M, int N, int K, int row_cost, int runs,
            int runs_row_cost) {
    static_assert(kN % 8 == 0 && kN <= 64, "one block computes 8..64 columns of x");
    using S = PartShape<kN>;
    using L = Layout<kN, kRing, kStages, kAligned>;
    FLASHLLM_DYNAMIC_SHARED(shared);
    const L layout{ptx::shared_address(shared)};
    const StageBarriers barriers = layout.barriers();
    const int warp = ptx::uniform(threadIdx.x >> 5);
    const bool feeds = warp == bitmap::kParts;

    const int tiles_k = (K + bitmap::kTileK - 1) / bitmap::kTileK;
    constexpr bool kImages = kWarpgroup && kN >= 32;  // matmul/bitmap.py must agree
    using MakeX = XFor<S, L, kAligned, kImages>;
    using X = typename MakeX::Type;
    const StreamK<S> split((M + bitmap::kTileM - 1) / bitmap::kTileM, tiles_k, row_cost,
                           workspace + (kImages ? L::Images::counter_bytes(tiles_k) : 0));
    const int first = static_cast<int>(split.first_tile(blockIdx.x));
    const int count = static_cast<int>(split.first_tile(blockIdx.x + 1)) - first;
    const int n0 = blockIdx.y * kN;
    const int row = first / split.tiles_k, tile_k = first - row * split.tiles_k;
    // From the start of a run of the format on, no earlier row is needed.
    const Runs format_runs{split.tiles_m, split.tiles_k, runs_row_cost, static_cast<unsigned>(runs)};
    int run = static_cast<int>(format_runs.run_of(first)), restart = static_cast<int>(format_runs.first_tile(run));

    // Loaded by all warps: if the feeder alone loads them, it has fewer uniform registers, and N = 16 takes 2 % longer.
    const FirstFronts first_fronts(fronts + first, count);
    if (threadIdx.x == 0) barriers.init(kStages, L::Feed::kArrivals + X::kArrivals);
    __syncthreads();

    const X all_x = MakeX::make(reinterpret_cast<const unsigned short*>(x), n0, N, K, tiles_k, tile_k,
                                reinterpret_cast<unsigned*>(workspace), scratch);
    const int lag = first == restart ? 0 : bitmap::kSlack;
    if (feeds) {
        const typename L::Ring ring(layout.base, first_fronts.begin, lag);
        feed_tiles<X>(layout, typename L::Feed(ring, barriers, values, fronts + first, count, 0, first_fronts),
                      typename X::Feed(layout, all_x), masks + static_cast<long long>(first) * bitmap::kMaskBytes);
    } else {
        const StreamsBegin streams_begin(masks, fronts, places, first, first + count, restart, threadIdx.x);
        ptx::grid_dependency_wait();  // the feeder waits too, but brings what is constant first
        ptx::grid_launch_dependents();
        const auto begun = all_x.begin(layout, count, warp);
        const typename L::Ring ring(layout.base, ptx::uniform(streams_begin.first_front), lag);
        Accumulators<S> sum = {};
        const auto write = [&](Accumulators<S>& sum, int row) {
            store_fragments<S>(sum, y, n0, row * S::kM, N, M);
        };
        Streams<typename L::Ring> streams(ring, streams_begin, warp);
        // The next start of a run of the format, counted from the first tile, and the front there.
        const auto next_restart = [&] { return static_cast<int>(format_runs.first_tile(++run)) - first; };
        restart = next_restart();
        int restart_front = __ldg(fronts + first + min(restart, count));
        Chains<S> chains(split, first, row, count);
        // The next tile before which streams trade columns. (Opaque: CUDA 13.2 loses signs in minima of three.)
        const auto next_trade = [&](int tile) {
            return ptx::opaque(tile + bitmap::kPlaceTiles - (first + tile) % bitmap::kPlaceTiles);
        };
        int stop = min(min(chains.chain_end, restart), next_trade(0));
        all_x.finish(layout, begun, reinterpret_cast<unsigned char*>(shared), warp);
        Cycle<kStages> cycle;
        int tile = 0;
        while (true) {
            ptx::mbarrier_wait(barriers.full(cycle.stage), cycle.parity);
            const unsigned x_stage = layout.x(cycle.stage);
            const uint2 mask = ptx::load_shared8(layout.masks(cycle.stage) + threadIdx.x * 8);
            streams.wrap();
            if constexpr (kWarpgroup) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
                if constexpr (!kImages) ptx::fence_async_proxy();  // x came by cp.async or stores, not by bulk copies
                start_step<T, S, 0>(sum, streams, mask.x, ptx::operand(x_stage));
                start_step<T, S, 1>(sum, streams, mask.x, ptx::operand(x_stage));
                streams.wrap();
                start_step<T, S, 2>(sum, streams, mask.y, ptx::operand(x_stage));
                start_step<T, S, 3>(sum, streams, mask.y, ptx::operand(x_stage));
                ptx::warpgroup_wait();
#endif
            } else {
                multiply_word<T, S, 0>(sum, streams, mask.x, x_stage);
                streams.wrap();
                multiply_word<T, S, 1>(sum, streams, mask.y, x_stage);
            }
            barriers.release(cycle.stage);
            cycle.advance();
            if (++tile != stop) continue;
            if (tile == chains.chain_end) {
                chains.end(split, tile, sum, write);
                if (tile == count) break;
            }
            const int next = first + tile;
            if (next % bitmap::kPlaceTiles == 0) streams.trade(places, next, first + count, threadIdx.x);
            if (tile == restart) {
                streams.restart(ring, restart_front);
                restart = next_restart();
                restart_front = __ldg(fronts + first + min(restart, count));
            }
            stop = min(min(chains.chain_end, restart), next_trade(tile));
        }
        chains.finish(split, sum, write);
    }
}

}  // namespace flashllm
