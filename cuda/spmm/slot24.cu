// SPDX-License-Identifier: Apache-2.0
// y[N, M] = x[N, K] @ W[M, K]^T with W in slots of the 2:4 sparse tensor cores: two columns of W share one.
//
// Which two is a choice of the format, made for each part of a tile, so x is gathered: the feeding warp lays windows of x
// into shared memory column by column (x_window.cuh), and a lane loads the columns that its part has paired. All else is as
// in bitmap.cu: slots are a bitmap and value streams (value_ring.cuh), walked tile by tile, a tile being 128 rows x 64
// slots = 128 columns. Per tile, a warp
//   waits      for the tile's barrier,
//   decodes    its masks, 16 groups of four slots per lane, into A fragments (bitmap.cuh),
//   gathers    the columns of x that the slots of each step belong to,
//   multiplies them on sparse tensor cores, which take of each pair the column that the picks name, and
//   releases   the tile.
// A dense m16n8k16 takes as many fragment registers for half as many columns: the decoding per element is half.
#include "flashllm/epilogue.cuh"
#include "flashllm/ptx.cuh"
#include "flashllm/slot24.cuh"
#include "flashllm/stream_k.cuh"
#include "flashllm/value_ring.cuh"
#include "flashllm/x_window.cuh"

namespace flashllm {

constexpr int kThreads = (bitmap::kParts + 1) * bitmap::kLanes;  // the last warp brings what the others multiply
constexpr int kMaxChainSteps = 384;  // see tiled_csl.cu: tensor cores truncate

template <int kN_>
struct Slot24Shape {
    static constexpr int kN = kN_;
    static constexpr int kM = bitmap::kTileM;
    static constexpr int kBlockWarps = bitmap::kParts;
    static constexpr int kSlices = 1;
    static constexpr int kRowFragments = 2;
    static constexpr int kColumnFragments = kN / 8;
    static constexpr int kMaxChain = kMaxChainSteps / slot24::kSteps;  // tiles
    static_assert(kN % 8 == 0 && kN <= 64, "one block computes 8..64 columns of x");

    FLASHLLM_DEVICE static int row(int i) { return i * 64 + static_cast<int>(threadIdx.x >> 5) * 16; }
    FLASHLLM_DEVICE static int slice() { return 0; }
};

// Shared memory of a block: rings of value rows, windows of x, units of x on their way there, stages of masks, picks and
// columns, barriers.
template <int kN, int kRing, int kStages, int kWindows, int kUnits>
struct Layout {
    using Ring = ValueRing<kRing>;
    using Feed = Feeder<kRing, kStages>;
    static constexpr unsigned kStageBytes = bitmap::kMaskBytes + slot24::kPickBytes + slot24::kColumnBytes;
    static constexpr unsigned kWindowsAt = Ring::kBytes;
    static constexpr unsigned kUnitsAt = kWindowsAt + kWindows * XWindow<kN>::kBytes;
    static constexpr unsigned kStagesAt = kUnitsAt + kUnits * kN * 128;
    static constexpr unsigned kBarriersAt = kStagesAt + kStages * kStageBytes;

    unsigned base;  // shared address

    FLASHLLM_DEVICE unsigned window(int i) const { return base + kWindowsAt + i * XWindow<kN>::kBytes; }
    FLASHLLM_DEVICE unsigned units() const { return base + kUnitsAt; }
    FLASHLLM_DEVICE unsigned masks(int stage) const { return base + kStagesAt + stage * kStageBytes; }
    FLASHLLM_DEVICE unsigned picks(int stage) const { return masks(stage) + bitmap::kMaskBytes; }
    FLASHLLM_DEVICE unsigned columns(int stage) const { return picks(stage) + slot24::kPickBytes; }
    FLASHLLM_DEVICE StageBarriers barriers() const { return {base + kBarriersAt}; }
};

// One m16n8k32 step: gathers x, decodes the A fragments of both rows of fragments and multiplies.
template <typename T, typename S, int kStep>
FLASHLLM_DEVICE void multiply_step(Accumulators<S>& sum, unsigned& even, unsigned& odd, unsigned mask, unsigned picks,
                                   unsigned columns, unsigned window) {
    constexpr unsigned kColumnBytes = XWindow<S::kN>::kColumnBytes;
    const unsigned column = ptx::dot4(columns, kColumnBytes << (8 * kStep), window);  // the lane's, of 32
    unsigned b[S::kColumnFragments][4];
#pragma unroll
    for (int j = 0; j < S::kColumnFragments; ++j) ptx::load_matrix_x4_transposed(b[j], column + j * 16);
    constexpr int kGroup = kStep % 2 * 4;
    unsigned a[2][4];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        if (i == 0) {
            bitmap::decode_group<kGroup>(a[0][0], a[0][1], even, odd, mask);
            bitmap::decode_group<kGroup + 1>(a[0][2], a[0][3], even, odd, mask);
        } else {
            bitmap::decode_group<kGroup + 2>(a[1][0], a[1][1], even, odd, mask);
            bitmap::decode_group<kGroup + 3>(a[1][2], a[1][3], even, odd, mask);
        }
        const unsigned metadata = slot24::metadata(picks, i);
#pragma unroll
        for (int j = 0; j < S::kColumnFragments; ++j) {
            ptx::mma_sp_m16n8k32<T, kStep % 2>(sum[i][j], a[i], b[j], metadata);
        }
    }
}

