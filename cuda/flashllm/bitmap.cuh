// SPDX-License-Identifier: Apache-2.0
// Bitmap: constants of the format and decode of one group of four elements.
// Mirrors src/flashllm/formats/bitmap.py; the specification is docs/formats/bitmap.md.
//
// A weight W [M, K] is cut into tiles of 128 rows x 64 columns, stored row-major over the tile grid. Part p of a tile
// (0..3) is rows 16p..16p+15 and 64+16p..64+16p+15: what one warp holds as A fragments of m16n8k16. A lane
// (g = lane / 4, t = lane % 4) owns 64 elements of a part, in 16 groups of four:
//   group q (0..15): fragment row i = q / 2 % 2, half h = q % 2, k16 step s = q / 4
//   element b (0..3): row 64 i + 16 p + g + 8 (b / 2), column 16 s + 8 h + 2 t + b % 2
// which are the low and the high half of fragment registers 2h and 2h + 1.
//   masks   one bit per element: word q / 8 of the lane's two, bit 8 b + q % 8. A set bit has a stored value.
//   values  a lane's values lie in two streams, elements of even and of odd columns, in the order of the groups. A
//           value row is the next value of each of a part's 64 streams, 32 lanes x {even, odd}: every lane reads its
//           own bank. kChunkRows rows of all four parts, part after part, are a chunk; blocks copy whole chunks.
// The streams run through the whole matrix, tile after tile, and are not brought together at the end of a tile: each
// may lag behind the front, the longest of the 256, by kSlack rows. What would lag more gets explicit zeros (bit set,
// value 0).
#pragma once

#include "flashllm/portable.cuh"
#include "flashllm/ptx.cuh"

namespace flashllm {
namespace bitmap {

constexpr int kTileM = 128;                  // rows of a tile
constexpr int kTileK = 64;                   // columns of a tile
constexpr int kParts = 4;                    // warps that share a tile
constexpr int kLanes = 32;
constexpr int kTileThreads = kParts * kLanes;  // each with 64 elements of a tile
constexpr int kMaskBytes = kTileM * kTileK / 8;  // masks of a tile: [part][lane] of 8 bytes
constexpr int kStreamElements = kTileM * kTileK / kParts / (2 * kLanes);  // 32: elements of one stream in one tile
constexpr int kRowBytes = kLanes * 4;        // a value row
constexpr int kLagTiles = 8;                 // tiles between the places where the lags of the streams are stored
constexpr int kSlack = 32;                   // rows that a stream may lag behind the front
constexpr int kChunkRows = 16;               // value rows of a chunk
constexpr int kPartChunkBytes = kChunkRows * kRowBytes;  // a part's rows in one chunk
constexpr int kChunkBytes = kParts * kPartChunkBytes;

// Elements of a mask word that belong to the even and to the odd stream.
constexpr unsigned kEvenBits = 0x00ff00ffu, kOddBits = 0xff00ff00u;

// Decodes group kGroup of a mask word into two fragment registers. `even` and `odd` are the shared addresses of the
// lane's next values; they move to behind the group's values. No population count, no predicate: a multiply-add of the
// flag bytes with a row's bytes (IDP.4A, off the ALU) gives every address, all four loads are made, and the byte
// selector of a permute takes the loaded half or the zero that a 2-byte load leaves above it.
template <int kGroup>
FLASHLLM_DEVICE void decode_group(unsigned& first, unsigned& second, unsigned& even, unsigned& odd, unsigned mask) {
    static_assert(0 <= kGroup && kGroup < 8, "eight groups per mask word");
    // Two neighbouring groups share one shift: the flags are bytes of 1 or of 2, the weights 128 or 64.
    constexpr int kBit = kGroup & 1;
    constexpr unsigned kWeight = kRowBytes >> kBit;
    static_assert(kRowBytes == 128, "weights are bytes");
    const unsigned flags = (mask >> (kGroup & ~1)) & (0x01010101u << kBit);
    const unsigned even2 = ptx::dot4(flags, kWeight, even), odd2 = ptx::dot4(flags, kWeight << 8, odd);
    const unsigned a = ptx::load_shared_half(even), b = ptx::load_shared_half(odd);
    const unsigned c = ptx::load_shared_half(even2), d = ptx::load_shared_half(odd2);
    even = ptx::dot4(flags, kWeight | kWeight << 16, even);
    odd = ptx::dot4(flags, (kWeight | kWeight << 16) << 8, odd);
    // Bytes 2, 3 and 6, 7 of a pair of registers are zeros; a flag moves the selection to 0, 1 or 4, 5.
    const unsigned select = 0x76327632u - flags * (0x22u >> kBit);
    first = ptx::permute(a, b, select);
    second = ptx::permute(c, d, select >> 16);
}

// Decodes the fragments of a k16 step, 0 or 1 of a mask word, of both 16 rows of the part.
template <int kStep>
FLASHLLM_DEVICE void decode_step(unsigned (&a)[2][4], unsigned& even, unsigned& odd, unsigned mask) {
    decode_group<kStep * 4>(a[0][0], a[0][1], even, odd, mask);
    decode_group<kStep * 4 + 1>(a[0][2], a[0][3], even, odd, mask);
    decode_group<kStep * 4 + 2>(a[1][0], a[1][1], even, odd, mask);
    decode_group<kStep * 4 + 3>(a[1][2], a[1][3], even, odd, mask);
}

}  // namespace bitmap
}  // namespace flashllm
