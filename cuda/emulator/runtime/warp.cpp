// SPDX-License-Identifier: Apache-2.0
// Warp-wide instructions except wgmma: the last lane to arrive does the work of all.
#include <cstring>

#include "runtime/state.hpp"

namespace emu {

namespace {

template <typename T>
T& argument(Warp& warp, unsigned lane) {
    return *static_cast<T*>(warp.argument[lane]);
}

template <typename Body>
void for_lanes(unsigned mask, Body body) {
    for (; mask != 0; mask &= mask - 1) body(static_cast<unsigned>(__builtin_ctz(mask)));
}

struct ShuffleArgument {
    Shuffle kind;
    unsigned parameter, width;
    std::uint64_t value, result;
};

void perform_shuffle(Warp& warp, unsigned mask) {
    for_lanes(mask, [&](unsigned lane) {
        auto& mine = argument<ShuffleArgument>(warp, lane);
        const unsigned first = lane & ~(mine.width - 1), last = first + mine.width - 1;
        long source = lane;
        switch (mine.kind) {
            case Shuffle::index: source = first + (mine.parameter & (mine.width - 1)); break;
            case Shuffle::up: source = static_cast<long>(lane) - mine.parameter; break;
            case Shuffle::down: source = static_cast<long>(lane) + mine.parameter; break;
            case Shuffle::exchange: source = lane ^ mine.parameter; break;
        }
        const bool outside = source < static_cast<long>(first) || source > static_cast<long>(last);
        if (outside) source = lane;
        if (!(mask >> source & 1)) {
            mine.result = 0x7fff7fff7fff7fffull;  // undefined on a GPU
        } else {
            mine.result = argument<ShuffleArgument>(warp, static_cast<unsigned>(source)).value;
        }
    });
}

struct VoteArgument {
    bool value;
    unsigned result;
};

void perform_vote(Warp& warp, unsigned mask) {
    unsigned votes = 0;
    for_lanes(mask, [&](unsigned lane) {
        if (argument<VoteArgument>(warp, lane).value) votes |= 1u << lane;
    });
    for_lanes(mask, [&](unsigned lane) { argument<VoteArgument>(warp, lane).result = votes; });
}

struct MatrixArgument {
    unsigned* fragment;
    unsigned address;
    bool transposed;
};

void perform_load_matrix(Warp& warp, unsigned matrices) {
    Block& block = *warp.block;
    block.worker->add(Counter::ldmatrix_requests);
    for (unsigned m = 0; m < matrices; ++m) {
        unsigned addresses[8];
        unsigned short element[8][8];
        for (unsigned row = 0; row < 8; ++row) {
            addresses[row] = argument<MatrixArgument>(warp, m * 8 + row).address;
            std::memcpy(element[row], shared_pointer(block, addresses[row]), 16);
        }
        block.worker->add(Counter::ldmatrix_ideal);
        block.worker->add(Counter::ldmatrix_wavefronts, wavefronts16(addresses, 8));
        for (unsigned lane = 0; lane < 32; ++lane) {
            auto& mine = argument<MatrixArgument>(warp, lane);
            const unsigned row = lane / 4, column = lane % 4 * 2;
            const unsigned low = mine.transposed ? element[column][row] : element[row][column];
            const unsigned high = mine.transposed ? element[column + 1][row] : element[row][column + 1];
            mine.fragment[m] = low | high << 16;
        }
    }
}

struct MmaArgument {
    Value type;
    float* c;
    const unsigned *a, *b;
    unsigned metadata, selector;  // of a sparse instruction
};

// The fragments of a warp: lane 4 g + t holds rows g and g + 8, columns 2 t.. and 2 t + 8.. of a; of b, column g.
template <unsigned kDepth>
struct Fragments {
    std::uint16_t a[16][16], b[8][kDepth];
    float c[16][8];

    explicit Fragments(Warp& warp) {
        for (unsigned lane = 0; lane < 32; ++lane) {
            auto& mine = argument<MmaArgument>(warp, lane);
            const unsigned g = lane / 4, t = lane % 4 * 2;
            for (unsigned i = 0; i < 4; ++i) std::memcpy(&a[g + i % 2 * 8][t + i / 2 * 8], &mine.a[i], 4);
            for (unsigned i = 0; i < kDepth / 8; ++i) std::memcpy(&b[g][t + i * 8], &mine.b[i], 4);
            for (unsigned i = 0; i < 2; ++i) std::memcpy(&c[g + i * 8][t], &mine.c[i * 2], 8);
        }
    }

