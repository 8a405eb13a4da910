// SPDX-License-Identifier: Apache-2.0
// y[N, M] = x[N, K] @ W[M, K]^T with W in 2:4 form (two stored elements in every four along K) on sparse tensor cores.
//
// This kernel stands for what cuSPARSELt computes in SparTA (Zheng et al., OSDI'22) as the Flash-LLM paper composes it,
// so there is also y += x @ W^T, and the layout of SparTA's other half: x [K, N], y [M, N]. With few columns of x the
// product is bound by reading W once. Its tiles, 128 rows x 64 columns, lie one after the other along K, each in the
// order in which lanes need it (src/flashllm/baselines/two_four.py), so a tile is one contiguous copy and its fragments
// are 16-byte reads. A block has one or two tiles of rows (two: half the reads of x from the L2 per byte of W) and one
// split of K, through which it walks with a ring of stages filled by cp.async. Blocks that share rows by split-K leave
// fp32 partial sums, which a second kernel adds up in the order of the splits: results are bit-reproducible.
#include <cuda_fp16.h>

#include "flashllm/portable.cuh"
#include "flashllm/ptx.cuh"

namespace flashllm {
namespace two_four {

constexpr int kThreads = 128;
constexpr int kWarps = kThreads / 32;
constexpr int kTileM = 128, kTileK = 64;
constexpr int kStepK = 32;                           // columns of W of one mma.sp
constexpr int kSteps = kTileK / kStepK;
constexpr int kFragments = kTileM / kWarps / 16;     // row fragments of a warp in a tile
constexpr int kFragmentBytes = 16 * kStepK;          // 16 x 16 stored fp16 values
constexpr int kValueBytes = kTileM * kTileK;         // half of the elements, two bytes each
constexpr int kMetadataBytes = kTileM * kTileK / 8;  // two bits for each stored element
constexpr int kTileBytes = kValueBytes + kMetadataBytes;
constexpr int kTileVectors = kTileBytes / 16;
constexpr int kReduceThreads = 256;
static_assert(kFragments == 2, "one metadata word of a lane serves two fragments, one by each selector");
static_assert(kMetadataBytes == kThreads * kSteps * 4, "a lane has one metadata word for each step");

// Tiles of x in shared memory. Row layout: [kN][kTileK], a row for each column of the product; column layout:
// [kTileK][kN]. The 16-byte chunks of a row are swizzled such that eight rows of ldmatrix fall on all 32 banks.
template <int kN, bool kColumn>
struct XTile {
    static constexpr int kRowChunks = (kColumn ? kN : kTileK) / 8;
    static constexpr int kChunks = kN * kTileK / 8;
    static constexpr int kBytes = kChunks * 16;
    static constexpr int kTurns = (kChunks + kThreads - 1) / kThreads;
    static_assert((kRowChunks & (kRowChunks - 1)) == 0 && kRowChunks <= 8, "the swizzle is an XOR within 128 bytes");

    FLASHLLM_DEVICE static unsigned place(int row, int chunk) {
        return (row * kRowChunks + (chunk ^ ((row * kRowChunks >> 3) & (kRowChunks - 1)))) * 16;
    }

    // Copies the tile whose first element is (row0, column0) of x, a rows x columns matrix. What lies outside becomes
    // zero, since the zeros that pad W must not meet a NaN. aligned: columns is a multiple of 8, so that chunks are
    // whole and at addresses that cp.async accepts.
    FLASHLLM_DEVICE static void load(unsigned tile, const __half* x, int row0, int column0, int rows, int columns,
                                     bool aligned) {
#pragma unroll
        for (int turn = 0; turn < kTurns; ++turn) {
            const int number = turn * kThreads + static_cast<int>(threadIdx.x);
            const bool active = kChunks % kThreads == 0 || number < kChunks;
            const int row = number / kRowChunks, chunk = number % kRowChunks;
            // Elements of this row from here on.
            const int left = row0 + row < rows ? columns - column0 - chunk * 8 : 0;
            const __half* const from =
                left > 0 ? x + static_cast<long long>(row0 + row) * columns + column0 + chunk * 8 : x;
            if (aligned) {
                ptx::copy_async16(active, tile + place(row, chunk), from, left > 0 ? 16u : 0u);
            } else if (active) {
                unsigned pair[4];
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    const unsigned low = 2 * i < left ? __half_as_ushort(from[2 * i]) : 0u;
                    const unsigned high = 2 * i + 1 < left ? __half_as_ushort(from[2 * i + 1]) : 0u;
                    pair[i] = low | high << 16;
                }
                ptx::store_shared(tile + place(row, chunk), make_uint4(pair[0], pair[1], pair[2], pair[3]));
            }
        }
    }

