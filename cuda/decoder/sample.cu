// SPDX-License-Identifier: Apache-2.0
// The next token of every sequence from its logits. Host side: src/flashllm/decoder/sample.py.
//
// One block takes one row. Temperature zero takes the largest logit. Otherwise the token is drawn among those that
// top-k and then top-p keep, by the Gumbel-max trick: each token has the largest logit / temperature + noise, where
// noise = -log(-log(uniform)), with the probability that softmax gives it. The noise is a function of the seed, the
// token and how many tokens the sequence has so far (philox.cuh), whatever the batch.
//
// Both filters keep the tokens at or above a threshold: the largest one for which those kept still number k, or still
// hold the share p of the probability. It is found by bisection over integers that are ordered as the logits are.
// Bisecting a whole row would mean reading it 30 times. So the largest logit of each thread first stands for all its
// logits: where these 1024 alone reach the target, the row does too, and few others lie above that threshold. What lies
// at or above it is gathered in shared memory, where the bisection ends. The row itself is bisected only for k above
// 1024, or where these 1024 hold less than the share p, or where too many are to be gathered.
//
// Sums over the block are sums of integers (probabilities in units of 2^-40 of the largest), so they are the same in
// any order.
#include "flashllm/philox.cuh"
#include "flashllm/ptx.cuh"

namespace flashllm {
namespace sampling {

using Wide = unsigned long long;

constexpr int kThreads = 1024;
constexpr int kLanes = 32;
constexpr int kWarps = kThreads / kLanes;
constexpr unsigned kFullWarp = 0xffffffffu;
constexpr int kGroup = 4;                       // logits per 16-byte load, and words per call of Philox
constexpr int kBatch = 4;                       // loads that a thread has in flight at once
constexpr int kCandidates = 4096;               // tokens in shared memory
constexpr float kUnit = 0x1p40f;                // weight of the largest logit
constexpr float kLeastTemperature = 0x1p-126f;  // from here on the inverse is finite
constexpr unsigned kLeastKey = 1;               // of a number; a NaN has 0
constexpr unsigned kMinusInfinity = 0x007fffffu, kPlusInfinity = 0xff800000u;  // their keys
static_assert(kWarps == kLanes, "each lane reads the result of one warp");

// Keys are ordered as floats are; the two zeros share one key, and NaNs share one below all others.
FLASHLLM_DEVICE unsigned key_of(float value) {
  if (value != value) return 0;
  const unsigned bits = __float_as_uint(value + 0.0f);
  return bits >> 31 ? ~bits : bits | 0x80000000u;
}
FLASHLLM_DEVICE float value_of(unsigned key) { return __uint_as_float(key >> 31 ? key & 0x7fffffffu : ~key); }

// A token with its key, such that the largest entry has the largest key and, among equal keys, the lowest index.
FLASHLLM_DEVICE Wide entry_of(unsigned key, int index) {
  return static_cast<Wide>(key) << 32 | ~static_cast<unsigned>(index);
}
FLASHLLM_DEVICE unsigned key_in(Wide entry) { return static_cast<unsigned>(entry >> 32); }
FLASHLLM_DEVICE int index_in(Wide entry) { return static_cast<int>(~static_cast<unsigned>(entry)); }

struct Add {
  FLASHLLM_DEVICE Wide operator()(Wide a, Wide b) const { return a + b; }
};
struct Larger {
  FLASHLLM_DEVICE Wide operator()(Wide a, Wide b) const { return a > b ? a : b; }
};

struct Shared {
  Wide partial[2][kWarps];
  Wide candidates[kCandidates];  // entries
  int count;
};

// What a token weighs in a filter's target.
struct Count {
  FLASHLLM_DEVICE Wide operator()(unsigned) const { return 1; }
};
struct Probability {
  float largest, inverse;  // the largest logit, and the inverse of the temperature
  FLASHLLM_DEVICE Wide operator()(unsigned key) const {
    return static_cast<Wide>(expf((value_of(key) - largest) * inverse) * kUnit);
  }
};

struct Row {
  Shared& shared;
  const float* logits;
  int vocab;
  Wide own = 0;                // the thread's largest entry
  Wide best = 0;               // the block's
  unsigned least = kLeastKey;  // the threshold so far
  int gathered = -1;           // number of candidates, once all that is kept is among them
  int turn = 0;

