// SPDX-License-Identifier: Apache-2.0
// Matches lefts and rights with one warp, to pair columns of slot24 and to find neighbours for its slots. The rules are
// in docs/formats/slot24.md; src/flashllm/formats/slot24_groups.py and slot24_pairs.py follow the same ones.
#pragma once

#include "flashllm/bitmap.cuh"
#include "flashllm/portable.cuh"

namespace flashllm {
namespace slot24 {

constexpr unsigned kWarp = 0xffffffffu;
constexpr unsigned char kNone = 0xff;

FLASHLLM_DEVICE int weight_of(unsigned rows) { return __popc(rows); }
FLASHLLM_DEVICE int weight_of(unsigned long long rows) {
    return __popc(static_cast<unsigned>(rows)) + __popc(static_cast<unsigned>(rows >> 32));
}

// kSize lefts and as many rights, known by their places in two lists. Two members of different kinds fit if their rows
// have no bit in common.
template <typename Rows_, int kSize_>
struct alignas(16) Matching {
    using Rows = Rows_;
    static constexpr int kSize = kSize_;
    static constexpr int kOwn = kSize / bitmap::kLanes;  // places of a list that a lane has

    Rows rows[2][kSize];
    unsigned keys[2 * kSize];
    unsigned char kind[2][kSize];
    unsigned char order[2][kSize];      // places of both lists as the matching ranks them
    unsigned char heaviest[2 * kSize];  // places of both lists, heaviest first; rights count from kSize
    unsigned char partner[kSize];       // right of each left
    unsigned char owner[kSize];         // left of each right
    unsigned char parent[kSize];        // left from which the search saw each right
    unsigned char queue[kSize];         // lefts of the search
};

// Sorts the places 32 j + lane by rising key[j]; keys are all different, and below 2^31.
template <int kCount>
FLASHLLM_DEVICE void sort_places(unsigned* keys, const unsigned (&key)[kCount], unsigned char* sorted, int lane) {
    unsigned rank[kCount] = {};
#pragma unroll
    for (int j = 0; j < kCount; ++j) keys[j * 32 + lane] = key[j];
    __syncwarp();
#pragma unroll 4
    for (int i = 0; i < kCount * 32; i += 4) {
        const uint4 other = *reinterpret_cast<const uint4*>(keys + i);
#pragma unroll
        for (int j = 0; j < kCount; ++j) {
            // The sign of a difference says whether the other key is lower: two instructions each.
            rank[j] += (other.x - key[j]) >> 31;
            rank[j] += (other.y - key[j]) >> 31;
            rank[j] += (other.z - key[j]) >> 31;
            rank[j] += (other.w - key[j]) >> 31;
        }
    }
#pragma unroll
    for (int j = 0; j < kCount; ++j) sorted[rank[j]] = static_cast<unsigned char>(j * 32 + lane);
    __syncwarp();
}

// The members of a list that a lane has.
template <typename M>
struct Some {
    typename M::Rows rows[M::kOwn];
    unsigned kind[M::kOwn];

    // place_of(j): the place of the lane's j-th member.
    template <typename PlaceOf>
    FLASHLLM_DEVICE Some(const M& p, int side, PlaceOf&& place_of) {
#pragma unroll
        for (int j = 0; j < M::kOwn; ++j) rows[j] = p.rows[side][place_of(j)], kind[j] = p.kind[side][place_of(j)];
    }

