// SPDX-License-Identifier: Apache-2.0
// Warpgroup tensor cores. Each warp has its own quarter (16 of 64 rows) of every instruction, and the four quarters
// are not in step, as on the hardware. An instruction reads its operands when it is waited for; they are also read
// when it is issued, and a difference is a race. Until the wait the accumulators hold NaN.
#include <cstring>

#include "runtime/state.hpp"

namespace emu {

namespace {

constexpr unsigned kMaxColumns = 256;
constexpr unsigned kRows = 16;  // of one warp
constexpr unsigned kDepth = 16;  // K of one instruction

struct Operands {
    std::uint16_t a[kRows][kDepth];
    std::uint16_t b[kMaxColumns][kDepth];
};

struct Accumulator {
    float* place[32] = {};  // each lane's registers
    unsigned columns = 0;
    unsigned in_flight = 0;
    float value[kRows * kMaxColumns];
};

struct Instruction {
    Value type;
    unsigned columns;
    bool a_in_registers;  // read at the issue alone: which registers the compiler uses is up to it
    std::uint64_t a, b;
    unsigned accumulator;  // index in WgmmaQueue::accumulators
    std::unique_ptr<Operands> at_issue;
};

struct WgmmaArgument {
    Value type;
    float* c;
    unsigned columns;
    const unsigned* registers;
    std::uint64_t a, b;
};

}  // namespace

struct WgmmaQueue {
    bool fenced = false;  // since the last wait
    std::vector<std::unique_ptr<Accumulator>> accumulators;
    std::vector<Instruction> instructions;
    std::vector<std::unique_ptr<Operands>> spare;
    std::vector<unsigned> group_ends;
};

void WgmmaQueueDeleter::operator()(WgmmaQueue* queue) const { delete queue; }

namespace {

// Byte address of row r, 16-byte chunk `chunk` of a K-major operand with the 128-byte swizzle: the address bits 7..9
// (the row in its group of 8) are added without carry to bits 4..6.
unsigned row_address(const char* name, std::uint64_t descriptor, unsigned row, unsigned chunk) {
    const auto low = static_cast<unsigned>(descriptor), high = static_cast<unsigned>(descriptor >> 32);
    const unsigned start = (low & 0x3fffu) << 4, group_stride = (high & 0x3fffu) << 4, swizzle = high >> 30;
    if (swizzle != 1 || group_stride != 1024 || (high >> 17 & 7) != 0 || start % 1024 >= 128 || start % 32 != 0) {
        fail("wgmma.mma_async: descriptor %016llx of operand %s: expected the 128-byte swizzle, 1024-byte groups, an "
             "address of 1024 n + 32 k, k < 4", static_cast<unsigned long long>(descriptor), name);
    }
    const unsigned address = start + row / 8 * group_stride + row % 8 * 128 + chunk * 16;
    return address ^ (address >> 7 & 7u) << 4;
}

void read_rows(Warp& warp, const char* name, std::uint64_t descriptor, unsigned first, unsigned rows,
               std::uint16_t (*to)[kDepth]) {
    Block& block = *warp.block;
    const Thread& thread = current();
    for (unsigned r = 0; r < rows; ++r) {
        for (unsigned chunk = 0; chunk < 2; ++chunk) {
            const unsigned address = row_address(name, descriptor, first + r, chunk);
            check_shared(thread, "wgmma.mma_async", address, 16);
            std::memcpy(&to[r][chunk * 8], shared_pointer(block, address), 16);
        }
    }
}

// Every element must have been published since it was written: see Writes.
void check_published(Warp& warp, const char* name, std::uint64_t descriptor, unsigned first, unsigned rows) {
    Block& block = *warp.block;
    for (unsigned r = 0; r < rows; ++r) {
        for (unsigned chunk = 0; chunk < 2; ++chunk) {
            const unsigned address = row_address(name, descriptor, first + r, chunk);
            const unsigned* writer = &block.writer[(address - kSharedBase) / 2];
            for (unsigned i = 0; i < 8; ++i) {
                if (writer[i] == 0) continue;
                const unsigned id = (writer[i] & ~kCopiedMark) >> 20, epoch = writer[i] & 0xfffffu;
                const Thread& thread = block.thread(id);
                const Writes& writes = (writer[i] & kCopiedMark) != 0 ? thread.copied : thread.stores;
                if (epoch >= (writes.published & 0xfffffu)) {
                    fail("missing proxy fence: wgmma.mma_async reads operand %s at shared offset %u, which thread %u "
                         "wrote without fence.proxy.async and a barrier after it",
                         name, address + i * 2 - kSharedBase, id);
                }
            }
        }
    }
}

void read_operands(Warp& warp, const Instruction& instruction, Operands& to) {
    if (!instruction.a_in_registers) read_rows(warp, "a", instruction.a, warp.index % 4 * kRows, kRows, to.a);
    read_rows(warp, "b", instruction.b, 0, instruction.columns, to.b);
}

// Register r of lane 4 g + t: row g + 8 (r % 2), columns 2 t + 8 (r / 2) and the next, as in m16n8k16.
void read_registers(Warp& warp, Operands& to) {
    for (unsigned lane = 0; lane < 32; ++lane) {
        const unsigned* registers = static_cast<WgmmaArgument*>(warp.argument[lane])->registers;
        for (unsigned r = 0; r < 4; ++r) {
            std::memcpy(&to.a[lane / 4 + r % 2 * 8][lane % 4 * 2 + r / 2 * 8], registers + r, 4);
        }
    }
}

// Lane 4 g + t holds, of 8 columns j, rows g and g + 8, columns 8 j + 2 t and the next.
void gather(Accumulator& accumulator, float* value) {
    for (unsigned lane = 0; lane < 32; ++lane) {
        for (unsigned j = 0; j < accumulator.columns / 8; ++j) {
            for (unsigned i = 0; i < 2; ++i) {
                float* to = value + (lane / 4 + i * 8) * accumulator.columns + j * 8 + lane % 4 * 2;
                std::memcpy(to, accumulator.place[lane] + j * 4 + i * 2, 8);
            }
        }
    }
}

void scatter(const Accumulator& accumulator) {
    for (unsigned lane = 0; lane < 32; ++lane) {
        for (unsigned j = 0; j < accumulator.columns / 8; ++j) {
            for (unsigned i = 0; i < 2; ++i) {
                const float* from = accumulator.value + (lane / 4 + i * 8) * accumulator.columns + j * 8 + lane % 4 * 2;
                std::memcpy(accumulator.place[lane] + j * 4 + i * 2, from, 8);
            }
        }
    }
}

unsigned find_accumulator(Warp& warp, unsigned columns) {
    WgmmaQueue& queue = *warp.wgmma;
    auto place = [&](unsigned lane) { return static_cast<WgmmaArgument*>(warp.argument[lane])->c; };
    unsigned i = 0;
    while (i < queue.accumulators.size() && queue.accumulators[i]->place[0] != place(0)) ++i;
    if (i == queue.accumulators.size()) queue.accumulators.push_back(std::make_unique<Accumulator>());
    Accumulator& accumulator = *queue.accumulators[i];
    if (accumulator.in_flight != 0) return i;
    const bool known = accumulator.columns == columns;
    for (unsigned lane = 0; lane < 32; ++lane) accumulator.place[lane] = place(lane);
    accumulator.columns = columns;
    float now[kRows * kMaxColumns];
    gather(accumulator, now);
    // Accumulators that are untouched since the last wait need no new fence.
    if (!queue.fenced && (!known || std::memcmp(now, accumulator.value, sizeof(float) * kRows * columns) != 0)) {
        fail("missing wgmma.fence: the accumulators were written since the last wgmma.wait_group");
    }
    std::memcpy(accumulator.value, now, sizeof(float) * kRows * columns);
    for (unsigned lane = 0; lane < 32; ++lane) {
        std::memset(accumulator.place[lane], 0xff, sizeof(float) * columns / 2);
    }
    return i;
}

Counter counter_of(unsigned columns) {
    return static_cast<Counter>(static_cast<unsigned>(Counter::wgmma_m64n8k16) + columns / 8 - 1);
}

void perform_wgmma(Warp& warp, unsigned) {
    WgmmaQueue& queue = *warp.wgmma;
    auto& call = *static_cast<WgmmaArgument*>(warp.argument[0]);
    for (unsigned lane = 1; lane < 32; ++lane) {
        auto& other = *static_cast<WgmmaArgument*>(warp.argument[lane]);
        if (other.a != call.a || other.b != call.b || other.columns != call.columns ||
            (other.registers == nullptr) != (call.registers == nullptr)) {
            fail("wgmma.mma_async: lanes 0 and %u give different descriptors or shapes", lane);
        }
    }
    if (call.columns == 0 || call.columns > kMaxColumns || call.columns % 8 != 0) {
        fail("wgmma.mma_async: no shape m64n%uk16", call.columns);
    }
    if (warp.index / 4 * 4 + 4 > warp.block->warp_count) fail("wgmma.mma_async: by a warp without a whole warpgroup");
    const bool in_registers = call.registers != nullptr;
    Instruction instruction{call.type, call.columns, in_registers, call.a, call.b, find_accumulator(warp, call.columns),
                            nullptr};
    if (!in_registers) check_published(warp, "a", call.a, warp.index % 4 * kRows, kRows);
    check_published(warp, "b", call.b, 0, call.columns);
    if (queue.spare.empty()) queue.spare.push_back(std::make_unique<Operands>());
    instruction.at_issue = std::move(queue.spare.back());
    queue.spare.pop_back();
    if (in_registers) read_registers(warp, *instruction.at_issue);
    read_operands(warp, instruction, *instruction.at_issue);
    ++queue.accumulators[instruction.accumulator]->in_flight;
    queue.instructions.push_back(std::move(instruction));
    ++warp.wgmma_issued;
    if (warp.index % 4 == 0) warp.block->worker->add(counter_of(call.columns));
}

void retire(Warp& warp, Instruction& instruction) {
    WgmmaQueue& queue = *warp.wgmma;
    static_assert(sizeof(Operands) < 16384, "fits a fiber's stack");
    Operands now;
    const Operands& then = *instruction.at_issue;
    if (instruction.a_in_registers) std::memcpy(now.a, then.a, sizeof now.a);
    read_operands(warp, instruction, now);
    const bool same_a = std::memcmp(now.a, then.a, sizeof now.a) == 0;
    const bool same_b = std::memcmp(now.b, then.b, instruction.columns * sizeof now.b[0]) == 0;
    if (!same_a || !same_b) {
        fail("race: operand %s of wgmma.mma_async changed between its issue and its wgmma.wait_group",
             same_a ? "b" : "a");
    }
    Accumulator& accumulator = *queue.accumulators[instruction.accumulator];
    multiply_add(instruction.type, accumulator.value, instruction.columns, now.a[0], now.b[0]);
    if (--accumulator.in_flight == 0) scatter(accumulator);
    queue.spare.push_back(std::move(instruction.at_issue));
}

}  // namespace

void reset_wgmma(Warp& warp) {
    warp.wgmma.reset(new WgmmaQueue);
    warp.wgmma_issued = 0;
}

void check_warpgroups(Block& block) {
    for (unsigned w = 0; w < block.warp_count; ++w) {
        const unsigned first = w / 4 * 4;
        if (block.warps[w].wgmma_issued != block.warps[first].wgmma_issued) {
            fail("divergent warpgroup: warp %u has issued %u wgmma.mma_async, warp %u %u", first,
                 block.warps[first].wgmma_issued, w, block.warps[w].wgmma_issued);
        }
    }
}

void check_wgmma_done(Warp& warp) {
    if (!warp.wgmma->instructions.empty()) {
        fail("warp %u ends with %zu wgmma.mma_async not waited for", warp.index, warp.wgmma->instructions.size());
    }
}

void wgmma_fence() {
    meet(Operation::wgmma_fence, ~0u, nullptr, [](Warp& warp, unsigned) { warp.wgmma->fenced = true; });
}

void wgmma(Value type, float* c, unsigned columns, const unsigned* registers, std::uint64_t a, std::uint64_t b) {
    WgmmaArgument mine{type, c, columns, registers, a, b};
    meet(Operation::wgmma, ~0u, &mine, perform_wgmma);
}

void wgmma_commit() {
    meet(Operation::wgmma_commit, ~0u, nullptr, [](Warp& warp, unsigned) {
        warp.wgmma->group_ends.push_back(static_cast<unsigned>(warp.wgmma->instructions.size()));
    });
}

void wgmma_wait(unsigned pending) {
    meet(Operation::wgmma_wait, ~0u, reinterpret_cast<void*>(static_cast<std::uintptr_t>(pending)),
         [](Warp& warp, unsigned) {
             WgmmaQueue& queue = *warp.wgmma;
             const auto keep = reinterpret_cast<std::uintptr_t>(warp.argument[0]);
             queue.fenced = false;
             if (queue.group_ends.size() <= keep) return;
             const std::size_t groups = queue.group_ends.size() - keep;
             const unsigned end = queue.group_ends[groups - 1];
             for (unsigned i = 0; i < end; ++i) retire(warp, queue.instructions[i]);
             queue.instructions.erase(queue.instructions.begin(), queue.instructions.begin() + end);
             queue.group_ends.erase(queue.group_ends.begin(),
                                    queue.group_ends.begin() + static_cast<std::ptrdiff_t>(groups));
             for (unsigned& group_end : queue.group_ends) group_end -= end;
         });
}

}  // namespace emu
