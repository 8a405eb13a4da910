// SPDX-License-Identifier: Apache-2.0
// y[M, N] = W[M, K] x[K, N] with W in CSR, on the CUDA cores: the one-dimensionally tiled SpMM of Sputnik (Gale,
// Zaharia, Young, Elsen: "Sparse GPU Kernels for Deep Learning", SC'20) for fp16 values and 16-bit columns, written
// anew.
//
// A block is one warp. kWidth of its threads, a subwarp, compute kColumns columns of one row of y, kVector neighbouring
// ones each. In steps of kStep stored elements of the row they
//   copy     the values and columns to shared memory, a vector of each per thread,
//   gather   their part of the row of x that each column names, a vector per thread, into registers, and
//   multiply it by the value, in fp32.
// Rows start at multiples of kPad elements, not of the vectors that load them. So the first step starts with the
// vector that the row starts in ("reverse-offset memory alignment"), and the elements before the row become zeros.
// Stored values are never zero: a zero stands for no element. Where zeros may occur, which is among the first kPad
// elements of a row and in its last step, the row of x is read only for a value that is not zero, since zero times an
// infinity is not zero.
#include "flashllm/ptx.cuh"

namespace flashllm {

constexpr int kStep = 64;    // stored elements of a row per step
constexpr int kPad = 4;      // rows are padded with zeros to a multiple of this
constexpr int kBankPad = 8;  // the subwarps of a warp read at once: each row's step starts 4 banks further on
constexpr int kRowStride = 2 * kStep + kBankPad;

// ---- vectors of 16-bit elements ------------------------------------------------------------------------------------

template <int kHalves> struct VectorType;
template <> struct VectorType<1> { using Type = unsigned short; };
template <> struct VectorType<2> { using Type = unsigned; };
template <> struct VectorType<4> { using Type = uint2; };
template <> struct VectorType<8> { using Type = uint4; };
template <int kHalves> using Vector = typename VectorType<kHalves>::Type;

FLASHLLM_DEVICE unsigned half_at(unsigned short vector, int) { return vector; }
FLASHLLM_DEVICE unsigned half_at(unsigned vector, int i) { return i == 0 ? vector & 0xffffu : vector >> 16; }
FLASHLLM_DEVICE unsigned half_at(const uint2& vector, int i) { return half_at(i < 2 ? vector.x : vector.y, i & 1); }
FLASHLLM_DEVICE unsigned half_at(const uint4& vector, int i) {
    return half_at(i < 4 ? make_uint2(vector.x, vector.y) : make_uint2(vector.z, vector.w), i & 3);
}

FLASHLLM_DEVICE float to_float(unsigned half) {
    return __half2float(__ushort_as_half(static_cast<unsigned short>(half)));
}
FLASHLLM_DEVICE unsigned to_half(float value) { return __half_as_ushort(__float2half_rn(value)); }

FLASHLLM_DEVICE void pack(unsigned short& vector, const float* sum) {
    vector = static_cast<unsigned short>(to_half(sum[0]));
}
FLASHLLM_DEVICE void pack(unsigned& vector, const float* sum) { vector = to_half(sum[0]) | to_half(sum[1]) << 16; }
FLASHLLM_DEVICE void pack(uint2& vector, const float* sum) { pack(vector.x, sum), pack(vector.y, sum + 2); }
FLASHLLM_DEVICE void pack(uint4& vector, const float* sum) {
    pack(vector.x, sum), pack(vector.y, sum + 2), pack(vector.z, sum + 4), pack(vector.w, sum + 6);
}

// Stored elements are read once, rows of x again and again, so the L1 cache is left to the rows of x.
FLASHLLM_DEVICE uint4 load_stored(const uint4* pointer) { return ptx::load_streaming(pointer); }
template <typename T>
FLASHLLM_DEVICE T load_stored(const T* pointer) { return __ldcs(pointer); }

// ---- one row of y --------------------------------------------------------------------------------------------------

template <int kRows_, int kColumns_, int kWidth_>
struct Shape {
    static constexpr int kRows = kRows_;               // of y per block
    static constexpr int kColumns = kColumns_;         // of y per block
    static constexpr int kWidth = kWidth_;             // threads per row
    static constexpr int kVector = kColumns / kWidth;  // columns per thread
    static constexpr int kStored = kStep / kWidth < 8 ? kStep / kWidth : 8;  // stored elements a thread loads at once
    static constexpr int kLoads = kStep / kWidth / kStored;
    static constexpr bool kMayStartEarly = kStored > kPad;  // rows may start inside a vector
    static constexpr int kBatch = kVector == 8 ? 8 : 16;    // stored elements gathered for before any is multiplied
    // Blocks resident on an SM. 24 leave a thread 80 registers, enough for about a dozen vectors of x in flight. With
    // vectors of one element the compiler keeps more in flight, and then spills on sm_80.
    static constexpr int kBlocks = kVector == 1 ? 16 : 24;
    static_assert(kRows * kWidth == 32, "a block is one warp");
    static_assert(kVector * kWidth == kColumns, "a block's columns are whole vectors");
    static_assert(kLoads * kStored * kWidth == kStep, "the threads of a row load a step in whole vectors");
    static_assert(kStored <= 2 * kPad, "of the row before, at most kPad elements come with a row's first vector");
    static_assert(kStep % kBatch == 0 && kBatch % 8 == 0, "batches are read from shared memory in 16-byte vectors");
};

// What a thread knows of its row, and the row's step in shared memory.
template <typename S>
struct Row {
    using Part = Vector<S::kVector>;
    const char* x;                     // this thread's first column
    unsigned pitch;                    // bytes from row to row of x
    unsigned short *values, *columns;  // in shared memory
    unsigned mask;                     // the lanes of the subwarp
    int lane;                          // number of this thread in it
    float sum[S::kVector] = {};

