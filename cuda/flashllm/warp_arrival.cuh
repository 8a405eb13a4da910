// SPDX-License-Identifier: Apache-2.0
// A warp's arrival at a barrier in shared memory: what its lanes have read and written is complete for all that wait.
#pragma once

#include "flashllm/portable.cuh"
#include "flashllm/ptx.cuh"

namespace flashllm {

// One lane arrives for all, after a __syncwarp: 32 arrivals would take 32 turns of shared memory. But
// compute-sanitizer's racecheck attributes an arrival to its own lane only and reports what the other 31 lanes did as
// races, so for it all lanes arrive.
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
