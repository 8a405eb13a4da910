// SPDX-License-Identifier: Apache-2.0
// Attention of one query, or of several with the same keys, whose positions are divided among the warps of a block and
// among several blocks, the splits (Flash-Decoding: Dao, Haziza, Massa and Sizov, 2023). Each has a softmax over its
// own positions, by which their sums are combined at the end, always in the same order, so results are bit-identical on
// every run.
#pragma once

#include "flashllm/rows.cuh"
#include "flashllm/softmax.cuh"

namespace flashllm {
namespace shares {

constexpr int kThreads = 128;
constexpr int kWarps = kThreads / rows::kLanes;
constexpr int kQuad = 4;     // elements per thread when sums are combined
constexpr int kLeast = 64;   // positions of a split; with fewer, another split costs more than it saves
constexpr int kLong = 2048;  // positions that would keep the other blocks waiting if one block had them all
constexpr int kAtOnce = 8;   // splits whose sums a thread loads together, so that they do not wait for one another

// The positions of a row that a split has, in shares as equal as whole steps allow. There are `common` shares, or fewer
// if each would have less than kLeast positions, or, as far as there are splits, more if each would have more than
// kLong: the row may be longer than others, whose blocks finish sooner. The remaining splits have none.
struct Share {
  int begin, end, split, size, length;

  FLASHLLM_DEVICE Share(int length, int splits, int common, int split, int step) : split(split), length(length) {
    const int wanted = max(1, min(splits, max(min(common, length / kLeast), length / kLong)));
    size = (length + wanted * step - 1) / (wanted * step) * step;
    begin = split * size;
    end = min(length, begin + size);
  }
  FLASHLLM_DEVICE bool is_empty() const { return begin >= length; }
  FLASHLLM_DEVICE bool is_all() const { return size >= length; }
  // The number of shares. Computed late: at the start, loads would have to wait for the division.
  FLASHLLM_DEVICE int count() const { return (length + size - 1) / size; }
};

// Copies the queries of `heads` heads, which are contiguous at `from`, to `shared` + place(head, chunk), with all
// threads. The rest of the kHeads x kChunks chunks of 16 bytes is filled with zeros.
template <int kHeads, int kChunks, typename T, typename Place>
FLASHLLM_DEVICE void copy_queries(unsigned shared, const T* from, int heads, int head_dim, const Place& place) {
  for (int item = threadIdx.x; item < kHeads * kChunks; item += kThreads) {
    const int head = item / kChunks, chunk = item % kChunks, element = chunk * rows::kVector;
    const bool there_is = head < heads && element < head_dim;
    const auto* const its = reinterpret_cast<const uint4*>(from + head * head_dim + element);
    ptx::store_shared(shared + place(head, chunk), there_is ? __ldcg(its) : uint4{});
  }
}

// Four elements of a head, not yet divided by the total.
struct Part {
  float4 sums = {0.0f, 0.0f, 0.0f, 0.0f};
  softmax::Running running;

  FLASHLLM_DEVICE void raise(float maximum) {
    const float factor = running.raise(maximum);
    sums.x *= factor, sums.y *= factor, sums.z *= factor, sums.w *= factor;
  }

  // Adds the sums `more` of other positions, with maximum and total `other`; their maximum must not exceed this one's.
  FLASHLLM_DEVICE void add(const float2& other, const float4& more) {
    const float weight = running.weight(other.x);
    running.total += weight * other.y;
    sums.x += weight * more.x, sums.y += weight * more.y, sums.z += weight * more.z, sums.w += weight * more.w;
  }

  template <typename T>
  FLASHLLM_DEVICE void store(T* to) const {
    const float total = running.total;
    const float mean[kQuad] = {sums.x / total, sums.y / total, sums.z / total, sums.w / total};
    rows::store(to, mean);
  }
};

// What the warps of a block leave in shared memory: for each of kGroup heads the maximum and the total [warp][head],
// and sums of weighted values, up to kDims floats, kPitch floats from head to head and kWarpPitch from warp to warp.
template <int kGroup, int kDims, int kPitch, int kWarpPitch>
struct WarpSums {
  static constexpr int kQuads = kDims / kQuad;
  const float2* softmaxes;
  const float* sums;

