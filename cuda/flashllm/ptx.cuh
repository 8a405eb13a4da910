// SPDX-License-Identifier: Apache-2.0
// All inline PTX of the project: one small named wrapper per instruction, with the reason it is used.
//
// Shared-memory pointers are passed as 32-bit addresses ("shared addresses"): the instructions take them in this form,
// and one register instead of two per pointer matters in the inner loops.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include "flashllm/portable.cuh"

namespace flashllm::ptx {

// ---- addresses -----------------------------------------------------------------------------------------

FLASHLLM_DEVICE unsigned shared_address(const void* pointer) {
    return static_cast<unsigned>(__cvta_generic_to_shared(pointer));
}

// Returns the same value, but hides it from the compiler: computations on it stay where they are written instead of
// being hoisted out of a loop into registers that the loop needs.
FLASHLLM_DEVICE int opaque(int value) {
    asm volatile("" : "+r"(value));
    return value;
}

// ---- bytes in registers ----------------------------------------------------------------------------------

// Tells the compiler that a value is the same in all lanes of the warp: it can then compute with it and branch on it
// once for the warp, and bulk copies need no loop over lanes that might differ.
FLASHLLM_DEVICE int uniform(int value) { return __shfl_sync(0xffffffffu, value, 0); }

// True in exactly one lane of a warp whose lanes are all active, and the compiler knows that it is one: see uniform().
FLASHLLM_DEVICE bool elect() {
#if __CUDA_ARCH__ >= 900
    int elected;
    asm volatile("{ .reg .pred p; elect.sync _|p, 0xffffffff; selp.s32 %0, 1, 0, p; }" : "=r"(elected));
    return elected != 0;
#else
    return (threadIdx.x & 31) == 0;
#endif
}

// sum + the dot product of the bytes of a and b: one IDP.4A on the FMA pipe, so the integer ALU is not used.
FLASHLLM_DEVICE unsigned dot4(unsigned a, unsigned b, unsigned sum) {
    unsigned result;
    asm("dp4a.u32.u32 %0, %1, %2, %3;" : "=r"(result) : "r"(a), "r"(b), "r"(sum));
    return result;
}

// Byte i of the result is the byte of {low, high} that selector nibble i names, or eight copies of its sign if bit 3 of
// the nibble is set. The upper half of the selector is ignored; __byte_perm would spend an instruction on masking it.
FLASHLLM_DEVICE unsigned permute(unsigned low, unsigned high, unsigned selector) {
    unsigned result;
    asm("prmt.b32 %0, %1, %2, %3;" : "=r"(result) : "r"(low), "r"(high), "r"(selector));
    return result;
}

// The value with +0 replaced by -0: never all zero bits. (In C++ it would take registers that the accumulators need.)
FLASHLLM_DEVICE float not_plus_zero(float value) {
    asm("{ .reg .pred p; setp.eq.b32 p, %0, 0; @p mov.b32 %0, 0x80000000; }" : "+f"(value));
    return value;
}

// ---- shared memory ---------------------------------------------------------------------------------------

// Stores the low 16 bits of `word`, or zero if kZero, at base + kOffset + 2 * (the high 16 bits of `word`). The address
// is one IDP.2A on the FMA pipe plus an immediate: the integer ALU is not used.
template <bool kZero, int kOffset>
FLASHLLM_DEVICE void scatter_low_half(unsigned word, unsigned base) {
    unsigned address;
    asm("dp2a.lo.u32.u32 %0, %1, %2, %3;" : "=r"(address) : "r"(word), "r"(0x0200u), "r"(base));
    asm volatile("{ .reg .b16 low, high; mov.b32 {low, high}, %1; st.shared.b16 [%0 + %2], low; }"
                 :: "r"(address), "r"(kZero ? 0u : word), "n"(kOffset) : "memory");
}

// The halfword at `address`, zero-extended. Volatile: reads of a ring must stay between the wait for a tile and its
// release.
FLASHLLM_DEVICE unsigned load_shared_half(unsigned address) {
    unsigned value;
    asm volatile("ld.shared.u16 %0, [%1];" : "=r"(value) : "r"(address));
    return value;
}

FLASHLLM_DEVICE unsigned load_shared4(unsigned address) {
    unsigned value;
    asm volatile("ld.shared.b32 %0, [%1];" : "=r"(value) : "r"(address) : "memory");
    return value;
}

FLASHLLM_DEVICE uint2 load_shared8(unsigned address) {
    uint2 value;
    asm volatile("ld.shared.v2.b32 {%0, %1}, [%2];" : "=r"(value.x), "=r"(value.y) : "r"(address) : "memory");
    return value;
}

FLASHLLM_DEVICE uint4 load_shared(unsigned address) {
    uint4 value;
    asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(value.x), "=r"(value.y), "=r"(value.z), "=r"(value.w) : "r"(address) : "memory");
    return value;
}

