// SPDX-License-Identifier: Apache-2.0
// Attention of a decoding step where several query heads share keys: the work of attention.cu, on tensor cores. Host
// side: src/flashllm/decoder/grouped_attention.py.
//
// Each key and value is read once for all its heads, which leaves more to compute than fp32 can hide behind the
// reading. A warp takes 16 positions at a time. Scores = queries x keys^T has the heads in the 16 rows of an mma; with
// up to eight heads, half of the rows are zeros. That wastes half of a few instructions, but the weights made from
// their accumulators are, once rounded, already the B operand of sums^T = values^T x weights^T, which has elements of a
// head in its rows and eight heads in its columns. This product wastes neither tensor-core steps nor registers for
// sums, and no fragment is ever transposed: ldmatrix loads both operands from shared memory, values in its transposing
// form.
//
// Each warp has its own positions and a ring of tiles that its own cp.async copies fill, so that between its first load
// and the end of the loop it waits for other warps only once, for the queries.
#include "flashllm/quads.cuh"
#include "flashllm/shares.cuh"

namespace flashllm {
namespace grouped {

using quads::kQuadLanes, quads::pack;
constexpr int kTile = 16;      // positions that a warp takes at a time: what one step of the second product sums over
constexpr int kStepDims = 16;  // elements of a head in one step of the first product, and in one fragment of sums
constexpr int kSetHeads = 8;   // columns of an mma

// Tiles in shared memory: rows of kDim elements and 16 bytes, so that the eight rows of an ldmatrix fall on all 32
// banks. Elements from head_dim to kDim, and rows that do not exist, are zeros.
template <int kDim, int kGroup>
struct Shape {
  static constexpr int kSets = kGroup / kSetHeads;
  static constexpr int kSteps = kDim / kStepDims;
  static constexpr int kChunks = kDim / rows::kVector;
  static constexpr int kPitch = kDim * 2 + 16;
  static constexpr int kTileBytes = kTile * kPitch;
  // Stages of keys, and as many of values: up to 64 KB per block in flight, and three blocks fit in an H200's shared
  // memory.
  static constexpr int kStages = kDim > 128 ? 1 : 2;
  static constexpr int kRingBytes = kStages * 2 * kTileBytes;  // per warp
  // Copies that may still be in flight while the warp waits for the oldest one.
  static constexpr int kPending = kStages * 2 - 1;
  static constexpr int kSumPitch = kDim + 4;  // floats from head to head: the lanes of a fragment fall on all banks
  static_assert(kGroup == 8 || kGroup == 16, "an mma has 16 rows for heads");
  static_assert(kDim % kStepDims == 0 && kTile * kChunks % rows::kLanes == 0, "all lanes copy in each turn");
  static_assert(kGroup * kSumPitch * 4 <= kRingBytes, "in the end sums take the place of the warp's tiles");

  FLASHLLM_DEVICE static unsigned place(int row, int chunk) { return row * kPitch + chunk * 16; }

  // Copies this lane's part of a tile that starts at element `first` of an array; `count` of its rows exist, one after
  // the other. Addresses are computed in 32 bits but for one addition each.
  template <typename T>
  FLASHLLM_DEVICE static void copy(unsigned to, const T* array, int first, int count, int head_dim) {
    constexpr int kLanes = rows::kLanes;
    const unsigned lane = threadIdx.x % kLanes;
#pragma unroll
    for (int turn = 0; turn < kTile * kChunks / kLanes; ++turn) {
      int row, chunk;
      if constexpr (kLanes % kChunks == 0) {
        row = lane / kChunks + turn * (kLanes / kChunks), chunk = lane % kChunks;
      } else {
        row = (turn * kLanes + lane) / kChunks, chunk = (turn * kLanes + lane) % kChunks;
      }
      const int element = chunk * rows::kVector;
      const bool there_is = row < count && element < head_dim;
      const int offset = there_is ? first + row * head_dim + element : first;
      ptx::copy_async16(true, to + place(row, chunk), array + offset, there_is ? 16u : 0u);
    }
  }

  // The A fragment of step `step` along the queries. With a single set of heads, rows 8 to 15 stay zero.
  FLASHLLM_DEVICE static void query_fragment(unsigned (&a)[4], unsigned queries, int step) {
    const int lane = threadIdx.x % rows::kLanes;
    if constexpr (kSets == 2) ptx::load_matrix_x4(a, queries + place(lane % 16, step * 2 + lane / 16));
    else ptx::load_matrix_x2(a[0], a[2], queries + place(lane % 8, step * 2 + lane / 8 % 2));
  }

