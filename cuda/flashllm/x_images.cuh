// SPDX-License-Identifier: Apache-2.0
// x on its way to shared memory, as images: parts of x, some columns wide, that lie in device memory as they will lie
// in shared memory.
//
// In device memory x is stored by rows. Blocks need its columns again and again, each block a different part, so a
// launch lays out each image only once, in a scratch buffer: every multiplying warp does a share when it begins.
// Feeding warps copy whole images from there. The first images of a block do not wait for that: its warps lay them out
// themselves. And where some blocks do not begin, because others that wait for them are running, a feeding warp lays
// out what it needs.
//
// Image: its layout, and its pieces, each the work of one warp: kN rows of x, kBytes, kPieces; Piece, load, store.
#pragma once

#include "flashllm/bitmap.cuh"
#include "flashllm/portable.cuh"
#include "flashllm/ptx.cuh"

namespace flashllm {

// Counters that the blocks of a launch share, zero before and after it: one counts the blocks that need no more of x,
// and one for each group of images the pieces that are laid out. Each has its own sector, since many warps poll them.
constexpr int kCounterWords = 8;
constexpr int kImagesBarrier = 5;  // a named barrier: those before it are for slices (epilogue.cuh)

// The part of x for one image: `width` columns from `column` on, rows from n0 on. What x does not have is zero.
struct XPart {
    const unsigned short* x;
    int K, width, rows;  // rows: those that x has from n0 on

    FLASHLLM_DEVICE XPart(const unsigned short* x_, int n0, int N, int K_, int column_, int width_)
        : x(x_ + static_cast<long long>(n0) * K_ + column_), K(K_), width(min(width_, K_ - column_)),
          rows(N - n0) {}
};

template <typename Image, int kFirst_, int kGroup, int kWarps = bitmap::kParts>
struct XImages {
    static constexpr int kFirst = kFirst_;  // images that a block lays out for itself
    static constexpr int kPieces = Image::kPieces;
    static constexpr int kOwn = (kFirst * kPieces + kWarps - 1) / kWarps;  // pieces of these images per warp
    static constexpr int kTogether = kOwn < Image::kTogether ? kOwn : Image::kTogether;  // loaded before the first is stored

    const unsigned short* x;
    int N, K;
    int images, width;    // images per column block; columns per image
    unsigned* counters;
    unsigned char* scratch;

    // Bytes of workspace for the counters, a multiple of 128.
    FLASHLLM_DEVICE static unsigned counter_bytes(int images) {
        return (groups(images) * gridDim.y + 1 + 3) / 4 * 4 * kCounterWords * 4;
    }
    FLASHLLM_DEVICE unsigned char* image(int number) const {
        return scratch + (static_cast<long long>(blockIdx.y) * images + number) * Image::kBytes;
    }

    // What a multiplying warp has loaded of the run's first images and of its share.
    struct Begun {
        typename Image::Piece own[kTogether], share;
    };

    // Called by the kWarps multiplying warps when they begin. While these loads are in flight, the warps do whatever
    // else they need to begin.
    FLASHLLM_DEVICE Begun begin(int first_image, int warp) const {
        Begun begun = {};
#pragma unroll
        for (int i = 0; i < kTogether; ++i) begun.own[i] = load_own(first_image, warp + i * kWarps);
        if (first_share(warp) < pieces()) begun.share = load_share(first_share(warp));
        return begun;
    }

    // Called next: lays out the first images in shared memory, from `to` on and `distance` bytes apart, where the warps
    // may read them when this returns, and the warps' shares in the scratch buffer.
    FLASHLLM_DEVICE void finish(const Begun& begun, unsigned char* to, unsigned distance, int first_image, int warp) const {
#pragma unroll
        for (int i = 0; i < kTogether; ++i) store_own(to, distance, warp + i * kWarps, begun.own[i]);
        const bool has_share = first_share(warp) < pieces();
        if (has_share) store_share(first_share(warp), begun.share);
#pragma unroll 1
        for (int i = kTogether; i < kOwn; ++i) {
            const int piece = warp + i * kWarps;
            store_own(to, distance, piece, load_own(first_image, piece));
        }
#pragma unroll 1
        for (int share = first_share(warp) + step(); share < pieces(); share += step()) {
            store_share(share, load_share(share));
        }
        Image::publish();
        ptx::meet<kWarps * 32>(kImagesBarrier);
        if (has_share) tell(warp);
    }

