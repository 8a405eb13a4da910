// SPDX-License-Identifier: Apache-2.0
// Who runs next, and who waits for whom. A thread runs until it has to wait; then, or now and then at random, another
// takes over: a lane of the same warp if one can run, otherwise any warp of any resident block. With odd seeds warps
// have ranks, redrawn now and then, and the first warp in rank that can run does: the last is held back until no other
// can go on without it, which random turns alone almost never bring about (Burckhardt et al., ASPLOS'10). The order is
// a function of the seed, so a failure can be reproduced.
#include <cstdio>
#include <cstring>
#include <string>
#include <thread>

#include "runtime/state.hpp"

namespace emu {

namespace {

const char* const kOperationNames[] = {"__syncwarp", "shuffle", "vote", "ldmatrix.x2", "ldmatrix.x4",
                                       "ldmatrix.x4.trans", "mma.m16n8k16", "mma.sp.m16n8k32",
                                       "wgmma.fence", "wgmma.mma_async", "wgmma.commit_group", "wgmma.wait_group"};

// At one in this many meetings, another warp gets a turn although this one could go on.
constexpr unsigned kPreempt = 8;

unsigned pick_bit(unsigned mask, unsigned start) {
    start &= 31;
    const unsigned rotated = mask >> start | mask << (-start & 31);
    return (static_cast<unsigned>(__builtin_ctz(rotated)) + start) & 31;
}

void set_ready(Warp& warp, unsigned lanes) {
    warp.ready |= lanes;
    if (warp.ready != 0) warp.block->ready_warps |= 1u << warp.index;
}

void set_waiting(Thread& thread) {
    Warp& warp = *thread.warp;
    warp.ready &= ~(1u << thread.lane);
    if (warp.ready == 0) warp.block->ready_warps &= ~(1u << warp.index);
}

void append(std::string& text, const char* format, ...) __attribute__((format(printf, 2, 3)));
void append(std::string& text, const char* format, ...) {
    char part[160];
    va_list arguments;
    va_start(arguments, format);
    std::vsnprintf(part, sizeof part, format, arguments);
    va_end(arguments);
    text += part;
}

[[noreturn]] void report_deadlock(Block& block) {
    std::string text = "deadlock:";
    for (unsigned w = 0; w < block.warp_count; ++w) {
        Warp& warp = block.warps[w];
        for (unsigned b = 0; b < kNamedBarriers; ++b) {
            if (const unsigned lanes = block.barriers[b].waiting[w]) {
                append(text, " warp %u lanes %08x wait at ", w, lanes);
                if (b == 0) append(text, "__syncthreads;");
                else append(text, "barrier %u;", b);
            }
        }
        for (unsigned i = 0; i < warp.meeting_count; ++i) {
            const Meeting& meeting = warp.meetings[i];
            append(text, " warp %u lanes %08x wait at %s for lanes %08x;", w, meeting.arrived,
                   name_of(meeting.operation), meeting.mask & ~meeting.arrived);
        }
        for (const auto& [address, barrier] : block.transactions) {
            if (const unsigned lanes = barrier.waiting[w]) {
                append(text, " warp %u lanes %08x wait for %u arrivals and %lld bytes at the mbarrier at offset %u;", w,
                       lanes, barrier.arrivals_left, barrier.bytes_left, address - kSharedBase);
            }
        }
        const unsigned all = w + 1 < block.warp_count ? ~0u : ~0u >> (31 - (block.block_dim.x - 1) % 32);
        if (warp.live != all) append(text, " warp %u lanes %08x have ended;", w, all & ~warp.live);
    }
    fail("%s", text.c_str());
}

Thread* pick_in(Block& block, unsigned random) {
    Warp& warp = block.warps[pick_bit(block.ready_warps, random)];
    return &block.thread(warp.index * 32 + pick_bit(warp.ready, random >> 5));
}

// Another resident block that can run, or `otherwise`.
Block& pick_block(Worker& worker, Block& otherwise) {
    const std::size_t count = worker.blocks.size();
    if (count == 1) return otherwise;
    Block& other = *worker.blocks[worker.draw() % count];
    return other.running && other.ready_warps != 0 ? other : otherwise;
}

// The thread that runs next, where `block` has one that can; worker.blocks are few and have at most 32 warps each.
Thread* pick(Worker& worker, Block& block) {
    const unsigned random = worker.draw();
    if (!worker.ranked) return pick_in(pick_block(worker, block), random);
    Warp* first = nullptr;
    for (auto& candidate : worker.blocks) {
        for (unsigned rest = candidate->running ? candidate->ready_warps : 0; rest != 0; rest &= rest - 1) {
            Warp& warp = candidate->warps[__builtin_ctz(rest)];
            if (first == nullptr || warp.rank < first->rank) first = &warp;
        }
    }
    return &first->block->thread(first->index * 32 + pick_bit(first->ready, random));
}

void switch_to(Thread& from, Thread& to) {
    if (&from == &to) return;
    from.owner->worker->add(Counter::switches);
    switch_context(from.context, to.context);
}

// The current thread has to wait (or ended): gives way to another.
void give_way(Thread& thread) {
    Block& block = *thread.owner;
    Warp& warp = *thread.warp;
    Worker& worker = *block.worker;
    if (warp.ready != 0) {
        switch_to(thread, block.thread(warp.index * 32 + pick_bit(warp.ready, thread.lane + 1)));
        return;
    }
    if (block.ready_warps == 0) report_deadlock(block);
    switch_to(thread, *pick(worker, block));
}

void maybe_preempt(Thread& thread) {
    Worker& worker = *thread.owner->worker;
    if (worker.draw() % kPreempt != 0) return;
    thread.warp->rank = worker.draw();
    switch_to(thread, *pick(worker, *thread.owner));
}

void complete(Block& block, Barrier& barrier) {
    // Whatever the threads that meet here wrote and fenced is published to wgmma from now on.
    check_warpgroups(block);
    block.worker->add(Counter::barriers);
    switch (barrier.reduce) {
        case Reduce::none: barrier.result = 0; break;
        case Reduce::any: barrier.result = barrier.any; break;
        case Reduce::all: barrier.result = barrier.all; break;
        case Reduce::count: barrier.result = barrier.count; break;
    }
    unsigned behind = 0;
    for (unsigned w = 0; w < block.warp_count; ++w) behind |= barrier.waiting[w] & block.warps[w].behind;
    for (unsigned w = 0; w < block.warp_count; ++w) {
        const unsigned lanes = barrier.waiting[w];
        if (lanes == 0) continue;
        Warp& warp = block.warps[w];
        flush_logs(warp);
        for (unsigned rest = lanes; rest != 0; rest &= rest - 1) {
            Thread& thread = block.thread(w * 32 + static_cast<unsigned>(__builtin_ctz(rest)));
            thread.stores.published = thread.stores.epoch;
        }
        if (behind != 0) warp.behind |= lanes;
        barrier.waiting[w] = 0;
        set_ready(warp, lanes);
    }
    barrier.arrived = 0, barrier.any = 0, barrier.all = 1, barrier.count = 0, barrier.expected = 0;
}

int wait_at(Thread& thread, unsigned id, unsigned expected, Reduce reduce, int value) {
    Block& block = *thread.owner;
    Barrier& barrier = block.barriers[id];
    if (barrier.arrived != 0 && (barrier.reduce != reduce || barrier.expected != expected)) {
        fail("divergent barrier: threads wait at different kinds of barrier %u", id);
    }
    barrier.reduce = reduce, barrier.expected = expected;
    barrier.any |= value != 0, barrier.all &= value != 0, barrier.count += value != 0;
    barrier.waiting[thread.warp->index] |= 1u << thread.lane;
    set_waiting(thread);
    if (++barrier.arrived == (expected != 0 ? expected : block.live_threads)) {
        complete(block, barrier);
        switch_to(thread, *pick(*block.worker, block));
    } else {
        give_way(thread);
    }
    return barrier.result;
}

void end_thread(Thread& thread) {
    Block& block = *thread.owner;
    Warp& warp = *thread.warp;
    warp.live &= ~(1u << thread.lane);
    set_waiting(thread);
    for (unsigned i = 0; i < warp.meeting_count; ++i) {
        if (warp.meetings[i].mask >> thread.lane & 1) {
            fail("divergent collective: the thread ends while lanes %08x of its warp wait for it at %s",
                 warp.meetings[i].arrived, name_of(warp.meetings[i].operation));
        }
    }
    if (--block.live_threads == 0) {
        check_warpgroups(block);
        check_transactions_done(block);
        for (unsigned w = 0; w < block.warp_count; ++w) flush_logs(block.warps[w]);
        for (unsigned w = 0; w < block.warp_count; ++w) check_wgmma_done(block.warps[w]);
        block.running = false;
        switch_context(thread.context, block.worker->main);
    }
    Barrier& barrier = block.barriers[0];  // threads that ended are not waited for
    if (barrier.arrived != 0 && barrier.arrived == block.live_threads) complete(block, barrier);
    give_way(thread);
}

void fiber_main() {
    Thread& thread = current();
    Launch& launch = *thread.owner->worker->launch;
    launch.body(launch.request->arguments);
    end_thread(thread);
    __builtin_unreachable();
}

}  // namespace

const char* name_of(Operation operation) { return kOperationNames[static_cast<unsigned>(operation)]; }

void prepare_block(Block& block) {
    const unsigned threads = block.block_dim.x;
    block.live_threads = threads;
    block.ready_warps = 0;
    for (unsigned b = 0; b < kNamedBarriers; ++b) block.barriers[b] = Barrier{};
    block.transactions.clear();
    for (unsigned w = 0; w < block.warp_count; ++w) {
        Warp& warp = block.warps[w];
        warp.block = &block, warp.index = w, warp.meeting_count = 0, warp.behind = 0, warp.rank = block.worker->draw();
        warp.live = w * 32 + 32 <= threads ? ~0u : ~0u >> (32 - threads % 32);
        warp.ready = 0;
        set_ready(warp, warp.live);
        reset_wgmma(warp);
    }
    for (unsigned id = 0; id < threads; ++id) {
        char* stack = block.stacks + id * kStackBytes;
        Thread& thread = *new (stack) Thread;
        thread.index = {id, 0, 0};
        thread.block = &block;
        thread.owner = &block;
        thread.warp = &block.warps[id / 32];
        thread.id = id, thread.lane = id % 32;
        thread.copies = &block.copies[id];
        thread.copies->clear();
        prepare_context(thread.context, stack + kStackBytes / 4, kStackBytes / 4 * 3, fiber_main);
    }
    block.running = true;
}

void run_until_block_ends(Worker& worker) {
    for (auto& block : worker.blocks) {
        if (!block->running) continue;
        switch_context(worker.main, pick_in(*block, worker.draw())->context);
        return;
    }
}

void meet(Operation operation, unsigned mask, void* argument, void (*perform)(Warp&, unsigned)) {
    Thread& thread = current();
    Warp& warp = *thread.warp;
    const unsigned me = 1u << thread.lane;
    unsigned i = 0;
    while (i < warp.meeting_count && (warp.meetings[i].mask & mask) == 0) ++i;
    Meeting& meeting = warp.meetings[i];
    if (i == warp.meeting_count) {
        if ((mask & me) == 0) fail("%s: mask %08x lacks the calling lane", name_of(operation), mask);
        if ((mask & ~warp.live) != 0) {
            fail("%s: waits for lanes %08x, which have ended", name_of(operation), mask & ~warp.live);
        }
        ++warp.meeting_count;
        meeting = {operation, mask, 0};
    } else if (meeting.operation != operation || meeting.mask != mask) {
        fail("divergent collective: this lane is at %s (mask %08x), lanes %08x of its warp are at %s (mask %08x)",
             name_of(operation), mask, meeting.arrived, name_of(meeting.operation), meeting.mask);
    }
    warp.argument[thread.lane] = argument;
    meeting.arrived |= me;
    if (meeting.arrived != mask) {
        set_waiting(thread);
        give_way(thread);
        return;
    }
    warp.meetings[i] = warp.meetings[--warp.meeting_count];
    if (mask == warp.live) flush_logs(warp);
    perform(warp, mask);
    set_ready(warp, mask);
    maybe_preempt(thread);
}

void wait_for_wake(Thread& thread) {
    set_waiting(thread);
    give_way(thread);
}

void wake(Block& block, unsigned (&waiting)[kMaxWarps], bool behind) {
    for (unsigned w = 0; w < block.warp_count; ++w) {
        if (waiting[w] == 0) continue;
        if (behind) block.warps[w].behind |= waiting[w];
        set_ready(block.warps[w], waiting[w]);
        waiting[w] = 0;
    }
}

void look_again() {
    constexpr unsigned kLooks = 256;
    Thread& thread = current();
    Block& block = *thread.owner;
    Launch& launch = *block.worker->launch;
    if (launch.failed) switch_context(thread.context, block.worker->main);
    if (++thread.looks % kLooks == 0) {
        bool alone = true;
        for (unsigned long long i = 0; i < block.number && alone; ++i) alone = launch.ended[i];
        if (alone && thread.last_look) fail("waits for global memory that no earlier block will write any more");
        thread.last_look = alone;
        std::this_thread::yield();  // to the other workers
    }
    // Anyone may run next, whatever the ranks: by rank, two threads that poll might take turns for ever.
    Worker& worker = *block.worker;
    switch_to(thread, *pick_in(pick_block(worker, block), worker.draw()));
}

void sometimes_let_others_run() { maybe_preempt(current()); }

int block_barrier(Reduce reduce, int value) { return wait_at(current(), 0, 0, reduce, value); }

void named_barrier(unsigned id, unsigned threads) {
    if (id >= kNamedBarriers || threads == 0 || threads % 32 != 0) {
        fail("barrier %u for %u threads: expected one of 0..15, a multiple of 32 threads", id, threads);
    }
    wait_at(current(), id, threads, Reduce::none, 0);
}

}  // namespace emu
