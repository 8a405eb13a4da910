// SPDX-License-Identifier: Apache-2.0
// y[N, M] = x[N, K] @ W[M, K]^T with W as a bitmap and value streams: decoded straight into tensor-core fragments.
//
// The tiles of W are dealt to the blocks in contiguous runs (stream_k.cuh), and the values of a run are one contiguous
// stream. Four warps of a block multiply, one for each part of a tile; the fifth brings them x, masks and value rows, bulk
// copies and cp.async that end in one barrier per tile, as far ahead as the stages and the ring of value rows have room.
// Per tile, a multiplying warp
//   waits      for the tile's barrier,
//   decodes    its masks, 16 groups of four elements per lane, into A fragments (bitmap.cuh),
//   multiplies them by x on tensor cores, and
//   releases   the stage, and with it the value rows that no stream needs any more.
// The warps of a block meet nowhere else until its run ends. No element of W is written to shared memory once decoded, and
// nothing is counted, scanned or scattered.
#include "flashllm/bitmap.cuh"
#include "flashllm/epilogue.cuh"
#include "flashllm/ptx.cuh"
#include "flashllm/stream_k.cuh"
#include "flashllm/x_stage.cuh"

namespace flashllm {

constexpr int kThreads = (bitmap::kParts + 1) * bitmap::kLanes;  // the last warp brings what the others multiply
constexpr int kMaxChainSteps = 384;  // see tiled_csl.cu: tensor cores truncate
constexpr int kMirrorRows = 16;      // a pointer wraps once per mask word: 16 elements of a stream
static_assert(bitmap::kStreamElements == 2 * kMirrorRows, "a mask word is half of a stream's elements");

template <int kN_>
struct BitmapShape {
    static constexpr int kN = kN_;
    static constexpr int kM = bitmap::kTileM;
    static constexpr int kBlockWarps = bitmap::kParts;
    static constexpr int kSlices = 1;
    static constexpr int kRowFragments = 2;
    static constexpr int kColumnFragments = kN / 8;
    static constexpr int kMaxChain = kMaxChainSteps / (bitmap::kTileK / 16);  // tiles
    static constexpr int kStageBytes = kN * kStageRowBytes;
    static_assert(kN % 8 == 0 && kN <= 64, "one block computes 8..64 columns of x");

    FLASHLLM_DEVICE static int row(int i) { return i * 64 + static_cast<int>(threadIdx.x >> 5) * 16; }
    FLASHLLM_DEVICE static int slice() { return 0; }
};

// Shared memory of a block: for each part a ring of value rows, stages of x and masks, a pair of barriers for each stage.
// Rows are numbered from the run's first; row r of a part lies at place r % kRing, and rows at the first places once more
// behind the last, so that a pointer may run kMirrorRows over the end before it wraps.
template <int kN, int kRing, int kStages>
struct Layout {
    static constexpr unsigned kRingBytes = (kRing + kMirrorRows) * bitmap::kRowBytes;  // of one part
    static constexpr unsigned kXBytes = kN * kStageRowBytes;
    static constexpr unsigned kStageBytes = kXBytes + bitmap::kMaskBytes;
    static constexpr unsigned kStagesAt = bitmap::kParts * kRingBytes;
    static constexpr unsigned kBarriersAt = kStagesAt + kStages * kStageBytes;
    static_assert(kRing % bitmap::kChunkRows == 0 && kMirrorRows == bitmap::kChunkRows, "mirrored is the first chunk");
    static_assert(kRing > bitmap::kSlack + bitmap::kStreamElements,
                  "or a full tile of a stream could wait for rows that wait for the slowest stream");

    unsigned base;  // shared address

