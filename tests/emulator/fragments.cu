// SPDX-License-Identifier: Apache-2.0
// The fragments of warp-wide instructions, loaded from and stored to plain arrays. kMistake as in broken.cu (0: none).
#include "flashllm/ptx.cuh"

namespace fragments {

using namespace flashllm;

// y[16, 8] += W[16, 32] b[8, 32]^T by one warp. a[16, 16]: the slots of W; places[16, 2]: where they stand, a word for
// each half of K. Mistake 1: the metadata come from the lanes of the other selector, 2: from memory nobody wrote, 3: a
// does, 4: half of the warp takes the dense instruction, 5: half of it the other selector.
template <typename T, int kSelector, int kMistake>
__global__ void multiply_sparse(const unsigned* a, const unsigned* b, const unsigned short* places, float* y) {
    FLASHLLM_DYNAMIC_SHARED(shared);
    const unsigned unwritten = ptx::shared_address(shared);
    const unsigned lane = threadIdx.x, g = lane / 4, t = lane % 4;
    const unsigned* row = a + g * 8 + t;
    unsigned slots[4] = {row[0], row[8 * 8], row[4], row[8 * 8 + 4]};
    if (kMistake == 3) slots[1] = ptx::load_shared4(unwritten + lane * 4);
    const unsigned* column = b + g * 16 + t;
    const unsigned rows[4] = {column[0], column[4], column[8], column[12]};
    unsigned metadata = 0;  // not in order, in lanes that give none
    if (t / 2 == (kMistake == 1 ? 1 - kSelector : kSelector)) {
        metadata = places[g * 2 + t % 2] | static_cast<unsigned>(places[(g + 8) * 2 + t % 2]) << 16;
    }
    if (kMistake == 2) metadata = ptx::load_shared4(unwritten + lane * 4);
    float* target = y + g * 8 + t * 2;
    float sum[4] = {target[0], target[1], target[64], target[65]};
    if (kMistake == 4 && lane >= 16) ptx::mma_m16n8k16<T>(sum, slots, rows[0], rows[1]);
    else if (kMistake == 5 && lane >= 16) ptx::mma_sp_m16n8k32<T, 1 - kSelector>(sum, slots, rows, 0xeeeeeeeeu);
    else ptx::mma_sp_m16n8k32<T, kSelector>(sum, slots, rows, metadata);
    target[0] = sum[0], target[1] = sum[1], target[64] = sum[2], target[65] = sum[3];
}

// y[16, 8] += a[16, 16] b[8, 16]^T by one warp.
template <typename T>
__global__ void multiply_dense(const unsigned* a, const unsigned* b, float* y) {
    const unsigned lane = threadIdx.x, g = lane / 4, t = lane % 4;
    const unsigned* row = a + g * 8 + t;
    const unsigned fragment[4] = {row[0], row[8 * 8], row[4], row[8 * 8 + 4]};
    float* target = y + g * 8 + t * 2;
    float sum[4] = {target[0], target[1], target[64], target[65]};
    ptx::mma_m16n8k16<T>(sum, fragment, b[g * 8 + t], b[g * 8 + t + 4]);
    target[0] = sum[0], target[1] = sum[1], target[64] = sum[2], target[65] = sum[3];
}

// y[2, 4, 32]: each warp's four fragments of the other's matrices x[2, 4, 8, 8], transposed, whose rows lie `pitch` bytes
// apart. Mistake 1: an address off its row, 2: a row past the end, 3: a row that nobody wrote, 4: no barrier, 5: half of
// a warp does not transpose.
template <int kMistake>
__global__ void transpose(const uint4* x, unsigned* y, unsigned pitch) {
    FLASHLLM_DYNAMIC_SHARED(shared);
    const unsigned base = ptx::shared_address(shared), i = threadIdx.x, lane = i % 32;
    if (kMistake != 3 || i != 9) ptx::store_shared(base + i * pitch, x[i]);
    if (kMistake != 4) __syncthreads();
    const unsigned wrong = kMistake == 1 && i == 9 ? 8 : kMistake == 2 && i == 31 ? pitch : 0;
    const unsigned address = base + (i ^ 32) * pitch + wrong;
    unsigned fragment[4];
    if (kMistake == 5 && lane >= 16) ptx::load_matrix_x4(fragment, address);
    else ptx::load_matrix_x4_transposed(fragment, address);
    for (unsigned j = 0; j < 4; ++j) y[(i / 32 * 4 + j) * 32 + lane] = fragment[j];
}

// y[0, i]: bytes of {low[i], high[i]} that selectors[i] names, y[1, i]: the sum of the products of their bytes and of it.
__global__ void bytes(const unsigned* low, const unsigned* high, const unsigned* selectors, unsigned* y, int count) {
    for (int i = threadIdx.x; i < count; i += blockDim.x) {
        y[i] = ptx::permute(low[i], high[i], selectors[i]);
        y[count + i] = ptx::dot4(low[i], high[i], selectors[i]);
    }
}

// y[i] = x[i + 1 mod 64], through words `stride` apart. Mistake 1: a store between two words, 2: a store past the end,
// 3: a load between two words, 4: a load past the end, 5: a word that nobody wrote, 6: no barrier.
template <int kMistake>
__global__ void words(const unsigned* x, unsigned* y, unsigned stride) {
    FLASHLLM_DYNAMIC_SHARED(shared);
    const unsigned base = ptx::shared_address(shared), i = threadIdx.x, next = (i + 1) % 64;
    const unsigned off = i != 9 ? 0 : kMistake == 1 || kMistake == 3 ? 2 : 64 * stride * 4;
    if (kMistake != 5 || i != 9) {
        ptx::store_shared(base + i * stride * 4 + (kMistake == 1 || kMistake == 2 ? off : 0), x[i]);
    }
    if (kMistake != 6) __syncthreads();
    y[i] = ptx::load_shared4(base + next * stride * 4 + (kMistake == 3 || kMistake == 4 ? off : 0));
}

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
// y[64, 8]: in every row the sums of the 16 columns of b[8, 16], which warp 0 stores for wgmma. Mistake 1: no proxy
// fence.
template <int kMistake>
__global__ void publish(const uint4* b, float* y) {
    FLASHLLM_DYNAMIC_SHARED(shared);
    const unsigned base = ptx::shared_address(shared), lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    if (warp == 0) {
        const unsigned chunk = lane / 8, row = lane % 8;
        if (chunk < 2) ptx::store_shared(base + row * 128 + ((chunk ^ row) << 4), b[row * 2 + chunk]);
        if (kMistake != 1) ptx::fence_async_proxy();
    }
    __syncthreads();
    const unsigned ones[4] = {0x3c003c00u, 0x3c003c00u, 0x3c003c00u, 0x3c003c00u};
    float sum[1][4] = {};
    ptx::warpgroup_begin();
    ptx::warpgroup_mma<__half>(sum, ones, ptx::operand(base));
    ptx::warpgroup_commit();
    ptx::warpgroup_wait();
    for (unsigned r = 0; r < 4; ++r) y[(warp * 16 + lane / 4 + r / 2 * 8) * 8 + lane % 4 * 2 + r % 2] = sum[0][r];
}
#endif

}  // namespace fragments
