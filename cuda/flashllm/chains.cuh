// SPDX-License-Identifier: Apache-2.0
// What a block does with its accumulators at the end of each chain of tiles and at the end of its run.
//
// A chain is a part of a run within one row of tiles, short enough to be summed by the tensor cores, which truncate.
#pragma once

#include "flashllm/epilogue.cuh"
#include "flashllm/portable.cuh"
#include "flashllm/ptx.cuh"
#include "flashllm/stream_k.cuh"

namespace flashllm {

// What a block has to do with the row of tiles in which its run begins. One register, unpacked where it is used.
struct Part {
    int packed;

    FLASHLLM_DEVICE Part() = default;
    // from: the first block whose piece this block adds; from_begin: that block has the start of the row; begins: this
    // block has it; ends: this block has the end of the row, and others have the start; halfway: it is the middle one.
    FLASHLLM_DEVICE Part(int from, bool from_begin, bool begins, bool ends, bool halfway)
        : packed(from << 4 | from_begin << 3 | begins << 2 | ends << 1 | static_cast<int>(halfway)) {}

    FLASHLLM_DEVICE int from() const { return ptx::opaque(packed) >> 4; }
    FLASHLLM_DEVICE bool from_begin() const { return ptx::opaque(packed) & 8; }
    FLASHLLM_DEVICE bool begins() const { return ptx::opaque(packed) & 4; }
    FLASHLLM_DEVICE bool ends() const { return ptx::opaque(packed) & 2; }
    FLASHLLM_DEVICE bool adds() const { return ptx::opaque(packed) & 3; }
};

// Everything that needs a division is computed before the first tile, while its data are in flight: at the end it would
// delay the block. Tiles count from the run's first. write(sum, row) writes a row of tiles to y and leaves the
// accumulators zero.
template <typename S>
struct Chains {
    int count;               // tiles of the run
    int row;                 // the current row
    int row_begin, row_end;  // the run's part of it
    int chain_end;           // where the current chain ends
    Part part;               // in the row that the run begins in

    // first: the run's first tile, which lies in the row of tiles first_row.
    FLASHLLM_DEVICE Chains(const StreamK<S>& split, int first, int first_row, int count_)
        : count(count_), row(first_row), row_begin(0) {
        const int left = (first_row + 1) * split.tiles_k - first;  // tiles of the row, from the start of the run on
        row_end = min(count, left);
        chain_end = split.first_chain(row_end, S::kMaxChain, blockIdx.x);
        const int block = blockIdx.x, first_block = static_cast<int>(split.block_of(first_row * split.tiles_k));
        const int middle = split.middle(
            first_block, static_cast<int>(split.block_of(first_row * split.tiles_k + split.tiles_k - 1)));
        const bool begins = block == first_block, halfway = block == middle && !begins;
        const int from = halfway ? first_block : middle;
        part = {from, from == first_block, begins, left < split.tiles_k && row_end == left, halfway};
    }

    // Whether the accumulators keep the block's piece when the run ends: it is the last piece of the row to be added.
    FLASHLLM_DEVICE bool keeps_piece() const { return part.adds() && row_begin == 0 && row_end == count; }

    // Ends the chain before `tile`: stores the accumulators and leaves them zero, unless they keep the block's piece.
    // No barrier is needed: a thread adds what it has stored itself.
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

    // Called at the end of the run by the threads that multiply. If the run has the end of a row of tiles that others
    // began, adds up the pieces of the row and writes it; if it is in the middle of the row, adds up the pieces so far
    // and stores the sum. This is not done as soon as the row ends, since the block would idle until the others have
    // finished. No barrier is needed: a thread adds what threads with the same number have stored.
    template <typename Write>
    FLASHLLM_DEVICE void finish(const StreamK<S>& split, Accumulators<S>& sum, Write&& write) const {
        if (!part.adds()) return;
        int first_row = row;  // counted back: there is no register to keep it in, and a division is slow
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
