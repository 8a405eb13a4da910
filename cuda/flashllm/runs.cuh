// SPDX-License-Identifier: Apache-2.0
// Runs of tiles of equal cost. Mirrors src/flashllm/formats/runs.py, and the split of src/flashllm/matmul/stream_k.py.
#pragma once

#include "flashllm/portable.cuh"

namespace flashllm {

struct Runs {
    int tiles_m, tiles_k, row_cost;  // the end of a row of tiles costs as much as row_cost tiles
    unsigned count;

    // 32-bit arithmetic throughout: 64-bit division is slow and needs registers. The host keeps cost * count below 2^32.
    FLASHLLM_DEVICE unsigned cost() const { return static_cast<unsigned>(tiles_m) * (tiles_k + row_cost); }

    // First tile of `run`; for `run + 1`, one past the last tile of `run`.
    FLASHLLM_DEVICE unsigned first_tile(unsigned run) const {
        const unsigned begin = cost() * run / count, row = begin / (tiles_k + row_cost);
        return row * tiles_k + min(begin - row * (tiles_k + row_cost), static_cast<unsigned>(tiles_k));
    }

    // The run that holds `tile`: the inverse of first_tile.
    FLASHLLM_DEVICE unsigned run_of(unsigned tile) const {
        return ((tile + tile / tiles_k * row_cost + 1) * count - 1) / cost();
    }
};

}  // namespace flashllm
