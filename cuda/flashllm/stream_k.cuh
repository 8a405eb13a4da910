// SPDX-License-Identifier: Apache-2.0
// Stream-K split of a grid of weight tiles over the blocks of a launch, and the ordered reduction of the pieces.
//
// The tiles of an [M, K] weight, numbered row by row, are dealt to the G = gridDim.x blocks in contiguous runs of
// equal cost. A row of tiles that one block covers alone is final; otherwise each block leaves its piece of it in the
// workspace, and the row's last block adds the pieces in block order. (Stream-K: Osama et al., PPoPP'23.) A piece is the
// accumulators as the threads of the first K slice hold them, one 16-byte vector per thread after another.
//
// Nobody counts arrivals. A slot is zero until its piece comes, and a piece has no zero in the first word of a vector:
// +0 is stored as -0, which adds up to the same. So the last block just looks at what it is going to add, and puts zeros
// back. A fence and a counter would cost each row two trips to the L2 more, about a microsecond at the end of every
// launch. The last block waits only for blocks before it, and those have started before it: GPUs start blocks in order of
// their numbers. (No specification says so, but CUB's decoupled look-back counts on it too.)
//
// Cost counts the end of a row like `row_cost` more tiles, since there a block stops to write its accumulators: a run
// that reaches into another row gets so many tiles fewer, and does not keep the others waiting at the end.
//
// Workspace, all of it zero before and after every launch, for C = gridDim.y column blocks, in pieces of kN * 128 * 4 bytes:
//   C * G * 2   slots: a block has at most two unfinished rows, its first and its last
//   C * G       where a row of tiles is longer than a chain: what a block's earlier chains of a row have added up to
// src/flashllm/matmul/stream_k.py mirrors these formulas.
#pragma once

#include "flashllm/epilogue.cuh"
#include "flashllm/portable.cuh"
#include "flashllm/ptx.cuh"
#include "flashllm/runs.cuh"

namespace flashllm {

template <typename S>
struct StreamK {
    static constexpr int kThreads = S::kBlockWarps * 32 / S::kSlices;  // those of the first K slice
    static constexpr int kPieceVectors = S::kRowFragments * S::kColumnFragments * kThreads;
    static constexpr int kSlotVectors = 2 * kPieceVectors;  // from a slot of one block to that of the next
    static_assert(kPieceVectors * 4 == S::kN * S::kM, "the host sizes the workspace by this");

    int tiles_m, tiles_k, row_cost;
    unsigned char* workspace;

    FLASHLLM_DEVICE StreamK(int tiles_m, int tiles_k, int row_cost, unsigned char* workspace)
        : tiles_m(tiles_m), tiles_k(tiles_k), row_cost(row_cost), workspace(workspace) {}

    FLASHLLM_DEVICE Runs runs() const { return {tiles_m, tiles_k, row_cost, gridDim.x}; }
    FLASHLLM_DEVICE unsigned first_tile(unsigned block) const { return runs().first_tile(block); }
    FLASHLLM_DEVICE unsigned block_of(unsigned tile) const { return runs().run_of(tile); }

    // Length of the first of the chains that `length` tiles of a row are cut into, `longest` at most and no more of
    // them than needed. Blocks take different lengths, so that they do not all write their accumulators, and leave
    // DRAM idle, at one time.
    FLASHLLM_DEVICE static int first_chain(int length, int longest, unsigned block) {
        if (length <= longest) return length;
        const int least = (length - 1) % longest + 1;
        return least + (longest - least) * static_cast<int>(block % 8) / 7;
    }

    // Where vector v of this thread lies in a piece.
    FLASHLLM_DEVICE static int place(int v) {
        return v * kThreads + (threadIdx.x >> 5) / S::kSlices * 32 + (threadIdx.x & 31);
    }

    // What the chains of `block` in one row have added up to, but for its last one.
    FLASHLLM_DEVICE float4* chains(int block, int column_block) const {
        const long long blocks = gridDim.x;
        return reinterpret_cast<float4*>(workspace) + gridDim.y * blocks * kSlotVectors +
               (column_block * blocks + block) * kPieceVectors;
    }

    // Puts the accumulators of the first K slice aside, for one of its later chains, and leaves them zero.
    FLASHLLM_DEVICE static void put_aside(Accumulators<S>& sum, float4* chains) {
        if (S::slice() != 0) return;
        for_each<S>(sum, [&](float (&part)[4], int v) {
            __stcg(chains + place(v), make_float4(part[0], part[1], part[2], part[3]));
            part[0] = part[1] = part[2] = part[3] = 0.0f;
        });
    }

    // Adds what this block has put aside, and leaves zeros there.
    FLASHLLM_DEVICE static void take_back(Accumulators<S>& sum, float4* chains) {
        if (S::slice() != 0) return;
        for_each<S>(sum, [&](float (&part)[4], int v) {
            accumulate(part, ptx::load_relaxed(chains + place(v)));
            __stcg(chains + place(v), make_float4(0.0f, 0.0f, 0.0f, 0.0f));
        });
    }

    struct Piece {
        bool whole;           // the block has all of K for this row of tiles
        int pieces;           // blocks that share the row of tiles
        float4* mine;         // this block's slot
        float4* first_slot;   // slot of the row's first block
        float4* other_slots;  // slot 0 of the row's second block

