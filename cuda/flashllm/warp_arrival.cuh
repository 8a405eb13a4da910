// SPDX-License-Identifier: Apache-2.0
// A warp's arrival at a barrier in shared memory: what all its lanes have read and written is done for whoever waits.
#pragma once

#include "flashllm/portable.cuh"
#include "flashllm/ptx.cuh"

namespace flashllm {

// One lane arrives for all, after a barrier of the warp: arrivals of 32 lanes would be 32 turns of shared memory. But
// compute-sanitizer's racecheck takes an arrival for that of its own lane, and what the other 31 did for races; for it,
// all arrive.
#if defined(FLASHLLM_RACECHECK)
constexpr unsigned kWarpArrivals = 32;
#else
constexpr unsigned kWarpArrivals = 1;
#endif

FLASHLLM_DEVICE void warp_arrive(unsigned barrier) {
    __syncwarp();
    if (kWarpArrivals == 32 || ptx::elect()) ptx::mbarrier_arrive(barrier);
}

}  // namespace flashllm
