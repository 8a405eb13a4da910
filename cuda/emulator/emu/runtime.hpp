// SPDX-License-Identifier: Apache-2.0
// What a kernel sees of the emulator: who it is, and the calls behind every CUDA built-in and PTX wrapper. The
// bodies are in ../runtime/, compiled once and linked to every kernel.
#pragma once

#include "emu/types.hpp"

namespace emu {

// Each CUDA thread is a fiber. Its stack is aligned to its size, so the stack pointer alone tells which thread
// runs, without thread-local storage, which a shared object reaches only through a call.
#if defined(__SANITIZE_ADDRESS__)
inline constexpr std::uintptr_t kStackBytes = 1u << 19;  // red zones make frames many times larger
#else
inline constexpr std::uintptr_t kStackBytes = 1u << 16;
#endif

struct BlockView {
    uint3 index;
    dim3 block_dim, grid_dim;
    unsigned char* shared;  // dynamic shared memory
};

struct ThreadView {
    uint3 index;
    const BlockView* block;
};

inline std::uintptr_t fiber_base() {
    std::uintptr_t stack;
#if defined(__x86_64__)
    asm("movq %%rsp, %0" : "=r"(stack));  // not volatile: the masked result is the same all over a fiber
#else
    stack = reinterpret_cast<std::uintptr_t>(__builtin_frame_address(0));
#endif
    return stack & ~(kStackBytes - 1);
}
inline const ThreadView& self() { return *reinterpret_cast<const ThreadView*>(fiber_base()); }

// ---- block-wide and warp-wide meetings -----------------------------------------------------------------------

enum class Reduce : unsigned char { none, any, all, count };
int block_barrier(Reduce reduce, int value);
void named_barrier(unsigned id, unsigned threads);
void sometimes_let_others_run();
void look_again();  // between two polls of global memory that an earlier block is to write
void warp_barrier(unsigned mask);

enum class Shuffle : unsigned char { index, up, down, exchange };
std::uint64_t shuffle(Shuffle kind, unsigned mask, std::uint64_t value, unsigned parameter, unsigned width);
unsigned ballot(unsigned mask, bool value);
unsigned live_lanes();

// ---- memory ----------------------------------------------------------------------------------------------------

// Checks one access of a wrapper to global memory against the arrays of the launch, and counts it.
void read_global(const void* pointer, unsigned bytes);
void write_global(const void* pointer, unsigned bytes);
void prefetch_global(const void* pointer, unsigned bytes);
float4 load_relaxed(const float4* pointer);  // 16 bytes at once
unsigned read_word(const unsigned* pointer);  // one that other blocks change
void store_relaxed(float4* pointer, const float4& value);

// From here on this thread may touch what is Dependent, and so may threads that a barrier orders after it.
void grid_dependency_wait();

unsigned shared_address(const void* pointer);
void read_shared(void* value, unsigned address, unsigned bytes);
template <typename T>
T load_shared(unsigned address) {
    T value;
    read_shared(&value, address, sizeof(T));
    return value;
}
void scatter_shared(unsigned address, unsigned short value);
void store_shared4(unsigned address, unsigned value);
void store_shared16(unsigned address, const uint4& value);

void copy_async16(unsigned address, const void* pointer, unsigned bytes);
void copy_async_commit();
void copy_async_wait(unsigned pending);

void mbarrier_init(unsigned address, unsigned arrivals);
void mbarrier_arrive_after_copies(unsigned address);
void mbarrier_arrive(unsigned address);
void mbarrier_expect(unsigned address, unsigned bytes);
void mbarrier_wait(unsigned address, unsigned parity);
void bulk_copy(unsigned address, const void* pointer, unsigned bytes, unsigned mbarrier);

// ---- tensor cores ----------------------------------------------------------------------------------------------

enum class Value : unsigned char { fp16, bf16 };
void load_matrix(unsigned* fragment, unsigned matrices, unsigned address, bool transposed);
void mma_m16n8k16(Value type, float* c, const unsigned* a, unsigned b0, unsigned b1);
void mma_sp_m16n8k32(Value type, float* c, const unsigned* a, const unsigned* b, unsigned metadata, unsigned selector);

void fence_async_proxy();
void wgmma_fence();
// registers: this lane's fragment of a, or null where descriptor a says where it lies.
void wgmma(Value type, float* c, unsigned columns, const unsigned* registers, std::uint64_t a, std::uint64_t b);
void wgmma_commit();
void wgmma_wait(unsigned pending);

}  // namespace emu
