// SPDX-License-Identifier: Apache-2.0
// Small kernels with one mistake each, chosen by kMistake (0: none), that the emulator has to catch.
#include "flashllm/ptx.cuh"

namespace broken {

using namespace flashllm;

// y[i] = x[i + 1 mod 128], twice through shared memory. Mistake 1: no barrier before reading, 2: none before the
// second write, 3: only half of warp 1 comes to the barrier, 4: no barrier, but one for the warp.
template <int kMistake>
__global__ void rotate(const int* x, int* y) {
    FLASHLLM_DYNAMIC_SHARED(shared);
    int* values = reinterpret_cast<int*>(shared);
    const int i = threadIdx.x;
    for (int turn = 0; turn < 2; ++turn) {
        values[i] = x[i] + turn;
        if (kMistake == 4) __syncwarp();
        if (kMistake == 3 && i / 16 == 3) __syncwarp();
        else if (kMistake != 1 && kMistake != 4) __syncthreads();
        y[turn * 128 + i] = values[(i + 1) % 128];
        if (kMistake != 2) __syncthreads();
    }
}

// y = x, 16 bytes per thread and group, three groups in flight. Mistake 1: no wait, 2: waits for one group less, 3: a
// group is not committed, 4: no barrier after the wait, 5: the first stage is filled again before everyone has read it.
template <int kMistake>
__global__ void copy(const uint4* x, uint4* y) {
    FLASHLLM_DYNAMIC_SHARED(shared);
    const unsigned base = ptx::shared_address(shared);
    const unsigned i = threadIdx.x, other = (i + 32) % 128;
    const uint4* stage = reinterpret_cast<const uint4*>(shared);
    for (unsigned group = 0; group < 3; ++group) {
        ptx::copy_async16(true, base + (group * 128 + i) * 16, x + group * 128 + i, 16);
        if (kMistake != 3 || group != 1) ptx::copy_async_commit();
    }
    if (kMistake != 1) ptx::copy_async_wait<kMistake == 2 ? 3 : 2>();
    if (kMistake != 4) __syncthreads();
    y[other] = stage[other];
    if (kMistake != 5) __syncthreads();
    ptx::copy_async16(true, base + i * 16, x, 0);  // zeros
    ptx::copy_async_commit();
    ptx::copy_async_wait<1>();
    __syncthreads();
    y[128 + other] = stage[128 + other];
    y[256 + other] = stage[256 + other];
    ptx::copy_async_wait<0>();
    __syncthreads();
    y[384 + other] = stage[other];
}

// Mistake 1: half of the warp takes another collective, 2: a lane has left, 3: threads meet at barriers of two kinds,
// 4: a lane is missing in the mask it gives.
template <int kMistake>
__global__ void meet(const int* x, int* y) {
    const int i = threadIdx.x;
    if (kMistake == 2 && i == 5) return;
    if (kMistake == 3) {
        if (i < 32) __syncthreads();
        else __syncthreads_or(1);
    }
    if (kMistake == 1 && i % 32 >= 16) {
        y[i] = static_cast<int>(__ballot_sync(0xffffffffu, 1));
    } else {
        y[i] = __shfl_xor_sync(kMistake == 4 ? 0x7fffffffu : 0xffffffffu, x[i], 1);
    }
}

// Mistake 1: writes past shared memory through a wrapper, 2: the same through a pointer, 3: reads past x, 4: writes to
// x, 5: a misaligned 16-byte store, 6: reads a static array that nobody wrote.
template <int kMistake>
__global__ void reach(const int* x, int* y, int count) {
    FLASHLLM_DYNAMIC_SHARED(shared);
    __shared__ int sums[4];
    const int i = threadIdx.x;
    const unsigned base = ptx::shared_address(shared);
    ptx::store_shared(base + i * 16 + (kMistake == 1 && i == 127 ? 16 : 0) + (kMistake == 5 && i == 9 ? 4 : 0),
                      make_uint4(x[i], 0, 0, 0));
    if (kMistake == 2 && i == 0) shared[128 * 16] = 1;
    if (i < 4 && (kMistake != 6 || i != 2)) sums[i] = 0;
    __syncthreads();
    if (kMistake == 3 && i == 0) y[0] = __ldg(x + count);
    if (kMistake == 4 && i == 0) __stcg(const_cast<int*>(x), 1);
    atomicAdd(&sums[i / 32], *reinterpret_cast<int*>(shared + i * 16));
    __syncthreads();
    y[i] = sums[i / 32];
}

// y[b] = x[0] + ... + x[b], 128 of 16 bytes for each block b, which takes the sum before it from y as the others are still
// at work. y must be zero before, x not. Mistake 1: waits for the block behind it, 2: does not wait, 3: block 1 writes
// nothing.
template <int kMistake>
__global__ void chain(const float4* x, float4* y) {
    const int block = static_cast<int>(blockIdx.x), i = block * 128 + static_cast<int>(threadIdx.x);
    const int other = kMistake == 1 ? block + 1 : block - 1;
    float4 sum = x[i];
    if (other >= 0 && other < static_cast<int>(gridDim.x)) {
        float4 before = ptx::load_relaxed(y + other * 128 + threadIdx.x);
        while (kMistake != 2 && before.x == 0.0f) {
            ptx::look_again();
            before = ptx::load_relaxed(y + other * 128 + threadIdx.x);
        }
        sum = make_float4(sum.x + before.x, sum.y + before.y, sum.z + before.z, sum.w + before.w);
    }
    if (kMistake != 3 || block != 1) ptx::store_relaxed(y + i, sum);
}

// y[b] = x[b] for every block b, and behind them their sum, by the last block once a word has counted the others. It must
// be zero before. Mistake 1: the first block adds them up, 2: the last waits for one more than there are, 3: it does not
// wait, 4: it looks behind the word.
template <int kMistake>
__global__ void count(const int* x, int* y, unsigned* counted) {
    const unsigned block = blockIdx.x, last = gridDim.x - 1, adds = kMistake == 1 ? 0 : last;
    if (threadIdx.x != 0) return;
    y[block] = x[block];
    if (block != adds) {
        __threadfence();
        atomicAdd(counted, 1u);
        return;
    }
    while (kMistake != 3 && !ptx::has_reached(counted + (kMistake == 4), last + (kMistake == 2))) ptx::look_again();
    int sum = 0;
    for (unsigned i = 0; i <= last; ++i) sum += y[i];
    y[last + 1] = sum;
}

// y = x, by four warps of which one thread waits for the launch before. It takes the others with it: its warp by a
// barrier of the warp, the second by an mbarrier, the third by a barrier of two warps, the last by that of the block.
// Mistake 1: a shuffle instead, which orders no memory, 2: an arrival before the wait, 3: an arrival after copies,
// which takes nobody along, 4: the third warp does not meet the second, 5: nor the last one the others.
template <int kMistake>
__global__ void follow(const int* x, int* y) {
    FLASHLLM_DYNAMIC_SHARED(shared);
    const unsigned bar = ptx::shared_address(shared);
    const int i = threadIdx.x, warp = i / 32;
    if (i == 0) {
        ptx::mbarrier_init(bar, 1);
        ptx::mbarrier_init_fence();
    }
    __syncthreads();
    if (warp == 0) {
        if (i == 5) ptx::grid_dependency_wait();
        if (kMistake == 2 && i == 9) ptx::mbarrier_arrive(bar);
        if (kMistake == 1) __shfl_sync(0xffffffffu, i, 5);
        else __syncwarp();
        if (kMistake == 3 && i == 9) ptx::mbarrier_arrive_after_copies(bar);
        if (kMistake != 2 && kMistake != 3 && i == 9) ptx::mbarrier_arrive(bar);
    }
    if (warp == 1) ptx::mbarrier_wait(bar, 0);
    if ((warp == 1 || warp == 2) && kMistake != 4) ptx::meet<64>(1);
    if (warp < 3) y[i] = __ldg(x + i);
    if (kMistake != 5) __syncthreads();
    if (warp == 3) y[i] = __ldg(x + i);
}

// y = x. Mistake 1: one element too many, through plain pointers, 2: a signed sum overflows.
template <int kMistake>
__global__ void plain(const int* x, int* y, int count) {
    const int i = threadIdx.x;
    if (i < count + (kMistake == 1 ? 1 : 0)) y[i] = x[i];
    if (kMistake == 2) y[i] = x[i] + 0x7fffffff;
}

// y = x, 4 chunks of 512 bytes: warp 0 copies 16 bytes per lane to a ring of 2 stages, all warps read them, warp 1
// writes. Mistake 1: it arrives before it copies, 2: a lane does not arrive, 3: a lane arrives twice, 4: a copy of 8
// bytes, 5: the last chunk is not waited for, 6: no barrier before a stage is filled again.
template <int kMistake>
__global__ void relay(const uint4* x, uint4* y) {
    constexpr unsigned kStages = 2, kChunks = 4, kBytes = 512;
    FLASHLLM_DYNAMIC_SHARED(shared);
    const unsigned warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const unsigned full = ptx::shared_address(shared), stages = full + 128;
    auto fill = [&](unsigned chunk) {
        const unsigned bar = full + chunk % kStages * 8;
        if (warp != 0) return;
        if (kMistake == 1) ptx::mbarrier_arrive_after_copies(bar);
        ptx::copy_async16(true, stages + chunk % kStages * kBytes + lane * 16, x + chunk * 32 + lane,
                          kMistake == 4 && lane == 3 ? 8 : 16);
        if (kMistake != 1 && (kMistake != 2 || lane != 5)) ptx::mbarrier_arrive_after_copies(bar);
        if (kMistake == 3 && lane == 9) ptx::mbarrier_arrive_after_copies(bar);
    };
    if (threadIdx.x == 0) {
        for (unsigned i = 0; i < kStages; ++i) ptx::mbarrier_init(full + i * 8, 32);
        ptx::mbarrier_init_fence();
    }
    __syncthreads();
    for (unsigned chunk = 0; chunk < kStages; ++chunk) fill(chunk);
    for (unsigned chunk = 0; chunk < kChunks; ++chunk) {
        const unsigned stage = chunk % kStages;
        if (kMistake == 5 && chunk == kChunks - 1) break;
        ptx::mbarrier_wait(full + stage * 8, chunk / kStages % 2);
        const uint4 value = ptx::load_shared(stages + stage * kBytes + (lane ^ 1) * 16);
        if (warp == 1) y[chunk * 32 + (lane ^ 1)] = value;
        if (kMistake != 6) __syncthreads();
        if (chunk + kStages < kChunks) fill(chunk + kStages);
    }
}

#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
// y = x, 8 chunks of 512 bytes per warp through its own ring of 3 stages. Mistake 1: no wait, 2: waits for the other
// parity, 3: a stage is refilled before all lanes have read it, 4: fewer bytes announced than copied, 5: more, 6: none
// and no arrival, 7: a barrier that nobody initialised, 8: the last chunk is not waited for, 9: a copy past the ring,
// 10: lanes use the barriers before they are there.
template <int kMistake>
__global__ void ring(const uint4* x, uint4* y) {
    constexpr unsigned kStages = 3, kChunks = 8, kBytes = 512;
    FLASHLLM_DYNAMIC_SHARED(shared);
    const unsigned warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const unsigned bars = ptx::shared_address(shared) + warp * 32;
    const unsigned stages = ptx::shared_address(shared) + 128 + warp * kStages * kBytes;
    const uint4* source = x + warp * kChunks * 32;
    uint4* target = y + warp * kChunks * 32;
    auto fill = [&](unsigned chunk) {
        if (lane != 0) return;
        const unsigned bar = bars + chunk % kStages * 8;
        const unsigned announced = kMistake == 4 ? kBytes - 16 : kMistake == 5 ? kBytes + 16 : kBytes;
        if (kMistake != 6) ptx::mbarrier_expect(bar, announced);
        const unsigned past = kMistake == 9 && warp == 3 && chunk == 2 ? 16 : 0;
        ptx::bulk_copy(stages + chunk % kStages * kBytes + past, source + chunk * 32, kBytes, bar);
    };
    if (lane == 0) {
        for (unsigned i = 0; i < (kMistake == 7 ? kStages - 1 : kStages); ++i) ptx::mbarrier_init(bars + i * 8, 1);
        ptx::mbarrier_init_fence();
    }
    if (kMistake != 10) __syncwarp();
    for (unsigned chunk = 0; chunk < kStages; ++chunk) fill(chunk);
    for (unsigned chunk = 0; chunk < kChunks; ++chunk) {
        const unsigned stage = chunk % kStages, parity = chunk / kStages % 2;
        if (kMistake == 8 && chunk == kChunks - 1) break;
        if (kMistake != 1) ptx::mbarrier_wait(bars + stage * 8, kMistake == 2 ? parity ^ 1 : parity);
        target[chunk * 32 + lane] = *reinterpret_cast<const uint4*>(shared + 128 + (warp * kStages + stage) * kBytes +
                                                                    (lane ^ 1) * 16);
        if (kMistake != 3) __syncwarp();
        if (chunk + kStages < kChunks) fill(chunk + kStages);
    }
}

// y = x, 4 chunks of 512 bytes: warp 0 fills a ring of 2 stages, warps 1..3 read all of it, warp 1 writes. Mistake 1: a
// stage is refilled before it is free, 2: a lane forgets to say that it is free, 3: the ring is said to be full before.
template <int kMistake>
__global__ void share(const uint4* x, uint4* y) {
    constexpr unsigned kStages = 2, kChunks = 4, kBytes = 512;
    FLASHLLM_DYNAMIC_SHARED(shared);
    const unsigned warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const unsigned full = ptx::shared_address(shared), free = full + kStages * 8, stages = full + 128;
    if (threadIdx.x == 0) {
        for (unsigned i = 0; i < kStages; ++i) ptx::mbarrier_init(full + i * 8, 1);
        for (unsigned i = 0; i < kStages; ++i) ptx::mbarrier_init(free + i * 8, 96);
        ptx::mbarrier_init_fence();
    }
    __syncthreads();
    for (unsigned chunk = 0; chunk < kChunks; ++chunk) {
        const unsigned stage = chunk % kStages, turn = chunk / kStages;
        if (warp == 0) {
            if (lane != 0) continue;
            if (turn > 0 && kMistake != 1) ptx::mbarrier_wait(free + stage * 8, (turn - 1) % 2);
            if (kMistake == 3) ptx::mbarrier_arrive(full + stage * 8);
            else ptx::mbarrier_expect(full + stage * 8, kBytes);
            ptx::bulk_copy(stages + stage * kBytes, x + chunk * 32, kBytes, full + stage * 8);
        } else {
            ptx::mbarrier_wait(full + stage * 8, turn % 2);
            const uint4 value = *reinterpret_cast<const uint4*>(shared + 128 + stage * kBytes + lane * 16);
            if (warp == 1) y[chunk * 32 + lane] = value;
            if (kMistake != 2 || chunk != 1 || threadIdx.x != 50) ptx::mbarrier_arrive(free + stage * 8);
        }
    }
}
#endif

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
// y[64, 8] = a[64, 64] b[8, 64]^T with wgmma. Mistake 1: no proxy fence, 2: the fence comes after the barrier, 3: no
// barrier, 4: no wait before the result is used, 5: not committed, 6: no wgmma.fence, 7: an operand is overwritten
// before the wait, 8: one warp leaves out a step.
template <int kMistake>
__global__ void multiply(const uint4* a, const uint4* b, float* y) {
    FLASHLLM_DYNAMIC_SHARED(shared);
    const unsigned base = ptx::shared_address(shared), base_b = base + 64 * 128;
    const unsigned i = threadIdx.x, lane = i % 32, warp = i / 32;
    auto place = [](unsigned row, unsigned chunk) { return row * 128 + ((chunk ^ (row & 7)) << 4); };
    for (unsigned j = i; j < 64 * 8; j += 128) ptx::store_shared(base + place(j / 8, j % 8), a[j]);
    if (i < 64) ptx::store_shared(base_b + place(i / 8, i % 8), b[i]);
    if (kMistake != 1 && kMistake != 2) ptx::fence_async_proxy();
    if (kMistake != 3) __syncthreads();
    if (kMistake == 2) ptx::fence_async_proxy();
    float sum[1][4] = {};
    if (kMistake != 6) ptx::warpgroup_begin();
    for (unsigned step = 0; step < (kMistake == 8 && warp == 2 ? 3 : 4); ++step) {
        ptx::warpgroup_mma<__half>(sum, ptx::operand(base) + step * 2, ptx::operand(base_b) + step * 2);
    }
    if (kMistake != 5) ptx::warpgroup_commit();
    if (kMistake == 7) ptx::store_shared(base + place(i / 2, 0), make_uint4(0, 0, 0, 0));
    if (kMistake != 4) ptx::warpgroup_wait();
    for (unsigned r = 0; r < 4; ++r) {
        const unsigned m = warp * 16 + lane / 4 + r / 2 * 8, n = lane % 4 * 2 + r % 2;
        y[m * 8 + n] = sum[0][r];
    }
    if (kMistake == 4) ptx::warpgroup_wait();
    __syncthreads();
}

// The same product with a in registers, one step after another. Mistake 1: no proxy fence, 2: no wait before the result
// is used, 3: not committed, 4: no wgmma.fence, 5: b is overwritten before the wait, 6: one warp leaves out a step, 7:
// half of a warp gives an address instead.
template <int kMistake>
__global__ void multiply_registers(const unsigned* a, const uint4* b, float* y) {
    FLASHLLM_DYNAMIC_SHARED(shared);
    const unsigned base = ptx::shared_address(shared);
    const unsigned i = threadIdx.x, lane = i % 32, warp = i / 32;
    if (i < 64) ptx::store_shared(base + i / 8 * 128 + ((i % 8 ^ i / 8) << 4), b[i]);
    if (kMistake != 1) ptx::fence_async_proxy();
    __syncthreads();
    const unsigned* row = a + (warp * 16 + lane / 4) * 32 + lane % 4;
    float sum[1][4] = {};
    for (unsigned step = 0; step < (kMistake == 6 && warp == 2 ? 3 : 4); ++step) {
        unsigned fragment[4] = {row[step * 8], row[step * 8 + 8 * 32], row[step * 8 + 4], row[step * 8 + 8 * 32 + 4]};
        if (kMistake != 4) ptx::warpgroup_begin();
        if (kMistake == 7 && lane > 15) ptx::warpgroup_mma<__half>(sum, ptx::operand(base), ptx::operand(base));
        else ptx::warpgroup_mma<__half>(sum, fragment, ptx::operand(base) + step * 2);
        if (kMistake != 3) ptx::warpgroup_commit();
        for (unsigned& value : fragment) value = 0x7e007e00u;  // the next step's registers are others
    }
    if (kMistake == 5 && i < 8) ptx::store_shared(base + i * 16, make_uint4(0, 0, 0, 0));
    if (kMistake != 2) ptx::warpgroup_wait();
    for (unsigned r = 0; r < 4; ++r) y[(warp * 16 + lane / 4 + r / 2 * 8) * 8 + lane % 4 * 2 + r % 2] = sum[0][r];
    if (kMistake == 2) ptx::warpgroup_wait();
}
#endif

}  // namespace broken
