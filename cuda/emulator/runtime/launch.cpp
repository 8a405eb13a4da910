// SPDX-License-Identifier: Apache-2.0
// Runs a grid over workers that each hold two blocks at a time, so that a block can overtake another at any point.
// Blocks start in the order of their numbers, as on a GPU: a block may wait for those before it, not for those after
// it. Errors end the launch with a message.
#include <link.h>
#include <sys/mman.h>

#include <algorithm>
#include <cstdio>
#include <cstring>
#include <mutex>
#include <thread>

#include "runtime/state.hpp"

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#define FLASHLLM_POISON(pointer, bytes) __asan_poison_memory_region(pointer, bytes)
#define FLASHLLM_UNPOISON(pointer, bytes) __asan_unpoison_memory_region(pointer, bytes)
#else
#define FLASHLLM_POISON(pointer, bytes) static_cast<void>(0)
#define FLASHLLM_UNPOISON(pointer, bytes) static_cast<void>(0)
#endif

namespace emu {

namespace {

constexpr unsigned kResidentBlocks = 2;
// NaN in fp16, bf16 and fp32, and a wild index.
constexpr unsigned char kPoison[2] = {0xff, 0x7f};

std::mutex message_lock;

// Keeps this module's thread-local block from being empty, and tells where it is.
thread_local volatile char anchor;

std::uint64_t mix(std::uint64_t z) {
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ull;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebull;
    return (z ^ (z >> 31)) | 1;
}

void poison(void* memory, std::size_t bytes) {
    auto* at = static_cast<unsigned char*>(memory);
    for (std::size_t i = 0; i < bytes; ++i) at[i] = kPoison[i % 2];
}

// This shared object: its address range, and its thread-local block, where static __shared__ arrays live.
struct Module {
    const char *begin = nullptr, *end = nullptr;
    char* statics = nullptr;
    std::size_t static_bytes = 0;
};

int find_module(dl_phdr_info* info, std::size_t, void* found) {
    const char *begin = nullptr, *end = nullptr;
    std::size_t static_bytes = 0;
    for (int i = 0; i < info->dlpi_phnum; ++i) {
        const auto& header = info->dlpi_phdr[i];
        if (header.p_type == PT_TLS) static_bytes = header.p_memsz;
        if (header.p_type != PT_LOAD) continue;
        const char* from = reinterpret_cast<const char*>(info->dlpi_addr + header.p_vaddr);
        if (begin == nullptr || from < begin) begin = from;
        if (from + header.p_memsz > end) end = from + header.p_memsz;
    }
    const char* self = reinterpret_cast<const char*>(&message_lock);
    if (self < begin || self >= end) return 0;
    *static_cast<Module*>(found) = {begin, end, static_cast<char*>(info->dlpi_tls_data), static_bytes};
    return 1;
}

Module module_of_this_thread() {
    anchor = 1;  // allocates the block
    Module module;
    dl_iterate_phdr(find_module, &module);
    return module;
}

char* map(std::size_t bytes, std::size_t alignment) {
    const std::size_t room = bytes + alignment;
    void* memory = mmap(nullptr, room, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) return nullptr;
    auto start = reinterpret_cast<std::uintptr_t>(memory);
    const std::uintptr_t aligned = (start + alignment - 1) & ~(alignment - 1);
    if (aligned != start) munmap(memory, aligned - start);
    const std::uintptr_t end = aligned + bytes, rest = start + room - end;
    if (rest != 0) munmap(reinterpret_cast<void*>(end), rest);
    return reinterpret_cast<char*>(aligned);
}

std::unique_ptr<Block> make_block(Worker& worker) {
    const Request& request = *worker.launch->request;
    auto block = std::make_unique<Block>();
    block->worker = &worker;
    block->block_dim = {request.threads, 1, 1};
    block->grid_dim = worker.launch->grid;
    block->warp_count = (request.threads + 31) / 32;
    block->warps.reset(new Warp[block->warp_count]);
    block->copies.reset(new CopyQueue[request.threads]);
    block->writer.reset(new unsigned[kSharedLimit / 2]);
    block->stacks = map(request.threads * kStackBytes, kStackBytes);
    block->shared = reinterpret_cast<unsigned char*>(map(kSharedLimit + kCanaryBytes, 4096));
    if (block->stacks == nullptr || block->shared == nullptr) return nullptr;
    // A quarter of each stack region holds the thread's record and a page that traps an overflow.
    for (unsigned id = 0; id < request.threads; ++id) {
        mprotect(block->stacks + id * kStackBytes + kStackBytes / 4 - 4096, 4096, PROT_NONE);
    }
    return block;
}

void free_block(Block& block) {
    const Request& request = *block.worker->launch->request;
    if (block.stacks != nullptr) {
        FLASHLLM_UNPOISON(block.stacks, request.threads * kStackBytes);
        munmap(block.stacks, request.threads * kStackBytes);
    }
    if (block.shared != nullptr) {
        FLASHLLM_UNPOISON(block.shared, kSharedLimit + kCanaryBytes);
        munmap(block.shared, kSharedLimit + kCanaryBytes);
    }
}

void record(Launch& launch, const char* text) {
    const std::lock_guard<std::mutex> hold(message_lock);
    if (launch.failed) return;
    std::snprintf(launch.request->message, launch.request->message_bytes, "%s", text);
    launch.failed = true;
}

void start_block(Worker& worker, Block& block, unsigned long long number) {
    const Request& request = *worker.launch->request;
    const dim3& grid = worker.launch->grid;
    block.number = number;
    block.index = {static_cast<unsigned>(number % grid.x), static_cast<unsigned>(number / grid.x % grid.y),
                   static_cast<unsigned>(number / grid.x / grid.y)};
    FLASHLLM_UNPOISON(block.shared, kSharedLimit + kCanaryBytes);
    poison(block.shared, request.shared_bytes + kCanaryBytes);
    FLASHLLM_POISON(block.shared + request.shared_bytes, kSharedLimit + kCanaryBytes - request.shared_bytes);
    std::memset(block.writer.get(), 0, sizeof(unsigned) * (request.shared_bytes + 1) / 2);
    FLASHLLM_UNPOISON(block.stacks, request.threads * kStackBytes);
    prepare_block(block);
}

void end_block(Worker& worker, Block& block) {
    const Request& request = *worker.launch->request;
    worker.add(Counter::blocks);
    worker.launch->ended[block.number] = true;
#if !defined(__SANITIZE_ADDRESS__)
    for (unsigned i = 0; i < kCanaryBytes; ++i) {
        if (block.shared[request.shared_bytes + i] == kPoison[(request.shared_bytes + i) % 2]) continue;
        char text[120];
        std::snprintf(text, sizeof text, "block (%u, %u, %u): wrote past the end of its %u bytes of shared memory",
                      block.index.x, block.index.y, block.index.z, request.shared_bytes);
        return record(*worker.launch, text);
    }
#else
    static_cast<void>(request), static_cast<void>(block);
#endif
}

void work(Worker& worker) {
    Launch& launch = *worker.launch;
    const Module module = module_of_this_thread();
    // Blocks with static shared memory share their worker's only copy of it.
    const bool statics = module.static_bytes > sizeof anchor;
    unsigned long long next = worker.index;
    for (unsigned i = 0; i < (statics ? 1 : kResidentBlocks) && next + i * worker.count < launch.blocks; ++i) {
        worker.blocks.push_back(make_block(worker));
        if (worker.blocks.back() == nullptr) return record(launch, "out of memory");
    }
    while (!launch.failed) {
        bool running = false;
        for (auto& block : worker.blocks) {
            if (!block->running && next < launch.blocks) {
                if (statics) poison(module.statics, module.static_bytes);
                start_block(worker, *block, next);
                next += worker.count;
            }
            running |= block->running;
        }
        if (!running) break;
        std::vector<Block*> before;
        for (auto& block : worker.blocks) {
            if (block->running) before.push_back(block.get());
        }
        run_until_block_ends(worker);
        for (Block* block : before) {
            if (!block->running && !launch.failed) end_block(worker, *block);
        }
    }
    for (auto& block : worker.blocks) free_block(*block);
}

const char* position(const Launch& launch, const void* pointer, unsigned bytes, bool write, std::size_t& hint) {
    const Request& request = *launch.request;
    const char* at = static_cast<const char*>(pointer);
    auto inside = [&](const Extent& extent) { return at >= extent.begin && at + bytes <= extent.begin + extent.bytes; };
    if (hint < request.extent_count && inside(request.extents[hint]) && (!write || request.extents[hint].writable)) {
        return nullptr;
    }
    for (std::size_t i = 0; i < request.extent_count; ++i) {
        if (!inside(request.extents[i])) continue;
        hint = i;
        return write && !request.extents[i].writable ? "a read-only array" : nullptr;
    }
    hint = request.extent_count;
    if (at >= launch.module_begin && at + bytes <= launch.module_end) return nullptr;
    return "no array of the launch";
}

void check_global(const char* what, const void* pointer, unsigned bytes, bool write) {
    const Thread& thread = current();
    Worker& worker = *thread.owner->worker;
    const Request& request = *worker.launch->request;
    if (const char* where = position(*worker.launch, pointer, bytes, write, worker.last_extent)) {
        // The nearest array, if any, is taken to be the one meant: small ones may lie side by side.
        const Extent* nearest = nullptr;
        long long least = 4096 + 1;
        for (std::size_t i = 0; i < request.extent_count; ++i) {
            const Extent& extent = request.extents[i];
            const long long offset = static_cast<const char*>(pointer) - extent.begin;
            const long long away = offset < 0 ? -offset : std::max(0LL, offset - static_cast<long long>(extent.bytes));
            if (away < least) {
                least = away;
                nearest = &extent;
            }
        }
        if (nearest != nullptr) {
            fail("%s of %u bytes at byte %lld of argument %u, which has %llu (%s)", what, bytes,
                 static_cast<long long>(static_cast<const char*>(pointer) - nearest->begin), nearest->argument,
                 static_cast<unsigned long long>(nearest->bytes), where);
        }
        fail("%s of %u bytes at %p: %s", what, bytes, pointer, where);
    }
    const std::size_t found = worker.last_extent;
    if (!is_behind(thread) && found < request.extent_count) {
        const char* at = static_cast<const char*>(pointer);
        for (std::size_t i = 0; i < request.dependent_count; ++i) {
            const Dependent& part = request.dependents[i];
            if (at + bytes <= part.begin || at >= part.begin + part.bytes) continue;
            fail("%s of argument %u, which the launch before may be using: this thread has neither waited for it nor "
                 "met one that had at a barrier", what, request.extents[found].argument);
        }
    }
    if (bytes <= 16 && reinterpret_cast<std::uintptr_t>(pointer) % bytes != 0) {
        fail("%s of %u bytes at %p: misaligned", what, bytes, pointer);
    }
}

}  // namespace

void fail(const char* format, ...) {
    Thread& thread = current();
    Block& block = *thread.owner;
    char text[1600], whole[1800];
    va_list arguments;
    va_start(arguments, format);
    std::vsnprintf(text, sizeof text, format, arguments);
    va_end(arguments);
    std::snprintf(whole, sizeof whole, "block (%u, %u, %u), warp %u, lane %u: %s", block.index.x, block.index.y,
                  block.index.z, thread.warp->index, thread.lane, text);
    record(*block.worker->launch, whole);
    switch_context(thread.context, block.worker->main);
    __builtin_unreachable();
}

void grid_dependency_wait() { put_behind(current()); }

void read_global(const void* pointer, unsigned bytes) {
    check_global("read", pointer, bytes, false);
    current().owner->worker->add(Counter::global_read_bytes, bytes);
}

void write_global(const void* pointer, unsigned bytes) {
    check_global("write", pointer, bytes, true);
    current().owner->worker->add(Counter::global_write_bytes, bytes);
}

// Not a single access on the host, but whoever sees the first 8 bytes sees the others too. Polls are not counted, since
// their number depends on the schedule.
float4 load_relaxed(const float4* pointer) {
    check_global("read", pointer, sizeof(float4), false);
    std::uint64_t bits[2];
    const auto* from = reinterpret_cast<const std::uint64_t*>(pointer);
    bits[0] = __atomic_load_n(from, __ATOMIC_ACQUIRE);
    bits[1] = __atomic_load_n(from + 1, __ATOMIC_RELAXED);
    float4 value;
    std::memcpy(&value, bits, sizeof value);
    return value;
}

unsigned read_word(const unsigned* pointer) {
    check_global("read", pointer, sizeof(unsigned), false);
    return __atomic_load_n(pointer, __ATOMIC_ACQUIRE);
}

void store_relaxed(float4* pointer, const float4& value) {
    write_global(pointer, sizeof(float4));
    std::uint64_t bits[2];
    std::memcpy(bits, &value, sizeof bits);
    auto* to = reinterpret_cast<std::uint64_t*>(pointer);
    __atomic_store_n(to + 1, bits[1], __ATOMIC_RELAXED);
    __atomic_store_n(to, bits[0], __ATOMIC_RELEASE);
}

void prefetch_global(const void* pointer, unsigned bytes) {
    if (bytes == 0 || bytes % 16 != 0 || reinterpret_cast<std::uintptr_t>(pointer) % 16 != 0) {
        fail("prefetch of %u bytes at %p: expected multiples of 16", bytes, pointer);
    }
    check_global("prefetch", pointer, bytes, false);
    current().owner->worker->add(Counter::prefetch_bytes, bytes);
}

int run(const Request& request, void (*body)(void* const*)) {
    Launch launch;
    launch.request = &request;
    launch.body = body;
    launch.grid = {request.grid[0], request.grid[1], request.grid[2]};
    if (request.threads == 0 || request.threads > 1024 || request.shared_bytes > kSharedLimit - kSharedBase) {
        record(launch, "impossible launch: 1..1024 threads, at most 255 KiB of shared memory");
        return 1;
    }
    const Module module = module_of_this_thread();
    launch.module_begin = module.begin, launch.module_end = module.end;
    launch.blocks = static_cast<unsigned long long>(request.grid[0]) * request.grid[1] * request.grid[2];
    launch.ended.reset(new std::atomic<bool>[launch.blocks]());
    const auto count = static_cast<unsigned>(std::min<unsigned long long>(std::max(request.workers, 1u), launch.blocks));
    std::vector<Worker> workers(count);
    std::vector<std::thread> threads;
    for (unsigned i = 0; i < count; ++i) {
        workers[i].launch = &launch, workers[i].index = i, workers[i].count = count;
        workers[i].ranked = request.seed % 2 == 1;
        workers[i].random = mix(request.seed * 0x9e3779b97f4a7c15ull + i + 1);
    }
    // Even a single worker does not run on the caller's thread, whose stack and thread-local block stay out of it.
    for (Worker& worker : workers) threads.emplace_back([&worker] { work(worker); });
    for (std::thread& thread : threads) thread.join();
    for (const Worker& worker : workers) {
        for (unsigned i = 0; i < kCounters; ++i) request.counts[i] += worker.counts[i];
    }
    return launch.failed ? 1 : 0;
}

FLASHLLM_EXPORT const char* flashllm_counters() {
#define FLASHLLM_COUNTER(name) #name " "
    return FLASHLLM_COUNTERS(FLASHLLM_COUNTER);
#undef FLASHLLM_COUNTER
}

}  // namespace emu