    FLASHLLM_DEVICE unsigned ring(int part) const { return base + part * kRingBytes; }
    FLASHLLM_DEVICE unsigned x(int stage) const { return base + kStagesAt + stage * kStageBytes; }
    FLASHLLM_DEVICE unsigned masks(int stage) const { return x(stage) + kXBytes; }
    FLASHLLM_DEVICE unsigned full(int stage) const { return base + kBarriersAt + stage * 16; }
    FLASHLLM_DEVICE unsigned empty(int stage) const { return full(stage) + 8; }
};

// Fragments of two k16 steps of x, from column 32 kWord of a stage on.
template <typename S, int kWord>
FLASHLLM_DEVICE void load_x(unsigned (&b)[2][S::kColumnFragments][2], unsigned stage) {
    const int lane = threadIdx.x & 31;
    if constexpr (S::kN == 8) {
        unsigned quad[4];
        ptx::load_matrix_x4(quad, stage + (lane & 7) * kStageRowBytes + ((kWord * 4 + (lane >> 3)) ^ (lane & 7)) * 16);
        b[0][0][0] = quad[0], b[0][0][1] = quad[1], b[1][0][0] = quad[2], b[1][0][1] = quad[3];
    } else {
        const unsigned row = stage + ((lane & 7) + (lane >> 4) * 8) * kStageRowBytes;
#pragma unroll
        for (int step = 0; step < 2; ++step) {
            const unsigned chunk = ((kWord * 4 + step * 2 + (lane >> 3 & 1)) ^ (lane & 7)) << 4;
#pragma unroll
            for (int j = 0; j < S::kColumnFragments; j += 2) {
                unsigned quad[4];
                ptx::load_matrix_x4(quad, row + j * 8 * kStageRowBytes + chunk);
                b[step][j][0] = quad[0], b[step][j][1] = quad[1];
                b[step][j + 1][0] = quad[2], b[step][j + 1][1] = quad[3];
            }
        }
    }
}

// One k16 step: decodes the A fragments of both rows of fragments and multiplies.
template <typename T, typename S, int kStep>
FLASHLLM_DEVICE void multiply_step(Accumulators<S>& sum, unsigned& even, unsigned& odd, unsigned mask,
                                   const unsigned (&b)[S::kColumnFragments][2]) {
    unsigned a[2][4];
    bitmap::decode_group<kStep * 4>(a[0][0], a[0][1], even, odd, mask);
    bitmap::decode_group<kStep * 4 + 1>(a[0][2], a[0][3], even, odd, mask);
#pragma unroll
    for (int j = 0; j < S::kColumnFragments; ++j) ptx::mma_m16n8k16<T>(sum[0][j], a[0], b[j][0], b[j][1]);
    bitmap::decode_group<kStep * 4 + 2>(a[1][0], a[1][1], even, odd, mask);
    bitmap::decode_group<kStep * 4 + 3>(a[1][2], a[1][3], even, odd, mask);
#pragma unroll
    for (int j = 0; j < S::kColumnFragments; ++j) ptx::mma_m16n8k16<T>(sum[1][j], a[1], b[j][0], b[j][1]);
}

// Half a tile: one mask word per lane, 32 columns.
template <typename T, typename S, int kWord>
FLASHLLM_DEVICE void multiply_word(Accumulators<S>& sum, unsigned& even, unsigned& odd, unsigned mask, unsigned stage) {
    unsigned b[2][S::kColumnFragments][2];
    load_x<S, kWord>(b, stage);
    multiply_step<T, S, 0>(sum, even, odd, mask, b[0]);
    multiply_step<T, S, 1>(sum, even, odd, mask, b[1]);
}

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
// The same k16 step on the warpgroup's tensor cores, which read x from shared memory: the four warps of the block at one
// time. Starts its products and returns when those of the step before are done, so that two steps' fragments are alive.
template <typename T, typename S, int kStep>
FLASHLLM_DEVICE void start_step(Accumulators<S>& sum, unsigned& even, unsigned& odd, unsigned mask, unsigned stage_operand) {
    unsigned a[2][4];
    constexpr int kGroup = kStep % 2 * 4;
    bitmap::decode_group<kGroup>(a[0][0], a[0][1], even, odd, mask);
    bitmap::decode_group<kGroup + 1>(a[0][2], a[0][3], even, odd, mask);
    bitmap::decode_group<kGroup + 2>(a[1][0], a[1][1], even, odd, mask);
    bitmap::decode_group<kGroup + 3>(a[1][2], a[1][3], even, odd, mask);
    ptx::warpgroup_begin();
#pragma unroll
    for (int i = 0; i < 2; ++i) ptx::warpgroup_mma<T>(sum[i], a[i], stage_operand + kStep * 32 / 16);
    ptx::warpgroup_commit();
    ptx::warpgroup_wait<1>();
}
#endif

// A place in the cycle of stages: the stage, and the parity of the phase of its barriers.
template <int kStages>
struct Cycle {
    int stage = 0;
    unsigned parity = 0;
    FLASHLLM_DEVICE void advance() {
        if (++stage == kStages) stage = 0, parity ^= 1;
    }
};

// The warp that brings everything: for each tile x, masks and the value rows that no tile before needed, announced on one
// barrier. It runs ahead until the stages are full, or the ring.
template <typename S, int kRing, int kStages, bool kAligned>
struct Producer {
    using L = Layout<S::kN, kRing, kStages>;
    struct OneWarp : S {
        static constexpr int kBlockWarps = 1;
        static constexpr int kStageBytes = L::kStageBytes;
    };

