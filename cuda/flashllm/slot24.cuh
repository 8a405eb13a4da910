// SPDX-License-Identifier: Apache-2.0
// Slot24: constants of the format beyond those of a bitmap. Mirrors src/flashllm/formats/slot24.py; the specification is
// docs/formats/slot24.md.
//
// Columns of W are paired, per window of K and per band of 32 or 64 rows of a tile, so that no row of the band has two
// nonzeros in a pair. A pair is a slot of the 2:4 sparse tensor cores, and the matrix of slots, 128 per window, is stored
// as a bitmap.
#pragma once

#include "flashllm/bitmap.cuh"

namespace flashllm {
namespace slot24 {

constexpr int kWindowTiles = 2;                       // tiles of slots in a window
constexpr int kPairs = kWindowTiles * bitmap::kTileK;  // pairs of columns of a window, and slots of a row in it
constexpr int kSteps = 4;                             // m16n8k32 steps of a tile: 16 slots each
constexpr int kPickBytes = bitmap::kTileThreads * 8;    // picks of a tile: [part][lane] of two words

// Bands of kPartRows rows as parts of a bitmap tile. A band of 32 is one part, rows 16b..16b+15 and 64+16b..64+16b+15,
// with all four steps. A band of 64, rows 64b..64b+63, has two parts with two of the steps each; a mask word of a lane
// then covers one step, with one half for rows 0..31 of the band and the other for rows 32..63.
template <int kPartRows>
struct Bands {
    static_assert(kPartRows == 32 || kPartRows == 64);
    static constexpr int kBands = bitmap::kTileM / kPartRows;
    static constexpr int kHalves = bitmap::kParts / kBands;  // parts of a band
    static constexpr int kPartSteps = kSteps / kHalves;
    static constexpr int kColumnBytes = bitmap::kTileThreads * kPartSteps;  // columns of a tile: [part][lane][step]
    static constexpr int kBandColumnBytes = kColumnBytes / kBands;

    // Byte offset in a band's columns of a tile of the left (side 0) or right (side 1) column of a slot of the window.
    FLASHLLM_DEVICE static int column_byte(int slot, int side) {
        const int step = slot >> 4 & 3, half = step / kPartSteps;
        return (half * bitmap::kLanes + (slot & 15) * 2 + side) * kPartSteps + step % kPartSteps;
    }
};

// A pick is one bit per slot: which of its two columns. It puts slot 0 of a group of four at position 0 or 1, and slot
// 1 at 2 or 3. One word has the picks of two metadata words, those of the second 16 rows one bit higher.
FLASHLLM_DEVICE unsigned metadata(unsigned picks, int rows) { return ((picks >> rows) & 0x55555555u) | 0x88888888u; }

}  // namespace slot24
}  // namespace flashllm
