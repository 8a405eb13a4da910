// SPDX-License-Identifier: Apache-2.0
// CUDA C++ without headers, as NVRTC understands it: keywords, built-in variables and functions.
#pragma once

#include <cmath>  // expf, sqrtf and the like, which CUDA has without a header
#include <type_traits>

#include "emu/runtime.hpp"

#define __global__
#define __device__
#define __host__
#define __constant__
#define __forceinline__ inline
#define __align__(n) __attribute__((aligned(n)))
#define __launch_bounds__(...)
// One copy per worker, so the blocks of a kernel that has any run one at a time on their worker.
#define __shared__ static thread_local

#define threadIdx (::emu::self().index)
#define blockIdx (::emu::self().block->index)
#define blockDim (::emu::self().block->block_dim)
#define gridDim (::emu::self().block->grid_dim)
constexpr int warpSize = 32;

// ---- meetings ----------------------------------------------------------------------------------------------------

inline void __syncthreads() { emu::block_barrier(emu::Reduce::none, 0); }
inline int __syncthreads_or(int value) { return emu::block_barrier(emu::Reduce::any, value); }
inline int __syncthreads_and(int value) { return emu::block_barrier(emu::Reduce::all, value); }
inline int __syncthreads_count(int value) { return emu::block_barrier(emu::Reduce::count, value); }
inline void __syncwarp(unsigned mask = 0xffffffffu) { emu::warp_barrier(mask); }

namespace emu {
template <typename T>
T shuffle_value(Shuffle kind, unsigned mask, T value, unsigned parameter, int width) {
    static_assert(std::is_trivially_copyable_v<T> && (sizeof(T) == 4 || sizeof(T) == 8));
    std::uint64_t bits = 0;
    std::memcpy(&bits, &value, sizeof(T));
    bits = shuffle(kind, mask, bits, parameter, static_cast<unsigned>(width));
    std::memcpy(&value, &bits, sizeof(T));
    return value;
}
}  // namespace emu

template <typename T>
T __shfl_sync(unsigned mask, T value, int lane, int width = 32) {
    return emu::shuffle_value(emu::Shuffle::index, mask, value, static_cast<unsigned>(lane), width);
}
template <typename T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32) {
    return emu::shuffle_value(emu::Shuffle::up, mask, value, delta, width);
}
template <typename T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32) {
    return emu::shuffle_value(emu::Shuffle::down, mask, value, delta, width);
}
template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int lanes, int width = 32) {
    return emu::shuffle_value(emu::Shuffle::exchange, mask, value, static_cast<unsigned>(lanes), width);
}
inline unsigned __ballot_sync(unsigned mask, int value) { return emu::ballot(mask, value != 0); }
inline int __any_sync(unsigned mask, int value) { return emu::ballot(mask, value != 0) != 0; }
inline int __all_sync(unsigned mask, int value) { return emu::ballot(mask, value == 0) == 0; }
inline unsigned __activemask() { return emu::live_lanes(); }

// ---- memory ----------------------------------------------------------------------------------------------------

template <typename T>
T __ldg(const T* pointer) {
    emu::read_global(pointer, sizeof(T));
    return *pointer;
}
template <typename T>
T __ldcg(const T* pointer) { return __ldg(pointer); }
template <typename T>
T __ldca(const T* pointer) { return __ldg(pointer); }
template <typename T>
T __ldcs(const T* pointer) { return __ldg(pointer); }
template <typename T>
void __stcg(T* pointer, const std::common_type_t<T>& value) {
    emu::write_global(pointer, sizeof(T));
    *pointer = value;
}
template <typename T>
void __stcs(T* pointer, const std::common_type_t<T>& value) { __stcg(pointer, value); }

inline void __threadfence() { __atomic_thread_fence(__ATOMIC_SEQ_CST); }
inline void __threadfence_block() { __atomic_thread_fence(__ATOMIC_SEQ_CST); }
inline void __threadfence_system() { __atomic_thread_fence(__ATOMIC_SEQ_CST); }

