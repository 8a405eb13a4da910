// SPDX-License-Identifier: Apache-2.0
// Which columns of a window share a slot: the pairing of slot24 by one warp, for one band of one window; a lane has
// four lefts and four rights. The same pairs in the same order as from src/flashllm/formats/slot24_pairs.py; the rules
// are in docs/formats/slot24.md.
#pragma once

#include "flashllm/portable.cuh"
#include "flashllm/slot24.cuh"

namespace flashllm {
namespace slot24 {

constexpr int kOwn = kPairs / bitmap::kLanes;  // places of a list that a lane has
constexpr int kClasses = 4;                    // residues of lefts, and of rights, modulo 8
constexpr int kOrders = 24;                    // permutations of the classes
constexpr unsigned kWarp = 0xffffffffu;
constexpr unsigned char kNone = 0xff;

// A bit for each row of a band.
template <int kPartRows> struct RowsOf { using Type = unsigned; };
template <> struct RowsOf<64> { using Type = unsigned long long; };
template <int kPartRows> using Rows = typename RowsOf<kPartRows>::Type;

FLASHLLM_DEVICE int weight_of(unsigned rows) { return __popc(rows); }
FLASHLLM_DEVICE int weight_of(unsigned long long rows) {
    return __popc(static_cast<unsigned>(rows)) + __popc(static_cast<unsigned>(rows >> 32));
}

// What a warp knows of its band of a window. Places are those in the lists of lefts and rights.
template <int kPartRows>
struct alignas(16) Problem {
    Rows<kPartRows> rows[2][kPairs];  // elements of each left and right
    unsigned keys[kPairs];
    unsigned counts[kClasses];       // pairs of each class of lefts, a byte for each class of rights
    unsigned char order[2][kPairs];  // lefts and rights, the heaviest first
    unsigned char partner[kPairs];   // right of each left
    unsigned char owner[kPairs];     // left of each right
    unsigned char parent[kPairs];    // left from which the search saw each right
    unsigned char queue[kPairs];     // lefts of the search; then lefts by class
    unsigned char listed[kWindowTiles * Bands<kPartRows>::kBandColumnBytes];  // columns of both tiles
};

// Column in the window of a place in the list of lefts (side 0) or rights (1): the real ones; then the copies of the
// dummies, to and fro.
FLASHLLM_DEVICE int column_at(int place, int side, int window) {
    const int dummy = place - window / 2, residue = place & 3;  // window / 2 is a multiple of 4
    if (dummy < 0) return (place >> 2) * 8 + side * 4 + residue;
    return window + side * 4 + ((dummy & 4) == 0 ? residue : 3 - residue);
}

// The places 32 j + lane by rising key[j]; keys are all different, and below 2^31.
template <int kPartRows>
FLASHLLM_DEVICE void sort_places(Problem<kPartRows>& p, const unsigned (&key)[kOwn], unsigned char* sorted, int lane) {
    unsigned rank[kOwn] = {};
#pragma unroll
    for (int j = 0; j < kOwn; ++j) p.keys[j * 32 + lane] = key[j];
    __syncwarp();
#pragma unroll 4
    for (int i = 0; i < kPairs; i += 4) {
        const uint4 other = *reinterpret_cast<const uint4*>(p.keys + i);
#pragma unroll
        for (int j = 0; j < kOwn; ++j) {
            // The sign of a difference is whether it is lower: two instructions each.
            rank[j] += (other.x - key[j]) >> 31;
            rank[j] += (other.y - key[j]) >> 31;
            rank[j] += (other.z - key[j]) >> 31;
            rank[j] += (other.w - key[j]) >> 31;
        }
    }
#pragma unroll
    for (int j = 0; j < kOwn; ++j) sorted[rank[j]] = static_cast<unsigned char>(j * 32 + lane);
    __syncwarp();
}

// Loads the columns of both sides and sorts them by falling weight. rows_of(column): of the `columns` in the matrix.
template <int kPartRows, typename RowsOfColumn>
FLASHLLM_DEVICE void load_problem(Problem<kPartRows>& p, RowsOfColumn&& rows_of, int columns, int window, int lane) {
#pragma unroll 1
    for (int side = 0; side < 2; ++side) {
        unsigned key[kOwn];
#pragma unroll
        for (int j = 0; j < kOwn; ++j) {
            const int place = j * 32 + lane, column = column_at(place, side, window);
            const Rows<kPartRows> rows = column < columns ? rows_of(column) : 0;
            p.rows[side][place] = rows;
            key[j] = static_cast<unsigned>((kPartRows - weight_of(rows)) * kPairs + place);
        }
        sort_places(p, key, p.order[side], lane);
    }
}

// A bit for each of the lane's rights that has no row in common with a left.
template <typename Rows>
FLASHLLM_DEVICE unsigned compatible(Rows left, const Rows (&rights)[kOwn]) {
    unsigned fits = 0;
#pragma unroll
    for (int j = 0; j < kOwn; ++j) fits |= static_cast<unsigned>((left & rights[j]) == 0) << j;
    return fits;
}

// Gives the left `start` a partner by the shortest alternating path, rights by place: 32 j + lane here. `open`: bits of
// the lane's rights without an owner.
template <int kPartRows>
FLASHLLM_DEVICE bool search(Problem<kPartRows>& p, int start, const Rows<kPartRows> (&rights)[kOwn], unsigned& open,
                            int lane) {
    unsigned unseen = (1u << kOwn) - 1;
    int tail = 1;
    if (lane == 0) p.queue[0] = static_cast<unsigned char>(start);
#pragma unroll 1
    for (int head = 0; head < tail; ++head) {
        __syncwarp();
        int left = p.queue[head];
        const unsigned reach = compatible(p.rows[0][left], rights) & unseen, ends = reach & open;
        if (__any_sync(kWarp, ends != 0)) {
            int right = 0;
#pragma unroll
            for (int j = kOwn - 1; j >= 0; --j) {
                const unsigned lanes = __ballot_sync(kWarp, ends >> j & 1);
                if (lanes != 0) right = j * 32 + __ffs(static_cast<int>(lanes)) - 1;
            }
            if (lane == (right & 31)) open ^= 1u << (right >> 5);
            if (lane == 0) {
                while (right != kNone) {  // a left on the path gives its right to the one before it
                    const int given = p.partner[left];
                    p.partner[left] = static_cast<unsigned char>(right);
                    p.owner[right] = static_cast<unsigned char>(left);
                    right = given;
                    if (right != kNone) left = p.parent[right];
                }
            }
            __syncwarp();
            return true;
        }
        unseen &= ~reach;
#pragma unroll
        for (int j = 0; j < kOwn; ++j) {
            const unsigned lanes = __ballot_sync(kWarp, reach >> j & 1);
            if ((reach >> j & 1) != 0) {
                p.queue[tail + __popc(lanes & ((1u << lane) - 1))] = p.owner[j * 32 + lane];
                p.parent[j * 32 + lane] = static_cast<unsigned char>(left);
            }
            tail += __popc(lanes);
        }
    }
    return false;
}

// Fills partner and owner; false when a left has no partner in any matching.
template <int kPartRows>
FLASHLLM_DEVICE bool match(Problem<kPartRows>& p, int lane) {
    Rows<kPartRows> rights[kOwn];
    reinterpret_cast<unsigned*>(p.partner)[lane] = kNone * 0x01010101u;
    reinterpret_cast<unsigned*>(p.owner)[lane] = kNone * 0x01010101u;
    // Ranks 4 lane + j here, so that the first lane that has one has the heaviest.
    const unsigned places = reinterpret_cast<const unsigned*>(p.order[1])[lane];
#pragma unroll
    for (int j = 0; j < kOwn; ++j) rights[j] = p.rows[1][places >> 8 * j & 0xff];
    unsigned open = (1u << kOwn) - 1;
    bool all = true;
    __syncwarp();
#pragma unroll 2
    for (int turn = 0; turn < kPairs; ++turn) {
        const int left = p.order[0][turn];
        const unsigned fits = compatible(p.rows[0][left], rights) & open;
        const unsigned lanes = __ballot_sync(kWarp, fits != 0);
        all = all && lanes != 0;
        if (lane == __ffs(static_cast<int>(lanes)) - 1) {
            const unsigned lowest = fits & (0u - fits);
            const int right = places >> 8 * (__ffs(static_cast<int>(lowest)) - 1) & 0xff;
            open ^= lowest;
            p.partner[left] = static_cast<unsigned char>(right);
            p.owner[right] = static_cast<unsigned char>(left);
        }
    }
    __syncwarp();
    if (all) return true;
    open = 0;
#pragma unroll
    for (int j = 0; j < kOwn; ++j) {
        rights[j] = p.rows[1][j * 32 + lane];
        open |= static_cast<unsigned>(p.owner[j * 32 + lane] == kNone) << j;
    }
#pragma unroll 1
    for (int turn = 0; turn < kPairs; ++turn) {
        const int left = p.order[0][turn];
        if (p.partner[left] == kNone && !search(p, left, rights, open, lane)) return false;
    }
    return true;
}

// Permutation `number` (0..23, in lexicographic order) of 0..3: 8 times its values, a byte each.
FLASHLLM_DEVICE unsigned permutation(int number) {
    const int digits[kClasses] = {number / 6, number % 6 / 2, number % 2, 0};
    unsigned rest = 0x3210, packed = 0;  // a nibble for each value that is left
#pragma unroll
    for (int a = 0; a < kClasses; ++a) {
        const int at = digits[a] * 4;
        packed |= (rest >> at & 0xf) * 8 << 8 * a;
        rest = (rest & ((1u << at) - 1)) | rest >> 4 >> at << at;
    }
    return packed;
}

// Orders the pairs: 32 rounds, of which lane n in the end holds the n-th, make 32 sets of columns with 8 different
// residues. Fills `listed`.
template <int kPartRows>
FLASHLLM_DEVICE void arrange(Problem<kPartRows>& p, int window, int lane) {
    using Shape = Bands<kPartRows>;
    unsigned key[kOwn], class_at[kOwn];
#pragma unroll
    for (int j = 0; j < kOwn; ++j) {
        const int left = j * 32 + lane, right = p.partner[left];
        const int a = column_at(left, 0, window) & 3, b = column_at(right, 1, window) & 3;
        const int weight = weight_of(p.rows[0][left] | p.rows[1][right]);
        class_at[j] = static_cast<unsigned>(a * kClasses + b);
        key[j] = (class_at[j] << 7 | static_cast<unsigned>(kPartRows - weight)) * kPairs + static_cast<unsigned>(left);
    }
    unsigned char* const by_class = p.queue;
    if (lane < kClasses) p.counts[lane] = 0;
    sort_places(p, key, by_class, lane);
#pragma unroll
    for (int j = 0; j < kOwn; ++j) atomicAdd(&p.counts[class_at[j] / kClasses], 1u << class_at[j] % kClasses * 8);
    __syncwarp();

    // Pairs of each class that wait for their round, now and when the round of this lane came.
    unsigned waiting[kClasses], found[kClasses] = {};
#pragma unroll
    for (int a = 0; a < kClasses; ++a) waiting[a] = p.counts[a];
    const unsigned mine = permutation(lane);
    unsigned chosen = 0, level = kPairs / kClasses;  // no round has more pairs to choose from than the one before it
#pragma unroll 1
    for (int round = 0; round < kPairs / kClasses; ++round) {
        unsigned least = lane < kOrders ? level : 0;
#pragma unroll
        for (int a = 0; a < kClasses; ++a) least = min(least, waiting[a] >> (mine >> 8 * a & 0xff) & 0xff);
        unsigned lanes;
        while ((lanes = __ballot_sync(kWarp, least >= level)) == 0) --level;
        const unsigned best = __shfl_sync(kWarp, mine, __ffs(static_cast<int>(lanes)) - 1);
        if (lane == round) chosen = best;
#pragma unroll
        for (int a = 0; a < kClasses; ++a) {
            if (lane == round) found[a] = waiting[a];
            waiting[a] -= 1u << (best >> 8 * a & 0xff);
        }
    }
    const int rank = lane / kClasses, turn = lane % kClasses, set = rank % 2 == 0 ? turn : kClasses - 1 - turn;
    // Of the four steps of a tile, from heavy to light, one of two parts has the first and the last.
    const int step = Shape::kHalves == 1 ? rank : (rank & 4) | (0x1320 >> (rank & 3) * 4 & 3);
#pragma unroll
    for (int a = 0; a < kClasses; ++a) {
        // Each class of lefts has 32 pairs, in the order of the classes of rights.
        const unsigned shift = chosen >> 8 * a & 0xff, all = p.counts[a];
        const unsigned first = all * 0x01010100u >> shift & 0xff;
        const unsigned used = (all >> shift & 0xff) - (found[a] >> shift & 0xff);
        const int place = by_class[a * 32 + first + used], slot = (step * kClasses + set) * kClasses + a;
        unsigned char* const listed = p.listed + slot / bitmap::kTileK * Shape::kBandColumnBytes;
        listed[Shape::column_byte(slot, 0)] = static_cast<unsigned char>(column_at(place, 0, window));
        listed[Shape::column_byte(slot, 1)] = static_cast<unsigned char>(column_at(p.partner[place], 1, window));
    }
    __syncwarp();
}

}  // namespace slot24
}  // namespace flashllm
