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

// What a block has to do with the row of tiles that its run begins in. One register, and unpacked where it is used.
struct Part {
    int packed;

    FLASHLLM_DEVICE Part() = default;
    // from: the block from which on it adds pieces up, which has the begin of the row or does not; this block has the begin;
    // it has the end, and others have the begin; it is the one in the middle.
    FLASHLLM_DEVICE Part(int from, bool from_begin, bool begins, bool ends, bool halfway)
        : packed(from << 4 | from_begin << 3 | begins << 2 | ends << 1 | static_cast<int>(halfway)) {}

    FLASHLLM_DEVICE int from() const { return ptx::opaque(packed) >> 4; }
    FLASHLLM_DEVICE bool from_begin() const { return ptx::opaque(packed) & 8; }
    FLASHLLM_DEVICE bool begins() const { return ptx::opaque(packed) & 4; }
    FLASHLLM_DEVICE bool ends() const { return ptx::opaque(packed) & 2; }
    FLASHLLM_DEVICE bool adds() const { return ptx::opaque(packed) & 3; }
};

// All that needs a division is worked out before the first tile, while its data are on their way: at the end it would be
// waited for. Tiles count from the run's first. write(sum, row) writes a row of tiles to y and leaves the accumulators zero.
template <typename S>
struct Chains {
    int count;               // tiles of the run
    int row;                 // the row at hand
    int row_begin, row_end;  // the run's part of it
    int chain_end;           // where the chain at hand ends
    Part part;               // in the row that the run begins in

    // first: the run's first tile, in the row of tiles first_row.
    FLASHLLM_DEVICE Chains(const StreamK<S>& split, int first, int first_row, int count_)
        : count(count_), row(first_row), row_begin(0) {
        const int left = (first_row + 1) * split.tiles_k - first;  // of the row, from the run's begin on
        row_end = min(count, left);
        chain_end = split.first_chain(row_end, S::kMaxChain, blockIdx.x);
        const int block = blockIdx.x, first_block = static_cast<int>(split.block_of(first_row * split.tiles_k));
        const int middle = split.middle(
            first_block, static_cast<int>(split.block_of(first_row * split.tiles_k + split.tiles_k - 1)));
        const bool begins = block == first_block, halfway = block == middle && !begins;
        const int from = halfway ? first_block : middle;
        part = {from, from == first_block, begins, left < split.tiles_k && row_end == left, halfway};
    }

    // Whether the accumulators stay what they are when the run is through: the last piece of the row to add up.
    FLASHLLM_DEVICE bool keeps_piece() const { return part.adds() && row_begin == 0 && row_end == count; }

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
            split.store(sum, split.slot(blockIdx.x, row_begin > 0 || part.begins()));
        }
        if (tile == count) return;
        ++row;
        row_begin = row_end;
        row_end = min(count, row_end + split.tiles_k);
        chain_end += split.first_chain(row_end - row_begin, S::kMaxChain, blockIdx.x);
    }

    // When the run is through, by the threads that multiply: where it has the end of a row of tiles that others began, adds
    // up the pieces of the row and writes it; in the middle of the row, adds up those so far and stores the sum. Not when
    // the row ends already: it would stand still until the others are through. A thread adds what threads of its number
    // have stored: no barrier.
    template <typename Write>
    FLASHLLM_DEVICE void finish(const StreamK<S>& split, Accumulators<S>& sum, Write&& write) const {
        if (!part.adds()) return;
        int first_row = row;  // counted back: there is no register to keep it, and no time to divide
        for (int tiles = row_begin; tiles > 0; tiles -= split.tiles_k) --first_row;
        const int others = static_cast<int>(blockIdx.x) - part.from();
        split.add(sum, part.from(), part.from_begin(), others + (keeps_piece() ? 0 : 1));
        if (part.ends()) {
            write(sum, first_row);
        } else {
            split.store(sum, split.slot(blockIdx.x, false));
        }
    }
};

}  // namespace flashllm
