// SPDX-License-Identifier: Apache-2.0
// From accumulator fragments to rows of y.
//
// S is the compile-time shape of a kernel: kM x kN outputs per block in kRowFragments x kColumnFragments m16n8
// fragments per warp, kBlockWarps warps, K split over kSlices groups of them; row(i) is the first row of this warp's
// fragment i and slice() its K slice.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "flashllm/portable.cuh"
#include "flashllm/ptx.cuh"

namespace flashllm {

template <typename S>
using Accumulators = float[S::kRowFragments][S::kColumnFragments][4];

// Calls body(four accumulators, number of their fragment) for every fragment.
template <typename S, typename Body>
FLASHLLM_DEVICE void for_each(Accumulators<S>& sum, Body&& body) {
#pragma unroll
    for (int i = 0; i < S::kRowFragments; ++i)
#pragma unroll
        for (int j = 0; j < S::kColumnFragments; ++j) body(sum[i][j], i * S::kColumnFragments + j);
}

FLASHLLM_DEVICE void accumulate(float (&part)[4], const float4& more) {
    part[0] += more.x, part[1] += more.y, part[2] += more.z, part[3] += more.w;
}

// Adds the second K slice's accumulators to the first's and zeroes the second's. scratch: kM x kN floats, left zero.
template <typename S>
FLASHLLM_DEVICE void combine_slices(Accumulators<S>& sum, float* scratch) {
    static_assert(S::kSlices <= 2, "two slices are combined in one step");
    if constexpr (S::kSlices == 2) {
        const int pair = (threadIdx.x >> 6) * 32 + (threadIdx.x & 31);  // the same in the two warps of a pair
        float4* cell = reinterpret_cast<float4*>(scratch) + pair;
        constexpr int kPairs = S::kBlockWarps * 16;
        if (S::slice() == 1) {
            for_each<S>(sum, [&](float (&part)[4], int v) {
                cell[v * kPairs] = make_float4(part[0], part[1], part[2], part[3]);
                part[0] = part[1] = part[2] = part[3] = 0.0f;
            });
        }
        __syncthreads();
        if (S::slice() == 0) {
            for_each<S>(sum, [&](float (&part)[4], int v) {
                accumulate(part, cell[v * kPairs]);
                cell[v * kPairs] = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
            });
        }
        __syncthreads();  // the other slice's warps may write here again
    }
}

// The same for kernels in which some warps cannot take part: each pair of warps synchronizes by itself, at named
// barriers from 1 on, and passes one fragment at a time through one place, so kSumBytes are enough.
template <typename S>
inline constexpr int kSumBytes = S::kSlices == 2 ? S::kBlockWarps / 2 * 32 * 16 : 0;

template <typename S>
FLASHLLM_DEVICE void add_slices(Accumulators<S>& sum, float4* scratch) {
    static_assert(S::kSlices <= 2, "a pair of warps has two slices");
    if constexpr (S::kSlices == 2) {
        const int pair = threadIdx.x >> 6;
        float4* const cell = scratch + pair * 32 + (threadIdx.x & 31);
        for_each<S>(sum, [&](float (&part)[4], int) {
            if (S::slice() == 1) {
                *cell = make_float4(part[0], part[1], part[2], part[3]);
                part[0] = part[1] = part[2] = part[3] = 0.0f;
            }
            ptx::meet<64>(1 + pair);
            if (S::slice() == 0) accumulate(part, *cell);
            ptx::meet<64>(1 + pair);
        });
    }
}

// The shape after deal_slices: where a warp has as many row fragments as there are slices, each slice can end up with
// one summed fragment, and all slices continue together.
template <typename S>
struct DealtShape : S {
    static_assert(S::kRowFragments == S::kSlices, "a fragment for each slice");
    static constexpr int kSlices = 1, kRowFragments = 1;
    FLASHLLM_DEVICE static int row(int) { return S::row(S::slice()); }
    FLASHLLM_DEVICE static int slice() { return 0; }
};

template <typename S>
inline constexpr int kDealBytes = S::kBlockWarps / S::kSlices * (S::kSlices - 1) * S::kColumnFragments * 32 * 16;

// Adds up the accumulators of all slices, so that each ends up with one row fragment in `own`, and leaves `sum` zero.
// Consecutive warps hold the slices of the same rows; they synchronize by themselves, at named barriers from 1 on.
// scratch: kDealBytes.
template <typename S>
FLASHLLM_DEVICE void deal_slices(Accumulators<S>& sum, Accumulators<DealtShape<S>>& own, float4* scratch) {
    constexpr int kThreads = S::kSlices * 32, kOthers = S::kSlices - 1;
    const int group = threadIdx.x / kThreads;
    float4* const cells = scratch + group * kOthers * S::kColumnFragments * 32 + (threadIdx.x & 31);
#pragma unroll
    for (int owner = 0; owner < S::kSlices; ++owner) {
        if (S::slice() != owner) {
            const int place = S::slice() - (S::slice() > owner ? 1 : 0);
#pragma unroll
            for (int j = 0; j < S::kColumnFragments; ++j) {
                const float(&part)[4] = sum[owner][j];
                cells[(place * S::kColumnFragments + j) * 32] = make_float4(part[0], part[1], part[2], part[3]);
            }
        }
        ptx::meet<kThreads>(1 + group);
#pragma unroll
        for (int j = 0; j < S::kColumnFragments; ++j) {
            float(&part)[4] = sum[owner][j];
            if (S::slice() == owner) {
#pragma unroll
                for (int other = 0; other < kOthers; ++other) {
                    accumulate(part, cells[(other * S::kColumnFragments + j) * 32]);
                }
#pragma unroll
                for (int r = 0; r < 4; ++r) own[0][j][r] = part[r];
            }
            part[0] = part[1] = part[2] = part[3] = 0.0f;
        }
        ptx::meet<kThreads>(1 + group);
    }
}

// Transposes the accumulators of the first K slice through shared memory, 32 columns of y at a time (scratch: kM x 32
// floats), and hands each thread groups of 4 neighbouring rows m of one column n: consume(n, m, float4). Leaves the
// accumulators zero.
template <typename S, typename Consume>
FLASHLLM_DEVICE void drain(Accumulators<S>& sum, float* scratch, Consume&& consume) {
    constexpr int kColumns = S::kN < 32 ? S::kN : 32;
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
#pragma unroll
    for (int first = 0; first < S::kN; first += kColumns) {
        if (S::slice() == 0) {
#pragma unroll
            for (int i = 0; i < S::kRowFragments; ++i)
#pragma unroll
                for (int j = 0; j < kColumns / 8; ++j)
#pragma unroll
                    for (int r = 0; r < 4; ++r) {
                        const int n = j * 8 + (lane & 3) * 2 + (r & 1);
                        const int m = S::row(i) + (lane >> 2) + (r >> 1) * 8;
                        // XOR by the quad lane: the 32 lanes of a store fall on 32 banks.
                        scratch[n * S::kM + (m ^ ((lane & 3) << 3))] = sum[i][first / 8 + j][r];
                        sum[i][first / 8 + j][r] = 0.0f;
                    }
        }
        __syncthreads();
#pragma unroll 2
        for (int n = warp; n < kColumns; n += S::kBlockWarps) {
            const int m = lane * 4;
            const float* cell = scratch + n * S::kM + (m ^ ((n >> 1 & 3) << 3));
            consume(first + n, m, *reinterpret_cast<const float4*>(cell));
        }
        __syncthreads();
    }
}

template <typename T>
FLASHLLM_DEVICE T round_to(float value);
template <>
FLASHLLM_DEVICE __half round_to<__half>(float value) {
    return __float2half_rn(value);
}
template <>
FLASHLLM_DEVICE __nv_bfloat16 round_to<__nv_bfloat16>(float value) {
    return __float2bfloat16_rn(value);
}

// Writes y[n, m] for every accumulator of the first K slice in 2-byte stores: for kernels that write rarely and have no
// shared memory in which to transpose fragments. Skips columns >= N and rows >= M. Leaves the accumulators zero.
template <typename S, typename T>
FLASHLLM_DEVICE void store_fragments(Accumulators<S>& sum, T* y, int n0, int m0, int N, int M) {
    if (S::slice() != 0) return;
    const int lane = ptx::opaque(threadIdx.x & 31);  // or addresses would stay in registers for the whole run
#pragma unroll
    for (int i = 0; i < S::kRowFragments; ++i)
#pragma unroll
        for (int j = 0; j < S::kColumnFragments; ++j)
#pragma unroll
            for (int r = 0; r < 4; ++r) {
                const int n = n0 + j * 8 + (lane & 3) * 2 + (r & 1);
                const int m = m0 + S::row(i) + (lane >> 2) + (r >> 1) * 8;
                if (n < N && m < M) y[static_cast<long long>(n) * M + m] = round_to<T>(sum[i][j][r]);
                sum[i][j][r] = 0.0f;
            }
}

// Writes y[n, m..m+3], but no rows from M on, in 8-byte stores where M keeps them aligned.
template <typename T>
FLASHLLM_DEVICE void store_y(T* y, int n, int m, int M, const float4& value) {
    T* target = y + static_cast<long long>(n) * M + m;
    alignas(8) const T rounded[4] = {round_to<T>(value.x), round_to<T>(value.y), round_to<T>(value.z),
                                     round_to<T>(value.w)};
    if (M % 4 == 0) {
        if (m < M) *reinterpret_cast<uint2*>(target) = *reinterpret_cast<const uint2*>(rounded);
    } else {
#pragma unroll
        for (int i = 0; i < 4; ++i)
            if (m + i < M) target[i] = rounded[i];
    }
}

}  // namespace flashllm
