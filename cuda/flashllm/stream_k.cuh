// SPDX-License-Identifier: Apache-2.0
// Stream-K split of a grid of weight tiles over the blocks of a launch, and the ordered reduction of the pieces.
//
// The tiles of an [M, K] weight, numbered row by row, are dealt to the G = gridDim.x blocks in contiguous runs of equal
// cost. A row of tiles that a single block covers is final; otherwise each block leaves its piece of the row in the
// workspace, and the row's last block adds the pieces in a fixed order. (Stream-K: Osama et al., PPoPP'23.) A piece is
// the accumulators of the threads of the first K slice, vector by vector, with 16 bytes from each thread.
//
// Arrivals are not counted. A slot is zero until its piece arrives, and a piece never has a zero in the first word of a
// vector: +0 is stored as -0, which gives the same sum. So the last block polls the very data that it is going to add,
// and writes zeros back. A fence and a counter would cost each row two more trips to the L2, about a microsecond at the
// end of every launch. A block waits only for blocks before it, which have started earlier, since GPUs start blocks in
// order of their numbers. (No specification guarantees this, but CUB's decoupled look-back relies on it too.)
//
// Where a row has many large pieces, the block in the middle of the row adds the pieces before it to its own and stores
// the sum; meanwhile the last block adds the other half.
//
// The end of a row costs as much as `row_cost` more tiles, since a block stops there to write its accumulators: a run
// that reaches into another row gets that many fewer tiles and does not keep the others waiting at the end.
//
// Workspace, all of it zero before and after every launch, for C = gridDim.y column blocks, in pieces of kN * 128 * 4 bytes:
//   C * G * 2   slots: a block has at most two unfinished rows, one that another block begins and one that it begins
//   C * G       where a row of tiles is longer than a chain: the sum of a block's earlier chains of a row
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
    static constexpr int kSlotVectors = 2 * kPieceVectors;  // from a slot of one block to that of the next block
    static_assert(kPieceVectors * 4 == S::kN * S::kM, "the host sizes the workspace by this");

    int tiles_m, tiles_k, row_cost;
    unsigned char* workspace;

    FLASHLLM_DEVICE StreamK(int tiles_m, int tiles_k, int row_cost, unsigned char* workspace)
        : tiles_m(tiles_m), tiles_k(tiles_k), row_cost(row_cost), workspace(workspace) {}

    FLASHLLM_DEVICE Runs runs() const { return {tiles_m, tiles_k, row_cost, gridDim.x}; }
    FLASHLLM_DEVICE unsigned first_tile(unsigned block) const { return runs().first_tile(block); }
    FLASHLLM_DEVICE unsigned block_of(unsigned tile) const { return runs().run_of(tile); }

    // Length of the first of the chains into which `length` tiles of a row are cut: as few chains as possible, of at
    // most `longest` tiles each. Blocks take different lengths, so that they do not all write their accumulators, and
    // leave DRAM idle, at the same time.
    FLASHLLM_DEVICE static int first_chain(int length, int longest, unsigned block) {
        if (length <= longest) return length;
        const int least = (length - 1) % longest + 1;
        return least + (longest - least) * static_cast<int>(block % 8) / 7;
    }

    // Where vector v of this thread lies in a piece. (Unsigned: a sign would take a register for the whole run.)
    FLASHLLM_DEVICE static unsigned place(int v) {
        return v * kThreads + (threadIdx.x >> 5) / S::kSlices * 32 + (threadIdx.x & 31);
    }

    // Where `block` keeps the sum of its chains in one row, except the last one.
    FLASHLLM_DEVICE float4* chains(int block, int column_block) const {
        const long long blocks = gridDim.x;
        return reinterpret_cast<float4*>(workspace) + gridDim.y * blocks * kSlotVectors +
               (column_block * blocks + block) * kPieceVectors;
    }

    // Puts the accumulators of the first K slice aside for a later chain of the row, and leaves them zero.
    FLASHLLM_DEVICE static void put_aside(Accumulators<S>& sum, float4* chains) {
        if (S::slice() != 0) return;
        for_each<S>(sum, [&](float (&part)[4], int v) {
            __stcg(chains + place(v), make_float4(part[0], part[1], part[2], part[3]));
            part[0] = part[1] = part[2] = part[3] = 0.0f;
        });
    }

    // Adds what this block has put aside, and leaves zeros there. Loads several vectors at a time: one after the other,
    // each would wait for the L2, 2 us where that is busy.
    FLASHLLM_DEVICE static void take_back(Accumulators<S>& sum, float4* chains) {
        if (S::slice() != 0) return;
        constexpr int kTaken = kVectors > 8 ? 6 : kVectors;  // as many as there are registers for
#pragma unroll
        for (int begin = 0; begin < kVectors; begin += kTaken) {
            float4 vectors[kTaken];
#pragma unroll
            for (int v = begin; v < min(begin + kTaken, kVectors); ++v) {
                vectors[v - begin] = ptx::load_relaxed(chains + place(v));
            }
#pragma unroll
            for (int v = begin; v < min(begin + kTaken, kVectors); ++v) {
                accumulate(sum[v / S::kColumnFragments][v % S::kColumnFragments], vectors[v - begin]);
                __stcg(chains + place(v), make_float4(0.0f, 0.0f, 0.0f, 0.0f));
            }
        }
    }

    // A slot of a block: slot 1 is for the row that it begins, slot 0 for the row that others begin.
    FLASHLLM_DEVICE float4* slot(int block, bool begins_row) const {
        return reinterpret_cast<float4*>(workspace) + static_cast<long long>(blockIdx.y) * gridDim.x * kSlotVectors +
               static_cast<long long>(block) * kSlotVectors + (begins_row ? kPieceVectors : 0);
    }

    // Puts the accumulators of the first K slice into a slot of this block and leaves them zero.
    FLASHLLM_DEVICE static void store(Accumulators<S>& sum, float4* slot) {
        if (S::slice() != 0) return;
        for_each<S>(sum, [&](float (&part)[4], int v) {
            const float4 vector = make_float4(ptx::not_plus_zero(part[0]), part[1], part[2], part[3]);
            ptx::store_relaxed(slot + place(v), vector);
            part[0] = part[1] = part[2] = part[3] = 0.0f;
        });
    }

    // The block in the middle of those that share a row, which adds up the pieces before its own; the first block if
    // there is no such middle block.
    FLASHLLM_DEVICE static int middle(int first_block, int last_block) {
        return kHalfway && last_block - first_block >= 3 ? (first_block + last_block) / 2 : first_block;
    }

    // Adds `count` pieces of a row to the accumulators of the first K slice, one after the other, and leaves their
    // slots zero. One is in slot `first` of block `from`, the others are in slot 0 of the blocks after it. Two groups
    // of vectors alternate: one is being loaded while the other is added.
    FLASHLLM_DEVICE void add(Accumulators<S>& sum, int from, bool first, int count) const {
        if (S::slice() != 0) return;
        Group<0> a{slot(from, first) + place(0), slot(from + kHalfway, false) + place(0), count};
        Group<1> b{a.from, a.others, count};
        a.look({0, 0}), b.look({0, 0});
#pragma unroll 1
        for (int piece = 0; piece < count; piece += kTurnPieces) {
#pragma unroll
            for (int part = 0; part < kParts; ++part) {
                const Turn now{piece, part};
                a.add(sum, now, b, now);
                b.add(sum, now, a, now.next());
            }
        }
    }