        // Puts the accumulators of the first K slice into this block's slot and leaves them zero.
        FLASHLLM_DEVICE void store(Accumulators<S>& sum) const {
            if (S::slice() != 0) return;
            for_each<S>(sum, [&](float (&part)[4], int v) {
                const float4 vector = make_float4(ptx::not_plus_zero(part[0]), part[1], part[2], part[3]);
                ptx::store_relaxed(mine + place(v), vector);
                part[0] = part[1] = part[2] = part[3] = 0.0f;
            });
        }

        // By the row's last block, when it has stored its own: puts the sum of all pieces, added in block order, into the
        // accumulators, and leaves the slots zero. As many loads as registers allow are under way at one time: one after
        // the other, their latencies cost more than all else.
        FLASHLLM_DEVICE void add_up(Accumulators<S>& sum) const {
            if (S::slice() != 0) return;
            constexpr int kAhead = kVectors < 16 ? 16 / kVectors : 1;  // pieces, besides the first where registers allow
            constexpr bool kFirstToo = kVectors < 16;
            float4* const first = first_slot + place(0);
            float4 total[1][kVectors] = {};
            if constexpr (!kFirstToo) {
                while (!look(total, first, 1)) ptx::look_again();
            }
            float4* slots = other_slots + place(0);
#pragma unroll 1
            for (int i = 1; i < pieces; i += kAhead, slots += kAhead * kSlotVectors) {
                float4 loaded[kAhead][kVectors] = {};
#pragma unroll 1
                while (true) {
                    const bool first_too = !kFirstToo || i != 1 || look(total, first, 1);
                    if (look(loaded, slots, pieces - i) && first_too) break;
                    ptx::look_again();
                }
                clear<kAhead>(slots, pieces - i);
#pragma unroll
                for (int v = 0; v < kVectors; ++v) {
#pragma unroll
                    for (int ahead = 0; ahead < kAhead; ++ahead) total[0][v] = added(total[0][v], loaded[ahead][v]);
                }
            }
            clear<1>(first, 1);
            for_each<S>(sum, [&](float (&part)[4], int v) {  // + 0: not -0 where all pieces are
                part[0] = total[0][v].x + 0.0f, part[1] = total[0][v].y + 0.0f;
                part[2] = total[0][v].z + 0.0f, part[3] = total[0][v].w + 0.0f;
            });
        }

    private:
        static constexpr int kVectors = S::kRowFragments * S::kColumnFragments;

        // Loads what has not come yet of the first `count` of kCount pieces; whether all of it has come now.
        template <int kCount>
        FLASHLLM_DEVICE static bool look(float4 (&loaded)[kCount][kVectors], const float4* slots, int count) {
#pragma unroll
            for (int i = 0; i < kCount; ++i) {
#pragma unroll
                for (int v = 0; v < kVectors; ++v) {
                    if (i < count && !has_come(loaded[i][v].x)) {
                        loaded[i][v] = ptx::load_relaxed(slots + i * kSlotVectors + v * kThreads);
                    }
                }
            }
            bool all = true;
#pragma unroll
            for (int i = 0; i < kCount; ++i) {
#pragma unroll
                for (int v = 0; v < kVectors; ++v) all &= i >= count || has_come(loaded[i][v].x);
            }
            return all;
        }

        template <int kCount>
        FLASHLLM_DEVICE static void clear(float4* slots, int count) {
#pragma unroll
            for (int i = 0; i < kCount; ++i) {
#pragma unroll
                for (int v = 0; v < kVectors; ++v) {
                    if (i < count) __stcg(slots + i * kSlotVectors + v * kThreads, make_float4(0.0f, 0.0f, 0.0f, 0.0f));
                }
            }
        }

        FLASHLLM_DEVICE static bool has_come(float first) { return __float_as_uint(first) != 0; }
        FLASHLLM_DEVICE static float4 added(const float4& a, const float4& b) {
            return make_float4(a.x + b.x, a.y + b.y, a.z + b.z, a.w + b.w);
        }
    };

    // The row of tiles of which `block` has the end and others the begin: the row its run begins in. -1: none.
    FLASHLLM_DEVICE int row_to_add_up(int block) const {
        const unsigned begin = first_tile(block), end = first_tile(block + 1), tile_m = begin / tiles_k;
        return begin != tile_m * tiles_k && end >= (tile_m + 1) * tiles_k ? static_cast<int>(tile_m) : -1;
    }

    FLASHLLM_DEVICE Piece piece(int block, int tile_m, int column_block) const {
        const unsigned row_first = tile_m * tiles_k;
        const unsigned first_block = block_of(row_first), last_block = block_of(row_first + tiles_k - 1);
        float4* const slots = reinterpret_cast<float4*>(workspace) +
                              static_cast<long long>(column_block) * gridDim.x * kSlotVectors;
        // Slot 0 of a block is for the row its run begins in, slot 1 for the row it ends in, if another.
        auto slot = [&](unsigned b) {
            const bool begins_in_row = first_tile(b) >= row_first;
            return slots + static_cast<long long>(b) * kSlotVectors + (begins_in_row ? 0 : kPieceVectors);
        };
        Piece piece;
        piece.pieces = last_block - first_block + 1;
        piece.whole = piece.pieces == 1;
        piece.mine = slot(block);
        piece.first_slot = slot(first_block);
        // Every later block of the row begins inside it, so its slot is its slot 0.
        piece.other_slots = slots + static_cast<long long>(first_block + 1) * kSlotVectors;
        return piece;
    }
};

}  // namespace flashllm