    // Copies a step to shared memory, from element `first`, a multiple of kStored, with `left` elements to the row's
    // end. before: how many elements at the front are another row's.
    FLASHLLM_DEVICE void copy(const unsigned short* all_values, const unsigned short* all_columns, int first, int left,
                              int before) {
        using Stored = Vector<S::kStored>;
        __syncwarp(mask);  // all have read the previous step
#pragma unroll
        for (int i = 0; i < S::kLoads; ++i) {
            const int place = (i * S::kWidth + lane) * S::kStored;
            // Past the row's end its last vector is copied again. Nobody reads it there: cheaper than a branch.
            const int from = first + min(place, (left - 1) & ~(S::kStored - 1));
            Stored value = load_stored(reinterpret_cast<const Stored*>(all_values + from));
            const Stored column = load_stored(reinterpret_cast<const Stored*>(all_columns + from));
            if constexpr (S::kMayStartEarly) {
                if (place < before) value.x = value.y = 0;
            }
            *reinterpret_cast<Stored*>(values + place) = value;
            *reinterpret_cast<Stored*>(columns + place) = column;
        }
        __syncwarp(mask);
    }

    // This thread's part of a row of x; zeros unless `stored`.
    FLASHLLM_DEVICE Part gather(bool stored, unsigned column, unsigned step_pitch) const {
        Part part = {};
        const char* there = x + static_cast<unsigned long long>(column) * step_pitch;
        if (stored) part = __ldg(reinterpret_cast<const Part*>(there));
        return part;
    }

    // The pitch as a value of this step. If it were widened to 64 bits once for all steps, the compiler would no longer
    // know that it fits in 32, and an address would take two instructions instead of one.
    FLASHLLM_DEVICE unsigned pitch_of_step() const {
        return static_cast<unsigned>(ptx::opaque(static_cast<int>(pitch)));
    }

    FLASHLLM_DEVICE void multiply(unsigned value, const Part& part) {
        const float factor = to_float(value);
#pragma unroll
        for (int j = 0; j < S::kVector; ++j) sum[j] += factor * to_float(half_at(part, j));
    }