  // The result is returned in every thread. Two arrays alternate: while some warps still read one, others may already
  // write the other for the next result.
  template <class Combine>
  FLASHLLM_DEVICE Wide over_block(Wide value, Combine combine) {
    for (int step = kLanes / 2; step > 0; step /= 2) value = combine(value, __shfl_xor_sync(kFullWarp, value, step));
    Wide* const partial = shared.partial[turn ^= 1];
    if (threadIdx.x % kLanes == 0) partial[threadIdx.x / kLanes] = value;
    __syncthreads();
    value = partial[threadIdx.x % kLanes];
    for (int step = kLanes / 2; step > 0; step /= 2) value = combine(value, __shfl_xor_sync(kFullWarp, value, step));
    return value;
  }

  // Past the end of the row, logits read as NaN.
  FLASHLLM_DEVICE static float none() { return __uint_as_float(~0u); }
  FLASHLLM_DEVICE float load(int index) const { return index < vocab ? __ldcg(logits + index) : none(); }

  // Calls visit(key, group, place) for each logit, whose index is kGroup * group + place.
  template <int kLoads, class Visit>
  FLASHLLM_DEVICE void each_logit(Visit visit) const {
    const int groups = (vocab + kGroup - 1) / kGroup;
    for (int start = threadIdx.x; start < groups; start += kLoads * kThreads) {
      float4 four[kLoads];
      if (vocab % kGroup == 0) {  // else rows start at any address
#pragma unroll
        for (int i = 0; i < kLoads; ++i) {
          const int group = start + i * kThreads;
          four[i] = make_float4(none(), none(), none(), none());
          if (group < groups) four[i] = __ldcg(reinterpret_cast<const float4*>(logits) + group);
        }
      } else {
#pragma unroll
        for (int i = 0; i < kLoads; ++i) {
          const int first = (start + i * kThreads) * kGroup;
          four[i] = make_float4(load(first), load(first + 1), load(first + 2), load(first + 3));
        }
      }
#pragma unroll
      for (int i = 0; i < kLoads; ++i) {
        const int group = start + i * kThreads;
        visit(key_of(four[i].x), group, 0);
        visit(key_of(four[i].y), group, 1);
        visit(key_of(four[i].z), group, 2);
        visit(key_of(four[i].w), group, 3);
      }
    }
  }
  // The same, but for the candidates alone as soon as they are gathered.
  template <int kLoads, class Visit>
  FLASHLLM_DEVICE void each(Visit visit) const {
    if (gathered < 0) return each_logit<kLoads>(visit);
    for (int i = threadIdx.x; i < gathered; i += kThreads) {
      const int index = index_in(shared.candidates[i]);
      visit(key_in(shared.candidates[i]), index / kGroup, index % kGroup);
    }
  }

  FLASHLLM_DEVICE void find_largest() {
    each_logit<kBatch>([this](unsigned key, int group, int place) {
      own = Larger()(own, entry_of(key, group * kGroup + place));
    });
    best = over_block(own, Larger());
  }

  // The weight of the logits at or above `threshold`: among all of them, or (kOwn) among each thread's largest.
  template <bool kOwn, class Weight>
  FLASHLLM_DEVICE Wide weight_from(unsigned threshold, Weight weight) {
    Wide sum = 0;
    const auto add = [&](unsigned key, int, int) { sum += key >= threshold ? weight(key) : 0; };
    if constexpr (kOwn) add(key_in(own), 0, 0);
    else each<kBatch>(add);
    return over_block(sum, Add());
  }

  // The largest threshold at which the weight still reaches the target, but not below the one so far.
  template <bool kOwn, class Weight>
  FLASHLLM_DEVICE unsigned search(Wide target, Weight weight) {
    unsigned low = least, high = key_in(best) + 1;
    while (high - low > 1) {
      const unsigned middle = low + (high - low) / 2;
      if (weight_from<kOwn>(middle, weight) >= target) low = middle;
      else high = middle;
    }
    return low;
  }