FLASHLLM_DEVICE void store_shared_zero16(unsigned address) {
    asm volatile("st.shared.v4.b32 [%0], {%1, %1, %1, %1};" :: "r"(address), "r"(0u) : "memory");
}

FLASHLLM_DEVICE void store_shared(unsigned address, uint4 value) {
    asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %4};"
                 :: "r"(address), "r"(value.x), "r"(value.y), "r"(value.z), "r"(value.w) : "memory");
}

FLASHLLM_DEVICE void store_shared(unsigned address, unsigned value) {
    asm volatile("st.shared.b32 [%0], %1;" :: "r"(address), "r"(value) : "memory");
}

// ---- global memory ---------------------------------------------------------------------------------------

// A policy for data that is read once: it leaves the L2 first, so x and the activations of neighbouring layers stay.
FLASHLLM_DEVICE unsigned long long evict_first() {
    unsigned long long policy;
    asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
    return policy;
}

// Weights are read once per launch, so they are not allocated in the L1 either. Unconditional on purpose: a predicated
// load must merge with the register's old value, and the copies that this needs would wait for the data.
FLASHLLM_DEVICE uint4 load_streaming(const uint4* pointer) {
    uint4 value;
    asm volatile("ld.global.nc.L1::no_allocate.L2::cache_hint.L2::128B.v4.b32 {%0, %1, %2, %3}, [%4], %5;"
                 : "=r"(value.x), "=r"(value.y), "=r"(value.z), "=r"(value.w) : "l"(pointer), "l"(evict_first()));
    return value;
}

// Prefetches `bytes` (a multiple of 16, not 0) from a 16-byte aligned address into the L2, to be read once, with one
// instruction of one thread: no registers are held for the DRAM latency. No-op before sm_90.
FLASHLLM_DEVICE void prefetch_to_l2(bool active, const void* pointer, unsigned bytes) {
#if __CUDA_ARCH__ >= 900
    asm volatile("{ .reg .pred p; setp.ne.s32 p, %2, 0;\n"
                 "@p cp.async.bulk.prefetch.L2.global.L2::cache_hint [%0], %1, %3; }"
                 :: "l"(pointer), "r"(bytes), "r"(static_cast<int>(active)), "l"(evict_first()) : "memory");
#endif
}

// Load and store of 16 bytes that blocks exchange during a launch: single accesses that never tear (PTX memory model,
// .b128), so one word can signal that all 16 bytes have arrived. No fence; nothing else is ordered.
FLASHLLM_DEVICE float4 load_relaxed(const float4* pointer) {
    float4 value;
    asm volatile("{ .reg .b128 whole; .reg .b64 low, high;\n"
                 "ld.relaxed.gpu.global.b128 whole, [%4];\n"
                 "mov.b128 {low, high}, whole; mov.b64 {%0, %1}, low; mov.b64 {%2, %3}, high; }"
                 : "=f"(value.x), "=f"(value.y), "=f"(value.z), "=f"(value.w) : "l"(pointer) : "memory");
    return value;
}

FLASHLLM_DEVICE void store_relaxed(float4* pointer, const float4& value) {
    asm volatile("{ .reg .b128 whole; .reg .b64 low, high;\n"
                 "mov.b64 low, {%1, %2}; mov.b64 high, {%3, %4}; mov.b128 whole, {low, high};\n"
                 "st.relaxed.gpu.global.b128 [%0], whole; }"
                 :: "l"(pointer), "f"(value.x), "f"(value.y), "f"(value.z), "f"(value.w) : "memory");
}

// Called between two polls of what another block will write. Does nothing: a poll itself takes long enough.
FLASHLLM_DEVICE void look_again() {}

// Whether a counter that other blocks increment has reached `value`. If so, what they wrote before is visible.
FLASHLLM_DEVICE bool has_reached(const unsigned* pointer, unsigned value) {
    unsigned now;
    asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(now) : "l"(pointer) : "memory");
    return now == value;
}

// Makes what this thread can see in device memory, including other threads' writes, visible to bulk copies too.
FLASHLLM_DEVICE void fence_async_proxy_global() {
#if __CUDA_ARCH__ >= 900
    asm volatile("fence.proxy.async.global;" ::: "memory");
#endif
}