    // Multiplies a step that elements of the row fill; with kGuarded its first kPad may be zeros instead.
    template <bool kGuarded>
    FLASHLLM_DEVICE void multiply_step() {
        const unsigned step_pitch = pitch_of_step();
#pragma unroll
        for (int first = 0; first < kStep; first += S::kBatch) {
            Part parts[S::kBatch];
#pragma unroll
            for (int i = 0; i < S::kBatch; i += 8) {
                const uint4 column = *reinterpret_cast<const uint4*>(columns + first + i);
#pragma unroll
                for (int j = 0; j < 8; ++j) {
                    const bool guarded = kGuarded && first + i + j < kPad;
                    parts[i + j] = gather(!guarded || values[j] != 0, half_at(column, j), step_pitch);
                }
            }
#pragma unroll
            for (int i = 0; i < S::kBatch; i += 8) {
                const uint4 value = *reinterpret_cast<const uint4*>(values + first + i);
#pragma unroll
                for (int j = 0; j < 8; ++j) multiply(half_at(value, j), parts[i + j]);
            }
        }
    }

    // Multiplies the row's last `left` elements, a multiple of kPad; any of them may be zero.
    FLASHLLM_DEVICE void multiply_rest(int left) {
#pragma unroll 1
        for (int first = 0; first < left; first += kPad) {
            const unsigned step_pitch = pitch_of_step();
            const uint2 column = *reinterpret_cast<const uint2*>(columns + first);
            const uint2 value = *reinterpret_cast<const uint2*>(values + first);
            Part parts[kPad];
#pragma unroll
            for (int i = 0; i < kPad; ++i) {
                parts[i] = gather(half_at(value, i) != 0, half_at(column, i), step_pitch);
            }
#pragma unroll
            for (int i = 0; i < kPad; ++i) multiply(half_at(value, i), parts[i]);
        }
    }
};

// Grid (ceil(M / kRows), ceil(N / kColumns)). N is a multiple of kVector, every array 16-byte aligned. Row m is
// elements row_offsets[m] to row_offsets[m + 1] of values and columns, whose lengths are multiples of 8. Rows are
// taken in the order of row_indices.
template <int kRows, int kColumns, int kWidth>
__global__ void __launch_bounds__(kRows * kWidth, Shape<kRows, kColumns, kWidth>::kBlocks)
spmm_sputnik(const unsigned short* __restrict__ x, const unsigned short* __restrict__ values,
             const unsigned short* __restrict__ columns, const int* __restrict__ row_offsets,
             const int* __restrict__ row_indices, unsigned short* __restrict__ y, int M, int N) {
    using S = Shape<kRows, kColumns, kWidth>;
    FLASHLLM_DYNAMIC_SHARED(shared);
    const int subwarp = threadIdx.x / kWidth;
    const unsigned turn = blockIdx.x * kRows + subwarp;
    if (turn >= static_cast<unsigned>(M)) return;
    const int m = __ldg(row_indices + turn);
    const int begin = __ldg(row_offsets + m), end = __ldg(row_offsets + m + 1);

    Row<S> row;
    row.lane = threadIdx.x % kWidth;
    row.mask = 0xffffffffu >> (32 - kWidth) << subwarp * kWidth;
    row.values = reinterpret_cast<unsigned short*>(shared) + subwarp * kRowStride;
    row.columns = row.values + kStep;
    // Threads past the right edge of y compute its last columns once more and do not store them, so that no load
    // depends on N.
    const int n = blockIdx.y * kColumns + row.lane * S::kVector;
    row.x = reinterpret_cast<const char*>(x + min(n, N - S::kVector));
    row.pitch = static_cast<unsigned>(N) * 2;

    int before = begin & (S::kStored - 1), first = begin - before, left = end - first;
    if (left > kStep) {  // if exactly one step is left, it may end in padding: multiply_rest takes it
        row.copy(values, columns, first, left, before);
        row.template multiply_step<S::kMayStartEarly>();
        first += kStep, left -= kStep, before = 0;
        for (; left > kStep; first += kStep, left -= kStep) {
            row.copy(values, columns, first, left, 0);
            row.template multiply_step<false>();
        }
    }
    if (left > 0) {
        row.copy(values, columns, first, left, before);
        row.multiply_rest(left);
    }
    if (n < N) pack(*reinterpret_cast<typename Row<S>::Part*>(y + static_cast<size_t>(m) * N + n), row.sum);
}

}  // namespace flashllm
