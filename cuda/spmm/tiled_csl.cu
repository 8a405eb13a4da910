// SPDX-License-Identifier: Apache-2.0
// y[N, M] = x[N, K] @ W[M, K]^T with W in Tiled-CSL: load as sparse, compute as dense (Flash-LLM, VLDB'24).
//
// The tiles of W, 128 rows x 64 columns each, lie in memory row by row and are dealt to the blocks in contiguous runs
// of equal cost (stream_k.cuh): one stream of weights per block. Per tile, a block
//   loads    the packed words of a later tile into registers,
//   scatters the words of the next tile into a zeroed 16 KB shared-memory image of it,
//   computes the present tile's image times x on tensor cores, and
//   clears   the previous image by storing zeros exactly where values were.
// Three images take turns, so the four activities touch different memory and one barrier per tile orders all of them.
// Where a row of tiles ends, the accumulators are written: to y if the block saw the whole row, else to the workspace.
// At the end of its run, a block that has the end of a row adds the pieces of the row, in a fixed order, so results are
// bit-reproducible.
#include "flashllm/chains.cuh"
#include "flashllm/epilogue.cuh"
#include "flashllm/ptx.cuh"
#include "flashllm/stream_k.cuh"
#include "flashllm/tiled_csl.cuh"
#include "flashllm/x_stage.cuh"

namespace flashllm {

constexpr int kThreads = 128;  // one warpgroup: what a block does once per tile is done by four warps, not more
constexpr int kWarps = kThreads / 32;
constexpr int kImages = 3;
constexpr int kFirstVectors = 1024;  // 16 KiB of words that a block prefetches before it may read x
constexpr int kTileBytes = csl::kTileElements * 2;
constexpr int kMaxChainSteps = 384;
constexpr int kRowBytes = csl::kTileK * 2;  // 128: one row of an image spans all 32 banks
static_assert(kRowBytes == kStageRowBytes, "a row of an image and one of an x stage meet in the tensor cores");

// Compile-time shape of one kernel. Warps split the tile into kSlices along K times kWarps / kSlices along M.
template <int kN_, int kSlices_>
struct Shape {
    static constexpr int kN = kN_;                                       // columns of x per block, padded
    static constexpr int kM = csl::kTileM;
    static constexpr int kBlockWarps = kWarps;
    static constexpr bool kWarpgroup = kSlices_ == 0;                    // sm_90a: wgmma instead of mma.sync
    static constexpr int kSlices = kWarpgroup ? 1 : kSlices_;
    static constexpr int kRowFragments = csl::kTileM / 16 / (kWarps / kSlices);  // m16 fragments of one warp
    static constexpr int kColumnFragments = kN / 8;
    static constexpr int kSteps = csl::kTileK / 16 / kSlices;            // k16 steps of one warp
    // Longest chain of accumulations, in tiles. Tensor cores truncate each fp32 sum towards zero; from about 400 steps
    // on the drift becomes visible beside the rounding of the result to fp16.
    static constexpr int kMaxChain = kMaxChainSteps / kSteps;
    static constexpr int kStageBytes = kN * kRowBytes;
    static_assert(kN % 8 == 0 && kN <= 64, "one block computes 8..64 columns of x");
    static_assert(kSlices * kSteps * 16 == csl::kTileK, "K slices must cover the tile");

    // First row of this warp's fragment i: wgmma gives a warp 16 of every 64 rows, mma.sync consecutive ones.
    FLASHLLM_DEVICE static int row(int i) {
        const int warp = threadIdx.x >> 5;
        return kWarpgroup ? i * 64 + warp * 16 : (warp / kSlices * kRowFragments + i) * 16;
    }
    FLASHLLM_DEVICE static int slice() { return kWarpgroup ? 0 : (threadIdx.x >> 5) % kSlices; }
};

// ---- words: registers -> image ---------------------------------------------------------------------------

// What an empty tile reads: value 0 at location 0.
__device__ const uint4 kNoWords = {0, 0, 0, 0};

// The words of one tile that this thread holds. Threads past the last vector hold a copy of it: storing the same value
// to the same place again causes no bank conflict, and saves branches. Only with 4 vectors, where the weights (sparsity
// 75 to 87 %) leave the last one empty in most warps, do those warps skip it (measured; with 5 it costs more than it
// saves).
template <int kVectors>
struct Words {
    static constexpr bool kSkipLast = kVectors == 4;
    uint4 vector[kVectors];
    bool last = true;  // this warp has a last vector
};

template <int kVectors>
FLASHLLM_DEVICE void load_words(Words<kVectors>& words, const uint4* all_words, int begin, int end) {
    constexpr int kLastRound = (kVectors - 1) * kThreads;
    const int count = end - begin, last = max(count - 1, 0);
    const uint4* tile = count > 0 ? all_words + begin : &kNoWords;
    if (words.kSkipLast) words.last = count > kLastRound + static_cast<int>(threadIdx.x & ~31u);
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
        if (i == kVectors - 1 && !words.last) break;
        words.vector[i] = ptx::load_streaming(tile + min(static_cast<int>(threadIdx.x) + i * kThreads, last));
    }
}

