// SPDX-License-Identifier: Apache-2.0
// Reproducible sparse test matrices, made where they are used. Every element is a pure function of
// (seed, row, column), so the host twin in src/flashllm/bench/data.py gives the same bytes.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

namespace flashllm {

// Which elements share one keep-or-drop decision.
constexpr int kPerElement = 0;
constexpr int kPerColumn = 1;
constexpr int kPerBlock = 2;
constexpr int kBlock = 32;  // edge of a square block of kPerBlock

// splitmix64's finaliser: 64 well mixed bits of any 64-bit number.
__device__ __forceinline__ unsigned long long mix(unsigned long long z) {
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ull;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebull;
    return z ^ (z >> 31);
}

__device__ __forceinline__ void store(__half* out, float value) { *out = __float2half_rn(value); }
__device__ __forceinline__ void store(__nv_bfloat16* out, float value) { *out = __float2bfloat16_rn(value); }

// out[rows, columns], row-major. An element is kept when 32 random bits are below threshold[row] (0 .. 2^32).
// A kept value is scale times the odd integer 2 (u0 + u1 + u2 + u3) - 4 * 65535 + 1, u = 16 random bits each:
// bell-shaped, zero mean, never zero before rounding, and exact in fp32 before the one multiplication.
template <typename T>
__global__ void random_matrix(T* out, long long rows, long long columns, const unsigned long long* threshold,
                              unsigned long long seed, int sharing, float scale) {
    const unsigned long long key = mix(seed + 0x9e3779b97f4a7c15ull);
    const long long count = rows * columns;
    const long long stride = static_cast<long long>(gridDim.x) * blockDim.x;
    for (long long i = static_cast<long long>(blockIdx.x) * blockDim.x + threadIdx.x; i < count; i += stride) {
        const long long row = i / columns, column = i - row * columns;
        long long group = i;
        if (sharing == kPerColumn) group = column;
        if (sharing == kPerBlock) group = row / kBlock * ((columns + kBlock - 1) / kBlock) + column / kBlock;
        const unsigned long long keep = mix(key ^ mix(static_cast<unsigned long long>(group) * 2)) >> 32;
        const unsigned long long bits = mix(key ^ mix(static_cast<unsigned long long>(i) * 2 + 1));
        const int sum = static_cast<int>(bits & 0xffff) + static_cast<int>(bits >> 16 & 0xffff) +
                        static_cast<int>(bits >> 32 & 0xffff) + static_cast<int>(bits >> 48);
        store(out + i, keep < threshold[row] ? static_cast<float>(2 * sum - 4 * 65535 + 1) * scale : 0.0f);
    }
}

}  // namespace flashllm
