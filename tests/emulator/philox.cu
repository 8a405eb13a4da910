// SPDX-License-Identifier: Apache-2.0
// Words of Philox into a plain array, one call a thread.
#include "flashllm/philox.cuh"

// counters and words [blockDim, 4], keys [blockDim, 2].
__global__ void philox_words(const unsigned* counters, const unsigned* keys, unsigned* words) {
    const unsigned* const counter = counters + threadIdx.x * 4;
    const unsigned* const key = keys + threadIdx.x * 2;
    const uint4 four = flashllm::philox::words(make_uint4(counter[0], counter[1], counter[2], counter[3]),
                                               make_uint2(key[0], key[1]));
    unsigned* const to = words + threadIdx.x * 4;
    to[0] = four.x, to[1] = four.y, to[2] = four.z, to[3] = four.w;
}
