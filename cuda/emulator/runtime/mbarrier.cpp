// SPDX-License-Identifier: Apache-2.0
// Transaction barriers (mbarrier) in shared memory and the bulk copies that complete on them. A copy is performed when
// a thread waits for its barrier, or at once if one waits already. With a seed, one in four is performed at once, as
// the hardware may do: that exposes data overwritten too early.
#include <cstring>

#include "runtime/state.hpp"

namespace emu {

namespace {

TransactionBarrier& find(const char* what, unsigned address) {
    Thread& thread = current();
    check_shared(thread, what, address, 8);
    const auto found = thread.owner->transactions.find(address);
    if (found == thread.owner->transactions.end()) {
        fail("%s: no mbarrier has been initialised at shared offset %u", what, address - kSharedBase);
    }
    return found->second;
}

bool waited_for(const TransactionBarrier& barrier) {
    for (const unsigned lanes : barrier.waiting) {
        if (lanes != 0) return true;
    }
    return false;
}

// The phase ends once all arrivals and all announced bytes have come.
void complete_if_done(Block& block, TransactionBarrier& barrier) {
    if (barrier.arrivals_left != 0 || barrier.bytes_left != 0) return;
    barrier.parity ^= 1;
    barrier.arrivals_left = barrier.arrivals;
    barrier.behind = barrier.arrived_behind;
    wake(block, barrier.waiting, barrier.behind);
}

void arrive(Block& block, TransactionBarrier& barrier, unsigned address) {
    if (barrier.arrivals_left == 0) {
        fail("mbarrier at shared offset %u: more than its %u arrivals in one phase", address - kSharedBase,
             barrier.arrivals);
    }
    --barrier.arrivals_left;
    complete_if_done(block, barrier);
}

// An arrival of the thread itself, unlike one after copies: what the thread has done so far is ordered before whatever
// follows a wait for the phase.
void arrive_and_release(TransactionBarrier& barrier, unsigned address) {
    Thread& thread = current();
    thread.stores.release();
    barrier.arrived_behind |= is_behind(thread);
    arrive(*thread.owner, barrier, address);
}

void perform(Block& block, TransactionBarrier& barrier, const BulkCopy& copy) {
    unsigned char* target = shared_pointer(block, copy.address);
    std::memcpy(target, copy.source, copy.bytes);
    std::memset(target + copy.bytes, 0, copy.zeros);
    mark_written(block, copy.address, copy.bytes + copy.zeros, copy.mark);
    barrier.bytes_left -= copy.bytes + copy.zeros;
}

void perform_all(Block& block, TransactionBarrier& barrier) {
    for (const BulkCopy& copy : barrier.copies) perform(block, barrier, copy);
    const bool any = !barrier.copies.empty();
    barrier.copies.clear();
    if (any) complete_if_done(block, barrier);
}

}  // namespace

void check_transactions_done(Block& block) {
    for (const auto& [address, barrier] : block.transactions) {
        if (!barrier.copies.empty()) {
            fail("the block ends with %zu bulk copies not waited for, of the mbarrier at shared offset %u",
                 barrier.copies.size(), address - kSharedBase);
        }
    }
}

void mbarrier_init(unsigned address, unsigned arrivals) {
    Thread& thread = current();
    check_shared(thread, "mbarrier.init", address, 8);
    if (arrivals == 0 || arrivals >= 1u << 20) fail("mbarrier.init: %u arrivals, expected 1..1048575", arrivals);
    TransactionBarrier barrier;
    barrier.arrivals = barrier.arrivals_left = arrivals;
    if (!thread.owner->transactions.emplace(address, barrier).second) {
        fail("mbarrier.init: the one at shared offset %u is in use", address - kSharedBase);
    }
}

void mbarrier_arrive(unsigned address) {
    arrive_and_release(find("mbarrier.arrive", address), address);
}

// The copies since the thread's last group are handed to the barrier, which then waits for their bytes. Copies of
// earlier groups are left to the waits for those groups.
void mbarrier_arrive_after_copies(unsigned address) {
    Thread& thread = current();
    TransactionBarrier& barrier = find("cp.async.mbarrier.arrive", address);
    CopyQueue& queue = *thread.copies;
    const std::size_t first = queue.group_ends.empty() ? 0 : queue.group_ends.back();
    for (std::size_t i = first; i < queue.copies.size(); ++i) {
        const AsyncCopy& copy = queue.copies[i];
        if (copy.source == nullptr) continue;  // performed at once
        barrier.bytes_left += 16;
        barrier.copies.push_back({copy.address, copy.bytes, 16 - copy.bytes, copy.source, mark_of_copies(thread)});
    }
    queue.copies.resize(first);
    thread.copied.release();
    arrive(*thread.owner, barrier, address);
    if (waited_for(barrier)) perform_all(*thread.owner, barrier);
}

void mbarrier_expect(unsigned address, unsigned bytes) {
    TransactionBarrier& barrier = find("mbarrier.arrive.expect_tx", address);
    barrier.bytes_left += bytes;
    arrive_and_release(barrier, address);
}

void mbarrier_wait(unsigned address, unsigned parity) {
    Thread& thread = current();
    TransactionBarrier& barrier = find("mbarrier.try_wait", address);
    if (parity > 1) fail("mbarrier.try_wait: parity %u, expected 0 or 1", parity);
    if (barrier.parity == parity) perform_all(*thread.owner, barrier);
    if (barrier.parity != parity) {
        if (barrier.behind) put_behind(thread);
        return;
    }
    barrier.waiting[thread.warp->index] |= 1u << thread.lane;
    wait_for_wake(thread);
}

void bulk_copy(unsigned address, const void* pointer, unsigned bytes, unsigned mbarrier) {
    Thread& thread = current();
    Block& block = *thread.owner;
    Worker& worker = *block.worker;
    check_shared(thread, "cp.async.bulk", address, 16);
    if (bytes == 0 || bytes % 16 != 0) fail("cp.async.bulk: %u bytes, expected a multiple of 16", bytes);
    check_shared(thread, "cp.async.bulk", address + bytes - 16, 16);
    if (reinterpret_cast<std::uintptr_t>(pointer) % 16 != 0) fail("cp.async.bulk: the source is not 16-byte aligned");
    read_global(pointer, bytes);
    worker.add(Counter::bulk_copy_bytes, bytes);
    TransactionBarrier& barrier = find("cp.async.bulk", mbarrier);
    const BulkCopy copy{address, bytes, 0, pointer, 0};  // the asynchronous proxy needs no fence from itself
    if (waited_for(barrier) || (worker.launch->request->seed != 0 && worker.draw() % 4 == 0)) {
        perform(block, barrier, copy);
        complete_if_done(block, barrier);
    } else {
        barrier.copies.push_back(copy);
    }
}

}  // namespace emu