    // The B fragment of columns 8 j .. 8 j + 7 of the product and step `step`: each lane names a row of 16 bytes.
    FLASHLLM_DEVICE static void fragment(unsigned (&b)[4], unsigned tile, int step, int j) {
        const int lane = threadIdx.x & 31;
        if constexpr (kColumn) {
            ptx::load_matrix_x4_transposed(b, tile + place(step * kStepK + lane, j));
        } else {
            ptx::load_matrix_x4(b, tile + place(j * 8 + (lane & 7), step * (kStepK / 8) + (lane >> 3)));
        }
    }
};

template <int kN, int kTiles>
using Sums = float[kTiles][kFragments][kN / 8][4];

// Adds the products of one stage, which holds kTiles tiles of W and then a tile of x.
template <int kN, int kTiles, bool kColumn>
FLASHLLM_DEVICE void multiply(Sums<kN, kTiles>& sum, unsigned stage) {
    const int warp = threadIdx.x >> 5, lane = threadIdx.x & 31;
    uint2 places[kTiles];
#pragma unroll
    for (int r = 0; r < kTiles; ++r) {
        places[r] = ptx::load_shared8(stage + r * kTileBytes + kValueBytes + threadIdx.x * 8);
    }
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
        unsigned a[kTiles][kFragments][4];
#pragma unroll
        for (int r = 0; r < kTiles; ++r)
#pragma unroll
            for (int i = 0; i < kFragments; ++i) {
                const int number = (warp * kSteps + step) * kFragments + i;
                const uint4 values = ptx::load_shared(stage + r * kTileBytes + number * kFragmentBytes + lane * 16);
                a[r][i][0] = values.x, a[r][i][1] = values.y, a[r][i][2] = values.z, a[r][i][3] = values.w;
            }
#pragma unroll
        for (int j = 0; j < kN / 8; ++j) {
            unsigned b[4];
            XTile<kN, kColumn>::fragment(b, stage + kTiles * kTileBytes, step, j);
#pragma unroll
            for (int r = 0; r < kTiles; ++r) {
                const unsigned metadata = step == 0 ? places[r].x : places[r].y;
                ptx::mma_sp_m16n8k32<__half, 0>(sum[r][0][j], a[r][0], b, metadata);
                ptx::mma_sp_m16n8k32<__half, 1>(sum[r][1][j], a[r][1], b, metadata);
            }
        }
    }
}

// What is done with the sums of a block at their places in y, or in a plane of partial sums with the same layout: `one`
// takes a single sum; `two` takes a pair in neighbouring columns where N is even, so that the pair is aligned.
struct LoadHalf {
    const __half* y;
    FLASHLLM_DEVICE void one(long long at, float& sum) const {
        sum = __half2float(__ushort_as_half(__ldcg(reinterpret_cast<const unsigned short*>(y + at))));
    }
    FLASHLLM_DEVICE void two(long long at, float& first, float& second) const {
        const unsigned both = __ldcg(reinterpret_cast<const unsigned*>(y + at));
        first = __half2float(__ushort_as_half(static_cast<unsigned short>(both)));
        second = __half2float(__ushort_as_half(static_cast<unsigned short>(both >> 16)));
    }
};
struct StoreHalf {
    __half* y;
    FLASHLLM_DEVICE void one(long long at, float sum) const { y[at] = __float2half_rn(sum); }
    FLASHLLM_DEVICE void two(long long at, float first, float second) const {
        const unsigned low = __half_as_ushort(__float2half_rn(first)), high = __half_as_ushort(__float2half_rn(second));
        *reinterpret_cast<unsigned*>(y + at) = low | high << 16;
    }
};
struct StoreFloat {
    float* partial;
    FLASHLLM_DEVICE void one(long long at, float sum) const { partial[at] = sum; }
    FLASHLLM_DEVICE void two(long long at, float first, float second) const {
        *reinterpret_cast<float2*>(partial + at) = make_float2(first, second);
    }
};

// Where in y the sums of a thread belong.
template <bool kColumn, int kN, int kTiles>
struct Places {
    int row_block, n0, M, N;

