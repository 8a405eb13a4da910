// SPDX-License-Identifier: Apache-2.0
// Stream-K split of a grid of weight tiles over the blocks of a launch, and the ordered reduction of the pieces.
//
// The tiles of an [M, K] weight, numbered row by row, are dealt to the G = gridDim.x blocks in contiguous runs of
// equal cost. A row of tiles that one block covers alone is final; otherwise each block leaves its piece of it, fp32
// [kN][128], in the workspace, and the block that arrives last adds the pieces in block order. (Stream-K: Osama
// et al., PPoPP'23.)
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

#include "flashllm/portable.cuh"
#include "flashllm/ptx.cuh"

namespace flashllm {

template <int kN>
struct StreamK {
    static constexpr int kPieceFloats = kN * 128;

    int tiles_m, tiles_k, row_cost;
    unsigned char* workspace;

    FLASHLLM_DEVICE StreamK(int tiles_m, int tiles_k, int row_cost, unsigned char* workspace)
        : tiles_m(tiles_m), tiles_k(tiles_k), row_cost(row_cost), workspace(workspace) {}

    // 32-bit arithmetic throughout: 64-bit division is slow and needs registers. The host keeps cost * G below 2^32.
    FLASHLLM_DEVICE unsigned cost() const { return static_cast<unsigned>(tiles_m) * (tiles_k + row_cost); }

    FLASHLLM_DEVICE unsigned first_tile(unsigned block) const {
        const unsigned begin = cost() * block / gridDim.x, row = begin / (tiles_k + row_cost);
        return row * tiles_k + min(begin - row * (tiles_k + row_cost), static_cast<unsigned>(tiles_k));
    }

    // The block that holds `tile`: the inverse of first_tile.
    FLASHLLM_DEVICE unsigned block_of(unsigned tile) const {
        return ((tile + tile / tiles_k * row_cost + 1) * gridDim.x - 1) / cost();
    }

    // Length of the first of the chains that `length` tiles of a row are cut into, `longest` at most and no more of
    // them than needed. Blocks take different lengths, so that they do not all write their accumulators, and leave
    // DRAM idle, at one time.
    FLASHLLM_DEVICE static int first_chain(int length, int longest, unsigned block) {
        if (length <= longest) return length;
        const int least = (length - 1) % longest + 1;
        return least + (longest - least) * static_cast<int>(block % 8) / 7;
    }

    struct Piece {
        bool whole;      // the block has all of K for this row of tiles
        int pieces;      // blocks that share the row of tiles
        float* mine;     // this block's slot
        const float* first_slot;   // slot of the row's first block
        const float* other_slots;  // slot 0 of the row's second block
        int* counter;

        FLASHLLM_DEVICE void store(int n, int m, const float4& value) const {
            __stcg(reinterpret_cast<float4*>(mine + n * 128 + m), value);
        }

        // What this block stored before at (n, m), plus `value`.
        FLASHLLM_DEVICE float4 continued(int n, int m, const float4& value) const {
            const float4 before = __ldcg(reinterpret_cast<const float4*>(mine + n * 128 + m));
            return make_float4(before.x + value.x, before.y + value.y, before.z + value.z, before.w + value.w);
        }

        // True if all other pieces of the row are stored. One thread calls it, after a barrier behind which all
        // threads of the block have stored theirs: its release covers them all.
        FLASHLLM_DEVICE bool arrive_last() const {
            if (whole || ptx::add_acquire_release(counter, 1) != pieces - 1) return false;
            *counter = 0;  // ready for the next launch
            return true;
        }

        // Sums over all blocks, in block order, of rows m..m+3 and columns n, n + stride, ... Several
        // pieces are loaded before the first is added: one after the other, their latencies cost more than all else.
        template <int kCount>
        FLASHLLM_DEVICE void total(float4 (&sums)[kCount], int n, int stride, int m) const {
            constexpr int kAhead = 16 / kCount;  // pieces in flight, 16 vectors of them
#pragma unroll
            for (int j = 0; j < kCount; ++j) {
                sums[j] = __ldcg(reinterpret_cast<const float4*>(first_slot + (n + j * stride) * 128 + m));
            }
            const float* slot = other_slots + n * 128 + m;
            for (int i = 1; i < pieces; i += kAhead, slot += kAhead * 2 * kPieceFloats) {
                float4 parts[kAhead][kCount] = {};
#pragma unroll
                for (int ahead = 0; ahead < kAhead; ++ahead) {
                    if (i + ahead >= pieces) break;
#pragma unroll
                    for (int j = 0; j < kCount; ++j) {
                        parts[ahead][j] = __ldcg(reinterpret_cast<const float4*>(slot + ahead * 2 * kPieceFloats +
                                                                                 j * stride * 128));
                    }
                }
#pragma unroll
                for (int ahead = 0; ahead < kAhead; ++ahead)
#pragma unroll
                    for (int j = 0; j < kCount; ++j) {
                        sums[j].x += parts[ahead][j].x, sums[j].y += parts[ahead][j].y;
                        sums[j].z += parts[ahead][j].z, sums[j].w += parts[ahead][j].w;
                    }
            }
        }
    };

    FLASHLLM_DEVICE Piece piece(int block, int tile_m, int column_block) const {
        const unsigned row_first = tile_m * tiles_k;
        const unsigned first_block = block_of(row_first), last_block = block_of(row_first + tiles_k - 1);
        const long long counters = (static_cast<long long>(gridDim.y) * tiles_m * 4 + 127) / 128 * 128;
        float* slots = reinterpret_cast<float*>(workspace + counters) +
                       static_cast<long long>(column_block) * gridDim.x * 2 * kPieceFloats;
        // Slot 0 of a block is for the row its run begins in, slot 1 for the row it ends in, if another.
        auto slot = [&](unsigned b) {
            const bool begins_in_row = first_tile(b) >= row_first;
            return slots + (static_cast<long long>(b) * 2 + (begins_in_row ? 0 : 1)) * kPieceFloats;
        };
        Piece piece;
        piece.pieces = last_block - first_block + 1;
        piece.whole = piece.pieces == 1;
        piece.mine = slot(block);
        piece.first_slot = slot(first_block);
        // Every later block of the row begins inside it, so its slot is its slot 0.
        piece.other_slots = slots + static_cast<long long>(first_block + 1) * 2 * kPieceFloats;
        piece.counter = reinterpret_cast<int*>(workspace) + static_cast<long long>(column_block) * tiles_m + tile_m;
        return piece;
    }
};

}  // namespace flashllm