private:
    static constexpr int kVectors = S::kRowFragments * S::kColumnFragments;
    static constexpr bool kHalfway = kVectors >= 8;  // small pieces are loaded many at a time: no gain
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
    static constexpr int kGroup = 8;  // vectors
#else
    static constexpr int kGroup = 4;  // where mma.sync leaves fewer registers
#endif
    static constexpr int kTurnPieces = 2 * kGroup > kVectors ? 2 * kGroup / kVectors : 1;
    static constexpr int kParts = 2 * kGroup < kVectors ? kVectors / (2 * kGroup) : 1;
    static_assert(kTurnPieces * kVectors == kParts * 2 * kGroup, "two groups are whole pieces, or whole parts of one");

    // What the two groups add in one turn: some pieces, from `piece` on, or a part of that one.
    struct Turn {
        int piece, part;
        FLASHLLM_DEVICE Turn next() const {
            return part + 1 < kParts ? Turn{piece, part + 1} : Turn{piece + kTurnPieces, 0};
        }
    };

    // Half kHalf of the vectors of a turn.
    template <int kHalf>
    struct Group {
        float4* from;    // the piece of block `from`: added last where it may be a sum, which arrives last
        float4* others;  // where piece 0 would be if it were like the others
        int count;
        float4 vectors[kGroup] = {};

        FLASHLLM_DEVICE static int piece_of(int i) { return (kHalf * kGroup + i) / kVectors; }
        FLASHLLM_DEVICE static int vector_of(Turn turn, int i) {
            return ((2 * turn.part + kHalf) * kGroup + i) % kVectors;
        }
        FLASHLLM_DEVICE static bool has_come(const float4& vector) { return __float_as_uint(vector.x) != 0; }
        FLASHLLM_DEVICE bool there_is(Turn turn, int i) const { return turn.piece + piece_of(i) < count; }

        FLASHLLM_DEVICE float4* at(Turn turn, int i) const {
            const bool special = turn.piece + piece_of(i) == (kHalfway ? count - 1 : 0);
            float4* const piece = others + turn.piece * kSlotVectors + piece_of(i) * kSlotVectors;
            return (special ? from : piece) + vector_of(turn, i) * kThreads;
        }

        // Loads the vectors that have not arrived yet; returns whether all have arrived now.
        FLASHLLM_DEVICE bool look(Turn turn) {
#pragma unroll
            for (int i = 0; i < kGroup; ++i) {
                if (there_is(turn, i) && !has_come(vectors[i])) vectors[i] = ptx::load_relaxed(at(turn, i));
            }
            bool all = true;
#pragma unroll
            for (int i = 0; i < kGroup; ++i) all &= !there_is(turn, i) || has_come(vectors[i]);
            return all;
        }

        // Adds the vectors, issues the loads of the next turn, and leaves zeros in the slots. While it waits, it also
        // polls for the other group, which then need not wait.
        template <typename Other>
        FLASHLLM_DEVICE void add(Accumulators<S>& sum, Turn turn, Other& other, Turn others) {
            while (!look(turn)) {
                other.look(others);
                ptx::look_again();
            }
#pragma unroll
            for (int i = 0; i < kGroup; ++i) {
                if (!there_is(turn, i)) break;
                const int v = vector_of(turn, i);
                accumulate(sum[v / S::kColumnFragments][v % S::kColumnFragments], vectors[i]);
                vectors[i] = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
            }
            look(turn.next());
#pragma unroll
            for (int i = 0; i < kGroup; ++i) {
                if (!there_is(turn, i)) break;
                __stcg(at(turn, i), make_float4(0.0f, 0.0f, 0.0f, 0.0f));
            }
        }
    };
};

}  // namespace flashllm