// ---- the launch before and the one after (sm_90) ------------------------------------------------------------------
// See docs/kernels/pdl.md. Both do nothing in a launch that overlaps no other, and before sm_90.

#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
// Returns once the previous launch is complete, its writes visible. __ldg and const __restrict__ reads may move above.
FLASHLLM_DEVICE void grid_dependency_wait() { asm volatile("griddepcontrol.wait;" ::: "memory"); }
// Lets the next launch start once a thread of every block has executed this.
FLASHLLM_DEVICE void grid_launch_dependents() { asm volatile("griddepcontrol.launch_dependents;" ::: "memory"); }
#else
FLASHLLM_DEVICE void grid_dependency_wait() {}
FLASHLLM_DEVICE void grid_launch_dependents() {}
#endif

// ---- asynchronous copies (sm_80) --------------------------------------------------------------------------

// 16 bytes global -> shared, bypassing L1; `bytes` = 0 writes zeros and reads nothing (the pointer must
// still be a valid address).
FLASHLLM_DEVICE void copy_async16(bool active, unsigned address, const void* pointer, unsigned bytes) {
    asm volatile("{ .reg .pred p; setp.ne.s32 p, %3, 0; @p cp.async.cg.shared.global [%0], [%1], 16, %2; }"
                 :: "r"(address), "l"(pointer), "r"(bytes), "r"(static_cast<int>(active)) : "memory");
}

FLASHLLM_DEVICE void copy_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

template <int kPending>
FLASHLLM_DEVICE void copy_async_wait() {
    asm volatile("cp.async.wait_group %0;" :: "n"(kPending) : "memory");
}

// Waits until kThreads threads of the block (whole warps) have reached barrier 1..15; 0 is the one of __syncthreads.
template <int kThreads>
FLASHLLM_DEVICE void meet(int barrier) {
    asm volatile("barrier.sync %0, %1;" :: "r"(barrier), "n"(kThreads) : "memory");
}

// Sets the registers per thread of all four warps of a warpgroup: fewer, or more once others have given theirs.
template <int kRegisters>
FLASHLLM_DEVICE void give_registers() {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" :: "n"(kRegisters));
}
template <int kRegisters>
FLASHLLM_DEVICE void take_registers() {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" :: "n"(kRegisters));
}

// ---- barriers in shared memory (sm_80), bulk copies (sm_90) -----------------------------------------------------

// A barrier (8 bytes of shared memory). A phase ends when all `arrivals` and all announced bytes have arrived.
FLASHLLM_DEVICE void mbarrier_init(unsigned address, unsigned arrivals) {
    asm volatile("mbarrier.init.shared.b64 [%0], %1;" :: "r"(address), "r"(arrivals) : "memory");
}

// By the thread of the inits, after the last and before the block's barrier: makes them visible to bulk copies too.
FLASHLLM_DEVICE void mbarrier_init_fence() {
#if __CUDA_ARCH__ >= 900
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
#endif
}

// Returns when the phase of this parity has ended: 0 for the first, 1 for the second, 0 for the third ...
FLASHLLM_DEVICE void mbarrier_wait(unsigned address, unsigned parity) {
#if __CUDA_ARCH__ >= 900
    asm volatile("{ .reg .pred done;\n"
                 "again: mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
                 "@!done bra again; }" :: "r"(address), "r"(parity) : "memory");
#else
    asm volatile("{ .reg .pred done;\n"
                 "again: mbarrier.test_wait.parity.shared.b64 done, [%0], %1;\n"
                 "@!done bra again; }" :: "r"(address), "r"(parity) : "memory");
#endif
}

// Arrives once this thread's asynchronous copies so far have landed. Ordinary stores need mbarrier_arrive instead.
FLASHLLM_DEVICE void mbarrier_arrive_after_copies(unsigned address) {
    asm volatile("cp.async.mbarrier.arrive.noinc.shared.b64 [%0];" :: "r"(address) : "memory");
}

// Arrives: this thread's reads and writes so far are complete for every thread that waits for the phase.
FLASHLLM_DEVICE void mbarrier_arrive(unsigned address) {
    asm volatile("{ .reg .b64 state; mbarrier.arrive.shared.b64 state, [%0]; }" :: "r"(address) : "memory");
}

#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
// Announces that `bytes` will land in this phase, and arrives.
FLASHLLM_DEVICE void mbarrier_expect(unsigned address, unsigned bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" :: "r"(address), "r"(bytes) : "memory");
}

