// SPDX-License-Identifier: Apache-2.0
// Embedding rows of tokens, plus those of positions where a model learns them, as the fp32 residual stream.
// Host side: src/flashllm/decoder/embed.py.
#include "flashllm/rows.cuh"

namespace flashllm {
namespace embed_rows {

// Adds row `index` of a table to the values, or makes them NaN where the table has no such row: a wrong token shows in
// the result, and nothing outside the table is read.
template <typename T, int kWidth>
FLASHLLM_DEVICE void add_row(float (&values)[kWidth], const T* table, int index, int size, int hidden, int column) {
  if (index >= 0 && index < size) {
    rows::add<T>(values, rows::load<kWidth>(table + static_cast<long long>(index) * hidden + column));
  } else {
#pragma unroll
    for (int i = 0; i < kWidth; ++i) values[i] = __int_as_float(0x7fffffff);
  }
}

}  // namespace embed_rows

// residual[row] = table[tokens[row]] + position_table[positions[row] + offset], the latter where there is one. Grid:
// rows, and blocks of kThreads x kWidth columns.
template <typename T, int kWidth>
__global__ void __launch_bounds__(rows::kThreads)
    embed(const int* tokens, const int* positions, const T* __restrict__ table, const T* __restrict__ position_table,
          int vocab, int position_rows, int offset, int hidden, float* residual) {
  const int column = (blockIdx.y * rows::kThreads + threadIdx.x) * kWidth;
  ptx::grid_dependency_wait();
  ptx::grid_launch_dependents();
  if (column >= hidden) return;

  float values[kWidth] = {};
  embed_rows::add_row<T>(values, table, __ldcg(tokens + blockIdx.x), vocab, hidden, column);
  if (position_table != nullptr) {
    const int position = __ldcg(positions + blockIdx.x) + offset;
    embed_rows::add_row<T>(values, position_table, position, position_rows, hidden, column);
  }
  rows::store_floats(residual + static_cast<long long>(blockIdx.x) * hidden + column, values);
}

}  // namespace flashllm