  // Where in a tile this lane loads fragments: its row of four matrices, two in neighbouring chunks, then two in the
  // next eight positions. As they are, they are B for two sets of keys; transposed, A for 16 elements of values.
  FLASHLLM_DEVICE static unsigned lane_place() {
    const int lane = threadIdx.x % rows::kLanes;
    return place(lane % 8 + lane / 16 * 8, lane / 8 % 2);
  }
};

// A warp's state over its positions so far. Lane 4 g + t has the maxima of heads g and g + 8, its part of their totals,
// and the sums of elements g and g + 8 of every 16 for heads 2 t and 2 t + 1 of each set.
template <typename T, typename S>
struct Heads {
  softmax::Running running[S::kSets];
  float sums[S::kSteps][S::kSets][4] = {};

  // Turns a tile's scores into weights, the B operand of the second product. Scores from number `count` on do not
  // count.
  FLASHLLM_DEVICE void weigh(unsigned (&weights)[S::kSets][2], float (&scores)[2][4], float scale, int count) {
    const int column = threadIdx.x % kQuadLanes * 2;
#pragma unroll
    for (int set = 0; set < S::kSets; ++set) {
      float largest = softmax::kNothing;
#pragma unroll
      for (int j = 0; j < 2; ++j)
#pragma unroll
        for (int c = 0; c < 2; ++c) {
          float& score = scores[j][set * 2 + c];
          score = j * 8 + column + c < count ? score * scale : softmax::kNothing;
          largest = fmaxf(largest, score);
        }
#pragma unroll
      for (int mask = 1; mask < kQuadLanes; mask *= 2) {
        largest = fmaxf(largest, __shfl_xor_sync(rows::kFullWarp, largest, mask));
      }
      rescale(set, running[set].raise(largest));
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        const float left = running[set].weight(scores[j][set * 2]);
        const float right = running[set].weight(scores[j][set * 2 + 1]);
        running[set].total += left + right;
        weights[set][j] = pack<T>(left, right);
      }
    }
  }

  // This lane's `factor` belongs to head g, its sums to heads 2 t and 2 t + 1.
  FLASHLLM_DEVICE void rescale(int set, float factor) {
    const int from = threadIdx.x % kQuadLanes * 2 * kQuadLanes;
    const float even = __shfl_sync(rows::kFullWarp, factor, from);
    const float odd = __shfl_sync(rows::kFullWarp, factor, from + kQuadLanes);
#pragma unroll
    for (int i = 0; i < S::kSteps; ++i) {
      sums[i][set][0] *= even, sums[i][set][1] *= odd, sums[i][set][2] *= even, sums[i][set][3] *= odd;
    }
  }

  // Stores maxima and totals, and sums [head][kSumPitch].
  FLASHLLM_DEVICE void leave(float2* to_softmaxes, float* to_sums) const {
    const int lane = threadIdx.x % rows::kLanes, row = lane / kQuadLanes, column = lane % kQuadLanes * 2;
#pragma unroll
    for (int set = 0; set < S::kSets; ++set) {
      const int first = set * kSetHeads;
      const float total = rows::lane_sum(running[set].total, kQuadLanes);
      if (column == 0) to_softmaxes[first + row] = make_float2(running[set].maximum, total);
#pragma unroll
      for (int i = 0; i < S::kSteps; ++i)
#pragma unroll
        for (int r = 0; r < 4; ++r) {
          to_sums[(first + column + r % 2) * S::kSumPitch + i * kStepDims + row + r / 2 * 8] = sums[i][set][r];
        }
    }
  }
};

}  // namespace grouped

