// SPDX-License-Identifier: Apache-2.0
// Pairs columns so that their slots have at most two values in a group of four, by one warp. Gives the same pairs in
// the same order as src/flashllm/formats/slot24_groups.py; the rules are in docs/formats/slot24.md.
#pragma once

#include "flashllm/portable.cuh"
#include "flashllm/slot24.cuh"
#include "flashllm/slot24_matching.cuh"
#include "flashllm/slot24_pairs.cuh"

namespace flashllm {
namespace slot24 {

constexpr int kAttempts = 8;         // pairings that are tried
constexpr int kCarefulAttempts = 6;  // the first of them, which keep equal residues apart
constexpr int kQuads = kPairs / 2;   // two neighbouring slots each

template <int kPartRows>
struct GroupProblem : Problem<kPartRows> {
    Matching<Rows<kPartRows>, kQuads> slots;  // of slots whose left has an even residue with those of an odd one
    unsigned char have[kQuads];               // residues of a quad, a bit for each of four lefts and four rights
    unsigned char sets[kQuads];               // quads in their final order
};

// The data that a warp needs for groups of up to kValues values.
template <int kPartRows, int kValues> struct ProblemFor { using Type = Problem<kPartRows>; };
template <int kPartRows> struct ProblemFor<kPartRows, 2> { using Type = GroupProblem<kPartRows>; };

// Two words for the rows of a slot. The first word of one slot and the second of another have a bit in common where the
// two slots have more than two values in a group, whose rows are eight apart.
template <typename Rows>
FLASHLLM_DEVICE void group_words(Rows rows, Rows& first, Rows& second) {
    const Rows low = static_cast<Rows>(0x00ff00ff00ff00ffull);
    const Rows one = (rows | rows >> 8) & low, two = rows & rows >> 8 & low;
    first = one | two << 8, second = two | one << 8;
}

// Place of the left of slot `number` among those of even (parity 0) or odd residue. Every other copy of the dummies is
// in reverse order.
FLASHLLM_DEVICE int place_of(int number, int parity, int window) {
    const int four = number / 2 * 4, dummy = four - window / 2;
    const int swapped = dummy >= 0 && (dummy & 4) != 0 ? 1 : 0;
    return four + number % 2 * 2 + (parity ^ swapped);
}

// Orders the quads in sets of two with all different residues, as far as there are any; the other quads come last.
template <int kPartRows>
FLASHLLM_DEVICE void order_quads(GroupProblem<kPartRows>& p, int lane) {
    const unsigned low = p.have[lane], high = p.have[lane + 32];
    unsigned low_waiting = kWarp, high_waiting = kWarp;  // a bit for each quad
    int rest[2] = {-1, -1};  // quads that found no other: numbers `lane` and `lane` + 32 of them
    int ordered = 0, left = 0;
#pragma unroll 1
    for (int quad = 0; quad < kQuads; ++quad) {
        const unsigned own = 1u << quad % 32;
        if (((quad < 32 ? low_waiting : high_waiting) & own) == 0) continue;
        if (quad < 32) low_waiting ^= own;
        else high_waiting ^= own;
        const unsigned wanted = 0xffu ^ p.have[quad];  // the residues that it lacks
        const unsigned low_others = __ballot_sync(kWarp, low == wanted) & low_waiting;
        const unsigned high_others = __ballot_sync(kWarp, high == wanted) & high_waiting;
        if ((low_others | high_others) == 0) {
            if (left == lane) rest[0] = quad;
            if (left == lane + 32) rest[1] = quad;
            ++left;
            continue;
        }
        int other;
        if (low_others != 0) {
            other = __ffs(static_cast<int>(low_others)) - 1;
            low_waiting &= ~(1u << other);
        } else {
            other = __ffs(static_cast<int>(high_others)) + 31;
            high_waiting &= ~(1u << (other - 32));
        }
        if (lane == 0) {
            p.sets[ordered] = static_cast<unsigned char>(quad);
            p.sets[ordered + 1] = static_cast<unsigned char>(other);
        }
        ordered += 2;
    }
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        if (rest[i] >= 0) p.sets[ordered + i * 32 + lane] = static_cast<unsigned char>(rest[i]);
    }
    __syncwarp();
}

// Pairs the loaded columns and orders their slots; fills `listed`. False when no attempt succeeds.
template <int kPartRows>
FLASHLLM_DEVICE bool pair_in_groups(GroupProblem<kPartRows>& p, int window, int lane) {
    using M = Matching<Rows<kPartRows>, kQuads>;
    M& slots = p.slots;
#pragma unroll 1
    for (int attempt = 0; attempt < kAttempts; ++attempt) {
        if (!match_evenly(p.columns, attempt, lane)) return false;
        const auto right_residue = [&](int left) { return column_at(p.columns.partner[left], 1, window) & 3; };
#pragma unroll
        for (int parity = 0; parity < 2; ++parity) {
#pragma unroll
            for (int j = 0; j < M::kOwn; ++j) {
                const int number = j * 32 + lane, left = place_of(number, parity, window);
                Rows<kPartRows> word[2];
                group_words(p.columns.rows[0][left] | p.columns.rows[1][p.columns.partner[left]], word[0], word[1]);
                slots.rows[parity][number] = word[parity];
                slots.kind[parity][number] =
                    static_cast<unsigned char>(attempt < kCarefulAttempts ? right_residue(left) : parity);
            }
        }
        __syncwarp();
        if (!match_evenly(slots, 0, lane)) continue;
#pragma unroll
        for (int j = 0; j < M::kOwn; ++j) {
            const int quad = j * 32 + lane;
            const int lefts[2] = {place_of(quad, 0, window), place_of(slots.partner[quad], 1, window)};
            unsigned bits = 0;
            for (int i = 0; i < 2; ++i) {
                bits |= 1u << (column_at(lefts[i], 0, window) & 3) | 16u << right_residue(lefts[i]);
            }
            p.have[quad] = static_cast<unsigned char>(bits);
        }
        __syncwarp();
        order_quads(p, lane);
#pragma unroll
        for (int j = 0; j < M::kOwn; ++j) {
            const int at = j * 32 + lane, quad = p.sets[at];
            p.list(2 * at, place_of(quad, 0, window), window);
            p.list(2 * at + 1, place_of(slots.partner[quad], 1, window), window);
        }
        __syncwarp();
        return true;
    }
    return false;
}

}  // namespace slot24
}  // namespace flashllm
