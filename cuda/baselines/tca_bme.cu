// SPDX-License-Identifier: Apache-2.0
// y[N, M] = x[N, K] @ W[M, K]^T with W in TCA-BME: bitmaps and compact values, decoded into registers. The format
// ("tensor-core-aware bitmap encoding"), its decoding ("SMBD", shared memory bitmap decoding) and the structure of the
// kernel are those of SpInfer (Fan et al., EuroSys'25).
//
// W is stored in GroupTiles of 64 x 64, row by row. Each is four median tiles of 16 x 64, one per warp; a median tile
// is four TCTiles of 16 x 16; a TCTile four BitmapTiles of 8 x 8 in the order of the registers of an mma fragment: top
// left, bottom left, top right, bottom right. A BitmapTile is 64 bits, one per element, row by row. The values of a
// GroupTile follow each other in that order without gaps; they begin and end at multiples of 16 bytes.
//
// A block computes 64 rows of W times kN columns of x over a range of GroupTiles along K, its split. Per GroupTile it
//   issues loads of the next bitmaps and values (one buffer: current ones are in registers), then of the next x (two),
//   multiplies the current fragments,
//   waits for the bitmaps and values and decodes them into the same registers, and
//   waits for x.
// With more than one split, sums go to the workspace as fp32 and a second kernel adds them; the published kernel keeps
// fp16 sums there, but each rounding to fp16 loses as much accuracy as the result is allowed to lose in all.
#include "flashllm/epilogue.cuh"
#include "flashllm/ptx.cuh"
#include "flashllm/x_stage.cuh"

namespace flashllm {

constexpr int kWarps = 4;
constexpr int kThreads = kWarps * 32;
constexpr int kTileM = 64;
constexpr int kTileK = kStageK;
constexpr int kSteps = kTileK / 16;              // TCTiles of a median tile, k16 steps of a GroupTile
constexpr int kMedianBitmapBytes = kSteps * 4 * 8;
constexpr int kBitmapBytes = kWarps * kMedianBitmapBytes;
constexpr int kVectorValues = 8;                 // values of a 16-byte vector, the unit of copies
constexpr int kHelperThreads = 256;
// Per SM: five, as the registers of the published kernel allow. With 64 columns the compiler arrives at that by itself
// (0: unspecified), but spills when told to.
template <int kN>
constexpr int kResidentBlocks = kN == 64 ? 0 : 5;
static_assert(kTileM == kWarps * 16, "a warp has the 16 rows of one mma fragment");
static_assert(kTileK == 64, "a GroupTile is as wide as an x stage");
static_assert(kBitmapBytes / 16 <= kThreads, "one copy per thread brings all bitmaps");

template <int kN_>
struct Shape {
    static constexpr int kN = kN_;  // columns of x per block, padded
    static constexpr int kBlockWarps = kWarps;
    static constexpr int kStageBytes = kN * kStageRowBytes;
    static constexpr int kColumnFragments = kN / 8;
    static_assert(kN == 8 || kN == 16 || kN == 32 || kN == 64, "one block computes 8..64 columns of x");
    static_assert(2 * kStageBytes == kN * kTileM * 4, "the epilogue turns the sums where x was");
};

template <typename S>
using Sums = float[S::kColumnFragments][4];
using Fragments = unsigned[kSteps][4];

// ---- from memory to fragments ------------------------------------------------------------------------------

// Starts the copies of one GroupTile's bitmaps and values. The values are `vectors` times 16 bytes, possibly none.
FLASHLLM_DEVICE void load_tile(unsigned bitmap_buffer, unsigned value_buffer, const uint4* bitmaps, const uint4* values,
                               int vectors) {
    const int thread = threadIdx.x;
    ptx::copy_async16(thread < kBitmapBytes / 16, bitmap_buffer + thread * 16, bitmaps + thread, 16);
#pragma unroll 1  // about two turns at 50 % zeros
    for (int i = thread; i < vectors; i += kThreads) ptx::copy_async16(true, value_buffer + i * 16, values + i, 16);
}

// Decodes a median tile. Lane l has bits 2 l and 2 l + 1 of every BitmapTile, which are row l / 4, column 2 (l % 4) and
// the next: what its register of the fragment holds. As many values precede its own as there are bits set before
// these. Neighbouring lanes read neighbouring values, so there are no bank conflicts.
FLASHLLM_DEVICE void decode(Fragments& a, unsigned bitmaps, unsigned values) {
    const int first_bit = (threadIdx.x & 31) * 2;
    const unsigned long long before = (1ull << first_bit) - 1;
#pragma unroll
    for (int step = 0; step < kSteps; ++step)
#pragma unroll
        for (int r = 0; r < 4; ++r) {
            const uint2 words = ptx::load_shared8(bitmaps + (step * 4 + r) * 8);
            const unsigned long long bitmap = static_cast<unsigned long long>(words.y) << 32 | words.x;
            const unsigned own = static_cast<unsigned>(bitmap >> first_bit);
            unsigned place = values + 2 * __popcll(bitmap & before);
            unsigned low = 0, high = 0;
            if (own & 1) low = ptx::load_shared_half(place), place += 2;
            if (own & 2) high = ptx::load_shared_half(place);
            a[step][r] = low | high << 16;
            values += 2 * __popcll(bitmap);
        }
}

// ---- from fragments to sums ----------------------------------------------------------------------------------

// sums += this warp's 16 rows of the GroupTile times the x stage, [kN][64] with swizzled 16-byte chunks.
template <typename S>
FLASHLLM_DEVICE void multiply(Sums<S>& sums, const Fragments& a, unsigned stage) {
    const int lane = threadIdx.x & 31;
    const unsigned row = stage + ((lane & 7) + (S::kN > 8 ? (lane >> 4) * 8 : 0)) * kStageRowBytes;
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
        const unsigned chunk = ((step * 2 + (lane >> 3 & 1)) ^ (lane & 7)) << 4;
        if constexpr (S::kN == 8) {
            unsigned b0, b1;
            ptx::load_matrix_x2(b0, b1, row + chunk);
            ptx::mma_m16n8k16<__half>(sums[0], a[step], b0, b1);
        } else {
#pragma unroll
            for (int j = 0; j < S::kColumnFragments; j += 2) {
                unsigned b[4];
                ptx::load_matrix_x4(b, row + j * 8 * kStageRowBytes + chunk);
                ptx::mma_m16n8k16<__half>(sums[j], a[step], b[0], b[1]);
                ptx::mma_m16n8k16<__half>(sums[j + 1], a[step], b[2], b[3]);
            }
        }
    }
}

