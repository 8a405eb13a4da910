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
//   masks   one bit per element: word q / 8 of the lane's two, bit 8 b + q % 8. It is set if a value is stored.
//   values  a lane's values lie in two streams, one for the first and one for the second half (h) of the steps, in the
//           order of the groups: a group takes consecutive values of one stream. A value row holds one value for each
//           of a part's 64 streams, 32 lanes x 2, so every lane reads from its own bank. kChunkRows rows of all four
//           parts, part after part, form a chunk; blocks copy whole chunks.
// The streams run through the whole matrix, tile after tile, and are not aligned at the end of a tile: each may lag up
// to kSlack rows behind the front, the row that the longest of the 256 has reached. A stream that would lag more gets
// explicit zeros (bit set, value 0).
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
constexpr int kPlaceTiles = 8;               // tiles between trades of columns; the streams' places are stored there
constexpr int kSlack = 31;                   // rows that a stream may lag behind the front
constexpr int kChunkRows = 16;               // value rows of a chunk
constexpr int kPartChunkBytes = kChunkRows * kRowBytes;  // a part's rows in one chunk
constexpr int kChunkBytes = kParts * kPartChunkBytes;

constexpr int kGroup = 4;                    // elements of a group

// Where the two streams of a lane continue. Stored as two half words, with five bits each for the lane of the stream
// that had the column before, the lane of the column, and the number of rows that it is behind the front.
struct Places {
    unsigned packed;

    FLASHLLM_DEVICE static unsigned pack(int giver, int lane, int lag) { return giver | lane << 5 | lag << 10; }
    // The lane is in the low five bits, and a shuffle ignores the others.
    FLASHLLM_DEVICE int giver(int stream) const { return static_cast<int>(packed >> (16 * stream)); }
    FLASHLLM_DEVICE int lane(int stream) const { return packed >> (16 * stream + 5) & 0x1f; }
    FLASHLLM_DEVICE int lag(int stream) const { return packed >> (16 * stream + 10) & 0x1f; }
    // Byte offset of the column in a value row, which has two values per lane.
    FLASHLLM_DEVICE unsigned column_byte(int stream) const { return lane(stream) * 4 + stream * 2; }
    // The places stored for the first multiple of kPlaceTiles after `tile`, or for the last one before `end`.
    FLASHLLM_DEVICE static Places behind(const unsigned* places, int tile, int end, int thread) {
        const int stored = min(tile / kPlaceTiles + 1, (end - 1) / kPlaceTiles);
        return {__ldg(places + stored * kTileThreads + thread)};
    }
    // Both streams at the front, each in its own column: how a run begins.
    FLASHLLM_DEVICE static Places own() { return {(threadIdx.x & 31) * 0x00210021u}; }
};

// The bits of a mask word whose elements belong to the first and to the second stream.
constexpr unsigned kLowBits = 0x55555555u, kHighBits = 0xaaaaaaaau;

// Decodes group kNumber of a mask word, which has at most kValues values, into two fragment registers. `place` is the
// shared address of the next value of the group's stream and advances past the group's values. There is no population
// count and no predicate: one multiply-add of the flag bytes with the bytes of a row (IDP.4A, off the ALU) gives each
// address, all loads are issued, and the byte selector of a permute takes either a loaded half or the zero that a
// 2-byte load leaves above it.
template <int kNumber, int kValues>
FLASHLLM_DEVICE void decode_group(unsigned& first, unsigned& second, unsigned& place, unsigned mask) {
    static_assert(0 <= kNumber && kNumber < 8, "eight groups per mask word");
    static_assert(kValues == 2 || kValues == kGroup, "two loads serve a group, or each half of it");
    // Two neighbouring groups share one shift: their flags are bytes of 1 and of 2, their weights 128 and 64.
    constexpr int kBit = kNumber & 1;
    constexpr unsigned kWeight = kRowBytes >> kBit, kHalf = kWeight | kWeight << 8;
    static_assert(kRowBytes == 128, "weights are bytes");
    const unsigned flags = (mask >> (kNumber & ~1)) & (0x01010101u << kBit);
    const unsigned a = ptx::load_shared_half(place), b = ptx::load_shared_half(place + kRowBytes);
    // An element takes bytes 2 k and 2 k + 1 of two loads, k = 1 + 2 * (flags before it) - (its own flag): the first
    // load (k = 0), the second (2), the zeros above one (1, 3), or, after two flags, bytes 10 and 11, which are the
    // signs of bytes 2 and 3 and thus zeros too. No sum carries, so one multiply-add computes all selectors.
    constexpr unsigned kBytes = 0x22u >> kBit;
    if constexpr (kValues == 2) {
        place = ptx::dot4(flags, kHalf | kHalf << 16, place);
        const unsigned select = 0x32323232u + flags * (kBytes * 0x02020200u - kBytes);
        first = ptx::permute(a, b, select);
        second = ptx::permute(a, b, select >> 16);
    } else {
        const unsigned between = ptx::dot4(flags, kHalf, place);
        const unsigned c = ptx::load_shared_half(between), d = ptx::load_shared_half(between + kRowBytes);
        place = ptx::dot4(flags, kHalf << 16, between);
        constexpr unsigned kFactor = kBytes * 0x0200u - kBytes;  // for the half word of two elements
        first = ptx::permute(a, b, 0x3232u + flags * kFactor);
        second = ptx::permute(c, d, 0x3232u + (flags >> 16) * kFactor);
    }
}

// Decodes the fragments of a k16 step, number 0 or 1 of a mask word, for both groups of 16 rows of the part.
template <int kStep, int kValues>
FLASHLLM_DEVICE void decode_step(unsigned (&a)[2][4], unsigned& low, unsigned& high, unsigned mask) {
    decode_group<kStep * 4, kValues>(a[0][0], a[0][1], low, mask);
    decode_group<kStep * 4 + 1, kValues>(a[0][2], a[0][3], high, mask);
    decode_group<kStep * 4 + 2, kValues>(a[1][0], a[1][1], low, mask);
    decode_group<kStep * 4 + 3, kValues>(a[1][2], a[1][3], high, mask);
}

}  // namespace bitmap
}  // namespace flashllm
