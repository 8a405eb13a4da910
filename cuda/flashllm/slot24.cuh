// SPDX-License-Identifier: Apache-2.0
// Slot24: constants of the format beyond those of a bitmap. Mirrors src/flashllm/formats/slot24.py; the specification is
// docs/formats/slot24.md.
//
// Columns of W are paired, per window of K and per part of a tile, so that no row of the part has two nonzeros in a pair.
// A pair is a slot of the 2:4 sparse tensor cores, and the matrix of slots [M, 128 * windows] is stored as a bitmap.
#pragma once

#include "flashllm/bitmap.cuh"

namespace flashllm {
namespace slot24 {

constexpr int kWindowTiles = 2;                       // tiles of slots of a window
constexpr int kPairs = kWindowTiles * bitmap::kTileK;  // pairs of columns of a window, and slots of a row in it
constexpr int kSteps = 4;                             // m16n8k32 steps of a tile: 16 slots each
constexpr int kPickBytes = bitmap::kTileThreads * 8;    // picks of a tile: [part][lane] of two words
constexpr int kColumnBytes = bitmap::kTileThreads * 4;  // columns of a tile: [part][lane][step]

// A pick is one bit for each slot: which of its two columns. Position of slot 0 in its group of four: 0 or 1; of slot 1:
// 2 or 3. Picks of two steps' worth of metadata words lie in one word, those of the second 16 rows one bit higher.
FLASHLLM_DEVICE unsigned metadata(unsigned picks, int rows) { return ((picks >> rows) & 0x55555555u) | 0x88888888u; }

}  // namespace slot24
}  // namespace flashllm