// Transposes the sums in shared memory, [kN][64] floats, and hands each thread groups of 4 neighbouring rows m of W in
// one column n of x: consume(n, m, float4).
template <typename S, typename Consume>
FLASHLLM_DEVICE void turn(const Sums<S>& sums, float* scratch, Consume&& consume) {
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
#pragma unroll
    for (int j = 0; j < S::kColumnFragments; ++j)
#pragma unroll
        for (int r = 0; r < 4; ++r) {
            const int n = j * 8 + (lane & 3) * 2 + (r & 1);
            const int m = warp * 16 + (lane >> 2) + (r >> 1) * 8;
            // XOR by the quad lane, n / 2 % 4: the 32 lanes of a store fall on 32 banks.
            scratch[n * kTileM + (m ^ ((lane & 3) << 3))] = sums[j][r];
        }
    __syncthreads();
#pragma unroll 2
    for (int i = threadIdx.x; i < S::kN * kTileM / 4; i += kThreads) {
        const int n = i / (kTileM / 4), m = i % (kTileM / 4) * 4;
        consume(n, m, *reinterpret_cast<const float4*>(scratch + n * kTileM + (m ^ ((n >> 1 & 3) << 3))));
    }
}

// ---- kernels ---------------------------------------------------------------------------------------------------