// Copies `bytes` (a multiple of 16) from global to shared memory, 16-byte aligned, by one instruction of one thread.
// They count towards the current phase of the barrier at `mbarrier`. For data read once: see evict_first.
FLASHLLM_DEVICE void bulk_copy(unsigned address, const void* pointer, unsigned bytes, unsigned mbarrier) {
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint "
                 "[%0], [%1], %2, [%3], %4;"
                 :: "r"(address), "l"(pointer), "r"(bytes), "r"(mbarrier), "l"(evict_first()) : "memory");
}
#endif

// ---- warp-level tensor cores (sm_80) -----------------------------------------------------------------------

template <typename T> inline constexpr bool is_half = false;
template <> inline constexpr bool is_half<__half> = true;

// Four 8x8 matrices of 16-bit elements, one 16-byte row per lane address: exactly the A fragment of m16n8k16.
FLASHLLM_DEVICE void load_matrix_x4(unsigned (&fragment)[4], unsigned address) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(fragment[0]), "=r"(fragment[1]), "=r"(fragment[2]), "=r"(fragment[3])
                 : "r"(address) : "memory");
}

// The same with each matrix transposed: lane 4 g + t gets rows 2 t and 2 t + 1 of column g.
FLASHLLM_DEVICE void load_matrix_x4_transposed(unsigned (&fragment)[4], unsigned address) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(fragment[0]), "=r"(fragment[1]), "=r"(fragment[2]), "=r"(fragment[3])
                 : "r"(address) : "memory");
}

FLASHLLM_DEVICE void load_matrix_x2(unsigned& first, unsigned& second, unsigned address) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];"
                 : "=r"(first), "=r"(second) : "r"(address) : "memory");
}

// c[16x8] += a[16x16] b[16x8], fp32 accumulators; T names the type of a and b.
template <typename T>
FLASHLLM_DEVICE void mma_m16n8k16(float (&c)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
#define FLASHLLM_MMA(type)                                                                               \
    asm("mma.sync.aligned.m16n8k16.row.col.f32." type "." type ".f32 "                                   \
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"                                \
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])                                                 \
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1))
    if constexpr (is_half<T>) FLASHLLM_MMA("f16");
    else FLASHLLM_MMA("bf16");
#undef FLASHLLM_MMA
}

// c[16x8] += a[16x32] b[32x8], where a has two elements, the "slots", in every group of four along K. `a` holds the
// slots alone, as the fragment of 16 columns of m16n8k16; b[j] holds rows 8 j + 2 t and the next of column g (lane 4 g
// + t). Positions of the slots: lane 4 g + 2 kSelector + h gives groups 4 h to 4 h + 3, of row g in the low half of
// `metadata` and of row g + 8 in the high half, 4 bits per group: the position of slot 0 and above it that of slot 1,
// which must be larger. Other lanes' metadata are ignored. "Ordered" is the variant fast on every architecture.
template <typename T, int kSelector>
FLASHLLM_DEVICE void mma_sp_m16n8k32(float (&c)[4], const unsigned (&a)[4], const unsigned (&b)[4], unsigned metadata) {
    static_assert(kSelector == 0 || kSelector == 1);
#define FLASHLLM_MMA_SP(type)                                                                            \
    asm("mma.sp::ordered_metadata.sync.aligned.m16n8k32.row.col.f32." type "." type ".f32 "              \
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9, %10, %11}, {%0, %1, %2, %3}, %12, %13;"            \
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])                                                 \
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]), "r"(b[2]), "r"(b[3]),        \
          "r"(metadata), "n"(kSelector))
    if constexpr (is_half<T>) FLASHLLM_MMA_SP("f16");
    else FLASHLLM_MMA_SP("bf16");
#undef FLASHLLM_MMA_SP
}

// ---- warpgroup-level tensor cores (sm_90a) ---------------------------------------------------------------------

// The low half of the descriptor of an operand in shared memory; the high half is FLASHLLM_OPERAND_HIGH. The operand is
// K-major with the 128-byte swizzle: rows of 64 16-bit elements, groups of 8 rows 1024 bytes apart, which is the layout
// of a Tiled-CSL image and of an x stage. `address` is 1024-byte aligned, plus a multiple of 32 bytes along K. Adding
// bytes / 16 to the result moves the operand.
FLASHLLM_DEVICE unsigned operand(unsigned address) { return address >> 4 | 1u << 16; }
#define FLASHLLM_OPERAND_HIGH "0x40000040"  // 128-byte swizzle, 1024 bytes between groups of rows

// Orders this thread's ordinary shared-memory accesses before later ones of the tensor cores (another "proxy"). Needed
// in each writing thread before the barrier that announces the data, or in each reading thread after it.
FLASHLLM_DEVICE void fence_async_proxy() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// All four warps of a warpgroup call these. The accumulators belong to the hardware from `begin` to `wait`.
FLASHLLM_DEVICE void warpgroup_begin() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
FLASHLLM_DEVICE void warpgroup_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
// Returns when all groups but the last kPending are done.
template <int kPending = 0>
FLASHLLM_DEVICE void warpgroup_wait() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" :: "n"(kPending) : "memory");
}

