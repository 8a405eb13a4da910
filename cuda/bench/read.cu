// SPDX-License-Identifier: Apache-2.0
// Pure read bandwidth of device memory: the ceiling that every kernel here is compared with.
//
// Each thread reads 16 bytes at a time, kUnroll independent loads in flight, and folds them into an XOR. The XOR of
// the whole buffer is returned, so that no load can be dropped and the result can be checked.
namespace flashllm {

constexpr int kUnroll = 8;

__device__ __forceinline__ unsigned fold(const uint4& v) { return v.x ^ v.y ^ v.z ^ v.w; }

// Any grid, any block size. `checksum` must be zero before the launch.
__global__ void read_bandwidth(const uint4* __restrict__ data, long long vectors, unsigned* checksum) {
    const long long stride = static_cast<long long>(gridDim.x) * blockDim.x;
    long long i = static_cast<long long>(blockIdx.x) * blockDim.x + threadIdx.x;
    unsigned sum = 0;
    for (; i + (kUnroll - 1) * stride < vectors; i += kUnroll * stride) {
        uint4 v[kUnroll];
#pragma unroll
        for (int j = 0; j < kUnroll; ++j) v[j] = __ldcs(data + i + j * stride);
#pragma unroll
        for (int j = 0; j < kUnroll; ++j) sum ^= fold(v[j]);
    }
    for (; i < vectors; i += stride) sum ^= fold(__ldcs(data + i));
#pragma unroll
    for (int lane = 16; lane > 0; lane /= 2) sum ^= __shfl_xor_sync(0xffffffffu, sum, lane);
    if (threadIdx.x % 32 == 0) atomicXor(checksum, sum);
}

}  // namespace flashllm
