// SPDX-License-Identifier: Apache-2.0
// Kernel of the format in tests/coordinates.py: y[n, m] from the (row, column, value) of W, a thread for each m.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "flashllm/portable.cuh"

namespace coordinates {

__device__ inline float widen(__half value) { return __half2float(value); }
__device__ inline float widen(__nv_bfloat16 value) { return __bfloat162float(value); }
__device__ inline void narrow(__half& to, float value) { to = __float2half_rn(value); }
__device__ inline void narrow(__nv_bfloat16& to, float value) { to = __float2bfloat16_rn(value); }

template <typename T, int kRepeat>
__global__ void spmm(const T* x, const int* rows, const int* columns, const T* values, T* y, int count, int M, int K) {
    const int m = blockIdx.x * blockDim.x + threadIdx.x, n = blockIdx.y;
    if (m >= M) return;
    for (int turn = 0; turn < kRepeat; ++turn) {
        float sum = 0;
        for (int i = 0; i < count; ++i) {
            if (rows[i] == m) sum += widen(values[i]) * widen(x[n * K + columns[i]]);
        }
        narrow(y[n * M + m], sum);
    }
}

}  // namespace coordinates
