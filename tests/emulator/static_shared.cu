// SPDX-License-Identifier: Apache-2.0
// A few bytes of static shared memory, which blocks that run at one time on the CPU must not share.
#include "flashllm/portable.cuh"

namespace static_shared {

// y[b] = b, 128 times for each block b.
__global__ void stamp(int* y) {
    __shared__ int number;
    if (threadIdx.x == 0) number = static_cast<int>(blockIdx.x);
    __syncthreads();
    y[blockIdx.x * 128 + threadIdx.x] = number;
}

}  // namespace static_shared