template <bool kZero, int kOffset>
FLASHLLM_DEVICE void store_vector(const uint4& vector, unsigned images) {
    ptx::scatter_low_half<kZero, kOffset>(vector.x, images);
    ptx::scatter_low_half<kZero, kOffset>(vector.y, images);
    ptx::scatter_low_half<kZero, kOffset>(vector.z, images);
    ptx::scatter_low_half<kZero, kOffset>(vector.w, images);
}

// Writes the values (or, to clear, zeros) to their places in image kImage.
template <bool kZero, int kImage, int kVectors>
FLASHLLM_DEVICE void store_words(const Words<kVectors>& words, unsigned images) {
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
        if (i == kVectors - 1 && !words.last) break;
        store_vector<kZero, kImage * kTileBytes>(words.vector[i], images);
    }
}

// Stores the words of a tile (from offset[0] to offset[1]) that do not fit in the registers, reading them from memory
// again: slower, but right for any density.
template <bool kZero, int kImage, int kVectors>
FLASHLLM_DEVICE void store_excess(unsigned images, const uint4* all_words, const int* offset) {
    const int begin = __ldg(offset), count = __ldg(offset + 1) - begin;
#pragma unroll 1  // rare, and in the way: the less code the better
    for (int i = kVectors * kThreads + threadIdx.x; i < count; i += kThreads) {
        store_vector<kZero, kImage * kTileBytes>(__ldg(all_words + begin + i), images);
    }
}

FLASHLLM_DEVICE void zero_image(unsigned image) {
#pragma unroll
    for (int i = 0; i < kTileBytes / 16 / kThreads; ++i) {
        ptx::store_shared_zero16(image + (i * kThreads + threadIdx.x) * 16);
    }
}

// ---- tensor cores ------------------------------------------------------------------------------------------

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
// Starts image times x on the warpgroup tensor cores, which read both operands from shared memory.
template <typename T, typename S>
FLASHLLM_DEVICE void start_multiply(Accumulators<S>& sum, unsigned image_operand, unsigned stage_operand) {
    ptx::warpgroup_begin();
#pragma unroll
    for (int step = 0; step < csl::kTileK / 16; ++step)
#pragma unroll
        for (int i = 0; i < S::kRowFragments; ++i) {
            ptx::warpgroup_mma<T>(sum[i], image_operand + (i * 64 * kRowBytes + step * 32) / 16,
                                  stage_operand + step * 32 / 16);
        }
    ptx::warpgroup_commit();
}
#endif

template <typename T, typename S>
FLASHLLM_DEVICE void multiply(Accumulators<S>& sum, unsigned image, unsigned stage) {
    const int lane = threadIdx.x & 31;
    const unsigned a_row = image + (S::row(0) + (lane & 15)) * kRowBytes;
    const unsigned b_row = stage + ((lane & 7) + (S::kN > 8 ? (lane >> 4) * 8 : 0)) * kRowBytes;
#pragma unroll
    for (int step = 0; step < S::kSteps; ++step) {
        const int chunk = (S::slice() * S::kSteps + step) * 2;  // 16-byte chunks along K
        unsigned b[S::kColumnFragments][2];
        const unsigned b_chunk = ((chunk + (lane >> 3 & 1)) ^ (lane & 7)) << 4;
        if constexpr (S::kN == 8) {
            ptx::load_matrix_x2(b[0][0], b[0][1], b_row + b_chunk);
        } else {
#pragma unroll
            for (int j = 0; j < S::kColumnFragments; j += 2) {
                unsigned quad[4];
                ptx::load_matrix_x4(quad, b_row + j * 8 * kRowBytes + b_chunk);
                b[j][0] = quad[0], b[j][1] = quad[1], b[j + 1][0] = quad[2], b[j + 1][1] = quad[3];
            }
        }
        const unsigned a_chunk = ((chunk + (lane >> 4)) ^ (lane & 7)) << 4;
#pragma unroll
        for (int i = 0; i < S::kRowFragments; ++i) {
            unsigned a[4];
            ptx::load_matrix_x4(a, a_row + i * 16 * kRowBytes + a_chunk);
#pragma unroll
            for (int j = 0; j < S::kColumnFragments; ++j) ptx::mma_m16n8k16<T>(sum[i][j], a, b[j][0], b[j][1]);
        }
    }
}

