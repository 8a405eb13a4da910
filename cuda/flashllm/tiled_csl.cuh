// SPDX-License-Identifier: Apache-2.0
// Tiled-CSL: constants of the format and decode of one packed word.
// Mirrors src/flashllm/formats/tiled_csl.py; the specification is docs/formats/tiled_csl.md.
//
// A weight W [M, K] is cut into tiles of 128 rows x 64 columns, stored row-major over the tile grid. A tile is a list of
// 32-bit words, its length padded to a multiple of 4 (one 16-byte load). A word holds one element:
//   bits  0..15  the fp16 or bf16 bit pattern of the value
//   bits 16..31  location = r * 64 + (c ^ ((r & 7) * 8)),  r = row in the tile, c = column in the tile
// The location is the index of the element in a 128 x 64 array of 2-byte values whose 16-byte chunks are swizzled by
// the row, so a scatter to shared memory needs no address arithmetic and ldmatrix reads the tile without bank
// conflicts.
#pragma once

#include "flashllm/portable.cuh"

namespace flashllm {
namespace csl {

constexpr int kTileM = 128;                      // rows of a tile
constexpr int kTileK = 64;                       // columns of a tile
constexpr int kTileElements = kTileM * kTileK;   // places in a tile; also one past the largest location
constexpr int kWordsPerVector = 4;               // words in one 16-byte load; the unit of the tile offsets
constexpr int kBanks = 32;                       // shared-memory banks of 4 bytes
constexpr int kLanes = 32;                       // lanes that share one round (one warp-wide 2-byte store)
constexpr int kGroupWords = kLanes * kWordsPerVector;  // words a warp reads with one 16-byte load per lane

// Location of row r (0..127), column c (0..63).
FLASHLLM_DEVICE unsigned location(int r, int c) {
  return static_cast<unsigned>(r * kTileK + (c ^ ((r & 7) * 8)));
}

// Row and column of a location: the swizzle is its own inverse.
FLASHLLM_DEVICE int row_of_location(unsigned loc) { return static_cast<int>(loc / kTileK); }
FLASHLLM_DEVICE int column_of_location(unsigned loc) {
  return static_cast<int>((loc % kTileK) ^ ((loc / kTileK & 7u) * 8u));
}

FLASHLLM_DEVICE unsigned word_location(unsigned word) { return word >> 16; }
FLASHLLM_DEVICE unsigned short word_value(unsigned word) { return static_cast<unsigned short>(word); }
FLASHLLM_DEVICE unsigned make_word(unsigned loc, unsigned short value) { return loc << 16 | value; }

// Shared-memory bank of a location when the tile starts at a multiple of 128 bytes: two 2-byte values per bank, and one
// row of 64 values covers all 32 banks.
FLASHLLM_DEVICE unsigned bank_of_location(unsigned loc) { return loc >> 1 & 31u; }

// True for every value the format stores: all but +0.0 and -0.0, in fp16 as in bf16. NaN and infinity are stored.
FLASHLLM_DEVICE bool is_stored(unsigned short bits) { return (bits & 0x7fffu) != 0; }

}  // namespace csl
}  // namespace flashllm
