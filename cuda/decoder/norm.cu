// SPDX-License-Identifier: Apache-2.0
// The end of one layer and the start of the next: the layer's result is added to the residual stream, which is then
// normalised. One block per row. Host side: src/flashllm/decoder/norm.py.
#include "flashllm/rows.cuh"

namespace flashllm {

constexpr int kLoads = 4;  // loads of a sum's parts that one thread has in flight together

// residual += y + y_bias (where given), then x = norm(residual) * weight (+ bias), for rows of `hidden` elements.
// kLayer: mean 0 and variance 1, otherwise (RMS) mean square 1. y is the sum of `parts` parts, `part_size`
// elements from one to the next, which are added in fp32 in their order. The row stays in registers: `hidden` is a
// multiple of 8 and at most kThreads x kVectors x 8.
template <typename T, bool kLayer, int kThreads, int kVectors>
__global__ void __launch_bounds__(kThreads)
    add_norm(float* residual, const T* y, int parts, long long part_size, const T* __restrict__ y_bias,
             const T* __restrict__ weight, const T* __restrict__ bias, int hidden, float eps, T* x) {
  using rows::kVector;
  using Packed = rows::Packed<kVector>;
  constexpr int kPartsAtOnce = kLoads / kVectors;
  static_assert(kLoads % kVectors == 0, "whole parts are under way");
  __shared__ float sums[2][rows::kLanes];
  const long long row = static_cast<long long>(blockIdx.x) * hidden;
  const auto column = [](int v) { return (v * kThreads + static_cast<int>(threadIdx.x)) * kVector; };

  // Weights and biases are loaded while the row is read and summed, so that nothing waits for them after the sums.
  Packed scale[kVectors], shift[kVectors], more[kVectors];
#pragma unroll
  for (int v = 0; v < kVectors; ++v) {
    if (column(v) < hidden) {
      scale[v] = rows::load<kVector>(weight + column(v));
      shift[v] = rows::load_or_zeros<kVector>(bias, column(v));
      more[v] = rows::load_or_zeros<kVector>(y_bias, column(v));
    }
  }
  ptx::grid_dependency_wait();
  ptx::grid_launch_dependents();

  float values[kVectors][kVector] = {};
#pragma unroll
  for (int v = 0; v < kVectors; ++v) {
    if (column(v) < hidden) rows::load_floats(residual + row + column(v), values[v]);
  }
  if (y != nullptr) {
    const auto add_part = [&](long long part) {
#pragma unroll
      for (int v = 0; v < kVectors; ++v) {
        if (column(v) < hidden) rows::add<T>(values[v], rows::load<kVector>(y + part * part_size + row + column(v)));
      }
    };
    add_part(0);  // outside the loop, for which a single part would have to wait
#pragma unroll kPartsAtOnce
    for (int part = 1; part < parts; ++part) add_part(part);
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
      if (column(v) < hidden) {
        rows::add<T>(values[v], more[v]);
        rows::store_floats(residual + row + column(v), values[v]);
      }
    }
  }

  const float share = 1.0f / static_cast<float>(hidden);
  if constexpr (kLayer) {
    float sum = 0.0f;
#pragma unroll
    for (int v = 0; v < kVectors; ++v)
#pragma unroll
      for (int i = 0; i < kVector; ++i) sum += values[v][i];
    const float mean = rows::block_sum<kThreads>(sum, sums[0]) * share;
#pragma unroll
    for (int v = 0; v < kVectors; ++v)
#pragma unroll
      for (int i = 0; i < kVector; ++i) values[v][i] = column(v) < hidden ? values[v][i] - mean : 0.0f;
  }
  float squares = 0.0f;
#pragma unroll
  for (int v = 0; v < kVectors; ++v)
#pragma unroll
    for (int i = 0; i < kVector; ++i) squares += values[v][i] * values[v][i];
  const float factor = 1.0f / sqrtf(rows::block_sum<kThreads>(squares, sums[1]) * share + eps);

#pragma unroll
  for (int v = 0; v < kVectors; ++v) {
    if (column(v) < hidden) {
      float factors[kVector];
      rows::unpack<T>(scale[v], factors);
#pragma unroll
      for (int i = 0; i < kVector; ++i) values[v][i] *= factor * factors[i];
      rows::add<T>(values[v], shift[v]);
      rows::store(x + row + column(v), values[v]);
    }
  }
}

// The same for rows of any length: element by element, and the residual is read again from memory after each sum.
template <typename T, bool kLayer, int kThreads>
__global__ void __launch_bounds__(kThreads)
    add_norm_any(float* residual, const T* y, int parts, long long part_size, const T* __restrict__ y_bias,
                 const T* __restrict__ weight, const T* __restrict__ bias, int hidden, float eps, T* x) {
  __shared__ float sums[2][rows::kLanes];
  const long long row = static_cast<long long>(blockIdx.x) * hidden;
  const auto element = [](const T* array, long long at) {
    float value[1];
    rows::unpack<T>(rows::load_or_zeros<1>(array, at), value);
    return value[0];
  };
  ptx::grid_dependency_wait();
  ptx::grid_launch_dependents();

  // Each thread reads what it wrote itself.
  if (y != nullptr) {
    for (int c = threadIdx.x; c < hidden; c += kThreads) {
      float value = residual[row + c];
      for (int part = 0; part < parts; ++part) value += element(y, part * part_size + row + c);
      residual[row + c] = value + element(y_bias, c);
    }
  }
  const float share = 1.0f / static_cast<float>(hidden);
  float mean = 0.0f;
  if constexpr (kLayer) {
    float sum = 0.0f;
    for (int c = threadIdx.x; c < hidden; c += kThreads) sum += residual[row + c];
    mean = rows::block_sum<kThreads>(sum, sums[0]) * share;
  }
  float squares = 0.0f;
  for (int c = threadIdx.x; c < hidden; c += kThreads) {
    const float value = residual[row + c] - mean;
    squares += value * value;
  }
  const float factor = 1.0f / sqrtf(rows::block_sum<kThreads>(squares, sums[1]) * share + eps);
  for (int c = threadIdx.x; c < hidden; c += kThreads) {
    const float value[1] = {(residual[row + c] - mean) * (factor * element(weight, c)) + element(bias, c)};
    rows::store(x + row + c, value);
  }
}

}  // namespace flashllm
