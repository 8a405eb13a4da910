// SPDX-License-Identifier: Apache-2.0
// y[N, M] = x[N, K] @ W[M, K]^T with W as a bitmap and value streams: decoded straight into tensor-core fragments.
//
// The tiles of W are dealt to the blocks in contiguous runs (stream_k.cuh), and the values of a run are one contiguous
// stream, which bulk copies (before sm_90: cp.async of one warp) bring into a ring in shared memory as far ahead as it
// has room. The four warps of a block take the four parts of each tile. Per tile, a warp
//   waits    until the value rows of the tile have landed,
//   decodes  its masks, 16 groups of four elements per lane, into A fragments (bitmap.cuh), and
//   multiplies them by x on tensor cores,
// while the first warp refills the ring where no stream needs the rows of the tile before any more. x and masks come by
// cp.async into stages that the block shares: one barrier per tile. No element of W is written to shared memory again
// once decoded, and nothing is counted, scanned or scattered.
#include "flashllm/bitmap.cuh"
#include "flashllm/epilogue.cuh"
#include "flashllm/ptx.cuh"
#include "flashllm/stream_k.cuh"
#include "flashllm/x_stage.cuh"

namespace flashllm {

constexpr int kThreads = bitmap::kParts * bitmap::kLanes;
constexpr int kMaxChainSteps = 384;  // see tiled_csl.cu: tensor cores truncate
constexpr int kMirrorRows = 16;      // a pointer wraps once per mask word: 16 elements of a stream
constexpr int kFirstRows = 48;       // value rows that a block asks for at once
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

// The block's ring of value rows, one for each part. Rows are numbered from the first one copied; row r lies at place
// r % kRing, and rows at the first places once more behind the last, so that a pointer may run kMirrorRows over the end
// before it wraps.
template <int kRing>
struct ValueRing {
    static constexpr int kChunks = kRing / bitmap::kChunkRows;
    static constexpr int kBytes = (kRing + kMirrorRows) * bitmap::kRowBytes;  // of one part
    static_assert(kRing % bitmap::kChunkRows == 0 && kMirrorRows == bitmap::kChunkRows, "mirrored is the first chunk");
    static_assert(kRing >= bitmap::kSlack + bitmap::kStreamElements + bitmap::kChunkRows,
                  "or a full tile could wait for rows that wait for the slowest stream");

    unsigned rings, barriers;  // shared addresses: of the part's rings, of a barrier for each chunk
    int origin, stop;          // the first row copied, in the matrix; rows to copy in all
    int copied = 0, landed = 0;
    int copy_slot = 0, land_slot = 0;
    unsigned parity = 0;

    FLASHLLM_DEVICE ValueRing(unsigned rings, unsigned barriers, int first_row, int end_row)
        : rings(rings), barriers(barriers), origin(first_row - first_row % bitmap::kChunkRows),
          stop(end_row - origin) {}

    // This warp's ring.
    FLASHLLM_DEVICE unsigned base() const { return rings + (threadIdx.x >> 5) * kBytes; }

    // By one thread; then a barrier of the block.
    FLASHLLM_DEVICE static void init(unsigned barriers) {
        for (int i = 0; i < kChunks; ++i) ptx::mbarrier_init(barriers + i * 8, kArrivals);
        ptx::mbarrier_init_fence();
    }

    // Starts the copies of all rows below `limit`, in whole chunks. One warp calls it.
    FLASHLLM_DEVICE void refill(const unsigned char* values, int limit) {
        while (copied + bitmap::kChunkRows <= limit && copied < stop) {
            copy_chunk(values + static_cast<long long>(origin + copied) * (bitmap::kParts * bitmap::kRowBytes),
                       rings + copy_slot * bitmap::kPartChunkBytes, barriers + copy_slot * 8);
            copied += bitmap::kChunkRows;
            if (++copy_slot == kChunks) copy_slot = 0;
        }
    }

#if __CUDA_ARCH__ >= 900
    static constexpr unsigned kArrivals = 1;

    FLASHLLM_DEVICE static void copy_chunk(const unsigned char* chunk, unsigned target, unsigned barrier) {
        const int lane = threadIdx.x & 31;
        if (lane == 0) ptx::mbarrier_expect(barrier, bitmap::kChunkBytes);
        __syncwarp();
        if (lane < bitmap::kParts) {
            ptx::bulk_copy(target + lane * kBytes, chunk + lane * bitmap::kPartChunkBytes, bitmap::kPartChunkBytes,
                           barrier);
        }
    }
#else
    static constexpr unsigned kArrivals = bitmap::kLanes;

    FLASHLLM_DEVICE static void copy_chunk(const unsigned char* chunk, unsigned target, unsigned barrier) {
        const int lane = threadIdx.x & 31;
#pragma unroll
        for (int part = 0; part < bitmap::kParts; ++part)
#pragma unroll
            for (int i = lane * 16; i < bitmap::kPartChunkBytes; i += bitmap::kLanes * 16) {
                ptx::copy_async16(true, target + part * kBytes + i, chunk + part * bitmap::kPartChunkBytes + i, 16);
            }
        ptx::mbarrier_arrive_after_copies(barrier);
    }
#endif