    // Does `work` for every sum. Sums outside y are left out or, with kClamp, pairs outside are replaced by others at
    // its edge: loads without a branch in between can all be in flight at once. (For single sums there are too few
    // registers to hold the addresses.)
    template <bool kClamp, typename Work>
    FLASHLLM_DEVICE void each(Sums<kN, kTiles>& sum, const Work& work) const {
        if (kColumn && N % 2 == 0) each_as<kClamp, kColumn>(sum, work);
        else each_as<false, false>(sum, work);
    }

private:
    template <bool kClamp, bool kPairs, typename Work>
    FLASHLLM_DEVICE void each_as(Sums<kN, kTiles>& sum, const Work& work) const {
        // Opaque, or what is computed here before the loop over tiles would be kept in registers for use after it.
        const int thread = ptx::opaque(threadIdx.x), lane = thread & 31;
        const int first_m = row_block * kTiles * kTileM + (thread >> 5) * kFragments * 16 + (lane >> 2);
        const int first_n = n0 + (lane & 3) * 2;
#pragma unroll
        for (int r = 0; r < kTiles; ++r)
#pragma unroll
            for (int i = 0; i < kFragments; ++i)
#pragma unroll
                for (int half = 0; half < 2; ++half)
#pragma unroll
                    for (int j = 0; j < kN / 8; ++j) {
                        const int m = first_m + r * kTileM + i * 16 + half * 8, n = first_n + j * 8;
                        float& first = sum[r][i][j][half * 2];
                        float& second = sum[r][i][j][half * 2 + 1];
                        if constexpr (kPairs) {
                            if (kClamp) work.two(at(min(m, M - 1), min(n, N - 2)), first, second);
                            else if (m < M && n < N) work.two(at(m, n), first, second);
                        } else {
                            if (m < M && n < N) work.one(at(m, n), first);
                            if (m < M && n + 1 < N) work.one(at(m, n + 1), second);
                        }
                    }
    }

    FLASHLLM_DEVICE long long at(int m, int n) const {
        return kColumn ? static_cast<long long>(m) * N + n : static_cast<long long>(n) * M + m;
    }
};

}  // namespace two_four

