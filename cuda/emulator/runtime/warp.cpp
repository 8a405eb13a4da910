// SPDX-License-Identifier: Apache-2.0
// Warp-wide instructions but wgmma: the last lane to come does the work of all.
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
    const unsigned* a;
    unsigned b[2];
};

void perform_mma(Warp& warp, unsigned) {
    std::uint16_t a[16][16], b[8][16];
    float c[16][8];
    // Lane 4 g + t holds rows g and g + 8, columns 2 t.. and 2 t + 8.. of a; of b, column g.
    for (unsigned lane = 0; lane < 32; ++lane) {
        auto& mine = argument<MmaArgument>(warp, lane);
        const unsigned g = lane / 4, t = lane % 4 * 2;
        for (unsigned i = 0; i < 4; ++i) std::memcpy(&a[g + i % 2 * 8][t + i / 2 * 8], &mine.a[i], 4);
        for (unsigned i = 0; i < 2; ++i) std::memcpy(&b[g][t + i * 8], &mine.b[i], 4);
        for (unsigned i = 0; i < 2; ++i) std::memcpy(&c[g + i * 8][t], &mine.c[i * 2], 8);
    }
    const Value type = argument<MmaArgument>(warp, 0).type;
    multiply_add(type, c[0], 8, a[0], b[0]);
    for (unsigned lane = 0; lane < 32; ++lane) {
        auto& mine = argument<MmaArgument>(warp, lane);
        for (unsigned i = 0; i < 2; ++i) std::memcpy(&mine.c[i * 2], &c[lane / 4 + i * 8][lane % 4 * 2], 8);
    }
    warp.block->worker->add(Counter::mma_m16n8k16);
}

}  // namespace

void warp_barrier(unsigned mask) {
    meet(Operation::syncwarp, mask, nullptr, [](Warp&, unsigned) {});
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
        meet(Operation::ldmatrix_x4, ~0u, &mine, [](Warp& warp, unsigned) { perform_load_matrix(warp, 4); });
    } else {
        meet(Operation::ldmatrix_x2, ~0u, &mine, [](Warp& warp, unsigned) { perform_load_matrix(warp, 2); });
    }
}

void mma_m16n8k16(Value type, float* c, const unsigned* a, unsigned b0, unsigned b1) {
    MmaArgument mine{type, c, a, {b0, b1}};
    meet(Operation::mma, ~0u, &mine, perform_mma);
}

}  // namespace emu
