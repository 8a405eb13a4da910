// SPDX-License-Identifier: Apache-2.0
// Stream-K split of a grid of weight tiles over the blocks of a launch, and the ordered reduction of the pieces.
//
// The tiles of an [M, K] weight, numbered row by row, are dealt to the G = gridDim.x blocks in contiguous runs of
// equal cost. A row of tiles that one block covers alone is final; otherwise each block leaves its piece of it in the
// workspace, and the block that arrives last adds the pieces in block order. (Stream-K: Osama et al., PPoPP'23.) A
// piece is the accumulators as the threads of the first K slice hold them, one 16-byte vector per thread after another.
//
// Cost counts the end of a row like `row_cost` more tiles, since there a block stops to write its accumulators: a run
// that reaches into another row gets so many tiles fewer, and does not keep the others waiting at the end.
//
// Workspace layout, in bytes, for C = gridDim.y column blocks and R rows of tiles:
//   [0, 128 * ceil(C * R * 4 / 128))   arrival counters, zero before and after every launch
//   then C * G * 2 pieces of kN * 128 * 4: a block has at most two unfinished rows, its first and its last. Rows it
//   computes alone in several chains pass through its second slot, which its last row takes over afterwards.
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

    struct Piece {
        bool whole;                 // the block has all of K for this row of tiles
        int pieces;                 // blocks that share the row of tiles
        float4* mine;               // this block's slot
        const float4* first_slot;   // slot of the row's first block
        const float4* other_slots;  // slot 0 of the row's second block
        int* counter;

        // Puts the accumulators of the first K slice into this block's slot and leaves them zero.
        FLASHLLM_DEVICE void store(Accumulators<S>& sum) const {
            if (S::slice() != 0) return;
            for_each<S>(sum, [&](float (&part)[4], int v) {
                __stcg(mine + place(v), make_float4(part[0], part[1], part[2], part[3]));
                part[0] = part[1] = part[2] = part[3] = 0.0f;
            });
        }

        // Adds what this block stored before.
        FLASHLLM_DEVICE void add_stored(Accumulators<S>& sum) const {
            if (S::slice() != 0) return;
            for_each<S>(sum, [&](float (&part)[4], int v) { accumulate(part, __ldcg(mine + place(v))); });
        }

        // True if all other pieces of the row are stored; false for a row the block has alone. One thread calls it,
        // after a barrier behind which all threads of the block have stored theirs: its release covers them all.
        FLASHLLM_DEVICE bool arrive_last() const {
            if (whole || ptx::add_acquire_release(counter, 1) != pieces - 1) return false;
            *counter = 0;  // ready for the next launch
            return true;
        }

        // Adds the pieces of all blocks, in block order, to accumulators that are zero. Several pieces are loaded
        // before the first is added: one after the other, their latencies cost more than all else.
        FLASHLLM_DEVICE void add_all(Accumulators<S>& sum) const {
            constexpr int kVectors = S::kRowFragments * S::kColumnFragments;
            constexpr int kAhead = kVectors < 16 ? 16 / kVectors : 1;
            if (S::slice() != 0) return;
            for_each<S>(sum, [&](float (&part)[4], int v) { accumulate(part, __ldcg(first_slot + place(v))); });
            const float4* slot = other_slots;
            for (int i = 1; i < pieces; i += kAhead, slot += kAhead * 2 * kPieceVectors) {
                float4 loaded[kAhead][kVectors] = {};
#pragma unroll
                for (int ahead = 0; ahead < kAhead; ++ahead) {
                    if (i + ahead >= pieces) break;
#pragma unroll
                    for (int v = 0; v < kVectors; ++v) {
                        loaded[ahead][v] = __ldcg(slot + ahead * 2 * kPieceVectors + place(v));
                    }
                }
#pragma unroll
                for (int ahead = 0; ahead < kAhead; ++ahead) {
                    for_each<S>(sum, [&](float (&part)[4], int v) { accumulate(part, loaded[ahead][v]); });
                }
            }
        }

    private:
        // Where vector v of this thread lies in a piece.
        FLASHLLM_DEVICE static int place(int v) {
            return v * kThreads + (threadIdx.x >> 5) / S::kSlices * 32 + (threadIdx.x & 31);
        }
    };

    FLASHLLM_DEVICE Piece piece(int block, int tile_m, int column_block) const {
        const unsigned row_first = tile_m * tiles_k;
        const unsigned first_block = block_of(row_first), last_block = block_of(row_first + tiles_k - 1);
        const long long counters = (static_cast<long long>(gridDim.y) * tiles_m * 4 + 127) / 128 * 128;
        float4* slots = reinterpret_cast<float4*>(workspace + counters) +
                        static_cast<long long>(column_block) * gridDim.x * 2 * kPieceVectors;
        // Slot 0 of a block is for the row its run begins in, slot 1 for the row it ends in, if another.
        auto slot = [&](unsigned b) {
            const bool begins_in_row = first_tile(b) >= row_first;
            return slots + (static_cast<long long>(b) * 2 + (begins_in_row ? 0 : 1)) * kPieceVectors;
        };
        Piece piece;
        piece.pieces = last_block - first_block + 1;
        piece.whole = piece.pieces == 1;
        piece.mine = slot(block);
        piece.first_slot = slot(first_block);
        // Every later block of the row begins inside it, so its slot is its slot 0.
        piece.other_slots = slots + static_cast<long long>(first_block + 1) * 2 * kPieceVectors;
        piece.counter = reinterpret_cast<int*>(workspace) + static_cast<long long>(column_block) * tiles_m + tile_m;
        return piece;
    }
};

}  // namespace flashllm
