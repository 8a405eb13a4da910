// SPDX-License-Identifier: Apache-2.0
// Shared by kernels whose scores, the accumulators of one mma, become operands of the next without leaving their lanes.
#pragma once

#include "flashllm/rows.cuh"

namespace flashllm {
namespace quads {

constexpr int kQuadLanes = 4;  // lanes that share a row of a fragment

// Two neighbouring elements of an operand, each rounded once.
template <typename T>
FLASHLLM_DEVICE unsigned pack(float low, float high) {
  return rows::narrow<T>(low) | rows::narrow<T>(high) << 16;
}

}  // namespace quads
}  // namespace flashllm
