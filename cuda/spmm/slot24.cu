// SPDX-License-Identifier: Apache-2.0
// y[N, M] = x[N, K] @ W[M, K]^T with W in slots of the 2:4 sparse tensor cores: two columns of W share one.
//
// Which two is a choice of the format, made for bands of 32 or 64 rows, so x is gathered: the multiplying warps lay windows
// of x into shared memory column by column (x_window.cuh), and a lane loads the columns that its band has paired. All
// else is as in bitmap.cu: slots are a bitmap and value streams, fed by a fifth warp (value_ring.cuh) and walked tile by
// tile, a tile being 128 rows x 64 slots of 128 columns. Per tile, a multiplying warp
//   waits      for the tile's barrier, and with the first tile of a window for that of x,
//   gathers    the columns of x that each step's slots belong to,
//   decodes    its masks, 16 groups of four slots per lane, into A fragments (bitmap.cuh),
//   multiplies them on sparse tensor cores, which take of each pair the column that the picks name, and
//   releases   the tile, and with the second of a window that of x.
// Dense tensor cores take as many fragment registers for half as many columns: decoding costs half per element.
// A warp has one part: a band of 32 rows, or half of the slots of one of 64, for which it gathers half as much. Then the
// halves' sums have to be added, once a chain.
#include "flashllm/chains.cuh"
#include "flashllm/epilogue.cuh"
#include "flashllm/ptx.cuh"
#include "flashllm/slot24.cuh"
#include "flashllm/stream_k.cuh"
#include "flashllm/value_ring.cuh"
#include "flashllm/x_window.cuh"

namespace flashllm {

// PartShape, but that in bands of 64 rows a warp has four fragments of 16 rows, and one of two slices of K.
template <int kN, int kPartRows, int kGroupValues_>
struct SlotShape : PartShape<kN> {
    static constexpr int kGroupValues = kGroupValues_;
    using Bands = slot24::Bands<kPartRows>;
    static constexpr int kSlices = Bands::kHalves;
    static constexpr int kRowFragments = kPartRows / 16;

    FLASHLLM_DEVICE static int row(int i) {
        return kSlices == 1 ? PartShape<kN>::row(i) : static_cast<int>(threadIdx.x >> 6) * 64 + i * 16;
    }
    FLASHLLM_DEVICE static int slice() { return kSlices == 1 ? 0 : threadIdx.x >> 5 & 1; }
};

// Loads the columns of x that step kStep of the part names: one of four bytes, times the distance of columns.
template <typename S, typename Windows, int kStep>
FLASHLLM_DEVICE void gather(unsigned (&b)[S::kColumnFragments][4], unsigned columns, unsigned window) {
    const unsigned column = ptx::dot4(columns, static_cast<unsigned>(Windows::kColumnBytes) << (8 * kStep), window);
#pragma unroll
    for (int j = 0; j < S::kColumnFragments; ++j) ptx::load_matrix_x4_transposed(b[j], column + j * 16);
}

// Decodes half kHalf of a mask word, 32 rows of one step, and multiplies it: the rows from fragment kFirst on.
template <typename T, typename S, int kHalf, int kFirst, typename Values>
FLASHLLM_DEVICE void multiply_rows(Accumulators<S>& sum, Values& streams, unsigned mask, unsigned picks,
                                   const unsigned (&b)[S::kColumnFragments][4]) {
    unsigned a[2][4];
    bitmap::decode_step<kHalf, S::kGroupValues>(a, streams.low, streams.high, mask);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        const unsigned metadata = slot24::metadata(picks, i);
#pragma unroll
        for (int j = 0; j < S::kColumnFragments; ++j) {
            ptx::mma_sp_m16n8k32<T, kHalf>(sum[kFirst + i][j], a[i], b[j], metadata);
        }
    }
}

// Multiplies what word kWord of masks and picks is about: two steps, or one of twice as many rows.
template <typename T, typename S, typename Windows, int kWord, typename Values>
FLASHLLM_DEVICE void multiply_word(Accumulators<S>& sum, Values& streams, unsigned mask, unsigned picks, unsigned columns,
                                   unsigned window) {
    constexpr bool kTwoSteps = S::kSlices == 1;
    unsigned b[S::kColumnFragments][4];
    gather<S, Windows, kTwoSteps ? 2 * kWord : kWord>(b, columns, window);
    multiply_rows<T, S, 0, 0>(sum, streams, mask, picks, b);
    if constexpr (kTwoSteps) gather<S, Windows, 2 * kWord + 1>(b, columns, window);
    multiply_rows<T, S, 1, kTwoSteps ? 0 : 2>(sum, streams, mask, picks, b);
}