// The feeding warp's loop.
template <typename L, typename Loader, int kWindows>
struct Load {
    static constexpr unsigned kArrivals = L::Feed::kArrivals + 1;  // and one when the window is there

    FLASHLLM_DEVICE static void run(const L& layout, typename L::Feed feed, Loader x, int first,
                                    TileCopier<bitmap::kMaskBytes> masks, TileCopier<slot24::kPickBytes> picks,
                                    TileCopier<slot24::kColumnBytes> columns) {
        const bool leads = (threadIdx.x & 31) == 0;
        int window_tile = 0, window = 0;  // first tile of the window to be written next, and its place
        while (feed.tile < feed.count || window_tile < feed.tile) {
            const int need = feed.needed();
            if (feed.tile < feed.count && feed.has_room(need)) {
                const int stage = feed.filled.stage;
                masks.copy(layout.masks(stage));
                picks.copy(layout.picks(stage));
                columns.copy(layout.columns(stage));
                feed.bring(need);
                // The first tile of a window is complete with the window.
                const bool begins = feed.tile == 0 || (first + feed.tile) % slot24::kWindowTiles == 0;
                if (!begins && leads) ptx::mbarrier_arrive(feed.barrier());
                feed.advance();
            } else if (window_tile < feed.tile && feed.done >= window_tile - (kWindows - 1) * slot24::kWindowTiles) {
                // There is a place: the last tile of the window that lay there is released.
                x.write(layout.window(window));
                if (leads) ptx::mbarrier_arrive(feed.barriers.full(window_tile % L::Feed::kDepth));
                if (++window == kWindows) window = 0;
                window_tile += slot24::kWindowTiles - (first + window_tile) % slot24::kWindowTiles;
            } else {
                feed.wait_release();
            }
        }
    }
};

