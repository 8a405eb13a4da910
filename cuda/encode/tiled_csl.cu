// SPDX-License-Identifier: Apache-2.0
// Dense -> Tiled-CSL on the device, and back.
//
// Encoding is two kernels with a prefix sum over the tiles between them: tiled_csl_count counts the stored elements of
// each tile, tiled_csl_fill writes its words. Both read the matrix once; nothing else of its size is needed. One block
// encodes one tile: warp w takes rows 16 w .. 16 w + 15, and a warp reads one row (64 values) as 32 pairs. In bank
// order lane b takes the pair that the swizzle puts into shared-memory bank b, so a lane walks the elements of its bank
// in the order [row][half] that the format requires and needs no sort: its ranks are a running count.
//
// The result is the same to the byte as that of src/flashllm/formats/tiled_csl_encode.py, and does not depend on
// timing: every word has its own place.
#include "flashllm/portable.cuh"
#include "flashllm/source.cuh"
#include "flashllm/tiled_csl.cuh"

namespace flashllm {
namespace csl_encode {

using source::Rounding;

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / csl::kLanes;
constexpr int kWarpRows = csl::kTileM / kWarps;            // rows of the tile that one warp takes
constexpr int kWarpElements = kWarpRows * 2;               // elements of one bank in those rows
constexpr int kBankElements = csl::kTileM * 2;             // elements of one bank in the tile
constexpr unsigned kFullWarp = 0xffffffffu;

// Two neighbouring values of a row: columns c (low half) and c + 1 (high half), c even. Zeros outside the matrix.
template <class Source>
struct TileReader {
  using Element = typename Source::Element;
  using Pair = typename Source::Pair;
  const Element* origin;  // element (0, 0) of the tile
  long long pitch;        // elements from one row to the next
  int rows, columns;      // of the tile, inside the matrix
  bool pair_loads;        // every pair is aligned and lies wholly inside or wholly outside the matrix

  FLASHLLM_DEVICE TileReader(const Element* a, long long M, long long K, long long ld, int tiles_k, int pairs)
      : pitch(ld), pair_loads(pairs != 0) {
    const long long row0 = static_cast<long long>(blockIdx.x / tiles_k) * csl::kTileM;
    const long long column0 = static_cast<long long>(blockIdx.x % tiles_k) * csl::kTileK;
    origin = a + row0 * ld + column0;
    rows = static_cast<int>(M - row0 < csl::kTileM ? M - row0 : csl::kTileM);
    columns = static_cast<int>(K - column0 < csl::kTileK ? K - column0 : csl::kTileK);
  }

  FLASHLLM_DEVICE unsigned operator()(int r, int c, Rounding& rounding) const {
    Element low = 0, high = 0;
    if (r < rows && c < columns) {
      const Element* at = origin + r * pitch + c;
      if (pair_loads) {
        const Pair pair = *reinterpret_cast<const Pair*>(at);
        low = Source::low(pair);
        high = Source::high(pair);
      } else {
        low = at[0];
        if (c + 1 < columns) high = at[1];
      }
    }
    const unsigned first = Source::convert(low, rounding);
    return first | static_cast<unsigned>(Source::convert(high, rounding)) << 16;
  }
};

FLASHLLM_DEVICE unsigned short half_of(unsigned pair, int half) { return static_cast<unsigned short>(pair >> 16 * half); }

// Sum over the lanes before this one.
FLASHLLM_DEVICE int exclusive_sum(int value, int lane) {
  int sum = value;
  for (int step = 1; step < csl::kLanes; step *= 2) {
    const int before = __shfl_up_sync(kFullWarp, sum, step);
    if (lane >= step) sum += before;
  }
  return sum - value;
}

FLASHLLM_DEVICE int warp_minimum(int value) {
  for (int step = csl::kLanes / 2; step > 0; step /= 2) {
    const int other = __shfl_xor_sync(kFullWarp, value, step);
    value = other < value ? other : value;
  }
  return value;
}

FLASHLLM_DEVICE int warp_sum(int value) {
  for (int step = csl::kLanes / 2; step > 0; step /= 2) value += __shfl_xor_sync(kFullWarp, value, step);
  return value;
}

// The places of one thread's words in bank order, one after the other. Elements of a bank go to its lane, one per clean
// round; the elements that are left over, bank by bank, fill the other places of the tile lane after lane.
struct BankOrder {
  int full;   // rounds of 32 lanes
  int clean;  // first rounds, in which lane b holds an element of bank b
  int rem;    // lanes of the four tail rounds
  int lane;   // lane and place in the lane of the thread's next left-over element
  int depth;

