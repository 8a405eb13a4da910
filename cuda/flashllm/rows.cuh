// SPDX-License-Identifier: Apache-2.0
// Shared by the decoder's kernels on rows: vectorized loads and stores of 16-bit elements, and sums over a block.
//
// A thread computes in fp32 on kWidth neighbouring elements: 8 fill a 16-byte load, 4 an 8-byte load, and 1 is for rows
// of odd length, where only the first row is sure to be aligned. Weights and biases are loaded before the wait for the
// previous launch (ptx::grid_dependency_wait), everything else after it. Host side: src/flashllm/decoder/rows.py.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "flashllm/portable.cuh"
#include "flashllm/ptx.cuh"

namespace flashllm {
namespace rows {

constexpr int kVector = 8;     // elements of a 16-byte load
constexpr int kThreads = 128;  // threads of a block that computes no sum over a row
constexpr int kLanes = 32;
constexpr unsigned kFullWarp = 0xffffffffu;

template <typename T>
FLASHLLM_DEVICE float widen(unsigned bits) {
    const unsigned short half = static_cast<unsigned short>(bits);
    if constexpr (ptx::is_half<T>) return __half2float(__ushort_as_half(half));
    else return __bfloat162float(__ushort_as_bfloat16(half));
}

template <typename T>
FLASHLLM_DEVICE unsigned narrow(float value) {
    if constexpr (ptx::is_half<T>) return __half_as_ushort(__float2half_rn(value));
    else return __bfloat16_as_ushort(__float2bfloat16_rn(value));
}

// kWidth elements in registers, packed as they are in memory.
template <int kWidth>
struct Packed {
    static_assert(kWidth == 4 || kWidth == kVector, "loads have 2, 8 or 16 bytes");
    unsigned words[kWidth / 2] = {};
};
template <>
struct Packed<1> {
    unsigned words[1] = {};
};

// Bypasses the L1: for what the previous launch wrote, or what a block reads only once.
template <int kWidth, typename T>
FLASHLLM_DEVICE Packed<kWidth> load(const T* from) {
    Packed<kWidth> packed;
    if constexpr (kWidth == kVector) {
        const uint4 all = __ldcg(reinterpret_cast<const uint4*>(from));
        packed.words[0] = all.x, packed.words[1] = all.y, packed.words[2] = all.z, packed.words[3] = all.w;
    } else if constexpr (kWidth == 4) {
        const uint2 all = __ldcg(reinterpret_cast<const uint2*>(from));
        packed.words[0] = all.x, packed.words[1] = all.y;
    } else {
        packed.words[0] = __ldcg(reinterpret_cast<const unsigned short*>(from));
    }
    return packed;
}

// The same, but returns zeros if `array` is null.
template <int kWidth, typename T>
FLASHLLM_DEVICE Packed<kWidth> load_or_zeros(const T* array, long long offset) {
    return array == nullptr ? Packed<kWidth>{} : load<kWidth>(array + offset);
}

template <typename T, int kWidth>
FLASHLLM_DEVICE void unpack(const Packed<kWidth>& packed, float (&values)[kWidth]) {
#pragma unroll
    for (int i = 0; i < kWidth; ++i) values[i] = widen<T>(packed.words[i / 2] >> 16 * (i % 2));
}

template <typename T, int kWidth>
FLASHLLM_DEVICE void add(float (&values)[kWidth], const Packed<kWidth>& packed) {
#pragma unroll
    for (int i = 0; i < kWidth; ++i) values[i] += widen<T>(packed.words[i / 2] >> 16 * (i % 2));
}

// Rounds each value once.
template <typename T, int kWidth>
FLASHLLM_DEVICE void store(T* to, const float (&values)[kWidth]) {
    unsigned words[(kWidth + 1) / 2] = {};
#pragma unroll
    for (int i = 0; i < kWidth; ++i) words[i / 2] |= narrow<T>(values[i]) << 16 * (i % 2);
    if constexpr (kWidth == kVector) {
        __stcg(reinterpret_cast<uint4*>(to), make_uint4(words[0], words[1], words[2], words[3]));
    } else if constexpr (kWidth == 4) {
        __stcg(reinterpret_cast<uint2*>(to), make_uint2(words[0], words[1]));
    } else {
        __stcg(reinterpret_cast<unsigned short*>(to), static_cast<unsigned short>(words[0]));
    }
}

// Loads fp32 values 16 bytes at a time, through the L1 because a 32-byte sector takes two such loads.
template <int kWidth>
FLASHLLM_DEVICE void load_floats(const float* from, float (&values)[kWidth]) {
    if constexpr (kWidth % 4 == 0) {
#pragma unroll
        for (int i = 0; i < kWidth; i += 4) {
            const float4 four = __ldca(reinterpret_cast<const float4*>(from + i));
            values[i] = four.x, values[i + 1] = four.y, values[i + 2] = four.z, values[i + 3] = four.w;
        }
    } else {
#pragma unroll
        for (int i = 0; i < kWidth; ++i) values[i] = __ldca(from + i);
    }
}

template <int kWidth>
FLASHLLM_DEVICE void store_floats(float* to, const float (&values)[kWidth]) {
    if constexpr (kWidth % 4 == 0) {
#pragma unroll
        for (int i = 0; i < kWidth; i += 4) {
            __stcg(reinterpret_cast<float4*>(to + i),
                   make_float4(values[i], values[i + 1], values[i + 2], values[i + 3]));
        }
    } else {
#pragma unroll
        for (int i = 0; i < kWidth; ++i) __stcg(to + i, values[i]);
    }
}

// Returns to each lane the sum over its group of `lanes` lanes, a power of two; all lanes of the warp take part.
FLASHLLM_DEVICE float lane_sum(float value, int lanes = kLanes) {
    for (int step = lanes / 2; step > 0; step /= 2) value += __shfl_xor_sync(kFullWarp, value, step);
    return value;
}

// Returns to each thread the sum over the block, always added in the same order. `scratch` has a float for each warp
// and must not be that of the previous sum, which some threads may still be reading.
template <int kThreads>
FLASHLLM_DEVICE float block_sum(float value, float* scratch) {
    constexpr int kWarps = kThreads / kLanes;
    static_assert(kThreads % kLanes == 0 && kWarps <= kLanes, "one warp adds the sums of all");
    const int warp = threadIdx.x / kLanes, lane = threadIdx.x % kLanes;
    value = lane_sum(value);
    if (lane == 0) scratch[warp] = value;
    __syncthreads();
    return lane_sum(lane < kWarps ? scratch[lane] : 0.0f);
}

}  // namespace rows
}  // namespace flashllm
