// SPDX-License-Identifier: Apache-2.0
// Attention of prompts on tensor cores: every row attends to the rows of its sequence up to itself, and to what the
// cache held before. Host side: src/flashllm/decoder/prefill.py.
//
// A block has 64 rows of one head, 16 per warp, and walks through keys and values in tiles while cp.async loads the
// next tile (FlashAttention-2: Dao, 2023). Keys and values come from the cache, which also holds those of the rows
// themselves. Fragments of scores become fragments of weights for the second product in place, rounded to its type.
#include "flashllm/quads.cuh"
#include "flashllm/rows.cuh"
#include "flashllm/softmax.cuh"

namespace flashllm {
namespace prefill {

using quads::kQuadLanes, quads::pack;
constexpr int kThreads = 128;
constexpr int kWarpRows = 16;  // rows of an mma
constexpr int kRows = kThreads / rows::kLanes * kWarpRows;

// Tiles in shared memory: rows of kDim elements, a multiple of 16, with 16 bytes between rows, so that the eight rows
// of an ldmatrix fall on all 32 banks. Elements from head_dim to kDim, and rows that do not exist, are zeros.
template <int kDim>
struct Shape {
  static constexpr int kTile = kDim > 128 ? 32 : 64;  // positions at a time
  static constexpr int kChunks = kDim / rows::kVector;
  static constexpr int kPitch = kDim * 2 + 16;
  static constexpr int kTileBytes = kTile * kPitch;
  static constexpr int kKeySteps = kDim / 16;      // tensor-core steps of a score
  static constexpr int kValueSteps = kTile / 16;   // and of a weighted sum
  static constexpr int kScores = kTile / 8;        // fragments of 16 x 8 scores
  static constexpr int kSums = kDim / 8;           // and of 16 x 8 sums
  static_assert(kDim % 16 == 0 && kDim <= 256, "fragments are 16 elements wide, and registers hold 256 sums a row");
  static_assert(kTile * kChunks % kThreads == 0 && kRows * kChunks % kThreads == 0, "all threads copy in each turn");

  FLASHLLM_DEVICE static unsigned place(int row, int chunk) { return row * kPitch + chunk * 16; }

  // Copies kCount rows that are `stride` elements apart, of which `count` exist, each of `chunks` chunks.
  template <int kCount, typename T>
  FLASHLLM_DEVICE static void copy(unsigned tile, const T* from, long long stride, int count, int chunks) {
    // Opaque, or addresses would be kept from tile to tile in registers that the sums need.
    const int thread = ptx::opaque(threadIdx.x);
#pragma unroll
    for (int turn = 0; turn < kCount * kChunks / kThreads; ++turn) {
      const int number = turn * kThreads + thread;
      const int row = number / kChunks, chunk = number % kChunks;
      const bool there_is = row < count && chunk < chunks;
      const T* const source = there_is ? from + row * stride + chunk * rows::kVector : from;
      ptx::copy_async16(true, tile + place(row, chunk), source, there_is ? 16u : 0u);
    }
  }