    // Called by a feeding warp: whether an image is laid out, polling at most `looks` times. If so, copies may read it.
    FLASHLLM_DEVICE bool is_there(int number, int looks) const {
        const int group = number / kGroup;
        while (!__all_sync(0xffffffffu, ptx::has_reached(counter(blockIdx.y, group), pieces_of(group)))) {
            if (--looks <= 0) return false;
            ptx::look_again();
        }
        ptx::fence_async_proxy_global();
        return true;
    }

    // Called by a feeding warp: whether all images of its column block are laid out.
    FLASHLLM_DEVICE bool are_there() const {
        bool all = true;
        for (int i = threadIdx.x & 31; i < groups(images); i += 32) {
            all &= ptx::has_reached(counter(blockIdx.y, i), pieces_of(i));
        }
        ptx::fence_async_proxy_global();
        return __all_sync(0xffffffffu, all);
    }

    // Called by a feeding warp: lays out an image, even if others lay it out too.
    FLASHLLM_DEVICE void lay_out(int number) const {
#pragma unroll 1
        for (int i = 0; i < kPieces; ++i) Image::store(image(number), i, Image::load(part(blockIdx.y, number), i));
        ptx::fence_async_proxy_global();
        __syncwarp();
    }

    // Called by a feeding warp that needs no more of x and whose block has laid out its share: the last one zeroes the
    // counters.
    FLASHLLM_DEVICE void leave() const {
        __threadfence();
        __syncwarp();
        const unsigned before = (threadIdx.x & 31) == 0 ? atomicAdd(counters, 1u) : 0;
        if (__shfl_sync(0xffffffffu, before, 0) != gridDim.x * gridDim.y - 1) return;
        const int last = groups(images) * static_cast<int>(gridDim.y);
        for (int i = threadIdx.x & 31; i <= last; i += 32) counters[i * kCounterWords] = 0;
    }

private:
    FLASHLLM_DEVICE static int groups(int images) { return (images + kGroup - 1) / kGroup; }
    FLASHLLM_DEVICE unsigned pieces_of(int group) const { return min(kGroup, images - group * kGroup) * kPieces; }
    FLASHLLM_DEVICE unsigned* counter(int column_block, int group) const {
        return counters + (column_block * groups(images) + group + 1) * kCounterWords;
    }
    FLASHLLM_DEVICE XPart part(int column_block, int number) const {
        return {x, column_block * Image::kN, N, K, number * width, width};
    }

    FLASHLLM_DEVICE int pieces() const { return images * kPieces * static_cast<int>(gridDim.y); }
    // The first piece of a warp's share, and the distance to the next one.
    FLASHLLM_DEVICE int first_share(int warp) const {
        return static_cast<int>(blockIdx.y * gridDim.x + blockIdx.x) * kWarps + warp;
    }
    FLASHLLM_DEVICE int step() const { return static_cast<int>(gridDim.x * gridDim.y) * kWarps; }

    FLASHLLM_DEVICE typename Image::Piece load_share(int share) const {
        const int number = share / kPieces, column_block = number / images;
        return Image::load(part(column_block, number - column_block * images), share % kPieces);
    }
    FLASHLLM_DEVICE void store_share(int share, const typename Image::Piece& values) const {
        Image::store(scratch + static_cast<long long>(share / kPieces) * Image::kBytes, share % kPieces, values);
    }

    // Counts the pieces of a warp's share as laid out.
    FLASHLLM_DEVICE void tell(int warp) const {
        __threadfence();
        __syncwarp();
        if ((threadIdx.x & 31) != 0) return;
        for (int share = first_share(warp); share < pieces(); share += step()) {
            const int number = share / kPieces, column_block = number / images;
            atomicAdd(counter(column_block, (number - column_block * images) / kGroup), 1u);
        }
    }

    // Loads a piece of the first images, which wrap around at the end of a row of tiles.
    FLASHLLM_DEVICE typename Image::Piece load_own(int first_image, int piece) const {
        const int number = (first_image + min(piece / kPieces, kFirst - 1)) % images;
        return Image::load(part(blockIdx.y, number), piece % kPieces);
    }
    FLASHLLM_DEVICE static void store_own(unsigned char* to, unsigned distance, int piece,
                                          const typename Image::Piece& values) {
        if (piece < kFirst * kPieces) Image::store(to + piece / kPieces * distance, piece % kPieces, values);
    }
};

}  // namespace flashllm