// Grid: ceil(N / kN) * ceil(M / (kTiles * 128)) * splits, column blocks varying fastest, so that those that read
// the same tiles of W run at the same time. With more than one split nothing is written to y, and `partials` is one
// plane per split, each of M * N floats rounded up to a multiple of four. kTiles: tiles of rows per block. kAdd: y +=
// instead of y =. kColumn: x is [K, N] and y [M, N].
template <int kN, int kTiles, int kStages, int kMinBlocks, bool kColumn, bool kAdd>
__global__ void __launch_bounds__(two_four::kThreads, kMinBlocks)
spmm_two_four(const __half* x, const uint4* __restrict__ tiles, __half* y, float* partials, int M, int N, int K,
              int splits) {
    using namespace two_four;
    using X = XTile<kN, kColumn>;
    static_assert(kN % 8 == 0 && kN <= 64, "one block computes 8..64 columns of the product");
    static_assert(kStages >= 3, "one stage is multiplied, one is free for copies, the others are under way");
    constexpr int kStageBytes = kTiles * kTileBytes + X::kBytes;
    FLASHLLM_DYNAMIC_SHARED(shared);
    const unsigned stages = ptx::shared_address(shared);

    const int column_blocks = (N + kN - 1) / kN;
    const int tiles_m = (M + kTileM - 1) / kTileM, tiles_k = (K + kTileK - 1) / kTileK;
    const int row_blocks = (tiles_m + kTiles - 1) / kTiles;
    const int n0 = static_cast<int>(blockIdx.x) % column_blocks * kN;
    const int row_block = static_cast<int>(blockIdx.x) / column_blocks % row_blocks;
    const int split = static_cast<int>(blockIdx.x) / column_blocks / row_blocks;
    const int begin = static_cast<int>(static_cast<long long>(tiles_k) * split / splits);
    const int count = static_cast<int>(static_cast<long long>(tiles_k) * (split + 1) / splits) - begin;

    const bool aligned = (kColumn ? N : K) % 8 == 0;
    const uint4* source[kTiles];  // this thread's first vector of the next tile
#pragma unroll
    for (int r = 0; r < kTiles; ++r) {
        // Past the last tile of rows the last one is read again; its results are outside M and not stored.
        const int tile_m = min(row_block * kTiles + r, tiles_m - 1);
        source[r] = tiles + (static_cast<long long>(tile_m) * tiles_k + begin) * kTileVectors + threadIdx.x;
    }
    int k0 = begin * kTileK;
    const auto load = [&](unsigned stage) {
#pragma unroll
        for (int r = 0; r < kTiles; ++r) {
            const unsigned to = stage + r * kTileBytes + threadIdx.x * 16;
#pragma unroll
            for (int i = 0; i * kThreads < kTileVectors; ++i) {
                const bool active =
                    (i + 1) * kThreads <= kTileVectors || i * kThreads + static_cast<int>(threadIdx.x) < kTileVectors;
                ptx::copy_async16(active, to + i * kThreads * 16, source[r] + i * kThreads, 16);
            }
            source[r] += kTileVectors;
        }
        X::load(stage + kTiles * kTileBytes, x, kColumn ? k0 : n0, kColumn ? n0 : k0, kColumn ? K : N, kColumn ? N : K,
                aligned);
        k0 += kTileK;
    };

#pragma unroll 1
    for (int tile = 0; tile < kStages - 1; ++tile) {
        if (tile < count) load(stages + tile * kStageBytes);
        ptx::copy_async_commit();  // committed even when empty: the wait counts groups
    }
    Sums<kN, kTiles> sum = {};
    const Places<kColumn, kN, kTiles> places{row_block, n0, M, N};
    // Sums start from y, which is loaded while the first tiles are and needs no other registers.
    if (kAdd && splits == 1) places.template each<true>(sum, LoadHalf{y});
    unsigned stage = stages, free_stage = stages + (kStages - 1) * kStageBytes;
    const auto next = [&](unsigned at) {
        return at == stages + (kStages - 1) * kStageBytes ? stages : at + kStageBytes;
    };
#pragma unroll 1
    for (int tile = 0; tile < count; ++tile) {
        ptx::copy_async_wait<kStages - 2>();
        __syncthreads();  // all have this tile, and all have multiplied the one before, whose stage is free now
        if (tile + kStages - 1 < count) load(free_stage);
        ptx::copy_async_commit();
        multiply<kN, kTiles, kColumn>(sum, stage);
        free_stage = stage;
        stage = next(stage);
    }

    const long long plane = (static_cast<long long>(M) * N + 3) / 4 * 4;
    if (splits > 1) places.template each<false>(sum, StoreFloat{partials + split * plane});
    else places.template each<false>(sum, StoreHalf{y});
}

// y = the sum of the partial sums, or with kAdd y += it, rounded once. Four elements per thread: the grid is
// ceil(elements / 1024). One kernel serves both layouts, because partial sums have the layout of y.
template <bool kAdd>
__global__ void __launch_bounds__(two_four::kReduceThreads)
reduce_two_four(const float4* partials, __half* y, long long elements, int splits) {
    const long long vectors = (elements + 3) / 4;
    const long long vector = static_cast<long long>(blockIdx.x) * two_four::kReduceThreads + threadIdx.x;
    if (vector >= vectors) return;
    float4 sum = partials[vector];
#pragma unroll 4
    for (int split = 1; split < splits; ++split) {
        const float4 more = partials[split * vectors + vector];
        sum.x += more.x, sum.y += more.y, sum.z += more.z, sum.w += more.w;
    }
    const float values[4] = {sum.x, sum.y, sum.z, sum.w};
    __half* const target = y + vector * 4;
    alignas(8) unsigned short rounded[4];
    if (vector * 4 + 4 <= elements) {
        if (kAdd) *reinterpret_cast<uint2*>(rounded) = *reinterpret_cast<const uint2*>(target);
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const float old = kAdd ? __half2float(__ushort_as_half(rounded[i])) : 0.0f;
            rounded[i] = __half_as_ushort(__float2half_rn(kAdd ? values[i] + old : values[i]));
        }
        *reinterpret_cast<uint2*>(target) = *reinterpret_cast<const uint2*>(rounded);
        return;
    }
#pragma unroll
    for (int i = 0; i < 3; ++i) {
        if (vector * 4 + i >= elements) break;
        target[i] = __float2half_rn(kAdd ? values[i] + __half2float(target[i]) : values[i]);
    }
}

}  // namespace flashllm