// ---- kernel ------------------------------------------------------------------------------------------------

// One block's walk over its tiles. The image, x stage, register set and offset of a tile have number tile % 3, a
// compile-time constant in each of the three unrolled phases: every shared address is a register plus an immediate, and
// nothing moves between registers.
template <typename T, typename S, int kVectors, int kPrefetch, bool kAligned, bool kOverlap, bool kUndo>
struct Walk {
    const uint4* words;
    const int* offset;           // of the block's first tile
    int run_end;                 // where the words of the block's last tile end
    unsigned images, stages, image_operand, stage_operand;
    int tile = 0, count;
    int edge[kImages];           // where the words of the tiles in flight begin
    unsigned excess = 0;         // bit i: the tile loaded i tiles before the last has more words than registers hold
    XLoader<S, kAligned> x;
    Words<kVectors> sets[kImages];

    FLASHLLM_DEVICE Walk(const uint4* words, const int* offset, int count, unsigned shared,
                         XLoader<S, kAligned> x)
        : words(words), offset(offset), run_end(__ldg(offset + count)), images(shared),
          stages(shared + kImages * kTileBytes), image_operand(ptx::operand(images)),
          stage_operand(ptx::operand(stages)), count(count), x(x) {}

    // Loads the words of the next tile of set kSet, `ahead` tiles after the current one. Past the block's last tile the
    // edges no longer move, so there are no words.
    template <int kSet>
    FLASHLLM_DEVICE void load_next(int ahead) {
        constexpr int kAfter = (kSet + 1) % kImages;
        const int begin = edge[kSet], end = edge[kAfter];
        load_words(sets[kSet], words, begin, end);
        excess = excess << 1 | (end - begin > kVectors * kThreads);
        if constexpr (kPrefetch > 0) {
            constexpr int kDistance = kPrefetch * 64;  // vectors
            // Not past the run: what follows is another block's first tile, read long ago.
            ptx::prefetch_to_l2(threadIdx.x == 0 && begin < end && end <= run_end - kDistance,
                                words + begin + kDistance, (end - begin) * 16);
        }
        edge[(kSet + 2) % kImages] = __ldg(offset + min(tile + ahead + 2, count));
    }

    FLASHLLM_DEVICE void fill() {
        edge[0] = __ldg(offset), edge[1] = __ldg(offset + 1);
        // Words are constant, x is not: the first words are prefetched to the L2 while the previous launch still runs.
        const int first_vectors = min(run_end - edge[0], kFirstVectors);
        ptx::prefetch_to_l2(threadIdx.x == 0 && first_vectors > 0, words + edge[0], first_vectors * 16);
        ptx::grid_dependency_wait();
        ptx::grid_launch_dependents();
        x.template load<0>();
        ptx::copy_async_commit();
        load_next<0>(0);
        if constexpr (kOverlap) {
            load_next<1>(1);
            x.template load<1>();
            ptx::copy_async_commit();
        }
#pragma unroll
        for (int i = 0; i < kVectors; ++i) sets[kImages - 1].vector[i] = make_uint4(0, 0, 0, 0);
        for (int i = 0; i < kImages; ++i) zero_image(images + i * kTileBytes);
        __syncthreads();
        store_words<false, 0>(sets[0], images);
        store_excess<false, 0, kVectors>(images, words, offset);
        finish();
    }

    // Makes the next tile's image and x stage visible to the whole block.
    FLASHLLM_DEVICE void finish() {
        ptx::copy_async_wait<kOverlap ? 1 : 0>();
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
        // In this order: with the fence first, ptxas 12.9 crashes.
        if constexpr (S::kWarpgroup) ptx::warpgroup_wait();
        if constexpr (S::kWarpgroup) ptx::fence_async_proxy();
#endif
        __syncthreads();
    }

    template <int u>
    FLASHLLM_DEVICE void phase(Accumulators<S>& sum) {
        constexpr int kNext = (u + 1) % kImages, kLast = (u + 2) % kImages;
        if constexpr (S::kWarpgroup) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
            start_multiply<T, S>(sum, image_operand + u * kTileBytes / 16, stage_operand + u * S::kStageBytes / 16);
#endif
        }
        if (tile + (kOverlap ? 2 : 1) < count) x.template load<kOverlap ? kLast : kNext>();
        ptx::copy_async_commit();  // committed even when empty: the wait counts groups
        // Rare: the previous or the next tile has more words than the registers hold. With overlap, tile + 1 was loaded
        // last, so these are bits 2 and 0; without, the current tile was, and the next is handled below.
        constexpr unsigned kLastBit = kOverlap ? 4 : 2, kNextBit = kOverlap ? 1 : 0;
        if (excess & (kLastBit | kNextBit)) {
            if (kUndo && (excess & kLastBit)) store_excess<true, kLast, kVectors>(images, words, offset + tile - 1);
            if (excess & kNextBit) store_excess<false, kNext, kVectors>(images, words, offset + tile + 1);
        }
        if constexpr (kUndo) store_words<true, kLast>(sets[kLast], images);
        else zero_image(images + kLast * kTileBytes);
        if constexpr (kOverlap) load_next<kLast>(2);
        else __syncthreads();
        if constexpr (!S::kWarpgroup) multiply<T, S>(sum, images + u * kTileBytes, stages + u * S::kStageBytes);
        if constexpr (!kOverlap) {
            __syncthreads();
            load_next<kNext>(1);
            if (excess & 1) store_excess<false, kNext, kVectors>(images, words, offset + tile + 1);
        }
        store_words<false, kNext>(sets[kNext], images);
        finish();
    }
};

