// SPDX-License-Identifier: Apache-2.0
// What a block does with its accumulators: at the end of each chain of tiles, and at the end of its run.
//
// A chain is a part of a run in one row of tiles, short enough for the tensor cores to add up (they truncate).
#pragma once

#include "flashllm/epilogue.cuh"
#include "flashllm/portable.cuh"
#include "flashllm/ptx.cuh"
#include "flashllm/stream_k.cuh"

namespace flashllm {

template <typename S, typename T>
struct Chains {
    T* y;
    int n0, N, M;
    int count;      // tiles of the run
    int row_end;    // the first tile, of the run, that belongs to the next row of tiles
    int chain_end;  // and that belongs to the next chain

    FLASHLLM_DEVICE Chains(const StreamK<S>& split, int tile_k, int count, T* y, int n0, int N, int M)
        : y(y), n0(n0), N(N), M(M), count(count), row_end(min(count, split.tiles_k - tile_k)),
          chain_end(split.first_chain(row_end, S::kMaxChain, blockIdx.x)) {}

    // Ends the chain before `tile`: stores the accumulators and leaves them zero. Rare, so this is where the row of
    // tiles is worked out: the loop needs the registers more. No barrier: a thread adds what it has stored itself.
    FLASHLLM_DEVICE void end(const StreamK<S>& split, int tile, Accumulators<S>& sum) {
        const int block = ptx::opaque(blockIdx.x);
        const unsigned run_begin = split.first_tile(block);
        const unsigned tile_m = (run_begin + row_end - 1) / split.tiles_k;
        const unsigned row_begin = max(run_begin, tile_m * split.tiles_k);
        const auto piece = split.piece(block, tile_m, blockIdx.y);
        const bool row_ends = tile == row_end;
        if (run_begin + tile - row_begin > S::kMaxChain) split.take_back(sum, split.chains(block, blockIdx.y));
        if (!row_ends) {
            split.put_aside(sum, split.chains(block, blockIdx.y));
        } else if (piece.whole) {
            store_fragments<S>(sum, y, n0, static_cast<int>(tile_m) * S::kM, N, M);
        } else {
            piece.store(sum);
        }
        if (row_ends) {
            row_end = min(count, row_end + split.tiles_k);
            chain_end += split.first_chain(row_end - chain_end, S::kMaxChain, block);
        } else {
            chain_end = min(row_end, chain_end + S::kMaxChain);
        }
    }

    // When the run is through, by the threads that multiply: where it has the end of a row of tiles that others began, adds
    // up all pieces of the row. Not when the row ends already: it would stand still until the others are through. A
    // thread adds what threads of its number have stored: no barrier.
    FLASHLLM_DEVICE void finish(const StreamK<S>& split, Accumulators<S>& sum) const {
        const int block = ptx::opaque(blockIdx.x), tile_m = split.row_to_add_up(block);
        if (tile_m < 0) return;
        split.piece(block, tile_m, blockIdx.y).add_up(sum);
        store_fragments<S>(sum, y, n0, tile_m * S::kM, N, M);
    }
};

}  // namespace flashllm
