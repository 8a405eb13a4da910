// SPDX-License-Identifier: Apache-2.0
// How a generated stub starts a kernel. src/flashllm/backends/emulator.py mirrors Request and Extent.
#pragma once

#include <cstddef>
#include <cstdint>
#include <type_traits>
#include <utility>

#include "emu/types.hpp"

namespace emu {

#define FLASHLLM_COUNTERS(X)                                                                              \
    X(blocks) X(barriers) X(switches)                                                                     \
    X(mma_m16n8k16) X(mma_sp_m16n8k32)                                                                    \
    X(wgmma_m64n8k16) X(wgmma_m64n16k16) X(wgmma_m64n24k16) X(wgmma_m64n32k16) X(wgmma_m64n40k16)         \
    X(wgmma_m64n48k16) X(wgmma_m64n56k16) X(wgmma_m64n64k16) X(wgmma_m64n72k16) X(wgmma_m64n80k16)        \
    X(wgmma_m64n88k16) X(wgmma_m64n96k16) X(wgmma_m64n104k16) X(wgmma_m64n112k16) X(wgmma_m64n120k16)     \
    X(wgmma_m64n128k16) X(wgmma_m64n136k16) X(wgmma_m64n144k16) X(wgmma_m64n152k16) X(wgmma_m64n160k16)   \
    X(wgmma_m64n168k16) X(wgmma_m64n176k16) X(wgmma_m64n184k16) X(wgmma_m64n192k16) X(wgmma_m64n200k16)   \
    X(wgmma_m64n208k16) X(wgmma_m64n216k16) X(wgmma_m64n224k16) X(wgmma_m64n232k16) X(wgmma_m64n240k16)   \
    X(wgmma_m64n248k16) X(wgmma_m64n256k16)                                                               \
    X(global_read_bytes) X(global_write_bytes) X(prefetch_bytes) X(copy_async_bytes) X(copy_async_zeros)   \
    X(bulk_copy_bytes)                                                                                    \
    X(scatter_requests) X(scatter_wavefronts) X(scatter_ideal)                                            \
    X(store4_requests) X(store4_wavefronts) X(store4_ideal)                                               \
    X(store16_requests) X(store16_wavefronts) X(store16_ideal)                                            \
    X(ldmatrix_requests) X(ldmatrix_wavefronts) X(ldmatrix_ideal)
enum class Counter : unsigned {
#define FLASHLLM_COUNTER(name) name,
    FLASHLLM_COUNTERS(FLASHLLM_COUNTER)
#undef FLASHLLM_COUNTER
    count_of_counters
};
constexpr unsigned kCounters = static_cast<unsigned>(Counter::count_of_counters);

// One array of the launch: the only global memory that wrappers may touch.
struct Extent {
    const char* begin;
    std::uint64_t bytes;
    std::uint32_t writable;
    std::uint32_t argument;
};

// Part of an array that no thread may touch before the preceding launch has finished.
struct Dependent {
    const char* begin;
    std::uint64_t bytes;
};

struct Request {
    void* const* arguments;  // address of each kernel argument
    std::uint32_t grid[3];
    std::uint32_t threads, shared_bytes, workers;
    std::uint64_t seed;
    const Extent* extents;
    std::uint64_t extent_count;
    const Dependent* dependents;
    std::uint64_t dependent_count;
    std::uint64_t* counts;  // kCounters of them
    char* message;          // what went wrong
    std::uint64_t message_bytes;
};

// 0: done. 1: the kernel misbehaved, see message.
int run(const Request& request, void (*body)(void* const*));

template <typename... A, std::size_t... I>
void call(void (*kernel)(A...), void* const* arguments, std::index_sequence<I...>) {
    kernel(*static_cast<std::remove_cv_t<std::remove_reference_t<A>>*>(arguments[I])...);
}
template <typename... A>
void call(void (*kernel)(A...), void* const* arguments) {
    call(kernel, arguments, std::index_sequence_for<A...>{});
}

// Writes the sizes in bytes of a kernel's arguments to sizes[0..limit); returns how many arguments there are.
template <typename... A>
unsigned argument_sizes(void (*)(A...), std::uint32_t* sizes, unsigned limit) {
    const std::uint32_t all[] = {static_cast<std::uint32_t>(sizeof(A))..., 0};
    for (unsigned i = 0; i < sizeof...(A) && i < limit; ++i) sizes[i] = all[i];
    return sizeof...(A);
}

}  // namespace emu

#define FLASHLLM_EXPORT extern "C" __attribute__((visibility("default")))
// Entry points number `i` of the shared object, for the kernel that the rest of the line names.
#define FLASHLLM_EMULATE(i, ...)                                                                          \
    static void flashllm_body_##i(void* const* arguments) { emu::call(&__VA_ARGS__, arguments); }         \
    FLASHLLM_EXPORT int flashllm_run_##i(const emu::Request* request) {                                   \
        return emu::run(*request, flashllm_body_##i);                                                     \
    }                                                                                                     \
    FLASHLLM_EXPORT unsigned flashllm_arguments_##i(std::uint32_t* sizes, unsigned limit) {               \
        return emu::argument_sizes(&__VA_ARGS__, sizes, limit);                                           \
    }
