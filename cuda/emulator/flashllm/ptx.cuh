// SPDX-License-Identifier: Apache-2.0
// Emulated twin of cuda/flashllm/ptx.cuh: the same functions, with what each instruction does in C++.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "flashllm/portable.cuh"

namespace flashllm::ptx {

FLASHLLM_DEVICE unsigned shared_address(const void* pointer) { return emu::shared_address(pointer); }

FLASHLLM_DEVICE int opaque(int value) { return value; }

FLASHLLM_DEVICE int uniform(int value) { return __shfl_sync(0xffffffffu, value, 0); }

// Orders no memory, so it is no barrier here.
FLASHLLM_DEVICE bool elect() { return (threadIdx.x & 31) == 0; }

// ---- bytes in registers ----------------------------------------------------------------------------------------

FLASHLLM_DEVICE unsigned dot4(unsigned a, unsigned b, unsigned sum) {
    for (int i = 0; i < 32; i += 8) sum += (a >> i & 0xffu) * (b >> i & 0xffu);
    return sum;
}

FLASHLLM_DEVICE unsigned permute(unsigned low, unsigned high, unsigned selector) {
    unsigned bytes = __byte_perm(low, high, selector);
    for (int i = 0; i < 4; ++i) {
        if ((selector >> 4 * i & 8u) == 0) continue;
        const unsigned byte = 0xffu << 8 * i;
        bytes = (bytes >> 8 * i & 0x80u) != 0 ? bytes | byte : bytes & ~byte;
    }
    return bytes;
}

FLASHLLM_DEVICE float not_plus_zero(float value) { return __float_as_uint(value) == 0 ? -0.0f : value; }

// ---- shared memory ---------------------------------------------------------------------------------------------

template <bool kZero, int kOffset>
FLASHLLM_DEVICE void scatter_low_half(unsigned word, unsigned base) {
    const unsigned address = (word & 0xffffu) * 0u + (word >> 16) * 2u + base;  // dp2a with weights 0 and 2
    emu::scatter_shared(address + kOffset, kZero ? 0 : static_cast<unsigned short>(word));
}

FLASHLLM_DEVICE unsigned load_shared_half(unsigned address) { return emu::load_shared<unsigned short>(address); }
FLASHLLM_DEVICE unsigned load_shared4(unsigned address) { return emu::load_shared<unsigned>(address); }
FLASHLLM_DEVICE uint2 load_shared8(unsigned address) { return emu::load_shared<uint2>(address); }
FLASHLLM_DEVICE uint4 load_shared(unsigned address) { return emu::load_shared<uint4>(address); }

FLASHLLM_DEVICE void store_shared_zero16(unsigned address) { emu::store_shared16(address, make_uint4(0, 0, 0, 0)); }

FLASHLLM_DEVICE void store_shared(unsigned address, uint4 value) { emu::store_shared16(address, value); }
FLASHLLM_DEVICE void store_shared(unsigned address, unsigned value) { emu::store_shared4(address, value); }

// ---- global memory ---------------------------------------------------------------------------------------------

FLASHLLM_DEVICE unsigned long long evict_first() { return 0; }

FLASHLLM_DEVICE uint4 load_streaming(const uint4* pointer) { return __ldg(pointer); }

FLASHLLM_DEVICE void prefetch_to_l2([[maybe_unused]] bool active, [[maybe_unused]] const void* pointer,
                                    [[maybe_unused]] unsigned bytes) {
#if __CUDA_ARCH__ >= 900
    if (active) emu::prefetch_global(pointer, bytes);
#endif
}

FLASHLLM_DEVICE float4 load_relaxed(const float4* pointer) { return emu::load_relaxed(pointer); }
// Whoever sees the value may act on it before this block does anything more.
FLASHLLM_DEVICE void store_relaxed(float4* pointer, const float4& value) {
    emu::store_relaxed(pointer, value);
    emu::sometimes_let_others_run();
}
FLASHLLM_DEVICE void look_again() { emu::look_again(); }

FLASHLLM_DEVICE bool has_reached(const unsigned* pointer, unsigned value) { return emu::read_word(pointer) == value; }
FLASHLLM_DEVICE void fence_async_proxy_global() {}

// ---- the launch before and the one after (sm_90) ---------------------------------------------------------------

FLASHLLM_DEVICE void grid_dependency_wait() { emu::grid_dependency_wait(); }
FLASHLLM_DEVICE void grid_launch_dependents() {}

// ---- asynchronous copies (sm_80) -------------------------------------------------------------------------------

FLASHLLM_DEVICE void copy_async16(bool active, unsigned address, const void* pointer, unsigned bytes) {
    if (active) emu::copy_async16(address, pointer, bytes);
}

FLASHLLM_DEVICE void copy_async_commit() { emu::copy_async_commit(); }

template <int kPending>
FLASHLLM_DEVICE void copy_async_wait() {
    emu::copy_async_wait(kPending);
}

template <int kThreads>
FLASHLLM_DEVICE void meet(int barrier) {
    emu::named_barrier(static_cast<unsigned>(barrier), kThreads);
}

template <int kRegisters>
FLASHLLM_DEVICE void give_registers() {}
template <int kRegisters>
FLASHLLM_DEVICE void take_registers() {}

// ---- barriers in shared memory (sm_80), bulk copies (sm_90) ----------------------------------------------------

FLASHLLM_DEVICE void mbarrier_init(unsigned address, unsigned arrivals) { emu::mbarrier_init(address, arrivals); }
FLASHLLM_DEVICE void mbarrier_init_fence() {}
FLASHLLM_DEVICE void mbarrier_arrive_after_copies(unsigned address) { emu::mbarrier_arrive_after_copies(address); }
FLASHLLM_DEVICE void mbarrier_arrive(unsigned address) {
    emu::mbarrier_arrive(address);
    emu::sometimes_let_others_run();  // whoever waited for it may act before this warp's other lanes do anything
}
FLASHLLM_DEVICE void mbarrier_expect(unsigned address, unsigned bytes) { emu::mbarrier_expect(address, bytes); }
FLASHLLM_DEVICE void mbarrier_wait(unsigned address, unsigned parity) { emu::mbarrier_wait(address, parity); }
FLASHLLM_DEVICE void bulk_copy(unsigned address, const void* pointer, unsigned bytes, unsigned mbarrier) {
    emu::bulk_copy(address, pointer, bytes, mbarrier);
}

// ---- warp-level tensor cores (sm_80) ---------------------------------------------------------------------------

FLASHLLM_DEVICE void load_matrix_x4(unsigned (&fragment)[4], unsigned address) {
    emu::load_matrix(fragment, 4, address, false);
}

FLASHLLM_DEVICE void load_matrix_x4_transposed(unsigned (&fragment)[4], unsigned address) {
    emu::load_matrix(fragment, 4, address, true);
}

FLASHLLM_DEVICE void load_matrix_x2(unsigned& first, unsigned& second, unsigned address) {
    unsigned fragment[2];
    emu::load_matrix(fragment, 2, address, false);
    first = fragment[0], second = fragment[1];
}

template <typename T> inline constexpr bool is_half = false;
template <> inline constexpr bool is_half<__half> = true;

template <typename T>
inline constexpr emu::Value value_type = is_half<T> ? emu::Value::fp16 : emu::Value::bf16;

template <typename T>
FLASHLLM_DEVICE void mma_m16n8k16(float (&c)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
    emu::mma_m16n8k16(value_type<T>, c, a, b0, b1);
}

template <typename T, int kSelector>
FLASHLLM_DEVICE void mma_sp_m16n8k32(float (&c)[4], const unsigned (&a)[4], const unsigned (&b)[4], unsigned metadata) {
    static_assert(kSelector == 0 || kSelector == 1);
    emu::mma_sp_m16n8k32(value_type<T>, c, a, b, metadata, kSelector);
}

// ---- warpgroup-level tensor cores (sm_90a) ---------------------------------------------------------------------

FLASHLLM_DEVICE unsigned operand(unsigned address) { return address >> 4 | 1u << 16; }

FLASHLLM_DEVICE void fence_async_proxy() { emu::fence_async_proxy(); }
FLASHLLM_DEVICE void warpgroup_begin() { emu::wgmma_fence(); }
FLASHLLM_DEVICE void warpgroup_commit() { emu::wgmma_commit(); }
template <int kPending = 0>
FLASHLLM_DEVICE void warpgroup_wait() {
    emu::wgmma_wait(kPending);
}

inline constexpr std::uint64_t kOperandHigh = 0x40000040ull << 32;  // 128-byte swizzle, 1024 bytes between groups of rows

template <typename T, int kFragments>
FLASHLLM_DEVICE void warpgroup_mma(float (&c)[kFragments][4], unsigned a, unsigned b) {
    emu::wgmma(value_type<T>, c[0], kFragments * 8, nullptr, kOperandHigh | a, kOperandHigh | b);
}

template <typename T, int kFragments>
FLASHLLM_DEVICE void warpgroup_mma(float (&c)[kFragments][4], const unsigned (&a)[4], unsigned b) {
    emu::wgmma(value_type<T>, c[0], kFragments * 8, a, 0, kOperandHigh | b);
}

}  // namespace flashllm::ptx
