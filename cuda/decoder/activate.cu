// SPDX-License-Identifier: Apache-2.0
// Activations of the feed-forward layer, after adding the biases of the preceding product.
// Host side: src/flashllm/decoder/activate.py.
//
// Grids: rows, and blocks of kThreads x kWidth columns of x.
#include "flashllm/rows.cuh"

namespace flashllm {
namespace activation {

// value / (1 + exp(-value)): exp is never taken of a positive number, so it cannot overflow and small
// results keep their digits.
FLASHLLM_DEVICE float silu(float value) {
  const float small = expf(-fabsf(value));
  return value * (value < 0.0f ? small : 1.0f) / (1.0f + small);
}

}  // namespace activation

// x = max(y + bias, 0), [rows, columns] each; x may be y. A NaN stays a NaN.
template <typename T, int kWidth>
__global__ void __launch_bounds__(rows::kThreads)
    relu(const T* y, const T* __restrict__ bias, int columns, T* x) {
  const int column = (blockIdx.y * rows::kThreads + threadIdx.x) * kWidth;
  rows::Packed<kWidth> shift;
  if (column < columns) shift = rows::load_or_zeros<kWidth>(bias, column);
  ptx::grid_dependency_wait();
  ptx::grid_launch_dependents();
  if (column >= columns) return;

  const long long at = static_cast<long long>(blockIdx.x) * columns + column;
  float values[kWidth];
  rows::unpack<T>(rows::load<kWidth>(y + at), values);
  rows::add<T>(values, shift);
#pragma unroll
  for (int i = 0; i < kWidth; ++i) values[i] = values[i] < 0.0f ? 0.0f : values[i];
  rows::store(x + at, values);
}

// x [rows, columns] = silu(gate) * up. A row of y + bias [rows, 2 columns] is gate and then up.
template <typename T, int kWidth>
__global__ void __launch_bounds__(rows::kThreads)
    silu_mul(const T* y, const T* __restrict__ bias, int columns, T* x) {
  const int column = (blockIdx.y * rows::kThreads + threadIdx.x) * kWidth;
  rows::Packed<kWidth> gate_shift, up_shift;
  if (column < columns) {
    gate_shift = rows::load_or_zeros<kWidth>(bias, column);
    up_shift = rows::load_or_zeros<kWidth>(bias, columns + column);
  }
  ptx::grid_dependency_wait();
  ptx::grid_launch_dependents();
  if (column >= columns) return;

  const T* const row = y + static_cast<long long>(blockIdx.x) * columns * 2;
  const auto gate_bits = rows::load<kWidth>(row + column);
  const auto up_bits = rows::load<kWidth>(row + columns + column);
  float gate[kWidth], up[kWidth];
  rows::unpack<T>(gate_bits, gate);
  rows::unpack<T>(up_bits, up);
  rows::add<T>(gate, gate_shift);
  rows::add<T>(up, up_shift);
#pragma unroll
  for (int i = 0; i < kWidth; ++i) gate[i] = activation::silu(gate[i]) * up[i];
  rows::store(x + static_cast<long long>(blockIdx.x) * columns + column, gate);
}

}  // namespace flashllm