// c[64 x kN] += a[64x16] b[16xkN]; c[j] is each warp's fragment of columns 8j..8j+7, as in m16n8k16. `a` is an operand
// in shared memory, or the fragment of m16n8k16 in registers, where warp w has rows 16w..16w+15. Those registers, too,
// belong to the hardware until the wait.
#define FLASHLLM_C4(j) "+f"(c[j][0]), "+f"(c[j][1]), "+f"(c[j][2]), "+f"(c[j][3])
#define FLASHLLM_WGMMA(kN, type, registers, a_low, b_low, ...)                                          \
    asm volatile("{ .reg .b64 a, b;\n"                                                                 \
                 "mov.b64 a, {%" #a_low ", " FLASHLLM_OPERAND_HIGH "};\n"                              \
                 "mov.b64 b, {%" #b_low ", " FLASHLLM_OPERAND_HIGH "};\n"                              \
                 "wgmma.mma_async.sync.aligned.m64n" #kN "k16.f32." type "." type " " registers         \
                 ", a, b, 1, 1, 1, 0, 0; }"                                                             \
                 : __VA_ARGS__ : "r"(a), "r"(b))
#define FLASHLLM_WGMMA_REGISTERS(kN, type, registers, a0, a1, a2, a3, b_low, ...)                        \
    asm volatile("{ .reg .b64 b;\n"                                                                    \
                 "mov.b64 b, {%" #b_low ", " FLASHLLM_OPERAND_HIGH "};\n"                              \
                 "wgmma.mma_async.sync.aligned.m64n" #kN "k16.f32." type "." type " " registers         \
                 ", {%" #a0 ", %" #a1 ", %" #a2 ", %" #a3 "}, b, 1, 1, 1, 0; }"                         \
                 : __VA_ARGS__ : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b))
#define FLASHLLM_WGMMA_SHAPE(kN, registers, n0, n1, n2, n3, n4, ...)                                     \
    template <typename T>                                                                               \
    FLASHLLM_DEVICE void warpgroup_mma(float (&c)[kN / 8][4], unsigned a, unsigned b) {                 \
        if constexpr (is_half<T>) FLASHLLM_WGMMA(kN, "f16", registers, n0, n1, __VA_ARGS__);            \
        else FLASHLLM_WGMMA(kN, "bf16", registers, n0, n1, __VA_ARGS__);                                \
    }                                                                                                   \
    template <typename T>                                                                               \
    FLASHLLM_DEVICE void warpgroup_mma(float (&c)[kN / 8][4], const unsigned (&a)[4], unsigned b) {     \
        if constexpr (is_half<T>) FLASHLLM_WGMMA_REGISTERS(kN, "f16", registers, n0, n1, n2, n3, n4, __VA_ARGS__); \
        else FLASHLLM_WGMMA_REGISTERS(kN, "bf16", registers, n0, n1, n2, n3, n4, __VA_ARGS__);           \
    }

FLASHLLM_WGMMA_SHAPE(8, "{%0, %1, %2, %3}", 4, 5, 6, 7, 8, FLASHLLM_C4(0))
FLASHLLM_WGMMA_SHAPE(16, "{%0, %1, %2, %3, %4, %5, %6, %7}", 8, 9, 10, 11, 12, FLASHLLM_C4(0), FLASHLLM_C4(1))
FLASHLLM_WGMMA_SHAPE(32, "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15}", 16, 17, 18, 19, 20,
                     FLASHLLM_C4(0), FLASHLLM_C4(1), FLASHLLM_C4(2), FLASHLLM_C4(3))
FLASHLLM_WGMMA_SHAPE(64,
                     "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
                     "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31}", 32, 33, 34, 35, 36,
                     FLASHLLM_C4(0), FLASHLLM_C4(1), FLASHLLM_C4(2), FLASHLLM_C4(3), FLASHLLM_C4(4),
                     FLASHLLM_C4(5), FLASHLLM_C4(6), FLASHLLM_C4(7))
#undef FLASHLLM_WGMMA_SHAPE
#undef FLASHLLM_WGMMA
#undef FLASHLLM_WGMMA_REGISTERS
#undef FLASHLLM_OPERAND_HIGH
#undef FLASHLLM_C4

}  // namespace flashllm::ptx