  // Places of a lane after its clean rounds.
  FLASHLLM_DEVICE int height(int of_lane) const { return full - clean + (of_lane < rem ? csl::kWordsPerVector : 0); }

  // Go to the position-th left-over element of the tile. The last position may be one past the end.
  FLASHLLM_DEVICE void seek(int position) {
    const int long_lanes = rem * height(-1);
    const bool in_long = position < long_lanes;
    const int step = in_long ? height(-1) : max(height(csl::kLanes), 1);
    const int local = in_long ? position : position - long_lanes;
    lane = local / step + (in_long ? 0 : rem);
    depth = local % step;
  }

  // Word index in the tile of element number `rank` of this thread's bank; must be called for each element in turn.
  FLASHLLM_DEVICE int place(int bank, int rank) {
    const bool is_clean = rank < clean;
    const int at = is_clean ? bank : lane;
    const int round = is_clean ? rank : clean + depth;
    if (!is_clean && ++depth == height(lane)) {
      depth = 0;
      ++lane;
    }
    // A group of 32 lanes x 4 words; the tail group has fewer lanes.
    return (round >> 2) * csl::kGroupWords + at * csl::kWordsPerVector + (round & 3);
  }
};

// Writes the words of a tile in bank order to `words` (shared memory); `counts` is scratch. Padding: the first zeros in
// the order [bank][row][half] count as elements.
FLASHLLM_DEVICE void fill_bank_order(const unsigned (&pairs)[kWarpRows], int warp, int lane,
                                     int (&counts)[kWarps][csl::kBanks], unsigned* words) {
  int own = 0;
  for (int i = 0; i < kWarpRows; ++i) own += csl::is_stored(half_of(pairs[i], 0)) + csl::is_stored(half_of(pairs[i], 1));
  counts[warp][lane] = own;
  __syncthreads();

  // Every warp computes the tile's layout for itself, lane = bank; that saves a barrier and a hand-over.
  int before = 0, stored = 0;  // elements of this bank in the warps before, and in all
  for (int w = 0; w < kWarps; ++w) {
    const int count = counts[w][lane];
    before += w < warp ? count : 0;
    stored += count;
  }
  const int nnz = warp_sum(stored);
  const int padding = -nnz & (csl::kWordsPerVector - 1);
  const int zeros = kBankElements - stored;
  const int first_zero = lane * kBankElements - exclusive_sum(stored, lane);  // rank of this bank's first zero
  const int own_first_zero = first_zero + warp * kWarpElements - before;      // rank of this thread's first zero
  const int bank_padding = min(max(padding - first_zero, 0), zeros);
  const int bank_count = stored + bank_padding;
  const int vectors = (nnz + padding) / csl::kWordsPerVector;
  BankOrder order;
  order.full = csl::kWordsPerVector * (vectors / csl::kLanes);
  order.rem = vectors % csl::kLanes;
  order.clean = min(warp_minimum(bank_count), order.full);
  int rank = before + min(max(padding - first_zero, 0), warp * kWarpElements - before);
  order.seek(exclusive_sum(bank_count - order.clean, lane) + max(rank - order.clean, 0));

  int zero = own_first_zero;
  for (int i = 0; i < kWarpRows; ++i) {
    for (int half = 0; half < 2; ++half) {
      const unsigned short bits = half_of(pairs[i], half);
      const bool is_stored = csl::is_stored(bits);
      if (is_stored || zero < padding) {
        const unsigned loc = (warp * kWarpRows + i) * csl::kTileK + lane * 2 + half;
        words[order.place(lane, rank)] = csl::make_word(loc, is_stored ? bits : 0);
        ++rank;
      }
      zero += !is_stored;
    }
  }
}

// Writes the words of a tile in row order to `words`: elements row by row, then padding at the first zeros.
FLASHLLM_DEVICE void fill_row_order(const unsigned (&pairs)[kWarpRows], int warp, int lane,
                                    int (&counts)[kWarps][csl::kBanks], unsigned* words) {
  const unsigned lanes_before = (1u << lane) - 1u;
  int own = 0;
  for (int i = 0; i < kWarpRows; ++i) own += csl::is_stored(half_of(pairs[i], 0)) + csl::is_stored(half_of(pairs[i], 1));
  own = warp_sum(own);
  if (lane == 0) counts[warp][0] = own;
  __syncthreads();
  int rank = 0, nnz = 0;  // elements before the row at hand, and in the tile
  for (int w = 0; w < kWarps; ++w) {
    rank += w < warp ? counts[w][0] : 0;
    nnz += counts[w][0];
  }
  const int padding = -nnz & (csl::kWordsPerVector - 1);
  for (int i = 0; i < kWarpRows; ++i) {
    const int r = warp * kWarpRows + i;
    const unsigned even = __ballot_sync(kFullWarp, csl::is_stored(half_of(pairs[i], 0)));
    const unsigned odd = __ballot_sync(kFullWarp, csl::is_stored(half_of(pairs[i], 1)));
    int before = rank + __popc(even & lanes_before) + __popc(odd & lanes_before);
    for (int half = 0; half < 2; ++half) {
      const int c = 2 * lane + half;
      const unsigned short bits = half_of(pairs[i], half);
      const int zero = r * csl::kTileK + c - before;  // rank among the zeros, if this is one
      if (csl::is_stored(bits)) {
        words[before] = csl::make_word(csl::location(r, c), bits);
        ++before;
      } else if (zero < padding) {
        words[nnz + zero] = csl::make_word(csl::location(r, c), 0);
      }
    }
    rank += __popc(even) + __popc(odd);
  }
}

}  // namespace csl_encode

// counts[tile] = stored elements of the tile. One block per tile, tiles row-major. a is [M, K] with `ld` elements from
// row to row. pair_loads: K, ld and the address of a allow loads of two elements. rounding[4] is added to when the
// source is rounded.
template <class Source>
__global__ void __launch_bounds__(csl_encode::kThreads, 2)
    tiled_csl_count(const typename Source::Element* a, long long M, long long K, long long ld, int tiles_k,
                    int pair_loads, int* counts, unsigned long long* rounding) {
  using namespace csl_encode;
  __shared__ int sums[1 + source::kRoundingFields];
  const int warp = threadIdx.x / csl::kLanes, lane = threadIdx.x % csl::kLanes;
  if (threadIdx.x < 1 + source::kRoundingFields) sums[threadIdx.x] = 0;
  __syncthreads();

  const TileReader<Source> read(a, M, K, ld, tiles_k, pair_loads);
  Rounding effect;
  int count = 0;
#pragma unroll
  for (int i = 0; i < kWarpRows; ++i) {
    const unsigned pair = read(warp * kWarpRows + i, lane * 2, effect);
    count += csl::is_stored(half_of(pair, 0)) + csl::is_stored(half_of(pair, 1));
  }
  count = warp_sum(count);
  if (lane == 0) atomicAdd(&sums[0], count);
  if constexpr (Source::kRounds) {
    for (int f = 0; f < source::kRoundingFields; ++f) {
      const int sum = warp_sum(effect.field[f]);
      if (lane == 0) atomicAdd(&sums[1 + f], sum);
    }
  }
  __syncthreads();
  if (threadIdx.x == 0) counts[blockIdx.x] = sums[0];
  if constexpr (Source::kRounds) {
    if (threadIdx.x < source::kRoundingFields && sums[1 + threadIdx.x] != 0) {
      atomicAdd(&rounding[threadIdx.x], static_cast<unsigned long long>(sums[1 + threadIdx.x]));
    }
  }
}

// Writes the words of every tile at words[4 * tile_offsets[tile]]. Grid and arguments as in tiled_csl_count; `words` is
// aligned to 16 bytes and has 4 * tile_offsets[tiles] entries.
template <class Source, bool kBankOrder>
__global__ void __launch_bounds__(csl_encode::kThreads, 2)
    tiled_csl_fill(const typename Source::Element* a, long long M, long long K, long long ld, int tiles_k,
                   int pair_loads, const int* tile_offsets, unsigned* words) {
  using namespace csl_encode;
  __shared__ int counts[kWarps][csl::kBanks];
  __shared__ __align__(16) unsigned staged[csl::kTileElements];
  const int warp = threadIdx.x / csl::kLanes, lane = threadIdx.x % csl::kLanes;
  const long long start = tile_offsets[blockIdx.x];
  const int vectors = static_cast<int>(tile_offsets[blockIdx.x + 1] - start);
  if (vectors == 0) return;

  const TileReader<Source> read(a, M, K, ld, tiles_k, pair_loads);
  Rounding unused;
  unsigned pairs[kWarpRows];
#pragma unroll
  for (int i = 0; i < kWarpRows; ++i) {
    const int r = warp * kWarpRows + i;
    const int c = kBankOrder ? lane * 2 ^ (r & 7) * 8 : lane * 2;
    pairs[i] = read(r, c, unused);
  }
  if constexpr (kBankOrder) {
    fill_bank_order(pairs, warp, lane, counts, staged);
  } else {
    fill_row_order(pairs, warp, lane, counts, staged);
  }
  __syncthreads();

  // The words are assembled in shared memory, so that they are stored as whole 16-byte vectors.
  uint4* out = reinterpret_cast<uint4*>(words) + start;
  const uint4* in = reinterpret_cast<const uint4*>(staged);
  for (int i = threadIdx.x; i < vectors; i += kThreads) out[i] = in[i];
}

// Writes the dense matrix out [M, K] (row pitch K) of 16-bit patterns from the words of every tile, each element once.
// pair_stores: K is even. Locations are masked, so that a damaged word cannot write outside the block's own array.
__global__ void __launch_bounds__(csl_encode::kThreads, 2)
    tiled_csl_decode(const unsigned* words, const int* tile_offsets, long long M, long long K, int tiles_k,
                     int pair_stores, unsigned short* out) {
  using namespace csl_encode;
  __shared__ __align__(16) unsigned short tile[csl::kTileElements];
  const int warp = threadIdx.x / csl::kLanes, lane = threadIdx.x % csl::kLanes;
  uint4* clear = reinterpret_cast<uint4*>(tile);
  for (int i = threadIdx.x; i < csl::kTileElements / 8; i += kThreads) clear[i] = make_uint4(0, 0, 0, 0);
  __syncthreads();

  const long long start = tile_offsets[blockIdx.x];
  const int vectors = static_cast<int>(tile_offsets[blockIdx.x + 1] - start);
  const uint4* in = reinterpret_cast<const uint4*>(words) + start;
  for (int i = threadIdx.x; i < vectors; i += kThreads) {
    const uint4 vector = in[i];
    const unsigned four[csl::kWordsPerVector] = {vector.x, vector.y, vector.z, vector.w};
    for (int v = 0; v < csl::kWordsPerVector; ++v) {
      tile[csl::word_location(four[v]) & (csl::kTileElements - 1)] = csl::word_value(four[v]);
    }
  }
  __syncthreads();

  const long long row0 = static_cast<long long>(blockIdx.x / tiles_k) * csl::kTileM;
  const long long column = static_cast<long long>(blockIdx.x % tiles_k) * csl::kTileK + lane * 2;
  for (int i = 0; i < kWarpRows; ++i) {
    const int r = warp * kWarpRows + i;
    if (row0 + r >= M || column >= K) continue;
    const unsigned pair = *reinterpret_cast<const unsigned*>(&tile[csl::location(r, lane * 2)]);
    unsigned short* to = out + (row0 + r) * K + column;
    if (pair_stores) {
      *reinterpret_cast<unsigned*>(to) = pair;
    } else {
      to[0] = half_of(pair, 0);
      if (column + 1 < K) to[1] = half_of(pair, 1);
    }
  }
}

}  // namespace flashllm
