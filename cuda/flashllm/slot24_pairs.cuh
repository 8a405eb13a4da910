// SPDX-License-Identifier: Apache-2.0
// Which columns of a window share a slot: one warp computes the pairing of slot24 for one band of one window, with four
// lefts and four rights per lane. The same pairs in the same order as from src/flashllm/formats/slot24_pairs.py; the
// rules are in docs/formats/slot24.md.
#pragma once

#include "flashllm/portable.cuh"
#include "flashllm/slot24.cuh"
#include "flashllm/slot24_matching.cuh"

namespace flashllm {
namespace slot24 {

constexpr int kOwn = kPairs / bitmap::kLanes;  // places of a list that a lane has
constexpr int kClasses = 4;                    // residues of lefts, and of rights, modulo 8
constexpr int kOrders = 24;                    // permutations of the classes

// A bit for each row of a band.
template <int kPartRows> struct RowsOf { using Type = unsigned; };
template <> struct RowsOf<64> { using Type = unsigned long long; };
template <int kPartRows> using Rows = typename RowsOf<kPartRows>::Type;

// Column in the window of a place in the list of lefts (side 0) or rights (side 1): first the real columns, then the
// copies of the dummies, every other copy in reverse order.
FLASHLLM_DEVICE int column_at(int place, int side, int window) {
    const int dummy = place - window / 2, residue = place & 3;  // window / 2 is a multiple of 4
    if (dummy < 0) return (place >> 2) * 8 + side * 4 + residue;
    return window + side * 4 + ((dummy & 4) == 0 ? residue : 3 - residue);
}

// A warp's data for its band of a window. Places are those in the lists of lefts and rights.
template <int kPartRows>
struct Problem {
    using Shape = Bands<kPartRows>;
    Matching<Rows<kPartRows>, kPairs> columns;
    unsigned counts[kClasses];  // number of pairs of each class of lefts, a byte for each class of rights
    unsigned char listed[kWindowTiles * Shape::kBandColumnBytes];  // columns of both tiles

