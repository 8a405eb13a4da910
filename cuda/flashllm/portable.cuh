// SPDX-License-Identifier: Apache-2.0
// Macros and functions that a GPU build and a host emulation of the same source define differently.
#pragma once

#if defined(__CUDACC_RTC__) || defined(__CUDACC__)
// One untyped dynamic shared-memory array per kernel; 1024-byte alignment is what a 128-byte-swizzled tensor-core
// operand requires of its base address.
#define FLASHLLM_DYNAMIC_SHARED(name) extern __shared__ __align__(1024) unsigned char name[]
#endif

#define FLASHLLM_DEVICE __device__ __forceinline__

namespace flashllm {

// Loads what the previous launch may have written. Not by __ldg, whose cache is only for data that nobody writes.
template <typename T>
FLASHLLM_DEVICE const T& load_coherent(const T* pointer) {
    return *pointer;
}

}  // namespace flashllm