// Shared memory of a block: rings of value rows, windows of x, stages of masks, picks and columns, sums on their way from
// one slice to the other, barriers.
template <int kRing, int kStages, typename S, typename Windows>
struct Layout {
    using Ring = ValueRing<kRing, bitmap::kStreamElements * S::kGroupValues / bitmap::kGroup>;
    using Feed = Feeder<Ring, kStages>;
    static constexpr int kColumnBytes = S::Bands::kColumnBytes;
    static constexpr unsigned kStageBytes = bitmap::kMaskBytes + slot24::kPickBytes + kColumnBytes;
    static constexpr unsigned kWindowsAt = Ring::kBytes;
    static constexpr unsigned kStagesAt = kWindowsAt + Windows::kBytes;
    static constexpr unsigned kSumsAt = kStagesAt + kStages * kStageBytes;
    static constexpr unsigned kBarriersAt = kSumsAt + kSumBytes<S>;

    unsigned base;  // shared address

    FLASHLLM_DEVICE unsigned masks(int stage) const { return base + kStagesAt + stage * kStageBytes; }
    FLASHLLM_DEVICE unsigned picks(int stage) const { return masks(stage) + bitmap::kMaskBytes; }
    FLASHLLM_DEVICE unsigned columns(int stage) const { return picks(stage) + slot24::kPickBytes; }
    FLASHLLM_DEVICE StageBarriers barriers() const { return {base + kBarriersAt}; }
    FLASHLLM_DEVICE unsigned window_barriers() const { return base + kBarriersAt + kStages * 16; }
};

// The feeding warp's loop.
template <typename L>
FLASHLLM_DEVICE void feed_tiles(const L& layout, typename L::Feed feed, const unsigned char* masks,
                                const unsigned char* picks, const unsigned char* columns) {
    for (; feed.tile < feed.count; feed.advance()) {
        const int need = feed.needed();
        while (!feed.has_room(need)) feed.wait_release();
        const int stage = feed.filled.stage;
        const Piece pieces[] = {{layout.masks(stage), masks, bitmap::kMaskBytes},
                                {layout.picks(stage), picks, slot24::kPickBytes},
                                {layout.columns(stage), columns, L::kColumnBytes}};
        feed.bring(pieces, need);
        masks += bitmap::kMaskBytes, picks += slot24::kPickBytes, columns += L::kColumnBytes;
    }
}

