// SPDX-License-Identifier: Apache-2.0
// Attention of a decoding step: each row is one query for every head. Host side: src/flashllm/decoder/attention.py.
//
// The cost is reading keys and values, so each is read once, for both query heads where two share them. (With more of
// them, fp32 arithmetic takes longer than the reading: see grouped_attention.cu.) Eight lanes take one position and
// read a whole line of 128 bytes in each load. Loads do not wait for one another: values are loaded before the scores
// of their keys are computed, and the next keys before the values are used. Teams of eight lanes, warps and splits
// divide the positions of a row among them: see shares.cuh.
#include "flashllm/shares.cuh"

namespace flashllm {
namespace attention {

using shares::kThreads, shares::kWarps;
constexpr int kPartLanes = 8;  // lanes of one position, 16 bytes each: 128 bytes, a line
constexpr int kTeams = rows::kLanes / kPartLanes;  // per warp: positions in one load

// kChunks: 16-byte loads per lane for one position. kHeads: query heads that share keys.
template <int kChunks_, int kHeads_>
struct Shape {
  static constexpr int kChunks = kChunks_, kHeads = kHeads_;
  static constexpr int kUnroll = 4 / kChunks;              // keeps 4 loads of keys and 4 of values in flight per lane
  static constexpr int kStep = kTeams * kUnroll;           // positions that a warp takes at a time
  static constexpr int kSums = kChunks * rows::kVector;    // per lane and head
  static constexpr int kDims = kSums * kPartLanes;         // elements of a head, rounded up
  // Blocks per SM for which the compiler has to leave registers; they decide how many loads are in flight.
  static constexpr int kMinBlocks = kHeads == 1 && kChunks < 4 ? 5 : 1;
  static constexpr int kRowChunks = kChunks * kPartLanes;  // per head
  static constexpr int kLeft = kSums / kTeams;             // sums per lane once the teams have added theirs
  static_assert(kChunks == 1 || kChunks == 2 || kChunks == 4, "heads have up to 256 elements");
  static_assert(kHeads == 1 || kHeads == 2, "with more heads there are no registers for loads");
};

template <typename S>
using Tile = rows::Packed<rows::kVector>[S::kUnroll][S::kChunks];

FLASHLLM_DEVICE rows::Packed<rows::kVector> packed(const uint4& all) { return {{all.x, all.y, all.z, all.w}}; }

// Which part of the keys and of the values of one head this lane reads.
template <typename T, typename S>
struct Reader {
  int head_dim, team, end;
  int offset[S::kChunks];

  // Loads positions from `first` on. Memory from position `end` on may hold anything, so the last position before it is
  // read instead. A lane without a part, because the head is shorter, reads that of another lane; its query is zero.
  FLASHLLM_DEVICE void load(Tile<S>& tile, const T* head, int first) const {
#pragma unroll
    for (int u = 0; u < S::kUnroll; ++u) {
      const T* const row = head + min(first + u * kTeams + team, end - 1) * head_dim;
#pragma unroll
      for (int c = 0; c < S::kChunks; ++c) {
        tile[u][c] = packed(__ldcs(reinterpret_cast<const uint4*>(row + offset[c])));
      }
    }
  }
};

// Adds the first kCount sums of this lane and of the lane kMask away, leaving each lane with half of them, and so on
// down to neighbouring teams.
template <int kCount, int kMask, int kSums>
FLASHLLM_DEVICE void fold(float (&sums)[kSums]) {
  if constexpr (kMask >= kPartLanes) {
    const bool upper = (threadIdx.x & kMask) != 0;
#pragma unroll
    for (int i = 0; i < kCount / 2; ++i) {
      const float given = upper ? sums[i] : sums[i + kCount / 2];
      sums[i] = (upper ? sums[i + kCount / 2] : sums[i]) + __shfl_xor_sync(rows::kFullWarp, given, kMask);
    }
    fold<kCount / 2, kMask / 2>(sums);
  }
}

// A lane's state for its heads: sums of weighted values, and of the weights, over the positions so far.
template <typename S>
struct Heads {
  using Scores = float[S::kHeads][S::kUnroll];
  softmax::Running running[S::kHeads];
  float sums[S::kHeads][S::kSums] = {};