    // A bit for each member that fits one given member of the other list.
    FLASHLLM_DEVICE unsigned fit(typename M::Rows other, unsigned other_kind) const {
        unsigned fits = 0;
#pragma unroll
        for (int j = 0; j < M::kOwn; ++j) {
            fits |= static_cast<unsigned>((other & rows[j]) == 0 && kind[j] != other_kind) << j;
        }
        return fits;
    }
};

// Gives the left `start` a partner along the shortest alternating path, taking rights in the order of their places: a
// lane has the places 32 j + lane. `open`: bits of the lane's rights without an owner.
template <typename M>
FLASHLLM_DEVICE bool search(M& p, int start, const Some<M>& rights, unsigned& open, int lane) {
    unsigned unseen = (1u << M::kOwn) - 1;
    int tail = 1;
    if (lane == 0) p.queue[0] = static_cast<unsigned char>(start);
#pragma unroll 1
    for (int head = 0; head < tail; ++head) {
        __syncwarp();
        int left = p.queue[head];
        const unsigned reach = rights.fit(p.rows[0][left], p.kind[0][left]) & unseen, ends = reach & open;
        if (__any_sync(kWarp, ends != 0)) {
            int right = 0;
#pragma unroll
            for (int j = M::kOwn - 1; j >= 0; --j) {
                const unsigned lanes = __ballot_sync(kWarp, ends >> j & 1);
                if (lanes != 0) right = j * 32 + __ffs(static_cast<int>(lanes)) - 1;
            }
            if (lane == (right & 31)) open ^= 1u << (right >> 5);
            if (lane == 0) {
                while (right != kNone) {  // each left on the path gives its right to the left before it
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
        for (int j = 0; j < M::kOwn; ++j) {
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

// Gives a partner to every left that has none; false when no matching covers all lefts. Tries the first `count` places
// in `order` one after the other, where lefts are those below kSize.
template <typename M>
FLASHLLM_DEVICE bool complete(M& p, const unsigned char* order, int count, int lane) {
    unsigned open = 0;
    const Some<M> rights(p, 1, [&](int j) { return j * 32 + lane; });
#pragma unroll
    for (int j = 0; j < M::kOwn; ++j) open |= static_cast<unsigned>(p.owner[j * 32 + lane] == kNone) << j;
#pragma unroll 1
    for (int turn = 0; turn < count; ++turn) {
        const int left = order[turn];
        if (left < M::kSize && p.partner[left] == kNone && !search(p, left, rights, open, lane)) return false;
    }
    return true;
}

template <typename M>
FLASHLLM_DEVICE void forget_partners(M& p, int lane) {
#pragma unroll
    for (int j = 0; j < M::kOwn; ++j) p.partner[j * 32 + lane] = p.owner[j * 32 + lane] = kNone;
}

// Gives the member at `place` of list kSide a partner: of the fitting members of the other list that have none, the
// first in that list's order. `open`: bits, for both lists, of the lane's members without a partner, in that order.
template <int kSide, typename M>
FLASHLLM_DEVICE void take_first(M& p, int place, const Some<M>& others, unsigned (&open)[2], int lane) {
    const unsigned fits = others.fit(p.rows[kSide][place], p.kind[kSide][place]) & open[1 - kSide];
    const unsigned lanes = __ballot_sync(kWarp, fits != 0);
    if (lanes == 0) return;
    __syncwarp();  // all lanes have seen that the place is free
#pragma unroll
    for (int j = 0; j < M::kOwn; ++j) {
        if (p.order[kSide][lane * M::kOwn + j] == place) open[kSide] &= ~(1u << j);
    }
    if (lane == __ffs(static_cast<int>(lanes)) - 1) {
        const int rank = __ffs(static_cast<int>(fits)) - 1;
        const unsigned char other = p.order[1 - kSide][lane * M::kOwn + rank], own = static_cast<unsigned char>(place);
        open[1 - kSide] ^= 1u << rank;
        (kSide == 0 ? p.partner : p.owner)[place] = other;
        (kSide == 0 ? p.owner : p.partner)[other] = own;
    }
    __syncwarp();
}

// Matches heavy members with light ones, given their rows and kinds: fills partner and owner; false when no matching
// covers all lefts. Later attempts rank some members up to three elements heavier.
template <typename M>
FLASHLLM_DEVICE bool match_evenly(M& p, int attempt, int lane) {
    unsigned heavy[2 * M::kOwn];
#pragma unroll
    for (int side = 0; side < 2; ++side) {
        unsigned light[M::kOwn];
#pragma unroll
        for (int j = 0; j < M::kOwn; ++j) {
            const int place = j * 32 + lane, weight = weight_of(p.rows[side][place]);
            const int shift = attempt != 0 ? place * (2 * attempt + 1) >> 3 & 3 : 0;
            light[j] = static_cast<unsigned>((weight + shift) * M::kSize + place);
            heavy[side * M::kOwn + j] = static_cast<unsigned>((64 - weight) * 2 * M::kSize + side * M::kSize + place);
        }
        sort_places(p.keys, light, p.order[side], lane);
    }
    sort_places(p.keys, heavy, p.heaviest, lane);
    forget_partners(p, lane);
    const auto ranked = [&](int side) {
        return Some<M>(p, side, [&](int j) { return p.order[side][lane * M::kOwn + j]; });
    };
    const Some<M> lefts = ranked(0), rights = ranked(1);
    unsigned open[2] = {(1u << M::kOwn) - 1, (1u << M::kOwn) - 1};
    __syncwarp();
#pragma unroll 1
    for (int turn = 0; turn < 2 * M::kSize; ++turn) {
        const int both = p.heaviest[turn], place = both % M::kSize;
        if (both < M::kSize) {
            if (p.partner[place] == kNone) take_first<0>(p, place, rights, open, lane);
        } else if (p.owner[place] == kNone) {
            take_first<1>(p, place, lefts, open, lane);
        }
    }
    bool whole = true;
#pragma unroll
    for (int j = 0; j < M::kOwn; ++j) whole &= p.partner[j * 32 + lane] != kNone;
    if (__all_sync(kWarp, whole)) return true;
    return complete(p, p.heaviest, 2 * M::kSize, lane);
}

}  // namespace slot24
}  // namespace flashllm