// Grid (G, ceil(N / kN)). workspace: see stream_k.cuh. masks ... columns: see docs/formats/slot24.md. window_columns: of x
// in a window. kRing: value rows that the ring of a part holds. kStages: tiles for which masks, picks and columns have
// room. kWindows: of x. kAligned: K is a multiple of 8 and x 16-byte aligned.
template <typename T, int kN, int kPartRows, int kGroupValues, int kRing, int kStages, int kWindows, int kMinBlocks, bool kAligned>
__global__ void __launch_bounds__(kThreads, kMinBlocks)
spmm_slot24(const T* x, const unsigned char* __restrict__ masks, const unsigned char* __restrict__ values,
            const int* __restrict__ fronts, const unsigned short* __restrict__ lags,
            const unsigned char* __restrict__ picks, const unsigned char* __restrict__ columns, T* __restrict__ y,
            unsigned char* __restrict__ workspace, int M, int N, int K, int window_columns, int row_cost,
            int runs, int runs_row_cost) {
    static_assert(kN % 8 == 0 && kN <= 32, "one block computes 8..32 columns of x");
    using S = SlotShape<kN, kPartRows, kGroupValues>;
    using Windows = XWindows<kN, kWindows, kAligned>;
    using L = Layout<kRing, kStages, S, Windows>;
    FLASHLLM_DYNAMIC_SHARED(shared);
    const L layout{ptx::shared_address(shared)};
    const StageBarriers barriers = layout.barriers();
    const int warp = ptx::uniform(threadIdx.x >> 5);
    const bool feeds = warp == bitmap::kParts;

    const StreamK<S> split((M + bitmap::kTileM - 1) / bitmap::kTileM,
                           (K + window_columns - 1) / window_columns * slot24::kWindowTiles, row_cost, workspace);
    const int first = static_cast<int>(split.first_tile(blockIdx.x));
    const int count = static_cast<int>(split.first_tile(blockIdx.x + 1)) - first;
    const int n0 = blockIdx.y * kN;
    const int row = first / split.tiles_k, tile_k = first - row * split.tiles_k;

    const FirstFronts first_fronts(fronts + first, count);
    // From the begin of a run of the format on, no row is needed from before it.
    const Runs format_runs{split.tiles_m, split.tiles_k, runs_row_cost, static_cast<unsigned>(runs)};
    int run = static_cast<int>(format_runs.run_of(first)), restart = static_cast<int>(format_runs.first_tile(run));
    const typename L::Ring ring(layout.base, first_fronts.begin, first == restart ? 0 : bitmap::kSlack);
    if (threadIdx.x == 0) {
        barriers.init(kStages, L::Feed::kArrivals);
        Windows::init(layout.window_barriers());
        ptx::mbarrier_init_fence();
    }
    __syncthreads();

    if (feeds) {
        feed_tiles(layout, typename L::Feed(ring, barriers, values, fronts + first, count, first_fronts),
                   masks + static_cast<long long>(first) * bitmap::kMaskBytes,
                   picks + static_cast<long long>(first) * slot24::kPickBytes,
                   columns + static_cast<long long>(first) * L::kColumnBytes);
    } else {
        const int windows = (first + count - 1) / slot24::kWindowTiles - first / slot24::kWindowTiles + 1;
        Windows window(reinterpret_cast<const unsigned short*>(x), n0, N, K, window_columns, tile_k / slot24::kWindowTiles,
                       windows, warp, layout.base + L::kWindowsAt, layout.window_barriers());
        ptx::grid_dependency_wait();  // the feeder need not: all it brings is constant
        ptx::grid_launch_dependents();
        window.ask();
        Accumulators<S> sum = {};
        const auto write = [&](Accumulators<S>& sum, int row) {
            store_fragments<S>(sum, y, n0, row * S::kM, N, M);
        };
        Streams<typename L::Ring> streams(ring, masks, fronts, lags, first, restart, warp);
        // The next begin of a run of the format, counted from the first tile, and the front there.
        const auto next_restart = [&] { return static_cast<int>(format_runs.first_tile(++run)) - first; };
        restart = next_restart();
        int restart_front = __ldg(fronts + first + min(restart, count));
        Chains<S> chains(split, first, row, count);
        int stop = min(chains.chain_end, restart);

        Cycle<kStages> cycle;
        int tile = 0;
        unsigned here = 0;  // the window in use
        while (true) {
            // With room for two, a window is written a tile before its use; but not two of them at the first tile.
            const bool second = (first + tile) % slot24::kWindowTiles != 0;
            const bool early = kWindows > 1 && second && tile + 1 < count;
            const bool late = !second && (kWindows == 1 || tile == 1);
            if (tile == 0 || early || late) window.write();
            if (tile == 0 || !second) here = window.enter();
            ptx::mbarrier_wait(barriers.full(cycle.stage), cycle.parity);
            const uint2 mask = ptx::load_shared8(layout.masks(cycle.stage) + threadIdx.x * 8);
            const uint2 pick = ptx::load_shared8(layout.picks(cycle.stage) + threadIdx.x * 8);
            const unsigned place = layout.columns(cycle.stage) + threadIdx.x * S::Bands::kPartSteps;
            const unsigned column = S::kSlices == 1 ? ptx::load_shared4(place) : ptx::load_shared_half(place);
            streams.wrap();
            multiply_word<T, S, Windows, 0>(sum, streams, mask.x, pick.x, column, here);
            streams.wrap();
            multiply_word<T, S, Windows, 1>(sum, streams, mask.y, pick.y, column, here);
            barriers.release(cycle.stage);
            cycle.advance();
            if (second) window.leave();
            if (++tile != stop) continue;
            if (tile == chains.chain_end) {
                add_slices<S>(sum, reinterpret_cast<float4*>(shared + L::kSumsAt));
                chains.end(split, tile, sum, write);
                if (tile == count) break;
            }
            if (tile == restart) {
                streams.restart(ring, restart_front);
                restart = next_restart();
                restart_front = __ldg(fronts + first + min(restart, count));
            }
            stop = min(chains.chain_end, restart);
        }
        chains.finish(split, sum, write);
    }
}

}  // namespace flashllm
