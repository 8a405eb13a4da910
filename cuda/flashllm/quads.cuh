// SPDX-License-Identifier: Apache-2.0
// What kernels share whose scores, accumulators of one mma, are as they are the operands of the next.
#pragma once

#include "flashllm/rows.cuh"

namespace flashllm {
namespace quads {

constexpr int kQuadLanes = 4;  // lanes with one row of a fragment

// Two neighbouring elements of an operand, each rounded once.
template <typename T>
FLASHLLM_DEVICE unsigned pack(float low, float high) {
  return rows::narrow<T>(low) | rows::narrow<T>(high) << 16;
}

}  // namespace quads
}  // namespace flashllm
