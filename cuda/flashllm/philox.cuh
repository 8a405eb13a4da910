// SPDX-License-Identifier: Apache-2.0
// Counter-based random numbers: Philox4x32-10 of Salmon, Moraes, Dror and Shaw, "Parallel random numbers: as easy as 1,
// 2, 3" (SC 2011). A number depends only on a key and on where it is used, so there is no state to keep and no order in
// which to draw. Host side: src/flashllm/engine/sampling.py.
#pragma once

#include "flashllm/portable.cuh"

namespace flashllm {
namespace philox {

constexpr int kRounds = 10;
constexpr unsigned kMultiplier0 = 0xd2511f53u, kMultiplier1 = 0xcd9e8d57u;
constexpr unsigned kKeyStep0 = 0x9e3779b9u, kKeyStep1 = 0xbb67ae85u;

// Four independent words for a counter of 128 bits and a key of 64.
FLASHLLM_DEVICE uint4 words(uint4 counter, uint2 key) {
#pragma unroll
    for (int round = 0; round < kRounds; ++round) {
        const unsigned long long product0 = static_cast<unsigned long long>(kMultiplier0) * counter.x;
        const unsigned long long product1 = static_cast<unsigned long long>(kMultiplier1) * counter.z;
        const unsigned high0 = static_cast<unsigned>(product0 >> 32), low0 = static_cast<unsigned>(product0);
        const unsigned high1 = static_cast<unsigned>(product1 >> 32), low1 = static_cast<unsigned>(product1);
        counter = make_uint4(high1 ^ counter.y ^ key.x, low1, high0 ^ counter.w ^ key.y, low0);
        key = make_uint2(key.x + kKeyStep0, key.y + kKeyStep1);
    }
    return counter;
}

}  // namespace philox
}  // namespace flashllm