    L layout;
    const unsigned char *masks, *values;
    const int* fronts;  // of the run's first tile
    int count, origin;
    XLoader<OneWarp, kAligned> x;

    // Lane l holds the front behind tile 32 i + l: of the last 32 tiles, of the present ones and the next.
    int before_set = 0, front_set, next_set;

    FLASHLLM_DEVICE int load_fronts(int tile) const {
        return __ldg(fronts + min(tile + static_cast<int>(threadIdx.x & 31), count));
    }

#if __CUDA_ARCH__ >= 900
    static constexpr int kArrivals = bitmap::kLanes + 1;  // each lane's for x, and the first lane's for the bulk copies

    // Announces the value rows first..end-1 and the masks of a tile on `barrier`, and copies them.
    FLASHLLM_DEVICE void copy(int first, int end, const unsigned char* tile_masks, unsigned masks_at, unsigned barrier) const {
        constexpr int kPieces = bitmap::kLanes / bitmap::kParts / 2;  // chunks of one round: a lane has one part of one
        const int lane = threadIdx.x & 31, part = lane % bitmap::kParts;
        const bool mirror = lane >= bitmap::kLanes / 2;  // the upper lanes write the first places once more
        if (lane == 0) {
            const int bytes = (end - first + rows_at_first_places(first, end)) * bitmap::kParts * bitmap::kRowBytes;
            ptx::mbarrier_expect(barrier, bytes + bitmap::kMaskBytes);
            ptx::bulk_copy(masks_at, tile_masks, bitmap::kMaskBytes, barrier);
        }
        __syncwarp();
        for (int round = first / bitmap::kChunkRows; round * bitmap::kChunkRows < end; round += kPieces) {
            const int chunk = round + lane / bitmap::kParts % kPieces;
            const int from = max(first, chunk * bitmap::kChunkRows), to = min(end, (chunk + 1) * bitmap::kChunkRows);
            const int place = (from - origin) % kRing;
            if (from < to && (!mirror || place < kMirrorRows)) {
                ptx::bulk_copy(layout.ring(part) + (place + (mirror ? kRing : 0)) * bitmap::kRowBytes, source(part, from),
                               (to - from) * bitmap::kRowBytes, barrier);
            }
        }
    }

    // How many of the rows first..end-1, less than kRing of them, lie at the first places of the ring.
    FLASHLLM_DEVICE int rows_at_first_places(int first, int end) const {
        const int place = (first - origin) % kRing, over = place + (end - first) - kRing;  // rows that wrap to place 0
        return max(min(kMirrorRows, place + (end - first)) - place, 0) + max(min(kMirrorRows, over), 0);
    }
#else
    static constexpr int kArrivals = kAligned ? bitmap::kLanes : 2 * bitmap::kLanes;

    FLASHLLM_DEVICE void copy(int first, int end, const unsigned char* tile_masks, unsigned masks_at, unsigned barrier) const {
        const int lane = threadIdx.x & 31;
        for (int i = lane * 16; i < bitmap::kMaskBytes; i += bitmap::kLanes * 16) {
            ptx::copy_async16(true, masks_at + i, tile_masks + i, 16);
        }
        for (int i = lane; i < (end - first) * bitmap::kParts * (bitmap::kRowBytes / 16); i += bitmap::kLanes) {
            const int row = first + i / (bitmap::kParts * (bitmap::kRowBytes / 16));
            const int part = i / (bitmap::kRowBytes / 16) % bitmap::kParts, bytes = i % (bitmap::kRowBytes / 16) * 16;
            const int place = (row - origin) % kRing;
            const unsigned target = layout.ring(part) + place * bitmap::kRowBytes + bytes;
            ptx::copy_async16(true, target, source(part, row) + bytes, 16);
            ptx::copy_async16(place < kMirrorRows, target + kRing * bitmap::kRowBytes, source(part, row) + bytes, 16);
        }
        ptx::mbarrier_arrive_after_copies(barrier);
    }
#endif

