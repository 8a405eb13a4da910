// SPDX-License-Identifier: Apache-2.0
// What the kernels on rows of a decoder share: 16-bit elements in whole loads and stores, and sums over a block.
//
// A thread computes in fp32 with kWidth neighbouring elements: 8 fill a load of 16 bytes, 4 one of 8 bytes, and 1 is
// for rows of odd lengths, where no row but the first need be aligned. Weights and biases come ahead of the wait for
// the launch before (ptx::grid_dependency_wait), everything else behind it. Host side: src/flashllm/decoder/rows.py.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "flashllm/portable.cuh"
#include "flashllm/ptx.cuh"

namespace flashllm {
namespace rows {

constexpr int kVector = 8;     // elements of a load of 16 bytes
constexpr int kThreads = 128;  // of a block that needs no sum over a row
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

// kWidth elements as they lie in memory, in registers.
template <int kWidth>
struct Packed {
    static_assert(kWidth == 4 || kWidth == kVector, "loads have 2, 8 or 16 bytes");
    unsigned words[kWidth / 2] = {};
};
template <>
struct Packed<1> {
    unsigned words[1] = {};
};

// Past the L1: what the launch before wrote, or what a block reads once.
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

// The same, but zeros where there is no array.
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

// fp32 in 16-byte loads, through the L1: a sector of 32 bytes comes in two of them.
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

// The sum over groups of `lanes` lanes, a power of two, in each of them; all lanes of the warp take part.
FLASHLLM_DEVICE float lane_sum(float value, int lanes = kLanes) {
    for (int step = lanes / 2; step > 0; step /= 2) value += __shfl_xor_sync(kFullWarp, value, step);
    return value;
}

// The sum over the block in each thread, in an order that is always the same. `scratch` has a float for each warp, and
// is another one than that of the sum before, which some threads may still read.
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
