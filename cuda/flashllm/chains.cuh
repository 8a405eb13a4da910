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

// All that needs a division is worked out before the first tile, while its data are on their way: at the end it would be
// waited for. Tiles count from the run's first. write(sum, row) writes a row of tiles to y and leaves the accumulators zero.
template <typename S>
struct Chains {
    int count;               // tiles of the run
    int first_row;           // the row of tiles that the run begins in
    int first_block;         // the block that has the begin of that row
    bool adds;               // the run has the end of that row, and others its begin
    int row;                 // the row at hand
    int row_begin, row_end;  // the run's part of it
    int chain_end;           // where the chain at hand ends

    // first: the run's first tile, in the row of tiles first_row.
    FLASHLLM_DEVICE Chains(const StreamK<S>& split, int first, int first_row_, int count_)
        : count(count_), first_row(first_row_), row(first_row_), row_begin(0) {
        const int left = (first_row + 1) * split.tiles_k - first;  // of the row, from the run's begin on
        row_end = min(count, left);
        chain_end = split.first_chain(row_end, S::kMaxChain, blockIdx.x);
        first_block = static_cast<int>(split.block_of(first_row * split.tiles_k));
        adds = left < split.tiles_k && row_end == left;
    }

    // Whether the accumulators stay what they are when the run is through: the last piece of the row to add up.
    FLASHLLM_DEVICE bool keeps_piece() const { return adds && row_begin == 0 && row_end == count; }

    // Ends the chain before `tile`: stores the accumulators and leaves them zero. No barrier: a thread adds what it has
    // stored itself.
    template <typename Write>
    FLASHLLM_DEVICE void end(const StreamK<S>& split, int tile, Accumulators<S>& sum, Write&& write) {
        if (tile - row_begin > S::kMaxChain) split.take_back(sum, split.chains(blockIdx.x, blockIdx.y));
        if (tile != row_end) {
            split.put_aside(sum, split.chains(blockIdx.x, blockIdx.y));
            chain_end = min(row_end, chain_end + S::kMaxChain);
            return;
        }
        if (row_end - row_begin == split.tiles_k) {
            write(sum, row);
        } else if (!keeps_piece()) {
            const bool begins_row = row_begin > 0 || first_block == static_cast<int>(blockIdx.x);
            split.store(sum, split.slot(blockIdx.x, begins_row));
        }
        if (tile == count) return;
        ++row;
        row_begin = row_end;
        row_end = min(count, row_end + split.tiles_k);
        chain_end += split.first_chain(row_end - row_begin, S::kMaxChain, blockIdx.x);
    }

    // When the run is through, by the threads that multiply: where it has the end of a row of tiles that others began, adds
    // up all pieces of the row. Not when the row ends already: it would stand still until the others are through. A
    // thread adds what threads of its number have stored: no barrier.
    template <typename Write>
    FLASHLLM_DEVICE void finish(const StreamK<S>& split, Accumulators<S>& sum, Write&& write) const {
        if (!adds) return;
        split.add(sum, first_block, static_cast<int>(blockIdx.x) - first_block + (keeps_piece() ? 0 : 1));
        write(sum, first_row);
    }
};

}  // namespace flashllm