  // Gathers all from the threshold on in shared memory, in any order; if they are too many, the row itself stays in
  // use.
  FLASHLLM_DEVICE void gather() {
    if (threadIdx.x == 0) shared.count = 0;
    __syncthreads();
    each_logit<kBatch>([this](unsigned key, int group, int place) {
      if (key < least) return;
      const int at = atomicAdd(&shared.count, 1);
      if (at < kCandidates) shared.candidates[at] = entry_of(key, group * kGroup + place);
    });
    __syncthreads();
    if (shared.count <= kCandidates) gathered = shared.count;
  }

  template <class Weight>
  FLASHLLM_DEVICE void keep(Wide target, Weight weight) {
    if (gathered < 0) {
      const unsigned bound = search<true>(target, weight);
      if (bound > least) {
        least = bound;
        gather();
      }
    }
    least = search<false>(target, weight);
  }

  FLASHLLM_DEVICE int draw(float inverse, uint2 key, unsigned count) {
    const float largest = value_of(key_in(best));
    Wide winner = 0;
    each<1>([&](unsigned logit, int group, int place) {
      const uint4 four = philox::words(make_uint4(group, count, 0, 0), key);
      const unsigned word = place == 0 ? four.x : place == 1 ? four.y : place == 2 ? four.z : four.w;
      if (logit < least) return;
      // Near zero, where the largest noise comes from, a float has enough digits; near one it would round to one.
      const float uniform = fminf((static_cast<float>(word) + 0.5f) * 0x1p-32f, 1.0f - 0x1p-24f);
      const float score = (value_of(logit) - largest) * inverse - logf(-log1pf(-uniform));
      winner = Larger()(winner, entry_of(key_of(score), group * kGroup + place));
    });
    return index_in(over_block(winner, Larger()));
  }
};

}  // namespace sampling

// logits [rows, vocab]; the state and the parameters of each row [rows], stops [n_stops], output [rows, capacity]: see
// SampleState in the host module. Grid: rows.
__global__ void __launch_bounds__(sampling::kThreads)
    sample(const float* logits, int vocab, int* tokens, int* positions, int* counts, const int* limits, int* finished,
           int* output, int capacity, const float* temperatures, const int* top_k, const float* top_p,
           const unsigned long long* seeds, const int* stops, int n_stops, int advance_positions) {
  using namespace sampling;
  __shared__ Shared shared;
  ptx::grid_dependency_wait();
  ptx::grid_launch_dependents();

  const int row = blockIdx.x;
  const int count = counts[row], limit = min(limits[row], capacity), position = positions[row];
  const float temperature = temperatures[row], p = top_p[row];
  const int k = top_k[row];
  const Wide seed = seeds[row];
  if (finished[row] != 0) return;
  if (count >= limit) {
    if (threadIdx.x == 0) finished[row] = 1;
    return;
  }

  Row choice{shared, logits + static_cast<long long>(row) * vocab, vocab};
  choice.find_largest();
  int token = index_in(choice.best);
  const unsigned largest = key_in(choice.best);
  if (temperature >= kLeastTemperature && largest > kMinusInfinity && largest < kPlusInfinity) {
    const float inverse = 1.0f / temperature;
    if (k > 0 && k < vocab) choice.keep(k, Count());
    if (p < 1.0f) {
      const Probability probability{value_of(largest), inverse};
      const Wide all = choice.weight_from<false>(choice.least, probability);
      choice.keep(static_cast<Wide>(ceil(static_cast<double>(all) * p)), probability);
    }
    const uint2 key = make_uint2(static_cast<unsigned>(seed), static_cast<unsigned>(seed >> 32));
    token = choice.draw(inverse, key, count);
  }

  int is_stop = 0;
  for (int i = threadIdx.x; i < n_stops; i += kThreads) is_stop |= stops[i] == token;
  is_stop = __syncthreads_or(is_stop);
  if (threadIdx.x != 0) return;
  output[static_cast<long long>(row) * capacity + count] = token;
  counts[row] = count + 1;
  if (is_stop || count + 1 == limit) {
    finished[row] = 1;
  } else {
    tokens[row] = token;
    if (advance_positions) positions[row] = position + 1;
  }
}

}  // namespace flashllm
