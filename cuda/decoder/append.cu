// SPDX-License-Identifier: Apache-2.0
// From the q, k and v product to attention: adds biases, normalises and rotates the heads, and writes keys and values
// to their places in the cache. Host side: src/flashllm/decoder/append.py.
#include "flashllm/rows.cuh"

namespace flashllm {

// A row of qkv has q of `heads` heads, then k and v of `kv_heads` heads each. Each head gets 2^lane_bits lanes of a
// warp. A lane computes kWidth elements of each half of its head, as far as the head reaches: element i of one half and
// element i of the other are a pair that is rotated. bias, rotation (cos and sin of each pair, by position), and q_norm
// together with k_norm may be absent. keys and values are [slot_count, kv_heads, capacity, head_dim]; a row whose slot
// or position they do not have is skipped. Grid: rows, and blocks of as many heads as kThreads threads serve.
template <typename T, int kWidth>
__global__ void __launch_bounds__(rows::kThreads)
    append(const T* qkv, const T* __restrict__ bias, const int* slots, const int* positions,
           const T* __restrict__ q_norm, const T* __restrict__ k_norm, const float* __restrict__ rotation, float eps,
           int heads, int kv_heads, int head_dim, int slot_count, int capacity, int lane_bits, T* q, T* keys,
           T* values) {
  const int lanes = 1 << lane_bits;
  const int half = head_dim / 2, all_heads = heads + 2 * kv_heads;
  const int head = (blockIdx.y * rows::kThreads + threadIdx.x) >> lane_bits;
  const int left = (threadIdx.x & (lanes - 1)) * kWidth, right = left + half;  // first elements of this lane
  const bool active = head < all_heads && left < half;
  const bool is_q = head < heads, is_v = head >= heads + kv_heads;
  const T* const norm = is_q ? q_norm : is_v ? nullptr : k_norm;
  const int width = all_heads * head_dim, first = head * head_dim;

  rows::Packed<kWidth> left_bias, right_bias, left_scale, right_scale;
  if (active) {
    left_bias = rows::load_or_zeros<kWidth>(bias, first + left);
    right_bias = rows::load_or_zeros<kWidth>(bias, first + right);
    left_scale = rows::load_or_zeros<kWidth>(norm, left);
    right_scale = rows::load_or_zeros<kWidth>(norm, right);
  }
  ptx::grid_dependency_wait();
  ptx::grid_launch_dependents();

  const int slot = __ldcg(slots + blockIdx.x), position = __ldcg(positions + blockIdx.x);
  float a[kWidth] = {}, b[kWidth] = {};
  if (active) {
    const T* const row = qkv + static_cast<long long>(blockIdx.x) * width + first;
    const auto left_bits = rows::load<kWidth>(row + left);
    const auto right_bits = rows::load<kWidth>(row + right);
    rows::unpack<T>(left_bits, a);
    rows::unpack<T>(right_bits, b);
    rows::add<T>(a, left_bias);
    rows::add<T>(b, right_bias);
  }
  if (slot < 0 || slot >= slot_count || position < 0 || position >= capacity) return;  // the whole block

  if (q_norm != nullptr) {  // then k_norm is given too. All lanes add, even those of v and those without elements
    float squares = 0.0f;
#pragma unroll
    for (int i = 0; i < kWidth; ++i) squares += a[i] * a[i] + b[i] * b[i];
    const float factor = 1.0f / sqrtf(rows::lane_sum(squares, lanes) / static_cast<float>(head_dim) + eps);
    if (norm != nullptr) {
      float left_factors[kWidth], right_factors[kWidth];
      rows::unpack<T>(left_scale, left_factors);
      rows::unpack<T>(right_scale, right_factors);
#pragma unroll
      for (int i = 0; i < kWidth; ++i) {
        a[i] *= factor * left_factors[i];
        b[i] *= factor * right_factors[i];
      }
    }
  }
  if (!active) return;
  if (rotation != nullptr && !is_v) {
    float turns[2 * kWidth];
    rows::load_floats(rotation + (static_cast<long long>(position) * half + left) * 2, turns);
#pragma unroll
    for (int i = 0; i < kWidth; ++i) {
      const float cos = turns[2 * i], sin = turns[2 * i + 1], x = a[i];
      a[i] = x * cos - b[i] * sin;
      b[i] = b[i] * cos + x * sin;
    }
  }

  T* to = q + (static_cast<long long>(blockIdx.x) * heads + head) * head_dim;
  if (!is_q) {
    const int kv_head = head - heads - (is_v ? kv_heads : 0);
    const long long place = (static_cast<long long>(slot) * kv_heads + kv_head) * capacity + position;
    to = (is_v ? values : keys) + place * head_dim;
  }
  rows::store(to + left, a);
  rows::store(to + right, b);
}

}  // namespace flashllm
