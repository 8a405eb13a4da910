// SPDX-License-Identifier: Apache-2.0
// Softmax over scores that come bit by bit (Milakov and Gimelshein, 2018), in base 2: whoever makes the scores
// multiplies them by log2(e), so that a weight is one exp2.
#pragma once

#include "flashllm/portable.cuh"

namespace flashllm {
namespace softmax {

// The score of a position that does not count, and the maximum of no scores. Finite, so that differences are no NaN: as
// long as nothing counts, such positions have weight 1, and the first score that does makes all of that 0.
constexpr float kNothing = -1e30f;

// Of the scores so far: the largest, and the sum of the weights, which are relative to it.
struct Running {
  float maximum = kNothing;
  float total = 0.0f;

  // Lets `score` be among those that the maximum is of; returns by what sums of weighted values are to be multiplied.
  FLASHLLM_DEVICE float raise(float score) {
    const float larger = fmaxf(maximum, score);
    const float factor = exp2f(maximum - larger);
    maximum = larger;
    total *= factor;
    return factor;
  }

  FLASHLLM_DEVICE float weight(float score) const { return exp2f(score - maximum); }
};

}  // namespace softmax
}  // namespace flashllm
