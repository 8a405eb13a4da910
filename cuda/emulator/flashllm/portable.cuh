// SPDX-License-Identifier: Apache-2.0
// Emulated twin of cuda/flashllm/portable.cuh.
#pragma once

#include "emu/cuda.hpp"

#define FLASHLLM_DYNAMIC_SHARED(name) unsigned char* const name = ::emu::self().block->shared
// A hint here: forced inlining only makes g++ slow.
#define FLASHLLM_DEVICE __device__ inline

namespace flashllm {

template <typename T>
FLASHLLM_DEVICE const T& load_coherent(const T* pointer) {
    emu::read_global(pointer, sizeof(T));
    return *pointer;
}

}  // namespace flashllm