  // Adds the lanes' parts of each score and turns the scores into weights. Positions from `end` on do not count.
  FLASHLLM_DEVICE void weigh(Scores& scores, float scale, int position, int end) {
#pragma unroll
    for (int h = 0; h < S::kHeads; ++h) {
      float largest = softmax::kNothing;
#pragma unroll
      for (int u = 0; u < S::kUnroll; ++u) {
        const float score = rows::lane_sum(scores[h][u], kPartLanes) * scale;
        scores[h][u] = position + u * kTeams < end ? score : softmax::kNothing;
        largest = fmaxf(largest, scores[h][u]);
      }
      rescale(h, largest);
#pragma unroll
      for (int u = 0; u < S::kUnroll; ++u) {
        scores[h][u] = running[h].weight(scores[h][u]);
        running[h].total += scores[h][u];
      }
    }
  }

  template <typename T>
  FLASHLLM_DEVICE void add(const Scores& weights, const Tile<S>& value) {
#pragma unroll
    for (int u = 0; u < S::kUnroll; ++u)
#pragma unroll
      for (int c = 0; c < S::kChunks; ++c) {
        float one[rows::kVector];
        rows::unpack<T>(value[u][c], one);
#pragma unroll
        for (int h = 0; h < S::kHeads; ++h)
#pragma unroll
          for (int i = 0; i < rows::kVector; ++i) sums[h][c * rows::kVector + i] += weights[h][u] * one[i];
      }
  }

  // Adds the sums of the teams; each keeps kLeft of them.
  FLASHLLM_DEVICE void join_teams() {
#pragma unroll
    for (int h = 0; h < S::kHeads; ++h) {
#pragma unroll
      for (int mask = rows::kLanes / 2; mask >= kPartLanes; mask /= 2) {
        rescale(h, __shfl_xor_sync(rows::kFullWarp, running[h].maximum, mask));
        running[h].total += __shfl_xor_sync(rows::kFullWarp, running[h].total, mask);
      }
      fold<S::kSums, rows::kLanes / 2>(sums[h]);
    }
  }

