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
#include "flashllm/part_ring.cuh"
#include "flashllm/x_window.cuh"

namespace flashllm {

constexpr int kThreads = bitmap::kTileThreads;
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

// One m16n8k32 step: gathers x, decodes the A fragments of both rows of fragments and multiplies.
template <typename T, typename S, int kStep>
FLASHLLM_DEVICE void multiply_step(Accumulators<S>& sum, unsigned& even, unsigned& odd, unsigned mask, unsigned picks,
                                   unsigned columns, unsigned window) {
    constexpr unsigned kColumnBytes = (S::kN / 8 | 1) * 16;
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

// What a thread needs of a tile, brought by cp.async of its own: masks, picks and columns of its lane.
template <int kStages>
struct LaneStages {
    static constexpr unsigned kStageBytes = bitmap::kMaskBytes + slot24::kPickBytes + slot24::kColumnBytes;
    unsigned base;  // shared address
    const unsigned char *masks, *picks, *columns;  // of the next tile
    int stage = 0;

    FLASHLLM_DEVICE LaneStages(unsigned base_, const unsigned char* masks_, const unsigned char* picks_,
                               const unsigned char* columns_, int first)
        : base(base_ + threadIdx.x * 8), masks(masks_ + static_cast<long long>(first) * bitmap::kMaskBytes + threadIdx.x * 8),
          picks(picks_ + static_cast<long long>(first) * slot24::kPickBytes + threadIdx.x * 8),
          columns(columns_ + static_cast<long long>(first) * slot24::kColumnBytes + threadIdx.x * 4) {}

    FLASHLLM_DEVICE void load() {
        const unsigned to = base + stage * kStageBytes;
        ptx::copy_async8(to, masks);
        ptx::copy_async8(to + bitmap::kMaskBytes, picks);
        ptx::copy_async4(to + bitmap::kMaskBytes + slot24::kPickBytes - threadIdx.x * 4, columns);
        masks += bitmap::kMaskBytes, picks += slot24::kPickBytes, columns += slot24::kColumnBytes;
        if (++stage == kStages) stage = 0;
    }
};

// Grid (G, ceil(N / kN)). workspace: see stream_k.cuh. masks ... columns: see docs/formats/slot24.md. window_columns: of x
// in a window. kRing: value rows that the ring of a part holds. kStages: tiles for which masks, picks and columns have
// room. kWindows: of x. kAligned: K is a multiple of 8 and x 16-byte aligned.
template <typename T, int kN, int kRing, int kStages, int kWindows, int kMinBlocks, bool kAligned>
__global__ void __launch_bounds__(kThreads, kMinBlocks)
spmm_slot24(const T* __restrict__ x, const unsigned char* __restrict__ masks, const unsigned char* __restrict__ values,
            const int* __restrict__ fronts, const unsigned short* __restrict__ lags,
            const unsigned char* __restrict__ picks, const unsigned char* __restrict__ columns, T* __restrict__ y,
            unsigned char* __restrict__ workspace, int M, int N, int K, int window_columns, int row_cost) {
    using S = Slot24Shape<kN>;
    using Ring = PartRing<kRing>;
    using Windows = XWindows<kN, kWindows, kAligned>;
    using Stages = LaneStages<kStages>;
    FLASHLLM_DYNAMIC_SHARED(shared);
    const unsigned rings = ptx::shared_address(shared);
    const unsigned x_windows = rings + bitmap::kParts * Ring::kBytes;
    const unsigned stages = x_windows + Windows::kBytes;
    const unsigned barriers = stages + kStages * Stages::kStageBytes;

    const StreamK<S> split((M + bitmap::kTileM - 1) / bitmap::kTileM,
                           (K + window_columns - 1) / window_columns * slot24::kWindowTiles, row_cost, workspace);
    const int first = static_cast<int>(split.first_tile(blockIdx.x));
    const int count = static_cast<int>(split.first_tile(blockIdx.x + 1)) - first;
    const int n0 = blockIdx.y * kN;
    const int tile_k = first % split.tiles_k;

    const int windows = (first + count - 1) / slot24::kWindowTiles - first / slot24::kWindowTiles + 1;
    Windows window(reinterpret_cast<const unsigned short*>(x), n0, N, K, window_columns, tile_k / slot24::kWindowTiles,
                   windows, x_windows, barriers + bitmap::kParts * Ring::kBarrierBytes);
    __syncthreads();
    window.ask();
    Stages lane_stages(stages, masks, picks, columns, first);
#pragma unroll
    for (int i = 0; i < kStages - 1; ++i) {
        if (i < count) lane_stages.load();
        ptx::copy_async_commit();
    }
    const int first_front = __ldg(fronts + first);
    Ring ring(rings, barriers, values, max(first_front - bitmap::kSlack, 0), __ldg(fronts + first + count) + 1);
    // Not the whole ring: what the first tiles of all blocks need comes first (2 % at 90 % zeros).
    ring.refill(kFirstRows);
    Fronts all_fronts(fronts + first, count);
    int front = first_front - ring.origin;
    Streams<kRing> streams(ring, masks, fronts, lags, first);
    window.write();

    Accumulators<S> sum = {};
    int row_end = min(count, split.tiles_k - tile_k);  // first tile of the next row of tiles
    int chain_end = split.first_chain(row_end, S::kMaxChain, blockIdx.x);
    int tile = 0;
    unsigned here = 0;  // the window in use
    while (true) {
        const bool second = (first + tile) % slot24::kWindowTiles != 0;
        if (!second || tile == 0) here = window.enter();
        // The next window is written a tile ahead of its use; the first one at the end of its tile, until when it has come.
        const bool more = second && tile + 1 < count;
        if (kWindows > 1 && more && tile != 0) window.write();
        ptx::copy_async_wait<kStages - 2>();
        __syncwarp();  // all lanes have read what the refill overwrites
        ring.refill(front - bitmap::kSlack + kRing);
        const unsigned stage = stages + (tile % kStages) * Stages::kStageBytes;
        if (tile + kStages - 1 < count) lane_stages.load();
        ptx::copy_async_commit();  // committed even when empty: the wait counts groups
        front = all_fronts.next() - ring.origin;
        ring.wait(front + 1);  // one more than the tile has: a stream that is through reads its next value, unused
        const uint2 mask = ptx::load_shared8(stage + threadIdx.x * 8);
        const uint2 pick = ptx::load_shared8(stage + bitmap::kMaskBytes + threadIdx.x * 8);
        const unsigned column = ptx::load_shared4(stage + bitmap::kMaskBytes + slot24::kPickBytes + threadIdx.x * 4);
        streams.wrap();
        multiply_step<T, S, 0>(sum, streams.even, streams.odd, mask.x, pick.x, column, here);
        multiply_step<T, S, 1>(sum, streams.even, streams.odd, mask.x, pick.x, column, here);
        streams.wrap();
        multiply_step<T, S, 2>(sum, streams.even, streams.odd, mask.y, pick.y, column, here);
        multiply_step<T, S, 3>(sum, streams.even, streams.odd, mask.y, pick.y, column, here);
        if (second) window.leave();
        if (more && (kWindows == 1 || tile == 0)) window.write();
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

    // The run shares its first and its last row of tiles, or one, or none, with other blocks: see tiled_csl.cu.
    const int block = ptx::opaque(blockIdx.x);
    const unsigned run_begin = split.first_tile(block);
    const unsigned first_m = run_begin / split.tiles_k, last_m = (run_begin + count - 1) / split.tiles_k;
    int* const completes = reinterpret_cast<int*>(shared);  // values are not needed any more
    __syncthreads();  // all threads have stored their part of the pieces
    if (threadIdx.x == 0) completes[0] = split.piece(block, first_m, blockIdx.y).arrive_last();
    if (threadIdx.x == 32) completes[1] = last_m != first_m && split.piece(block, last_m, blockIdx.y).arrive_last();
    __syncthreads();
#pragma unroll 1
    for (int i = 0; i < 2; ++i) {
        if (!completes[i]) continue;
        const unsigned tile_m = i == 0 ? first_m : last_m;
        split.piece(block, tile_m, blockIdx.y).add_all(sum);
        store_fragments<S>(sum, y, n0, static_cast<int>(tile_m) * bitmap::kTileM, N, M);
    }
}

}  // namespace flashllm