  // The A fragment of 16 rows from `row` on, at step `step` along them; its four matrices are what ldmatrix loads.
  FLASHLLM_DEVICE static void row_fragment(unsigned (&a)[4], unsigned tile, int row, int step) {
    const int lane = threadIdx.x % rows::kLanes;
    ptx::load_matrix_x4(a, tile + place(row + lane % 16, step * 2 + lane / 16));
  }
  // Two B fragments of step `step` along the rows; their columns are the 16 positions from 16 j on.
  FLASHLLM_DEVICE static void key_fragments(unsigned (&b)[4], unsigned tile, int step, int j) {
    const int lane = threadIdx.x % rows::kLanes;
    ptx::load_matrix_x4(b, tile + place(j * 16 + lane % 8 + lane / 16 * 8, step * 2 + lane / 8 % 2));
  }
  // Two B fragments of step `step` along the positions; their columns are the 16 elements from 16 j on.
  FLASHLLM_DEVICE static void value_fragments(unsigned (&b)[4], unsigned tile, int step, int j) {
    const int lane = threadIdx.x % rows::kLanes;
    ptx::load_matrix_x4_transposed(b, tile + place(step * 16 + lane % 16, j * 2 + lane / 16));
  }
};

// The maximum over the lanes that hold one row of a fragment.
FLASHLLM_DEVICE float quad_maximum(float value) {
#pragma unroll
  for (int mask = kQuadLanes / 2; mask > 0; mask /= 2) {
    value = fmaxf(value, __shfl_xor_sync(rows::kFullWarp, value, mask));
  }
  return value;
}

}  // namespace prefill

// out [row_count, heads * head_dim] = causal softmax(q k^T) v. q [row_count, heads, head_dim]; keys and values
// [slot_count, key heads, capacity, head_dim]. Rows starts[s] to starts[s + 1] - 1 are sequence s, at consecutive
// positions from that of the first row on; a sequence with rows, a slot or positions that do not exist is skipped.
//
// Grid: blocks of 64 rows of the longest sequence, heads, sequences. scale: usually log2(e) / sqrt(head_dim).
template <typename T, int kDim>
__global__ void __launch_bounds__(prefill::kThreads)
    prefill_attention(const T* q, const T* keys, const T* values, const int* slots, const int* positions,
                      const int* starts, T* out, int row_count, int kv_heads, int head_dim, int slot_count,
                      int capacity, float scale) {
  using namespace prefill;
  using S = Shape<kDim>;
  FLASHLLM_DYNAMIC_SHARED(shared);
  const unsigned queries = ptx::shared_address(shared);  // of kRows rows; then two stages of keys and values
  const unsigned stages = queries + kRows * S::kPitch;

  ptx::grid_dependency_wait();
  ptx::grid_launch_dependents();
  // The last rows attend to the most positions, so their blocks come first.
  const int row0 = static_cast<int>(gridDim.x - 1 - blockIdx.x) * kRows;
  const int start = starts[blockIdx.z], count = starts[blockIdx.z + 1] - start;
  if (row0 >= count) return;
  if (start < 0 || start > row_count - count) return;
  if (slots[start] < 0 || slots[start] >= slot_count) return;
  if (positions[start] < 0 || positions[start] > capacity - count) return;
  const int heads = gridDim.y, head = blockIdx.y, kv_head = head / (heads / kv_heads);
  const int position0 = positions[start] + row0;            // of the block's first row
  const int length = position0 + min(kRows, count - row0);  // positions that any of its rows attends to
  const int chunks = head_dim / rows::kVector;
  const long long cache = (static_cast<long long>(slots[start]) * kv_heads + kv_head) * capacity * head_dim;
  const long long stride = static_cast<long long>(heads) * head_dim;
  const long long block_offset = (start + row0) * stride + static_cast<long long>(head) * head_dim;

  const auto load = [&](int tile) {
    const unsigned stage = stages + tile % 2 * 2 * S::kTileBytes;
    const int first = tile * S::kTile;
    const long long offset = cache + static_cast<long long>(first) * head_dim;
    S::template copy<S::kTile>(stage, keys + offset, head_dim, length - first, chunks);
    S::template copy<S::kTile>(stage + S::kTileBytes, values + offset, head_dim, length - first, chunks);
  };
  S::template copy<kRows>(queries, q + block_offset, stride, count - row0, chunks);
  load(0);
  ptx::copy_async_commit();

  const int warp = threadIdx.x / rows::kLanes, lane = threadIdx.x % rows::kLanes;
  const int warp_row = warp * kWarpRows, column = lane % kQuadLanes * 2;
  const int own_position = position0 + warp_row + lane / kQuadLanes;  // of this lane's first row; the other is 8 later
  softmax::Running running[2];  // totals are of this lane's weights, and added up at the end
  float sums[S::kSums][4] = {};
  const int tiles = (length + S::kTile - 1) / S::kTile;
#pragma unroll 1
  for (int tile = 0; tile < tiles; ++tile) {
    ptx::copy_async_wait<0>();
    __syncthreads();  // all have this tile, and all have finished with the one whose stage the next one takes
    if (tile + 1 < tiles) load(tile + 1);
    ptx::copy_async_commit();
    const unsigned stage = stages + tile % 2 * 2 * S::kTileBytes;

    float scores[S::kScores][4] = {};
#pragma unroll
    for (int step = 0; step < S::kKeySteps; ++step) {
      unsigned a[4];
      S::row_fragment(a, queries, warp_row, step);
#pragma unroll
      for (int j = 0; j < S::kScores / 2; ++j) {
        unsigned b[4];
        S::key_fragments(b, stage, step, j);
        ptx::mma_m16n8k16<T>(scores[2 * j], a, b[0], b[1]);
        ptx::mma_m16n8k16<T>(scores[2 * j + 1], a, b[2], b[3]);
      }
    }

    const int first = tile * S::kTile + column;
    const bool all_count = tile * S::kTile + S::kTile <= position0 + warp_row + 1;
    float largest[2] = {softmax::kNothing, softmax::kNothing};
#pragma unroll
    for (int j = 0; j < S::kScores; ++j)
#pragma unroll
      for (int r = 0; r < 4; ++r) {
        const bool counts = all_count || first + j * 8 + r % 2 <= own_position + r / 2 * 8;
        scores[j][r] = counts ? scores[j][r] * scale : softmax::kNothing;
        largest[r / 2] = fmaxf(largest[r / 2], scores[j][r]);
      }
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float factor = running[half].raise(quad_maximum(largest[half]));
#pragma unroll
      for (int j = 0; j < S::kSums; ++j) sums[j][2 * half] *= factor, sums[j][2 * half + 1] *= factor;
    }
#pragma unroll
    for (int j = 0; j < S::kScores; ++j)
#pragma unroll
      for (int r = 0; r < 4; ++r) {
        scores[j][r] = running[r / 2].weight(scores[j][r]);
        running[r / 2].total += scores[j][r];
      }

#pragma unroll
    for (int step = 0; step < S::kValueSteps; ++step) {
      const float(&left)[4] = scores[2 * step];
      const float(&right)[4] = scores[2 * step + 1];
      const unsigned a[4] = {pack<T>(left[0], left[1]), pack<T>(left[2], left[3]), pack<T>(right[0], right[1]),
                             pack<T>(right[2], right[3])};
#pragma unroll
      for (int j = 0; j < S::kSums / 2; ++j) {
        unsigned b[4];
        S::value_fragments(b, stage + S::kTileBytes, step, j);
        ptx::mma_m16n8k16<T>(sums[2 * j], a, b[0], b[1]);
        ptx::mma_m16n8k16<T>(sums[2 * j + 1], a, b[2], b[3]);
      }
    }
  }

  // Results replace the warp's own queries, from where they are stored as whole vectors.
  __syncwarp();
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const float total = rows::lane_sum(running[half].total, kQuadLanes);
    const int row = warp_row + lane / kQuadLanes + half * 8;
#pragma unroll
    for (int j = 0; j < S::kSums; ++j) {
      const unsigned both = pack<T>(sums[j][2 * half] / total, sums[j][2 * half + 1] / total);
      ptx::store_shared(queries + S::place(row, j) + column * 2, both);
    }
  }
  __syncwarp();
#pragma unroll
  for (int turn = 0; turn < kWarpRows * S::kChunks / rows::kLanes; ++turn) {
    const int number = turn * rows::kLanes + lane;
    const int row = warp_row + number / S::kChunks, chunk = number % S::kChunks;
    if (row0 + row >= count || chunk >= chunks) continue;
    T* const to = out + block_offset + row * stride + chunk * rows::kVector;
    __stcg(reinterpret_cast<uint4*>(to), ptx::load_shared(queries + S::place(row, chunk)));
  }
}

}  // namespace flashllm