#define FLASHLLM_ATOMIC(name, builtin)                                                                    \
    template <typename T>                                                                                 \
    T name(T* pointer, std::common_type_t<T> value) { return builtin(pointer, value, __ATOMIC_SEQ_CST); }
FLASHLLM_ATOMIC(atomicSub, __atomic_fetch_sub)
FLASHLLM_ATOMIC(atomicAnd, __atomic_fetch_and)
FLASHLLM_ATOMIC(atomicOr, __atomic_fetch_or)
FLASHLLM_ATOMIC(atomicXor, __atomic_fetch_xor)
FLASHLLM_ATOMIC(atomicExch, __atomic_exchange_n)
#undef FLASHLLM_ATOMIC
template <typename T>
T atomicCAS(T* pointer, std::common_type_t<T> expected, std::common_type_t<T> value) {
    __atomic_compare_exchange_n(pointer, &expected, value, false, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST);
    return expected;
}
namespace emu {
template <typename T, typename Change>
T atomic_change(T* pointer, Change change) {
    T old, wanted;
    __atomic_load(pointer, &old, __ATOMIC_SEQ_CST);
    do wanted = change(old);
    while (!__atomic_compare_exchange(pointer, &old, &wanted, false, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST));
    return old;
}
}  // namespace emu
template <typename T>
T atomicAdd(T* pointer, std::common_type_t<T> value) {
    return emu::atomic_change(pointer, [=](T old) { return static_cast<T>(old + value); });
}
template <typename T>
T atomicMax(T* pointer, std::common_type_t<T> value) {
    return emu::atomic_change(pointer, [=](T old) { return old < value ? value : old; });
}
template <typename T>
T atomicMin(T* pointer, std::common_type_t<T> value) {
    return emu::atomic_change(pointer, [=](T old) { return value < old ? value : old; });
}

// ---- arithmetic ------------------------------------------------------------------------------------------------

template <typename A, typename B>
constexpr std::common_type_t<A, B> min(A a, B b) {
    using T = std::common_type_t<A, B>;
    return static_cast<T>(b) < static_cast<T>(a) ? static_cast<T>(b) : static_cast<T>(a);
}
template <typename A, typename B>
constexpr std::common_type_t<A, B> max(A a, B b) {
    using T = std::common_type_t<A, B>;
    return static_cast<T>(a) < static_cast<T>(b) ? static_cast<T>(b) : static_cast<T>(a);
}

namespace emu {
template <typename To, typename From>
To bit_cast(const From& from) {
    static_assert(sizeof(To) == sizeof(From));
    To to;
    std::memcpy(&to, &from, sizeof(To));
    return to;
}
}  // namespace emu
inline unsigned __float_as_uint(float value) { return emu::bit_cast<unsigned>(value); }
inline int __float_as_int(float value) { return emu::bit_cast<int>(value); }
inline float __uint_as_float(unsigned bits) { return emu::bit_cast<float>(bits); }
inline float __int_as_float(int bits) { return emu::bit_cast<float>(bits); }
inline int __popc(unsigned bits) { return __builtin_popcount(bits); }
inline int __popcll(unsigned long long bits) { return __builtin_popcountll(bits); }
inline int __clz(int bits) { return bits == 0 ? 32 : __builtin_clz(static_cast<unsigned>(bits)); }
inline int __ffs(int bits) { return __builtin_ffs(bits); }
inline unsigned __byte_perm(unsigned low, unsigned high, unsigned selector) {
    const std::uint64_t bytes = static_cast<std::uint64_t>(high) << 32 | low;
    unsigned result = 0;
    for (int i = 0; i < 4; ++i) {
        result |= static_cast<unsigned>(bytes >> (selector >> 4 * i & 7u) * 8 & 0xffu) << 8 * i;
    }
    return result;
}
inline unsigned __funnelshift_r(unsigned low, unsigned high, unsigned shift) {
    return static_cast<unsigned>((static_cast<std::uint64_t>(high) << 32 | low) >> (shift & 31u));
}
inline unsigned __funnelshift_l(unsigned low, unsigned high, unsigned shift) {
    return static_cast<unsigned>((static_cast<std::uint64_t>(high) << 32 | low) << (shift & 31u) >> 32);
}