    FLASHLLM_DEVICE const unsigned char* source(int part, int row) const {
        const long long chunk = static_cast<long long>(row / bitmap::kChunkRows) * bitmap::kParts + part;
        return values + chunk * bitmap::kPartChunkBytes + row % bitmap::kChunkRows * bitmap::kRowBytes;
    }

    FLASHLLM_DEVICE void run(int first_front, int first_tile) {
        front_set = load_fronts(1), next_set = load_fronts(33);
        Cycle<kStages> filled, emptied;
        int done = 0, done_front = first_front;  // tiles that all consumers have done with
        // Value rows asked for. The first is one that a stream needs: a place is written again only when the row there has
        // been used, and so has landed.
        int rows = max(first_front - bitmap::kSlack, 0);
        for (int tile = 0; tile < count; ++tile) {
            // One row more than the tile has: a stream that is through reads its next value, unused.
            const int need = __shfl_sync(0xffffffffu, front_set, tile & 31) + 1;
            while (tile - done >= kStages || need - kRing > done_front - bitmap::kSlack) {
                ptx::mbarrier_wait(layout.empty(emptied.stage), emptied.parity);
                emptied.advance();
                const bool current = done >> 5 == tile >> 5;
                done_front = __shfl_sync(0xffffffffu, current ? front_set : before_set, done & 31);
                ++done;
            }
            const unsigned barrier = layout.full(filled.stage);
            x.load(filled.stage * L::kStageBytes);
            if constexpr (!kAligned) {
#if __CUDA_ARCH__ >= 900
                ptx::fence_async_proxy();
#endif
                ptx::mbarrier_arrive(barrier);
            }
            copy(rows, max(rows, need), masks + static_cast<long long>(first_tile + tile) * bitmap::kMaskBytes,
                 layout.masks(filled.stage), barrier);
#if __CUDA_ARCH__ >= 900
            if constexpr (kAligned) ptx::mbarrier_arrive_after_copies(barrier);
#endif
            rows = max(rows, need);
            filled.advance();
            if ((tile & 31) == 31) before_set = front_set, front_set = next_set, next_set = load_fronts(tile + 34);
        }
    }
};

// Grid (G, ceil(N / kN)). workspace: see stream_k.cuh. masks, values, fronts, lags: see docs/formats/bitmap.md. kRing: value
// rows that the ring of a part holds. kStages: tiles for which x and masks have room. kWarpgroup: wgmma instead of mma.sync.
// kAligned: K is a multiple of 8 and x 16-byte aligned.
template <typename T, int kN, int kRing, int kStages, int kMinBlocks, bool kWarpgroup, bool kAligned>
__global__ void __launch_bounds__(kThreads, kMinBlocks)
spmm_bitmap(const T* __restrict__ x, const unsigned char* __restrict__ masks, const unsigned char* __restrict__ values,
            const int* __restrict__ fronts, const unsigned short* __restrict__ lags, T* __restrict__ y,
            unsigned char* __restrict__ workspace, int M, int N, int K, int row_cost) {
    using S = BitmapShape<kN>;
    using Load = Producer<S, kRing, kStages, kAligned>;
    FLASHLLM_DYNAMIC_SHARED(shared);
    const Layout<kN, kRing, kStages> layout{ptx::shared_address(shared)};
    const int lane = threadIdx.x & 31, part = threadIdx.x >> 5;
    const bool produces = part == bitmap::kParts;

    const StreamK<S> split((M + bitmap::kTileM - 1) / bitmap::kTileM, (K + bitmap::kTileK - 1) / bitmap::kTileK, row_cost,
                           workspace);
    const int first = static_cast<int>(split.first_tile(blockIdx.x));
    const int count = static_cast<int>(split.first_tile(blockIdx.x + 1)) - first;
    const int n0 = blockIdx.y * kN;
    const int tile_k = first % split.tiles_k;
    const int first_front = __ldg(fronts + first);
    const int first_row = max(first_front - bitmap::kSlack, 0), origin = first_row - first_row % bitmap::kChunkRows;

    if (threadIdx.x == 0) {
        for (int i = 0; i < kStages; ++i) {
            ptx::mbarrier_init(layout.full(i), Load::kArrivals);
            ptx::mbarrier_init(layout.empty(i), bitmap::kParts);
        }
        ptx::mbarrier_init_fence();
    }
    __syncthreads();

    Accumulators<S> sum = {};
    if (produces) {
        Load load{layout, masks, values, fronts + first, count, origin,
                  XLoader<typename Load::OneWarp, kAligned>(reinterpret_cast<const unsigned short*>(x), n0, N, K, tile_k,
                                                            layout.x(0), lane)};
        load.run(first_front, first);
    } else {
        // Where this lane's streams stand: stored every kLagTiles tiles, from there on the masks are counted.
        const unsigned ring = layout.ring(part);
        unsigned even, odd;
        {
            const int stored_back = first % bitmap::kLagTiles;  // tiles since the lags were stored last
            const unsigned lag = __ldg(lags + first / bitmap::kLagTiles * bitmap::kTileThreads + threadIdx.x);
            const int stored_front = __ldg(fronts + first - stored_back);
            int even_row = stored_front - origin - static_cast<int>(lag & 0xff);
            int odd_row = stored_front - origin - static_cast<int>(lag >> 8);
            const uint2* before = reinterpret_cast<const uint2*>(masks) +
                                  static_cast<long long>(first - stored_back) * bitmap::kTileThreads + threadIdx.x;
#pragma unroll
            for (int i = 0; i < bitmap::kLagTiles - 1; ++i) {
                if (i >= stored_back) break;
                const uint2 mask = __ldg(before + i * bitmap::kTileThreads);
                even_row += __popc(mask.x & bitmap::kEvenBits) + __popc(mask.y & bitmap::kEvenBits);
                odd_row += __popc(mask.x & bitmap::kOddBits) + __popc(mask.y & bitmap::kOddBits);
            }
            even = ring + lane * 4 + even_row * bitmap::kRowBytes;
            odd = ring + lane * 4 + 2 + odd_row * bitmap::kRowBytes;
        }
        const unsigned ring_end = ring + kRing * bitmap::kRowBytes;
        const auto wrap = [&] {
            if (even >= ring_end) even -= kRing * bitmap::kRowBytes;
            if (odd >= ring_end) odd -= kRing * bitmap::kRowBytes;
        };
        // All reads of a stage, and of value rows that only the tile and those before needed, are done.
        const auto release = [&](int stage) {
            __syncwarp();
            if (lane == 0) ptx::mbarrier_arrive(layout.empty(stage));
        };

        int row_end = min(count, split.tiles_k - tile_k);  // first tile of the next row of tiles
        int chain_end = split.first_chain(row_end, S::kMaxChain, blockIdx.x);
        Cycle<kStages> cycle;
        int tile = 0;
        while (true) {
            ptx::mbarrier_wait(layout.full(cycle.stage), cycle.parity);
            const unsigned x_stage = layout.x(cycle.stage);
            const uint2 mask = ptx::load_shared8(layout.masks(cycle.stage) + threadIdx.x * 8);
            wrap();
            if constexpr (kWarpgroup) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
                ptx::fence_async_proxy();  // x came by ordinary copies
                start_step<T, S, 0>(sum, even, odd, mask.x, ptx::operand(x_stage));
                start_step<T, S, 1>(sum, even, odd, mask.x, ptx::operand(x_stage));
                wrap();
                start_step<T, S, 2>(sum, even, odd, mask.y, ptx::operand(x_stage));
                start_step<T, S, 3>(sum, even, odd, mask.y, ptx::operand(x_stage));
                ptx::warpgroup_wait();
#endif
            } else {
                multiply_word<T, S, 0>(sum, even, odd, mask.x, x_stage);
                wrap();
                multiply_word<T, S, 1>(sum, even, odd, mask.y, x_stage);
            }
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
    if (produces) return;
#pragma unroll 1
    for (int i = 0; i < 2; ++i) {
        if (!completes[i]) continue;
        const unsigned tile_m = i == 0 ? first_m : last_m;
        split.piece(block, tile_m, blockIdx.y).add_all(sum);
        store_fragments<S>(sum, y, n0, static_cast<int>(tile_m) * bitmap::kTileM, N, M);
    }
}

}  // namespace flashllm