    void give_back(Warp& warp) const {
        for (unsigned lane = 0; lane < 32; ++lane) {
            auto& mine = argument<MmaArgument>(warp, lane);
            for (unsigned i = 0; i < 2; ++i) std::memcpy(&mine.c[i * 2], &c[lane / 4 + i * 8][lane % 4 * 2], 8);
        }
    }
};

void perform_mma(Warp& warp, unsigned) {
    Fragments<16> fragments(warp);
    multiply_add(argument<MmaArgument>(warp, 0).type, fragments.c[0], 8, fragments.a[0], fragments.b[0]);
    fragments.give_back(warp);
    warp.block->worker->add(Counter::mma_m16n8k16);
}

void perform_mma_sp(Warp& warp, unsigned) {
    const auto& first = argument<MmaArgument>(warp, 0);
    for (unsigned lane = 1; lane < 32; ++lane) {
        const auto& other = argument<MmaArgument>(warp, lane);
        if (other.type != first.type || other.selector != first.selector) {
            fail("mma.sp: lanes 0 and %u give different types or selectors", lane);
        }
    }
    unsigned char place[16][16];
    for (unsigned row = 0; row < 16; ++row) {
        for (unsigned slot = 0; slot < 16; ++slot) {
            const unsigned group = slot / 2, supplier = row % 8 * 4 + first.selector * 2 + group / 4;
            const unsigned bit = row / 8 * 16 + group % 4 * 4 + slot % 2 * 2;
            place[row][slot] = static_cast<unsigned char>(
                group * 4 + (argument<MmaArgument>(warp, supplier).metadata >> bit & 3u));
        }
    }
    Fragments<32> fragments(warp);
    multiply_add_sparse(first.type, fragments.c[0], fragments.a[0], fragments.b[0], place);
    fragments.give_back(warp);
    warp.block->worker->add(Counter::mma_sp_m16n8k32);
}

// For a lane whose metadata counts; also where the values are zeros, since what a GPU does then is undefined too.
void check_ordered(const Thread& thread, unsigned metadata) {
    for (unsigned i = 0; i < 8; ++i) {
        const unsigned low = metadata >> i * 4 & 3u, high = metadata >> (i * 4 + 2) & 3u;
        if (low < high) continue;
        fail("mma.sp::ordered_metadata: metadata 0x%08x places group %u of row %u at %u and %u, expected rising places",
             metadata, thread.lane % 2 * 4 + i % 4, thread.lane / 4 + i / 4 * 8, low, high);
    }
}

}  // namespace

void warp_barrier(unsigned mask) {
    Thread& thread = current();
    thread.looks = 0, thread.last_look = false;  // it went on, even if it gave up polling
    meet(Operation::syncwarp, mask, nullptr, [](Warp& warp, unsigned lanes) {
        if ((warp.behind & lanes) != 0) warp.behind |= lanes;
    });
}

std::uint64_t shuffle(Shuffle kind, unsigned mask, std::uint64_t value, unsigned parameter, unsigned width) {
    if (width == 0 || width > 32 || (width & (width - 1)) != 0) fail("shuffle: width %u is no power of two", width);
    ShuffleArgument mine{kind, parameter, width, value, 0};
    meet(Operation::shuffle, mask, &mine, perform_shuffle);
    return mine.result;
}

unsigned ballot(unsigned mask, bool value) {
    VoteArgument mine{value, 0};
    meet(Operation::vote, mask, &mine, perform_vote);
    return mine.result;
}

unsigned live_lanes() { return current().warp->live; }

void load_matrix(unsigned* fragment, unsigned matrices, unsigned address, bool transposed) {
    Thread& thread = current();
    if (thread.lane < matrices * 8) check_shared(thread, "ldmatrix", address, 16);
    MatrixArgument mine{fragment, address, transposed};
    if (matrices == 4) {
        const Operation operation = transposed ? Operation::ldmatrix_x4_trans : Operation::ldmatrix_x4;
        meet(operation, ~0u, &mine, [](Warp& warp, unsigned) { perform_load_matrix(warp, 4); });
    } else {
        meet(Operation::ldmatrix_x2, ~0u, &mine, [](Warp& warp, unsigned) { perform_load_matrix(warp, 2); });
    }
}

void mma_m16n8k16(Value type, float* c, const unsigned* a, unsigned b0, unsigned b1) {
    const unsigned b[2] = {b0, b1};
    MmaArgument mine{type, c, a, b, 0, 0};
    meet(Operation::mma, ~0u, &mine, perform_mma);
}

void mma_sp_m16n8k32(Value type, float* c, const unsigned* a, const unsigned* b, unsigned metadata, unsigned selector) {
    const Thread& thread = current();
    if (thread.lane % 4 / 2 == selector) check_ordered(thread, metadata);
    MmaArgument mine{type, c, a, b, metadata, selector};
    meet(Operation::mma_sp, ~0u, &mine, perform_mma_sp);
}

}  // namespace emu
