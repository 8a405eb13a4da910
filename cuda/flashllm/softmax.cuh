// SPDX-License-Identifier: Apache-2.0
// Online softmax over scores that come a few at a time (Milakov and Gimelshein, 2018), in base 2: the code that
// computes the scores multiplies them by log2(e), so that a weight is one exp2.
#pragma once

#include "flashllm/portable.cuh"

namespace flashllm {
namespace softmax {

// The score of a masked position, and the maximum of no scores. Finite, so that differences are never NaN: until a real
// score comes, masked positions have weight 1, and the first real score scales all of that to 0.
constexpr float kNothing = -1e30f;

// The largest of the scores so far, and the sum of their weights relative to it.
struct Running {
  float maximum = kNothing;
  float total = 0.0f;

  // Includes `score` in the maximum; returns the factor by which to multiply sums of weighted values.
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
