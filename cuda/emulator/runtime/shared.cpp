// SPDX-License-Identifier: Apache-2.0
// Shared memory: bounds, who wrote what since when (for the proxy fence), bank conflicts, asynchronous copies.
#include <cstring>

#include "runtime/state.hpp"

namespace emu {

namespace {

constexpr unsigned kBankBytes = 4, kBanks = 32;

// Wavefronts of 4-byte accesses by up to 32 lanes: the largest number of different words in one bank.
unsigned wavefronts4(const unsigned* addresses, unsigned count) {
    unsigned char in_bank[kBanks] = {};
    unsigned words[kBanks][32];
    unsigned most = 0;
    for (unsigned i = 0; i < count; ++i) {
        const unsigned word = addresses[i] / kBankBytes, bank = word % kBanks;
        unsigned n = 0;
        while (n < in_bank[bank] && words[bank][n] != word) ++n;
        if (n < in_bank[bank]) continue;
        words[bank][n] = word;
        in_bank[bank] = static_cast<unsigned char>(n + 1);
        if (n + 1 > most) most = n + 1;
    }
    return most;
}

void log_access(Thread& thread, AccessLog& log, unsigned address) {
    unsigned n = log.count[thread.lane];
    if (n == AccessLog::kDepth) {  // a long stretch without a meeting: count what is there
        flush_logs(*thread.warp);
        n = 0;
    }
    log.address[n][thread.lane] = address;
    log.count[thread.lane] = static_cast<unsigned short>(n + 1);
    if (n + 1 > log.longest) log.longest = n + 1;
}

// Calls count(addresses, lanes) for each round of the log, and empties the log.
template <typename Count>
void drain_log(AccessLog& log, Count count) {
    for (unsigned round = 0; round < log.longest; ++round) {
        unsigned addresses[32], lanes = 0;
        for (unsigned lane = 0; lane < 32; ++lane) {
            if (log.count[lane] > round) addresses[lanes++] = log.address[round][lane];
        }
        count(addresses, lanes);
    }
    log.longest = 0;
    std::memset(log.count, 0, sizeof log.count);
}

void perform_copy(Thread& thread, AsyncCopy& copy) {
    if (copy.source == nullptr) return;
    unsigned char* target = shared_pointer(*thread.owner, copy.address);
    std::memset(target, 0, 16);
    std::memcpy(target, copy.source, copy.bytes);
    copy.source = nullptr;
}

}  // namespace

unsigned wavefronts16(const unsigned* addresses, unsigned count) {
    unsigned char in_column[8] = {};
    unsigned chunks[8][8];
    unsigned most = 0;
    for (unsigned i = 0; i < count; ++i) {
        const unsigned chunk = addresses[i] / 16, column = chunk % 8;
        unsigned n = 0;
        while (n < in_column[column] && chunks[column][n] != chunk) ++n;
        if (n < in_column[column]) continue;
        chunks[column][n] = chunk;
        in_column[column] = static_cast<unsigned char>(n + 1);
        if (n + 1 > most) most = n + 1;
    }
    return most;
}

void flush_logs(Warp& warp) {
    Worker& worker = *warp.block->worker;
    if (warp.scatters.longest != 0) {
        drain_log(warp.scatters, [&](const unsigned* addresses, unsigned lanes) {
            worker.add(Counter::scatter_requests);
            worker.add(Counter::scatter_ideal);
            worker.add(Counter::scatter_wavefronts, wavefronts4(addresses, lanes));
        });
    }
    if (warp.stores4.longest != 0) {
        drain_log(warp.stores4, [&](const unsigned* addresses, unsigned lanes) {
            worker.add(Counter::store4_requests);
            worker.add(Counter::store4_ideal);
            worker.add(Counter::store4_wavefronts, wavefronts4(addresses, lanes));
        });
    }
    if (warp.stores16.longest != 0) {
        drain_log(warp.stores16, [&](const unsigned* addresses, unsigned lanes) {
            worker.add(Counter::store16_requests);
            for (unsigned first = 0; first < lanes; first += 8) {  // a quarter of a warp at a time
                worker.add(Counter::store16_ideal);
                const unsigned count = lanes - first < 8 ? lanes - first : 8;
                worker.add(Counter::store16_wavefronts, wavefronts16(addresses + first, count));
            }
        });
    }
}

void check_shared(const Thread& thread, const char* what, unsigned address, unsigned bytes) {
    const unsigned size = thread.owner->worker->launch->request->shared_bytes;
    if (address < kSharedBase || address + bytes > kSharedBase + size) {
        fail("%s: %u bytes at shared address %u (offset %d) of %u bytes", what, bytes, address,
             static_cast<int>(address - kSharedBase), size);
    }
    if (address % bytes != 0) fail("%s: shared address %u is not a multiple of %u", what, address, bytes);
}

void mark_written(Block& block, unsigned address, unsigned bytes, unsigned mark) {
    unsigned* writer = &block.writer[(address - kSharedBase) / 2];
    for (unsigned i = 0; i < bytes / 2; ++i) writer[i] = mark;
}

unsigned shared_address(const void* pointer) {
    const Thread& thread = current();
    const auto offset = static_cast<const unsigned char*>(pointer) - thread.owner->shared;
    if (offset < 0 || offset >= static_cast<long long>(kSharedLimit)) {
        fail("shared address of a pointer that is not into dynamic shared memory");
    }
    return kSharedBase + static_cast<unsigned>(offset);
}

void read_shared(void* value, unsigned address, unsigned bytes) {
    Thread& thread = current();
    check_shared(thread, "load", address, bytes);
    std::memcpy(value, shared_pointer(*thread.owner, address), bytes);
}

void scatter_shared(unsigned address, unsigned short value) {
    Thread& thread = current();
    check_shared(thread, "2-byte store", address, 2);
    std::memcpy(shared_pointer(*thread.owner, address), &value, 2);
    mark_written(*thread.owner, address, 2, mark_of_stores(thread));
    log_access(thread, thread.warp->scatters, address);
}

void store_shared4(unsigned address, unsigned value) {
    Thread& thread = current();
    check_shared(thread, "4-byte store", address, 4);
    std::memcpy(shared_pointer(*thread.owner, address), &value, 4);
    mark_written(*thread.owner, address, 4, mark_of_stores(thread));
    log_access(thread, thread.warp->stores4, address);
}

void store_shared16(unsigned address, const uint4& value) {
    Thread& thread = current();
    check_shared(thread, "16-byte store", address, 16);
    std::memcpy(shared_pointer(*thread.owner, address), &value, 16);
    mark_written(*thread.owner, address, 16, mark_of_stores(thread));
    log_access(thread, thread.warp->stores16, address);
}

// ---- cp.async: performed when its group is waited for. With a seed, some copies are performed at once, as the
// hardware may do: that exposes data overwritten too early.

void copy_async16(unsigned address, const void* pointer, unsigned bytes) {
    Thread& thread = current();
    Worker& worker = *thread.owner->worker;
    check_shared(thread, "cp.async", address, 16);
    if (bytes > 16) fail("cp.async: %u bytes to copy, expected at most 16", bytes);
    if (reinterpret_cast<std::uintptr_t>(pointer) % 16 != 0) fail("cp.async: the source is not 16-byte aligned");
    if (bytes != 0) read_global(pointer, bytes);
    worker.add(bytes != 0 ? Counter::copy_async_bytes : Counter::copy_async_zeros, bytes != 0 ? bytes : 16);
    AsyncCopy copy{address, bytes, pointer};
    if (worker.launch->request->seed != 0 && worker.draw() % 4 == 0) {
        perform_copy(thread, copy);
        mark_written(*thread.owner, address, 16, mark_of_copies(thread));
    }
    thread.copies->copies.push_back(copy);
}

void copy_async_commit() {
    CopyQueue& queue = *current().copies;
    queue.group_ends.push_back(static_cast<unsigned>(queue.copies.size()));
}

void copy_async_wait(unsigned pending) {
    Thread& thread = current();
    CopyQueue& queue = *thread.copies;
    if (queue.group_ends.size() <= pending) return;
    const std::size_t groups = queue.group_ends.size() - pending;
    const unsigned end = queue.group_ends[groups - 1];
    for (unsigned i = 0; i < end; ++i) {
        perform_copy(thread, queue.copies[i]);
        mark_written(*thread.owner, queue.copies[i].address, 16, mark_of_stores(thread));  // its own from now on
    }
    queue.copies.erase(queue.copies.begin(), queue.copies.begin() + end);
    queue.group_ends.erase(queue.group_ends.begin(), queue.group_ends.begin() + static_cast<std::ptrdiff_t>(groups));
    for (unsigned& group_end : queue.group_ends) group_end -= end;
}

void fence_async_proxy() {
    Thread& thread = current();
    ++thread.stores.epoch;
    Block& block = *thread.owner;
    for (unsigned id = 0; id < block.warp_count * 32; ++id) {
        Thread& other = block.thread(id);
        other.stores.publish_released();
        other.copied.publish_released();
    }
}

}  // namespace emu