// Like decode_attention, but weights are rounded to T before they multiply values. `group` query heads share a key
// head; a block takes up to block_heads of them, at most kGroup. kDim: head_dim, rounded up.
//
// Grid: kv_heads blocks for the first block_heads heads of each group, as many for the next, and so on; rows; splits.
template <typename T, int kDim, int kGroup>
__global__ void __launch_bounds__(shares::kThreads)
    grouped_attention(const T* q, const T* keys, const T* values, const int* slots, const int* positions, T* out,
                      unsigned* counters, float2* softmaxes, float4* partials, int head_dim, int slot_count,
                      int capacity, float scale, int common, int kv_heads, int group, int block_heads) {
  using namespace grouped;
  using S = Shape<kDim, kGroup>;
  FLASHLLM_DYNAMIC_SHARED(shared);
  const int warp = ptx::uniform(threadIdx.x / rows::kLanes);
  unsigned char* const own = shared + warp * S::kRingBytes;
  const unsigned ring = ptx::shared_address(own);  // stages of a tile of keys and one of values
  float2* const shared_softmaxes = reinterpret_cast<float2*>(shared + shares::kWarps * S::kRingBytes);
  const unsigned queries = ptx::shared_address(shared_softmaxes + shares::kWarps * kGroup);  // kGroup rows of a tile

  const int row = blockIdx.y;
  // Volatile, or they would be loaded only where they are needed; what depends on neither is computed meanwhile.
  const int slot = static_cast<const volatile int*>(slots)[row];
  const int position = min(static_cast<const volatile int*>(positions)[row], capacity - 1);
  int kv_head = blockIdx.x, first_in_group = 0;
  for (; kv_head >= kv_heads; kv_head -= kv_heads) first_in_group += block_heads;  // hardly ever loops, so no division
  const int heads = min(block_heads, group - first_in_group);
  const long long block_offset =  // of its queries and its results
      (static_cast<long long>(row * kv_heads + kv_head) * group + first_in_group) * head_dim;
  const shares::Share share(position + 1, gridDim.z, common, blockIdx.z, kTile);
  const bool nothing = min(slot, position) < 0 || slot >= slot_count || share.is_empty();
  if (nothing) return ptx::grid_dependency_wait();

  const long long cache = (static_cast<long long>(slot) * kv_heads + kv_head) * capacity * head_dim;
  const T* const head_keys = keys + cache;
  const T* const head_values = values + cache;
  constexpr int kStride = shares::kWarps * kTile;  // from one tile of a warp to its next
  int first = share.begin + warp * kTile;
  const auto load = [&](unsigned tile, const T* from, int at) {
    if (at < share.end) S::copy(tile, from, at * head_dim, share.end - at, head_dim);
  };
  // What is loaded next was written before the preceding launch, unless it includes the row's own position.
  if (min(first + (S::kStages - 1) * kStride + kTile, share.end) > position) ptx::grid_dependency_wait();
#pragma unroll
  for (int stage = 0; stage < S::kStages; ++stage) {
    load(ring + stage * 2 * S::kTileBytes, head_keys, first + stage * kStride);
    ptx::copy_async_commit();
    load(ring + (stage * 2 + 1) * S::kTileBytes, head_values, first + stage * kStride);
    ptx::copy_async_commit();
  }
  ptx::grid_dependency_wait();
  ptx::grid_launch_dependents();
  shares::copy_queries<kGroup, S::kChunks>(queries, q + block_offset, heads, head_dim, S::place);
  __syncthreads();

  Heads<T, S> state;
  unsigned stage = 0;
#pragma unroll 1
  for (; first < share.end; first += kStride) {
    const unsigned key_tile = ring + stage * 2 * S::kTileBytes, value_tile = key_tile + S::kTileBytes;
    stage = (stage + 1) % S::kStages;
    const int next = first + S::kStages * kStride;  // replaces these

    float scores[2][4] = {};
    ptx::copy_async_wait<S::kPending>();
    __syncwarp();
#pragma unroll
    for (int step = 0; step < S::kSteps; ++step) {
      unsigned a[4] = {}, b[4];
      S::query_fragment(a, queries, step);
      ptx::load_matrix_x4(b, key_tile + S::lane_place() + step * kStepDims * 2);
      ptx::mma_m16n8k16<T>(scores[0], a, b[0], b[1]);
      ptx::mma_m16n8k16<T>(scores[1], a, b[2], b[3]);
    }
    __syncwarp();
    load(key_tile, head_keys, next);
    ptx::copy_async_commit();

    unsigned weights[S::kSets][2];
    state.weigh(weights, scores, scale, share.end - first);
    ptx::copy_async_wait<S::kPending>();
    __syncwarp();
#pragma unroll
    for (int i = 0; i < S::kSteps; ++i) {
      unsigned a[4];
      ptx::load_matrix_x4_transposed(a, value_tile + S::lane_place() + i * kStepDims * 2);
#pragma unroll
      for (int set = 0; set < S::kSets; ++set) {
        ptx::mma_m16n8k16<T>(state.sums[i][set], a, weights[set][0], weights[set][1]);
      }
    }
    __syncwarp();
    load(value_tile, head_values, next);
    ptx::copy_async_commit();
  }

  state.leave(shared_softmaxes + warp * kGroup, reinterpret_cast<float*>(own));
  __syncthreads();
  using Sums = shares::WarpSums<kGroup, kDim, S::kSumPitch, S::kRingBytes / 4>;
  const Sums sums{shared_softmaxes, reinterpret_cast<const float*>(shared)};
  const int number = row * gridDim.x + blockIdx.x, splits = gridDim.z;
  const shares::Meeting meeting{counters, softmaxes, partials, number, splits, block_heads, head_dim / shares::kQuad};
  shares::put_together(out + block_offset, sums, meeting, share, heads);
}

}  // namespace flashllm