  FLASHLLM_DEVICE Part whole(int head, int quad) const {
    Part part;
    float largest = softmax::kNothing;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) largest = fmaxf(largest, softmaxes[w * kGroup + head].x);
    part.raise(largest);
#pragma unroll
    for (int w = 0; w < kWarps; ++w) {
      const float* const its = sums + w * kWarpPitch + head * kPitch + quad * kQuad;
      part.add(softmaxes[w * kGroup + head], *reinterpret_cast<const float4*>(its));
    }
    return part;
  }
};

// Device memory through which the splits of one row and one block of heads are combined: a counter that is zero before
// and after, maxima and totals [split][head], and sums [split][head][quad].
struct Meeting {
  unsigned* counters;
  float2* softmaxes;
  float4* partials;
  int number;  // index of this meeting in the launch
  int splits, block_heads, quads;

  FLASHLLM_DEVICE long long place(int split, int head) const {
    return (static_cast<long long>(number) * splits + split) * block_heads + head;
  }

  FLASHLLM_DEVICE void leave(const Part& part, int split, int head, int quad) const {
    const long long at = place(split, head);
    if (quad == 0) __stcg(softmaxes + at, make_float2(part.running.maximum, part.running.total));
    __stcg(partials + at * quads + quad, part.sums);
  }

  // Called after leave(). True in all threads of the block that comes last: the sums of all others are then visible.
  FLASHLLM_DEVICE bool is_last(int shares) const {
    __syncthreads();
    bool last = false;
    if (threadIdx.x == 0) {
      __threadfence();
      last = atomicAdd(counters + number, 1u) == static_cast<unsigned>(shares - 1);
      __threadfence();
    }
    last = __syncthreads_or(last);
    if (last && threadIdx.x == 0) counters[number] = 0;  // not before the fence, which would wait for it
    return last;
  }

  // Combines all shares in one pass: if maxima were read before sums, the sums would arrive one L2 latency later.
  FLASHLLM_DEVICE Part whole(int shares, int head, int quad) const {
    Part part;
#pragma unroll 1
    for (int first = 0; first < shares; first += kAtOnce) {
      float2 its_softmax[kAtOnce];
      float4 its_sums[kAtOnce];
      float largest = softmax::kNothing;
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        const long long at = place(min(first + i, shares - 1), head);
        its_softmax[i] = __ldcg(softmaxes + at);
        its_sums[i] = __ldcg(partials + at * quads + quad);
      }
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) largest = fmaxf(largest, its_softmax[i].x);
      part.raise(largest);
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        if (first + i < shares) part.add(its_softmax[i], its_sums[i]);
      }
    }
    return part;
  }
};

// Calls use(head, quad) for `quads` quads of each of `heads` heads, by all threads. Items are numbered kQuads to a
// head.
template <int kQuads, typename Use>
FLASHLLM_DEVICE void for_each_quad(int heads, int quads, const Use& use) {
  for (int item = threadIdx.x; item < heads * kQuads; item += kThreads) {
    const int head = item / kQuads, quad = item % kQuads;
    if (quad < quads) use(head, quad);
  }
}

// Writes `heads` neighbouring heads of out: directly if the block has all positions, else in the block that comes last.
template <typename T, typename Sums>
FLASHLLM_DEVICE void put_together(T* out, const Sums& sums, const Meeting& meeting, const Share& share, int heads) {
  const int quads = meeting.quads;
  if (share.is_all()) {
    for_each_quad<Sums::kQuads>(heads, quads, [&](int head, int quad) {
      sums.whole(head, quad).store(out + (head * quads + quad) * kQuad);
    });
    return;
  }
  for_each_quad<Sums::kQuads>(heads, quads, [&](int head, int quad) {
    meeting.leave(sums.whole(head, quad), share.split, head, quad);
  });
  const int shares = share.count();
  if (!meeting.is_last(shares)) return;
  for_each_quad<Sums::kQuads>(heads, quads, [&](int head, int quad) {
    meeting.whole(shares, head, quad).store(out + (head * quads + quad) * kQuad);
  });
}

}  // namespace shares
}  // namespace flashllm