// Blocks: column blocks of x, then tiles along M, then splits, the first varying fastest, so that blocks which read the
// same W run at the same time. K, the row length of x, is a multiple of 8. `tile_offsets`: where the values of each
// GroupTile begin, and where the last one ends; `median_offsets`: where those of its four median tiles begin, relative
// to that. Both count values. `partial`: [splits][N][tiles along M * 64], not touched if there is one split; otherwise
// y is not touched. Every split has at least one tile.
template <int kN>
__global__ void __launch_bounds__(kThreads, kResidentBlocks<kN>)
spmm_tca_bme(const unsigned short* __restrict__ x, const uint4* __restrict__ values, const uint4* __restrict__ bitmaps,
             const int* __restrict__ tile_offsets, const int* __restrict__ median_offsets, __half* __restrict__ y,
             float* __restrict__ partial, int M, int N, int K, int splits) {
    using S = Shape<kN>;
    FLASHLLM_DYNAMIC_SHARED(shared);
    const unsigned stages = ptx::shared_address(shared);
    const unsigned bitmap_buffer = stages + 2 * S::kStageBytes, value_buffer = bitmap_buffer + kBitmapBytes;

    const int warp = threadIdx.x >> 5;
    const int tiles_m = (M + kTileM - 1) / kTileM, tiles_k = (K + kTileK - 1) / kTileK;
    const int column_blocks = (N + kN - 1) / kN;
    const int n0 = static_cast<int>(blockIdx.x % column_blocks) * kN;
    const int strip = blockIdx.x / column_blocks;
    const int tile_m = strip % tiles_m, split = strip / tiles_m;
    // Splits differ by a tile at most; the published kernel gives the last one whatever is left, which can be nothing.
    const int begin = static_cast<int>(static_cast<long long>(tiles_k) * split / splits);
    const int count = static_cast<int>(static_cast<long long>(tiles_k) * (split + 1) / splits) - begin;

    const long long first = static_cast<long long>(tile_m) * tiles_k + begin;
    const int* const offset = tile_offsets + first;
    const int* const median_offset = median_offsets + first * kWarps + warp;
    const uint4* bitmap = bitmaps + first * (kBitmapBytes / 16);
    const unsigned warp_bitmaps = bitmap_buffer + warp * kMedianBitmapBytes;
    XLoader<S, true> x_loader(x, n0, N, K, begin, stages);

    // Of the tile being loaded: where its values begin and end, and where this warp's median tile begins. They are read
    // a tile ahead, and never past the split.
    int start = __ldg(offset), stop = __ldg(offset + 1), median = __ldg(median_offset);
    load_tile(bitmap_buffer, value_buffer, bitmap, values + start / kVectorValues, (stop - start) / kVectorValues);
    x_loader.load(0);
    ptx::copy_async_commit();
    int after = __ldg(offset + min(2, count)), median_after = __ldg(median_offset + min(1, count - 1) * kWarps);
    ptx::copy_async_wait<0>();
    __syncthreads();
    Fragments a;
    Sums<S> sums = {};
    decode(a, warp_bitmaps, value_buffer + 2 * median);
    __syncthreads();

    for (int tile = 1; tile < count; ++tile) {
        start = stop, stop = after, median = median_after;
        bitmap += kBitmapBytes / 16;
        load_tile(bitmap_buffer, value_buffer, bitmap, values + start / kVectorValues, (stop - start) / kVectorValues);
        ptx::copy_async_commit();
        x_loader.load((tile & 1) * S::kStageBytes);
        ptx::copy_async_commit();
        after = __ldg(offset + min(tile + 2, count));
        median_after = __ldg(median_offset + min(tile + 1, count - 1) * kWarps);
        multiply<S>(sums, a, stages + (~tile & 1) * S::kStageBytes);
        ptx::copy_async_wait<1>();
        __syncthreads();
        decode(a, warp_bitmaps, value_buffer + 2 * median);
        ptx::copy_async_wait<0>();
        __syncthreads();  // all have the stage, and all have finished with bitmaps and values
    }
    multiply<S>(sums, a, stages + (~count & 1) * S::kStageBytes);
    __syncthreads();  // all have finished with x: sums replace it

    const int m0 = tile_m * kTileM;
    turn<S>(sums, reinterpret_cast<float*>(shared), [&](int n, int m, const float4& value) {
        if (n0 + n >= N) return;
        if (splits == 1) {
            store_y(y, n0 + n, m0 + m, M, value);
        } else {
            const long long row = static_cast<long long>(split) * N + n0 + n;
            *reinterpret_cast<float4*>(partial + row * tiles_m * kTileM + m0 + m) = value;
        }
    });
}

// y = the sums of all splits, added in their order; 4 elements per thread.
__global__ void __launch_bounds__(kHelperThreads)
sum_tca_bme(const float4* __restrict__ partial, __half* __restrict__ y, int M, int N, int splits) {
    const int groups = (M + kTileM - 1) / kTileM * (kTileM / 4);  // of 4 elements in a row
    const long long all = static_cast<long long>(N) * groups;
    const long long i = static_cast<long long>(blockIdx.x) * kHelperThreads + threadIdx.x;
    if (i >= all) return;
    float4 sum = __ldg(partial + i);
#pragma unroll 4
    for (int split = 1; split < splits; ++split) {
        const float4 more = __ldg(partial + split * all + i);
        sum.x += more.x, sum.y += more.y, sum.z += more.z, sum.w += more.w;
    }
    store_y(y, static_cast<int>(i / groups), static_cast<int>(i % groups) * 4, M, sum);
}

// Copies the rows of x with zeros up to `padded` columns, a multiple of 8: 16-byte copies then find every row aligned.
__global__ void __launch_bounds__(kHelperThreads)
pad_tca_bme(const unsigned short* __restrict__ x, unsigned short* __restrict__ out, int N, int K, int padded) {
    const long long i = static_cast<long long>(blockIdx.x) * kHelperThreads + threadIdx.x;
    if (i >= static_cast<long long>(N) * padded) return;
    const long long n = i / padded;
    const int k = static_cast<int>(i % padded);
    out[i] = k < K ? __ldg(x + n * K + k) : static_cast<unsigned short>(0);
}

}  // namespace flashllm