// Grid (G, ceil(N / kN)). workspace: see stream_k.cuh.
// kSlices 0: warpgroup tensor cores. kVectors: words per thread and tile held in registers, in vectors of 4.
// kPrefetch: KiB of words prefetched to the L2 ahead of their loads, 0 = off. kAligned: K is a multiple of 8 and x is
// 16-byte aligned. For the ablation: kOverlap false = one activity at a time; kUndo false = clear whole images.
template <typename T, int kN, int kSlices, int kVectors, int kPrefetch, int kMinBlocks, bool kAligned, bool kOverlap,
          bool kUndo>
__global__ void __launch_bounds__(kThreads, kMinBlocks)
spmm_tiled_csl(const T* x, const uint4* __restrict__ words, const int* __restrict__ offsets,
               T* __restrict__ y, unsigned char* __restrict__ workspace, int M, int N, int K, int row_cost) {
    using S = Shape<kN, kSlices>;
    static_assert(kOverlap || !S::kWarpgroup, "without overlap there is mma.sync only");
    FLASHLLM_DYNAMIC_SHARED(shared);
    const unsigned base = ptx::shared_address(shared);

    const StreamK<S> split((M + csl::kTileM - 1) / csl::kTileM, (K + csl::kTileK - 1) / csl::kTileK, row_cost,
                            workspace);
    const unsigned first = split.first_tile(blockIdx.x);
    const int count = static_cast<int>(split.first_tile(blockIdx.x + 1) - first);
    const int n0 = blockIdx.y * kN;
    const int row = static_cast<int>(first / split.tiles_k), tile_k = static_cast<int>(first) - row * split.tiles_k;

    Walk<T, S, kVectors, kPrefetch, kAligned, kOverlap, kUndo> walk(
        words, offsets + first, count, base,
        XLoader<S, kAligned>(reinterpret_cast<const unsigned short*>(x), n0, N, K, tile_k,
                             base + kImages * kTileBytes));
    walk.fill();
    Accumulators<S> sum = {};
    const auto write = [&](Accumulators<S>& sum, float* scratch, int row) {
        drain<S>(sum, scratch, [&](int n, int m, const float4& value) {
            if (n0 + n < N) store_y(y, n0 + n, row * csl::kTileM + m, M, value);
        });
    };
    Chains<S> chains(split, static_cast<int>(first), row, count);
    int skip = 0;  // phases of the next round that have been run already
    while (true) {
        int ended = -1;  // the phase whose tile ended a chain
        if (skip < 1) {
            walk.template phase<0>(sum);
            if (++walk.tile == chains.chain_end) ended = 0;
        }
        if (ended < 0 && skip < 2) {
            walk.template phase<1>(sum);
            if (++walk.tile == chains.chain_end) ended = 1;
        }
        if (ended < 0) {
            walk.template phase<2>(sum);
            if (++walk.tile == chains.chain_end) ended = 2;
        }
        skip = 0;
        if (ended < 0) continue;

        // A chain ends: this is rare, so there is one copy of this code, and it is fetched from memory only once. The
        // current image has been read and not yet cleared, so it serves as scratch. It is left with zeros and with
        // values that the coming undo will clear.
        float* const scratch = reinterpret_cast<float*>(shared + ended * kTileBytes);
        combine_slices<S>(sum, scratch);
        chains.end(split, walk.tile, sum, [&](Accumulators<S>& sum, int row) {
            write(sum, scratch, row);
            zero_image(base + ended * kTileBytes);
        });
        if (walk.tile == walk.count) break;
        skip = (ended + 1) % kImages;
    }
    __syncthreads();  // the scratch of a row that was written last has been cleared
    chains.finish(split, sum, [&](Accumulators<S>& sum, int row) {
        write(sum, reinterpret_cast<float*>(shared), row);
    });
}

}  // namespace flashllm