  FLASHLLM_DEVICE void rescale(int h, float score) {
    const float factor = running[h].raise(score);
#pragma unroll
    for (int i = 0; i < S::kSums; ++i) sums[h][i] *= factor;
  }
};

// Adds this lane's part of the scores of its heads. `queries`: shared address of this lane's first chunk of the
// queries.
template <typename T, typename S>
FLASHLLM_DEVICE void multiply(typename Heads<S>::Scores& scores, const Tile<S>& key, unsigned queries) {
#pragma unroll
  for (int h = 0; h < S::kHeads; ++h)
#pragma unroll
    for (int c = 0; c < S::kChunks; ++c) {
      float query[rows::kVector];
      rows::unpack<T>(packed(ptx::load_shared(queries + (h * S::kRowChunks + c * kPartLanes) * 16)), query);
#pragma unroll
      for (int u = 0; u < S::kUnroll; ++u) {
        float one[rows::kVector];
        rows::unpack<T>(key[u][c], one);
#pragma unroll
        for (int i = 0; i < rows::kVector; ++i) scores[h][u] += query[i] * one[i];
      }
    }
}

}  // namespace attention

// out [rows, heads * head_dim] = softmax(q k^T) v of each row's positions up to its own. q [rows, heads, head_dim];
// keys and values [slot_count, key heads, capacity, head_dim]. A row whose slot does not exist or whose position is
// negative is skipped. kGroup query heads share a key head.
//
// Grid: key heads, rows, splits, of which `common` are for rows of any length (shares::Share). With more than one
// split, `counters` has a zero for each block of a split, before and after the launch; `softmaxes` and `partials` hold
// what the splits leave to be combined (shares::Meeting). scale: usually log2(e) / sqrt(head_dim).
//
// Of the inputs, the preceding launch may write only q, and the keys and values at each row's own position, which no
// other row may read. Everything else is read without waiting for it.
template <typename T, int kChunks, int kGroup>
__global__ void __launch_bounds__(attention::kThreads, attention::Shape<kChunks, kGroup>::kMinBlocks)
    decode_attention(const T* q, const T* keys, const T* values, const int* slots, const int* positions, T* out,
                     unsigned* counters, float2* softmaxes, float4* partials, int head_dim, int slot_count,
                     int capacity, float scale, int common) {
  using namespace attention;
  using S = Shape<kChunks, kGroup>;
  FLASHLLM_DYNAMIC_SHARED(shared);
  float* const shared_sums = reinterpret_cast<float*>(shared);  // [kWarps][kGroup][kDims]
  float2* const shared_softmaxes = reinterpret_cast<float2*>(shared_sums + kWarps * kGroup * S::kDims);
  // Queries are read again in every step: as fp32 in registers they would leave no room for loads.
  const unsigned queries = ptx::shared_address(shared_softmaxes + kWarps * kGroup);  // [kGroup][kRowChunks]

  const int kv_heads = gridDim.x, kv_head = blockIdx.x;
  const int row = blockIdx.y;
  const int slot = slots[row], position = min(positions[row], capacity - 1);
  const shares::Share share(position + 1, gridDim.z, common, blockIdx.z, S::kStep);
  // The first condition tests both at once; otherwise one would be loaded only after the other has arrived.
  if (min(slot, position) < 0 || slot >= slot_count || share.is_empty()) return ptx::grid_dependency_wait();

  const int warp = ptx::uniform(threadIdx.x / rows::kLanes), lane = threadIdx.x % rows::kLanes;
  const int part = lane % kPartLanes, team = lane / kPartLanes;
  const int chunks = head_dim / rows::kVector;
  const long long cache = (static_cast<long long>(slot) * kv_heads + kv_head) * capacity * head_dim;
  const T* const head_keys = keys + cache;
  const T* const head_values = values + cache;
  Reader<T, S> reader{head_dim, team, share.end, {}};
#pragma unroll
  for (int c = 0; c < kChunks; ++c) reader.offset[c] = min(part + c * kPartLanes, chunks - 1) * rows::kVector;
  int first = share.begin + warp * S::kStep;
  // What is loaded next was written before the preceding launch, unless it includes the row's own position.
  if (min(first + S::kStep, share.end) > position) ptx::grid_dependency_wait();
  Tile<S> key, value;
  reader.load(key, head_keys, first);
  reader.load(value, head_values, first);
  ptx::grid_dependency_wait();
  ptx::grid_launch_dependents();

  const int number = row * kv_heads + kv_head;  // of this block among those of one split
  const long long block_offset = static_cast<long long>(number) * kGroup * head_dim;  // of its queries and its results
  const auto place = [](int head, int chunk) { return (head * S::kRowChunks + chunk) * 16; };
  shares::copy_queries<kGroup, S::kRowChunks>(queries, q + block_offset, kGroup, head_dim, place);
  __syncthreads();

  Heads<S> own;
#pragma unroll 1
  for (; first < share.end; first += kWarps * S::kStep) {
    const int next = first + kWarps * S::kStep;
    typename Heads<S>::Scores scores = {};
    multiply<T, S>(scores, key, queries + part * 16);
    if (next < share.end) reader.load(key, head_keys, next);
    own.weigh(scores, scale, first + team, share.end);
    own.template add<T>(scores, value);
    if (next < share.end) reader.load(value, head_values, next);
  }

  own.join_teams();
#pragma unroll
  for (int h = 0; h < kGroup; ++h) {
    const int at = warp * kGroup + h;
    if (lane == 0) shared_softmaxes[at] = make_float2(own.running[h].maximum, own.running[h].total);
#pragma unroll
    for (int i = 0; i < S::kLeft; i += 2) {
      const int sum = team * S::kLeft + i, chunk = part + sum / rows::kVector * kPartLanes;
      float* const to = shared_sums + at * S::kDims + chunk * rows::kVector + sum % rows::kVector;
      *reinterpret_cast<float2*>(to) = make_float2(own.sums[h][i], own.sums[h][i + 1]);
    }
  }
  __syncthreads();
  const shares::WarpSums<kGroup, S::kDims, S::kDims, kGroup * S::kDims> sums{shared_softmaxes, shared_sums};
  const int splits = gridDim.z;
  const shares::Meeting meeting{counters, softmaxes, partials, number, splits, kGroup, head_dim / shares::kQuad};
  shares::put_together(out + block_offset, sums, meeting, share, kGroup);
}

}  // namespace flashllm