    // Assigns a slot to a left and its partner.
    FLASHLLM_DEVICE void list(int slot, int left, int window) {
        unsigned char* const tile = listed + slot / bitmap::kTileK * Shape::kBandColumnBytes;
        tile[Shape::column_byte(slot, 0)] = static_cast<unsigned char>(column_at(left, 0, window));
        tile[Shape::column_byte(slot, 1)] = static_cast<unsigned char>(column_at(columns.partner[left], 1, window));
    }
};

// Loads the columns of both sides. rows_of(column): the rows of one of the `columns` that the matrix has.
template <int kPartRows, typename RowsOfColumn>
FLASHLLM_DEVICE void load_problem(Problem<kPartRows>& p, RowsOfColumn&& rows_of, int columns, int window, int lane) {
#pragma unroll 1
    for (int side = 0; side < 2; ++side) {
#pragma unroll
        for (int j = 0; j < kOwn; ++j) {
            const int place = j * 32 + lane, column = column_at(place, side, window);
            p.columns.rows[side][place] = column < columns ? rows_of(column) : 0;
            p.columns.kind[side][place] = static_cast<unsigned char>(side);  // any left may pair with any right
        }
    }
    __syncwarp();
}

// Matches heavy lefts with heavy rights, so that dense columns get what room there is. Fills partner and owner; false
// when no matching covers all lefts.
template <typename M>
FLASHLLM_DEVICE bool match(M& p, int lane) {
#pragma unroll 1
    for (int side = 0; side < 2; ++side) {
        unsigned key[M::kOwn];
#pragma unroll
        for (int j = 0; j < M::kOwn; ++j) {
            const int place = j * 32 + lane;
            key[j] = static_cast<unsigned>((64 - weight_of(p.rows[side][place])) * M::kSize + place);
        }
        sort_places(p.keys, key, p.order[side], lane);
    }
    forget_partners(p, lane);
    // A lane has ranks 4 lane + j, so the first lane with a fitting right has the heaviest one.
    const Some<M> rights(p, 1, [&](int j) { return p.order[1][lane * M::kOwn + j]; });
    unsigned open = (1u << M::kOwn) - 1;
    bool all = true;
    __syncwarp();
#pragma unroll 2
    for (int turn = 0; turn < M::kSize; ++turn) {
        const int left = p.order[0][turn];
        const unsigned fits = rights.fit(p.rows[0][left], p.kind[0][left]) & open;
        const unsigned lanes = __ballot_sync(kWarp, fits != 0);
        all = all && lanes != 0;
        if (lane == __ffs(static_cast<int>(lanes)) - 1) {
            const int rank = __ffs(static_cast<int>(fits)) - 1, right = p.order[1][lane * M::kOwn + rank];
            open ^= 1u << rank;
            p.partner[left] = static_cast<unsigned char>(right);
            p.owner[right] = static_cast<unsigned char>(left);
        }
    }
    __syncwarp();
    return all || complete(p, p.order[0], M::kSize, lane);
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

// Orders the pairs: 32 rounds, the n-th of which lane n finally holds, form 32 sets of columns with 8 different
// residues, and the sets are placed by their weight. Fills `listed`.
template <int kPartRows>
FLASHLLM_DEVICE void arrange(Problem<kPartRows>& p, int window, int lane) {
    auto& columns = p.columns;
    unsigned key[kOwn], class_at[kOwn];
#pragma unroll
    for (int j = 0; j < kOwn; ++j) {
        const int left = j * 32 + lane, right = columns.partner[left];
        const int a = column_at(left, 0, window) & 3, b = column_at(right, 1, window) & 3;
        const int weight = weight_of(columns.rows[0][left] | columns.rows[1][right]);
        class_at[j] = static_cast<unsigned>(a * kClasses + b);
        key[j] = (class_at[j] << 7 | static_cast<unsigned>(kPartRows - weight)) * kPairs + static_cast<unsigned>(left);
    }
    unsigned char* const by_class = columns.queue;
    if (lane < kClasses) p.counts[lane] = 0;
    sort_places(columns.keys, key, by_class, lane);
#pragma unroll
    for (int j = 0; j < kOwn; ++j) atomicAdd(&p.counts[class_at[j] / kClasses], 1u << class_at[j] % kClasses * 8);
    __syncwarp();

    // Pairs of each class that still wait for a round: now, and at the time of this lane's round.
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
    int place[kClasses], weight = 0;  // lefts of the four pairs of this lane's round; values of all four pairs
#pragma unroll
    for (int a = 0; a < kClasses; ++a) {
        // Each class of lefts has 32 pairs, in the order of the classes of rights.
        const unsigned shift = chosen >> 8 * a & 0xff, all = p.counts[a];
        const unsigned first = all * 0x01010100u >> shift & 0xff;
        const unsigned used = (all >> shift & 0xff) - (found[a] >> shift & 0xff);
        place[a] = by_class[a * 32 + first + used];
        weight += weight_of(columns.rows[0][place[a]] | columns.rows[1][columns.partner[place[a]]]);
    }
    int rank = 0;  // rounds that come before this lane's
#pragma unroll 4
    for (int round = 0; round < kPairs / kClasses; ++round) {
        const int other = __shfl_sync(kWarp, weight, round);
        rank += other > weight || (other == weight && round < lane);
    }
    const int row = rank / kClasses, turn = rank % kClasses, set = row % 2 == 0 ? turn : kClasses - 1 - turn;
    // If a band has two parts, one of them gets the heaviest and the lightest of a tile's four steps.
    const int step = Bands<kPartRows>::kHalves == 1 ? row : (row & 4) | (0x1320 >> (row & 3) * 4 & 3);
#pragma unroll
    for (int a = 0; a < kClasses; ++a) p.list((step * kClasses + set) * kClasses + a, place[a], window);
    __syncwarp();
}

}  // namespace slot24
}  // namespace flashllm