    // Returns when `rows` rows have landed. They must have been asked for.
    FLASHLLM_DEVICE void wait(int rows) {
        while (landed < rows) {
            ptx::mbarrier_wait(barriers + land_slot * 8, parity);
            if (land_slot == 0) {
                const unsigned from = base() + (threadIdx.x & 31) * 16;
#pragma unroll
                for (unsigned i = 0; i < bitmap::kPartChunkBytes; i += 512) {
                    ptx::store_shared(from + i + kRing * bitmap::kRowBytes, ptx::load_shared(from + i));
                }
                __syncwarp();
            }
            landed += bitmap::kChunkRows;
            if (++land_slot == kChunks) land_slot = 0, parity ^= 1;
        }
    }

    FLASHLLM_DEVICE unsigned wrapped(unsigned address) const {
        return address >= base() + kRing * bitmap::kRowBytes ? address - kRing * bitmap::kRowBytes : address;
    }
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
// The same k16 step on the warpgroup's tensor cores, which read x from shared memory: the four warps of the block at
// one time. Starts its products and returns when those of the step before are done: two steps' fragments are alive.
template <typename T, typename S, int kStep>
FLASHLLM_DEVICE void start_step(Accumulators<S>& sum, unsigned& even, unsigned& odd, unsigned mask,
                                unsigned stage_operand) {
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

// Grid (G, ceil(N / kN)). workspace: see stream_k.cuh. masks, values, fronts, lags: see docs/formats/bitmap.md. kRing:
// value rows the ring holds. kStages: stages of x and masks. kAligned: K is a multiple of 8 and x 16-byte aligned.
template <typename T, int kN, int kRing, int kStages, int kMinBlocks, bool kWarpgroup, bool kAligned>
__global__ void __launch_bounds__(kThreads, kMinBlocks)
spmm_bitmap(const T* __restrict__ x, const unsigned char* __restrict__ masks, const unsigned char* __restrict__ values,
            const int* __restrict__ fronts, const unsigned short* __restrict__ lags, T* __restrict__ y,
            unsigned char* __restrict__ workspace, int M, int N, int K, int row_cost) {
    using S = BitmapShape<kN>;
    using Ring = ValueRing<kRing>;
    constexpr int kStageSize = S::kStageBytes + bitmap::kMaskBytes;
    FLASHLLM_DYNAMIC_SHARED(shared);
    const unsigned rings = ptx::shared_address(shared);
    const unsigned stages = rings + bitmap::kParts * Ring::kBytes;
    const unsigned barriers = stages + kStages * kStageSize;
    const int lane = threadIdx.x & 31;

    const StreamK<S> split((M + bitmap::kTileM - 1) / bitmap::kTileM, (K + bitmap::kTileK - 1) / bitmap::kTileK,
                           row_cost, workspace);
    const int first = static_cast<int>(split.first_tile(blockIdx.x));
    const int count = static_cast<int>(split.first_tile(blockIdx.x + 1)) - first;
    const int n0 = blockIdx.y * kN;
    const int tile_k = first % split.tiles_k;

    // Stages: tile t of the run lies in stage t % kStages.
    XLoader<S, kAligned> x_loader(reinterpret_cast<const unsigned short*>(x), n0, N, K, tile_k, stages);
    const auto load_stage = [&](int tile, int stage) {
        constexpr unsigned kChunks = bitmap::kMaskBytes / 16;
        x_loader.load(stage * kStageSize);
        const unsigned chunk = threadIdx.x - (kThreads - kChunks);  // the last threads copy the masks
        const bool active = threadIdx.x >= kThreads - kChunks;
        const unsigned char* tile_masks = masks + static_cast<long long>(first + tile) * bitmap::kMaskBytes;
        const unsigned to = stages + stage * kStageSize + S::kStageBytes + chunk * 16;
        ptx::copy_async16(active, to, active ? tile_masks + chunk * 16 : masks, 16);
    };
#pragma unroll
    for (int i = 0; i < kStages - 1; ++i) {
        if (i < count) load_stage(i, i);
        ptx::copy_async_commit();
    }

    // The fronts: the value row that the longest stream has reached behind each tile. A lane holds one of 32.
    const int* const run_fronts = fronts + first;
    const int stored_back = first % bitmap::kLagTiles;  // tiles since the lags were stored last
    const int first_front = __ldg(run_fronts), stored_front = __ldg(run_fronts - stored_back);
    const int last_front = __ldg(run_fronts + count);
    int front_set = __ldg(run_fronts + min(lane + 1, count));
    int next_front_set = __ldg(run_fronts + min(lane + 33, count));
    const unsigned lag = __ldg(lags + (first / bitmap::kLagTiles) * kThreads + threadIdx.x);
    if (threadIdx.x == 0) Ring::init(barriers);
    Ring ring(rings, barriers, max(first_front - bitmap::kSlack, 0), last_front + 1);
    __syncwarp();
    // Not the whole ring: what the first tiles of all blocks need comes first (2 % at 90 % zeros).
    if (threadIdx.x < 32) ring.refill(values, kFirstRows);
    int front = first_front - ring.origin;

    // Where this lane's streams stand: stored every kLagTiles tiles, from there on the masks are counted.
    unsigned even, odd;
    {
        int even_row = stored_front - ring.origin - static_cast<int>(lag & 0xff);
        int odd_row = stored_front - ring.origin - static_cast<int>(lag >> 8);
        const uint2* before = reinterpret_cast<const uint2*>(masks) +
                              static_cast<long long>(first - stored_back) * kThreads + threadIdx.x;
#pragma unroll
        for (int i = 0; i < bitmap::kLagTiles - 1; ++i) {
            if (i >= stored_back) break;
            const uint2 mask = __ldg(before + i * kThreads);
            even_row += __popc(mask.x & bitmap::kEvenBits) + __popc(mask.y & bitmap::kEvenBits);
            odd_row += __popc(mask.x & bitmap::kOddBits) + __popc(mask.y & bitmap::kOddBits);
        }
        even = ring.base() + lane * 4 + even_row * bitmap::kRowBytes;
        odd = ring.base() + lane * 4 + 2 + odd_row * bitmap::kRowBytes;
    }

    Accumulators<S> sum = {};
    int row_end = min(count, split.tiles_k - tile_k);  // first tile of the next row of tiles
    int chain_end = split.first_chain(row_end, S::kMaxChain, blockIdx.x);
    int stage = 0, tile = 0;
    while (true) {
        ptx::copy_async_wait<kStages - 2>();
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
        if constexpr (kWarpgroup) ptx::warpgroup_wait();  // the tensor cores have read the stage before
        if constexpr (kWarpgroup) ptx::fence_async_proxy();
#endif
        __syncthreads();  // the stage is there for all, and all have done with the one before
        if (threadIdx.x < 32) ring.refill(values, front - bitmap::kSlack + kRing);
        if (tile + kStages - 1 < count) load_stage(tile + kStages - 1, stage == 0 ? kStages - 1 : stage - 1);
        ptx::copy_async_commit();  // committed even when empty: the wait counts groups

        front = __shfl_sync(0xffffffffu, front_set, tile & 31) - ring.origin;
        if ((tile & 31) == 31) {
            front_set = next_front_set;
            next_front_set = __ldg(run_fronts + min(tile + 34 + lane, count));
        }
        ring.wait(front + 1);  // one more than the tile has: a stream that is through reads its next value, unused
        const unsigned here = stages + stage * kStageSize;
        const uint2 mask = ptx::load_shared8(here + S::kStageBytes + threadIdx.x * 8);
        even = ring.wrapped(even), odd = ring.wrapped(odd);
        if constexpr (kWarpgroup) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
            start_step<T, S, 0>(sum, even, odd, mask.x, ptx::operand(here));
            start_step<T, S, 1>(sum, even, odd, mask.x, ptx::operand(here));
            even = ring.wrapped(even), odd = ring.wrapped(odd);
            start_step<T, S, 2>(sum, even, odd, mask.y, ptx::operand(here));
            start_step<T, S, 3>(sum, even, odd, mask.y, ptx::operand(here));
#endif
        } else {
            multiply_word<T, S, 0>(sum, even, odd, mask.x, here);
            even = ring.wrapped(even), odd = ring.wrapped(odd);
            multiply_word<T, S, 1>(sum, even, odd, mask.y, here);
        }
        if (++stage == kStages) stage = 0;
        if (++tile != chain_end) continue;

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
        if constexpr (kWarpgroup) ptx::warpgroup_wait();
#endif
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
    const unsigned first_row = run_begin / split.tiles_k, last_row = (run_begin + count - 1) / split.tiles_k;
    int* const completes = reinterpret_cast<int*>(shared + bitmap::kParts * Ring::kBytes);  // x is not needed any more
    __syncthreads();  // all threads have stored their part of the pieces
    if (threadIdx.x == 0) completes[0] = split.piece(block, first_row, blockIdx.y).arrive_last();
    if (threadIdx.x == 32) {
        completes[1] = last_row != first_row && split.piece(block, last_row, blockIdx.y).arrive_last();
    }
    __syncthreads();
#pragma unroll 1
    for (int i = 0; i < 2; ++i) {
        if (!completes[i]) continue;
        const unsigned tile_m = i == 0 ? first_row : last_row;
        split.piece(block, tile_m, blockIdx.y).add_all(sum);
        store_fragments<S>(sum, y, n0, static_cast<int>(tile_m) * bitmap::kTileM, N, M);
    }
}

}  // namespace flashllm