// Grid (G, ceil(N / kN)). workspace: see stream_k.cuh. masks ... columns: see docs/formats/slot24.md. window_columns: of x
// in a window. kRing: value rows that the ring of a part holds. kStages: tiles for which masks, picks and columns have room.
// kWindows: of x. kUnits: of x on their way. kAligned: K is a multiple of 8 and x 16-byte aligned.
template <typename T, int kN, int kRing, int kStages, int kWindows, int kUnits, int kMinBlocks, bool kAligned>
__global__ void __launch_bounds__(kThreads, kMinBlocks)
spmm_slot24(const T* __restrict__ x, const unsigned char* __restrict__ masks, const unsigned char* __restrict__ values,
            const int* __restrict__ fronts, const unsigned short* __restrict__ lags,
            const unsigned char* __restrict__ picks, const unsigned char* __restrict__ columns, T* __restrict__ y,
            unsigned char* __restrict__ workspace, int M, int N, int K, int window_columns, int row_cost) {
    using S = Slot24Shape<kN>;
    using L = Layout<kN, kRing, kStages, kWindows, kUnits>;
    using Loader = XWindowLoader<kN, kUnits, kAligned>;
    using Loads = Load<L, Loader, kWindows>;
    FLASHLLM_DYNAMIC_SHARED(shared);
    const L layout{ptx::shared_address(shared)};
    const StageBarriers barriers = layout.barriers();
    const int lane = threadIdx.x & 31;
    const bool feeds = threadIdx.x >= bitmap::kTileThreads;

    const StreamK<S> split((M + bitmap::kTileM - 1) / bitmap::kTileM, (K + window_columns - 1) / window_columns * slot24::kWindowTiles,
                           row_cost, workspace);
    const int first = static_cast<int>(split.first_tile(blockIdx.x));
    const int count = static_cast<int>(split.first_tile(blockIdx.x + 1)) - first;
    const int n0 = blockIdx.y * kN;
    const int tile_k = first % split.tiles_k;
    const int first_front = __ldg(fronts + first);
    const int origin = max(first_front - bitmap::kSlack, 0) / bitmap::kChunkRows * bitmap::kChunkRows;
    const typename L::Ring ring{layout.base, origin};

    if (threadIdx.x == 0) barriers.init(kStages, Loads::kArrivals);
    __syncthreads();

    Accumulators<S> sum = {};
    if (feeds) {
        Loads::run(layout, typename L::Feed(ring, barriers, values, fronts + first, count, first_front),
                   Loader(reinterpret_cast<const unsigned short*>(x), n0, N, K, window_columns,
                          tile_k / slot24::kWindowTiles, layout.units()),
                   first, TileCopier<bitmap::kMaskBytes>(masks, first), TileCopier<slot24::kPickBytes>(picks, first),
                   TileCopier<slot24::kColumnBytes>(columns, first));
    } else {
        Streams<kRing> streams(ring, masks, fronts, lags, first);
        unsigned& even = streams.even;
        unsigned& odd = streams.odd;
        // All reads of a stage, and of value rows that only the tile and those before needed, are done.
        const auto release = [&](int stage) {
            __syncwarp();
            if (lane == 0) ptx::mbarrier_arrive(barriers.empty(stage));
        };

        int row_end = min(count, split.tiles_k - tile_k);  // first tile of the next row of tiles
        int chain_end = split.first_chain(row_end, S::kMaxChain, blockIdx.x);
        Cycle<kStages> cycle;
        int x_window = 0, parity = first % slot24::kWindowTiles;
        int tile = 0;
        while (true) {
            ptx::mbarrier_wait(barriers.full(cycle.stage), cycle.parity);
            const uint2 mask = ptx::load_shared8(layout.masks(cycle.stage) + threadIdx.x * 8);
            const uint2 pick = ptx::load_shared8(layout.picks(cycle.stage) + threadIdx.x * 8);
            const unsigned column = ptx::load_shared4(layout.columns(cycle.stage) + threadIdx.x * 4);
            const unsigned window = layout.window(x_window);
            streams.wrap();
            multiply_step<T, S, 0>(sum, even, odd, mask.x, pick.x, column, window);
            multiply_step<T, S, 1>(sum, even, odd, mask.x, pick.x, column, window);
            streams.wrap();
            multiply_step<T, S, 2>(sum, even, odd, mask.y, pick.y, column, window);
            multiply_step<T, S, 3>(sum, even, odd, mask.y, pick.y, column, window);
            if ((++parity & 1) == 0 && ++x_window == kWindows) x_window = 0;
            release(cycle.stage);
            cycle.advance();
            if (++tile != chain_end) continue;

            // A chain ends: rare. Which row of tiles this is, is worked out here: the loop needs the registers more.
            const int block = ptx::opaque(blockIdx.x);
            const unsigned run_begin = split.first_tile(block);
            const unsigned tile_m = (run_begin + row_end - 1) / split.tiles_k;
            const unsigned row_begin = max(run_begin, tile_m * split.tiles_k);
            const auto piece = split.piece(block, tile_m, blockIdx.y);
            const bool row_ends = tile == row_end;
            if (run_begin + tile - row_begin > S::kMaxChain) piece.add_stored(sum);  // by earlier chains
            if (row_ends && piece.whole) {
                store_fragments<S>(sum, y, n0, static_cast<int>(tile_m) * bitmap::kTileM, N, M);
            } else {
                piece.store(sum);
            }
            if (tile == count) break;
            if (row_ends) {
                row_end = min(count, row_end + split.tiles_k);
                chain_end += split.first_chain(row_end - chain_end, S::kMaxChain, block);
            } else {
                chain_end = min(row_end, chain_end + S::kMaxChain);
            }
        }
    }

    // The run shares its first and its last row of tiles, or one, or none, with other blocks: see tiled_csl.cu.
    const int block = ptx::opaque(blockIdx.x);
    const unsigned run_begin = split.first_tile(block);
    const unsigned first_m = run_begin / split.tiles_k, last_m = (run_begin + count - 1) / split.tiles_k;
    int* const completes = reinterpret_cast<int*>(shared);  // values are not needed any more
    __syncthreads();  // all threads have stored their part of the pieces
    if (threadIdx.x == 0) completes[0] = split.piece(block, first_m, blockIdx.y).arrive_last();
    if (threadIdx.x == 32) completes[1] = last_m != first_m && split.piece(block, last_m, blockIdx.y).arrive_last();
    __syncthreads();
    if (feeds) return;
#pragma unroll 1
    for (int i = 0; i < 2; ++i) {
        if (!completes[i]) continue;
        const unsigned tile_m = i == 0 ? first_m : last_m;
        split.piece(block, tile_m, blockIdx.y).add_all(sum);
        store_fragments<S>(sum, y, n0, static_cast<int>(tile_m) * bitmap::kTileM, N, M);
    }
}

}  // namespace flashllm
