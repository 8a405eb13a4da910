// SPDX-License-Identifier: Apache-2.0
// y[N, M] = x[N, K] @ W[M, K]^T with W in slots of the 2:4 sparse tensor cores: two columns of W share one.
//
// The format chooses which two, for each band of 32 or 64 rows, so x is gathered: it lies column by column in windows
// (x_window.cuh, x_images.cuh), from which a lane loads the columns that its band has paired. All else is as in
// bitmap.cu: slots are a bitmap and value streams, walked tile by tile, a tile being 128 rows x 64 slots of 128
// columns, and a fifth warp feeds these, and the windows, to the others (value_ring.cuh). Per tile, a multiplying warp
//   waits      for the tile's barrier: masks, picks, columns, value rows and the window of x are there,
//   gathers    the columns of x that each step's slots belong to,
//   decodes    its masks, 16 groups of four slots per lane, into A fragments (bitmap.cuh),
//   multiplies them on sparse tensor cores, which take from each pair the column that the picks name, and
//   releases   the tile, and what only this tile and those before it needed.
// Dense tensor cores take as many fragment registers for half as many columns: here decoding costs half per element.
// A warp has one part: a band of 32 rows, or half of the slots of a band of 64, for which it gathers half as much. In a
// band of 64 the sums of the two halves then have to be added, once per chain.
// For 64 columns of x the windows are so large that an SM has room for one block only. This block has two teams of four
// warps: one for the first tile of each window, one for the second. Each team advances its streams past the other's
// tiles.
#include "flashllm/chains.cuh"
#include "flashllm/epilogue.cuh"
#include "flashllm/ptx.cuh"
#include "flashllm/slot24.cuh"
#include "flashllm/stream_k.cuh"
#include "flashllm/value_ring.cuh"
#include "flashllm/x_images.cuh"
#include "flashllm/x_window.cuh"

namespace flashllm {

// Teams of four warps that multiply in a block of kN columns of x.
template <int kN>
inline constexpr int kTeamsOf = kN > 32 ? slot24::kWindowTiles : 1;
template <int kN>
inline constexpr int kSlotThreads = kTeamsOf<kN> == 1 ? kThreads : 3 * bitmap::kTileThreads;

constexpr int kFeedRegisters = 72, kMultiplyRegisters = 216;
static_assert(kFeedRegisters + 2 * kMultiplyRegisters <= 3 * 168,
              "or warps wait for ever: 384 threads start with 168 registers each, the most that an SM has for them");

// PartShape, except that in bands of 64 rows a warp has four fragments of 16 rows. The halves of a band, and the teams,
// are slices of K. Warps with the same rows are consecutive, and among them those with the same part.
template <int kN, int kPartRows, int kGroupValues_>
struct SlotShape : PartShape<kN> {
    static constexpr int kGroupValues = kGroupValues_;
    using Bands = slot24::Bands<kPartRows>;
    static constexpr int kTeams = kTeamsOf<kN>;
    static constexpr int kBlockWarps = kTeams * bitmap::kParts;
    static constexpr int kSlices = Bands::kHalves * kTeams;
    static constexpr int kRowFragments = kPartRows / 16;

    FLASHLLM_DEVICE static int part() { return static_cast<int>(threadIdx.x >> 5) / kTeams; }
    // Number of this thread among the lanes of a tile.
    FLASHLLM_DEVICE static int thread() {
        return kTeams == 1 ? threadIdx.x : part() * bitmap::kLanes + static_cast<int>(threadIdx.x & 31);
    }
    FLASHLLM_DEVICE static int row(int i) {
        return kPartRows == 32 ? i * 64 + part() * 16 : part() / Bands::kHalves * 64 + i * 16;
    }
    FLASHLLM_DEVICE static int slice() { return static_cast<int>(threadIdx.x >> 5) % kSlices; }
};

// Adds up the slices at the end of a chain. The first slice then has the sums or, with two teams, each warp a part.
template <typename S, int kTeams = S::kTeams>
struct Sums {
    using Shape = S;
    FLASHLLM_DEVICE static void add(Accumulators<S>& sum, float4* scratch) { add_slices<S>(sum, scratch); }
    FLASHLLM_DEVICE static Accumulators<S>& of(Accumulators<S>& sum) { return sum; }
};
template <typename S>
struct Sums<S, 2> {
    using Shape = DealtShape<S>;
    Accumulators<Shape> own = {};
    FLASHLLM_DEVICE void add(Accumulators<S>& sum, float4* scratch) { deal_slices<S>(sum, own, scratch); }
    FLASHLLM_DEVICE Accumulators<Shape>& of(Accumulators<S>&) { return own; }
};

// Loads the columns of x that step kStep of the part names: one of the four bytes of `columns` times the distance
// between columns. A lane has lefts, or rights, and `window` is the address of their first unit.
template <typename S, int kStep>
FLASHLLM_DEVICE void gather(unsigned (&b)[S::kColumnFragments][4], unsigned columns, unsigned window) {
    using Window = XWindow<S::kN>;
    const unsigned column = ptx::dot4(columns, static_cast<unsigned>(Window::kColumnBytes) << (8 * kStep), window);
#pragma unroll
    for (int j = 0; j < S::kColumnFragments; ++j) ptx::load_matrix_x4_transposed(b[j], Window::unit(column, j));
}

// Decodes half kHalf of a mask word, 32 rows of one step, and adds its products to the row fragments from kFirst on.
template <typename T, typename S, int kHalf, int kFirst, typename Values>
FLASHLLM_DEVICE void multiply_rows(Accumulators<S>& sum, Values& streams, unsigned mask, unsigned picks,
                                   const unsigned (&b)[S::kColumnFragments][4]) {
    unsigned a[2][4];
    bitmap::decode_step<kHalf, S::kGroupValues>(a, streams.low, streams.high, mask);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        const unsigned metadata = slot24::metadata(picks, i);
#pragma unroll
        for (int j = 0; j < S::kColumnFragments; ++j) {
            ptx::mma_sp_m16n8k32<T, kHalf>(sum[kFirst + i][j], a[i], b[j], metadata);
        }
    }
}

// Multiplies what word kWord of masks and picks covers: two steps, or one step of twice as many rows.
template <typename T, typename S, int kWord, typename Values>
FLASHLLM_DEVICE void multiply_word(Accumulators<S>& sum, Values& streams, unsigned mask, unsigned picks, unsigned columns,
                                   unsigned window) {
    constexpr bool kTwoSteps = S::Bands::kHalves == 1;
    unsigned b[S::kColumnFragments][4];
    gather<S, kTwoSteps ? 2 * kWord : kWord>(b, columns, window);
    multiply_rows<T, S, 0, 0>(sum, streams, mask, picks, b);
    if constexpr (kTwoSteps) gather<S, 2 * kWord + 1>(b, columns, window);
    multiply_rows<T, S, 1, kTwoSteps ? 0 : 2>(sum, streams, mask, picks, b);
}

// Shared memory of a block: rings of value rows, windows of x, stages of masks, picks and columns, sums that pass from
// one slice to the other, barriers. Where groups have two values, or there are two teams, both tiles of a window are
// loaded together: the feeder has half as much to do, and there is room for their value rows.
template <typename S, int kRing, int kStages_, int kWindows_>
struct Layout {
    static constexpr int kStepTiles = S::kGroupValues == bitmap::kGroup && S::kTeams == 1 ? 1 : slot24::kWindowTiles;
    static constexpr int kStages = kStages_, kWindows = kWindows_;
    using Ring = ValueRing<kRing, kStepTiles * bitmap::kStreamElements * S::kGroupValues / bitmap::kGroup>;
    using Feed = Feeder<Ring, kStages, kStepTiles>;
    using Window = XWindow<S::kN>;
    using Images = XImages<Window, 1, 1, S::kBlockWarps>;  // two first windows cost .5 us more than waiting for the second
    static constexpr int kColumnBytes = S::Bands::kColumnBytes;
    static constexpr unsigned kPicksAt = kStepTiles * bitmap::kMaskBytes;
    static constexpr unsigned kColumnsAt = kPicksAt + kStepTiles * slot24::kPickBytes;
    static constexpr unsigned kStageBytes = kColumnsAt + kStepTiles * kColumnBytes;
    static constexpr unsigned kWindowsAt = Ring::kBytes;
    static constexpr unsigned kStagesAt = kWindowsAt + kWindows * Window::kBytes;
    static constexpr unsigned kSumsAt = kStagesAt + kStages * kStageBytes;
    static constexpr unsigned kBarriersAt = kSumsAt + (S::kTeams == 1 ? kSumBytes<S> : kDealBytes<S>);

    unsigned base;  // shared address

    FLASHLLM_DEVICE unsigned window(int place) const { return base + kWindowsAt + place * Window::kBytes; }
    FLASHLLM_DEVICE unsigned stage(int stage) const { return base + kStagesAt + stage * kStageBytes; }
    FLASHLLM_DEVICE StageBarriers barriers() const { return {base + kBarriersAt}; }
};

// The feeding warp's windows of x, after the first ones of the run, which the multiplying warps lay out.
//
// A window is loaded with the first step that needs it, on the same barrier. But it may not be laid out yet when the
// first steps could be loaded: then everything else is issued first, and their barriers wait for the windows.
template <typename L>
struct WindowFeed {
    using Window = typename L::Window;
    const L& layout;
    const typename L::Images& images;
    int next;        // the window to copy, in its row of tiles
    int phase;       // 1 where the run begins with a window's second tile
    int asked = L::Images::kFirst;  // windows that steps wait for
    int copied = asked;             // how many of these are copied
    int place = copied % L::kWindows;  // where the next one goes
    bool all = false;  // all windows are laid out

    // The first step of the run's window `number`.
    FLASHLLM_DEVICE int step_of(int number) const {
        return L::kStepTiles == 1 ? slot24::kWindowTiles * number - phase : number;
    }
    FLASHLLM_DEVICE bool begins(int step) const { return step == step_of(asked); }

    // Number of steps that have to be released before the next window has a place.
    FLASHLLM_DEVICE int needed() const { return step_of(asked + 1 - L::kWindows); }

    // Copies all windows that steps wait for.
    FLASHLLM_DEVICE void copy() {
        constexpr int kLooks = 64;  // tens of microseconds: if that is not enough, some blocks have not begun
        if (copied == asked) return;
        if (copied == L::Images::kFirst) ptx::grid_dependency_wait();
        if (!all) all = images.are_there();
#pragma unroll 1
        while (copied < asked) {
            if (!all && !images.is_there(next, kLooks)) images.lay_out(next);
            const int stage = step_of(copied++) % L::kStages;
            copy_window(layout.window(place), images.image(next), layout.barriers().full(stage));
            if (++place == L::kWindows) place = 0;
            if (++next == images.images) next = 0;
        }
    }

private:
    FLASHLLM_DEVICE void copy_window(unsigned to, const unsigned char* from, [[maybe_unused]] unsigned full) const {
#if __CUDA_ARCH__ >= 900
        if (ptx::elect()) ptx::bulk_copy(to, from, Window::kBytes, full);
#else
        for (unsigned at = (threadIdx.x & 31) * 16; at < Window::kBytes; at += bitmap::kLanes * 16) {
            ptx::copy_async16(true, to + at, from + at, 16);
        }
#endif
    }
};

// The feeding warp's loop. masks ... columns: those of the first tile of the first step.
template <typename L>
FLASHLLM_DEVICE void feed_tiles(const L& layout, typename L::Feed feed, WindowFeed<L> x, const unsigned char* masks,
                                const unsigned char* picks, const unsigned char* columns) {
    for (; feed.more(); feed.advance()) {
        const int need = feed.needed();
        const bool begins = x.begins(feed.step);
        const int released = begins ? x.needed() : 0;
        while (!feed.has_room(need) || feed.done < released) {
            x.copy();
            feed.wait_release();
        }
        const unsigned stage = layout.stage(feed.filled.stage);
        const Piece pieces[] = {{stage, masks, L::kStepTiles * bitmap::kMaskBytes},
                                {stage + L::kPicksAt, picks, L::kStepTiles * slot24::kPickBytes},
                                {stage + L::kColumnsAt, columns, L::kStepTiles * L::kColumnBytes}};
        x.asked += begins;
#if __CUDA_ARCH__ >= 900
        feed.bring(pieces, need, begins ? L::Window::kBytes : 0);
        if (x.copied != L::Images::kFirst) x.copy();
#else
        x.copy();  // before the arrival that covers all copies
        feed.bring(pieces, need);
#endif
        masks += L::kStepTiles * bitmap::kMaskBytes, picks += L::kStepTiles * slot24::kPickBytes;
        columns += L::kStepTiles * L::kColumnBytes;
    }
    x.copy();
    while (feed.done == 0) feed.wait_release();
    ptx::grid_dependency_wait();
    x.images.leave();
}

// Grid (G, ceil(N / kN)). workspace: the counters of x_images.cuh, then what stream_k.cuh needs. scratch: see
// x_images.cuh. masks ... columns: see docs/formats/slot24.md. window_columns: columns of x in a window. kRing: value
// rows that the ring of a part holds. kStages: steps for which there is room for masks, picks and columns. kWindows:
// windows of x that fit.
template <typename T, int kN, int kPartRows, int kGroupValues, int kRing, int kStages, int kWindows, int kMinBlocks>
__global__ void __launch_bounds__(kSlotThreads<kN>, kMinBlocks)
spmm_slot24(const T* x, const unsigned char* __restrict__ masks, const unsigned char* __restrict__ values,
            const int* __restrict__ fronts, const unsigned* __restrict__ places,
            const unsigned char* __restrict__ picks, const unsigned char* __restrict__ columns, T* __restrict__ y,
            unsigned char* workspace, unsigned char* scratch, int M, int N, int K, int window_columns, int row_cost,
            int runs, int runs_row_cost) {
    static_assert(kN == 8 || kN == 16 || kN == 32 || kN == 64, "columns of x that one block computes");
    using S = SlotShape<kN, kPartRows, kGroupValues>;
    using L = Layout<S, kRing, kStages, kWindows>;
    using Sum = Sums<S>;
    using Out = typename Sum::Shape;
    constexpr int kTeams = S::kTeams;
    FLASHLLM_DYNAMIC_SHARED(shared);
    const L layout{ptx::shared_address(shared)};
    const StageBarriers barriers = layout.barriers();
    const int warp = ptx::uniform(threadIdx.x >> 5);
    const bool feeds = warp >= S::kBlockWarps;

    const int windows = (K + window_columns - 1) / window_columns;
    const int tiles_m = (M + bitmap::kTileM - 1) / bitmap::kTileM, tiles_k = windows * slot24::kWindowTiles;
    // Two teams take whole windows: these are dealt to blocks then, and `begin`, `split_count` and `tile` count them.
    const StreamK<Out> split(tiles_m, tiles_k / kTeams, row_cost, workspace + L::Images::counter_bytes(windows));
    const typename L::Images images{reinterpret_cast<const unsigned short*>(x), N, K, windows, window_columns,
                                    reinterpret_cast<unsigned*>(workspace), scratch};
    const int begin = static_cast<int>(split.first_tile(blockIdx.x));
    const int split_count = static_cast<int>(split.first_tile(blockIdx.x + 1)) - begin;
    const int first = begin * kTeams, count = split_count * kTeams;
    const int n0 = blockIdx.y * kN;
    const int row = first / tiles_k, tile_k = first - row * tiles_k;
    const int phase = tile_k % slot24::kWindowTiles, first_window = tile_k / slot24::kWindowTiles;

    // From the start of a run of the format on, no earlier row is needed.
    const Runs format_runs{tiles_m, tiles_k, runs_row_cost, static_cast<unsigned>(runs)};
    int run = static_cast<int>(format_runs.run_of(first)), restart = static_cast<int>(format_runs.first_tile(run));
    if (threadIdx.x == 0) barriers.init(kStages, L::Feed::kArrivals, S::kBlockWarps);
    __syncthreads();

    const int lag = first == restart ? 0 : bitmap::kSlack;
    if (feeds) {
        if constexpr (kTeams == 2) {
            // Registers are reallocated for four warps at a time: three of these four only leave theirs to the others.
            ptx::give_registers<kFeedRegisters>();
            if (warp != S::kBlockWarps) return;
        }
        const FirstFronts first_fronts(fronts + first, count);
        const typename L::Ring ring(layout.base, first_fronts.begin, lag);
        const int before = phase % L::kStepTiles;  // tiles of the first step that are not in the run
        const long long brought = first - before;
        feed_tiles(layout, typename L::Feed(ring, barriers, values, fronts + first, count, before, first_fronts),
                   WindowFeed<L>{layout, images, (first_window + L::Images::kFirst) % windows, phase},
                   masks + brought * bitmap::kMaskBytes, picks + brought * slot24::kPickBytes,
                   columns + brought * L::kColumnBytes);
    } else {
        if constexpr (kTeams == 2) ptx::take_registers<kMultiplyRegisters>();
        const int part = warp / kTeams, team = warp % kTeams, thread = S::thread();
        const StreamsBegin streams_begin(masks, fronts, places, first, first + count, restart, thread);
        ptx::grid_dependency_wait();  // the feeder waits too, but brings what is constant first
        ptx::grid_launch_dependents();
        const auto begun = images.begin(first_window, warp);
        Accumulators<S> sum = {};
        Sum all;
        const auto write = [&](Accumulators<Out>& sum, int row) { store_fragments<Out>(sum, y, n0, row * S::kM, N, M); };
        const typename L::Ring ring(layout.base, ptx::uniform(streams_begin.first_front), lag);
        Streams<typename L::Ring> streams(ring, streams_begin, part);
        // The next start of a run of the format, counted from the first tile, and the front there.
        const auto next_restart = [&] { return static_cast<int>(format_runs.first_tile(++run)) - first; };
        restart = next_restart();
        int restart_front = __ldg(fronts + first + min(restart, count));
        const auto restart_at = [&](int tile) {
            if (tile == restart) streams.restart(ring, restart_front);
        };
        const auto leave_run = [&] {
            restart = next_restart();
            restart_front = __ldg(fronts + first + min(restart, count));
        };
        Chains<Out> chains(split, begin, row, split_count);
        // Streams trade columns before tiles whose numbers are multiples of kPlaceTiles. (Opaque: see bitmap.cu.)
        const auto trade_at = [&](int tile) {
            const int next = first + tile;
            if (next % bitmap::kPlaceTiles == 0) streams.trade(places, next, first + count, thread);
        };
        const auto next_stop = [&](int tile) {
            if (kTeams == 2) return chains.chain_end;
            const int trade = tile + bitmap::kPlaceTiles - (first + tile) % bitmap::kPlaceTiles;
            return min(min(chains.chain_end, restart), ptx::opaque(trade));
        };
        int stop = next_stop(0);
        images.finish(begun, reinterpret_cast<unsigned char*>(shared) + L::kWindowsAt, L::Window::kBytes, first_window, warp);

        Cycle<kStages> cycle;
        int tile = 0, in_window = phase;
        const unsigned windows_begin = layout.window(0) + L::Window::first_unit((threadIdx.x & 1) * 4);
        unsigned window = windows_begin;  // the window of x in use
        while (true) {
            const int in_step = kTeams == 2 ? team : L::kStepTiles == 1 ? 0 : in_window;
            if (kTeams == 2 || in_step == 0 || tile == 0) ptx::mbarrier_wait(barriers.full(cycle.stage), cycle.parity);
            const unsigned stage = layout.stage(cycle.stage);
            const unsigned words = stage + in_step * bitmap::kMaskBytes + thread * 8;
            static_assert(bitmap::kMaskBytes == slot24::kPickBytes, "masks and picks lie alike");
            const uint2 mask = ptx::load_shared8(words), pick = ptx::load_shared8(words + L::kPicksAt);
            const unsigned place = stage + L::kColumnsAt + in_step * L::kColumnBytes + thread * S::Bands::kPartSteps;
            const unsigned column = S::Bands::kHalves == 1 ? ptx::load_shared4(place) : ptx::load_shared_half(place);
            // Skips the other team's tile of the window.
            const auto skip = [&](int other) {
                streams.skip(ptx::load_shared8(stage + other * bitmap::kMaskBytes + thread * 8));
            };
            if (kTeams == 2 && team == 1) {
                skip(0);
                restart_at(2 * tile + 1);
            }
            streams.wrap();
            multiply_word<T, S, 0>(sum, streams, mask.x, pick.x, column, window);
            streams.wrap();
            multiply_word<T, S, 1>(sum, streams, mask.y, pick.y, column, window);
            if (kTeams == 2 && team == 0) {
                restart_at(2 * tile + 1);
                skip(1);
            }
            if (kTeams == 2 || in_step == L::kStepTiles - 1) {
                barriers.release(cycle.stage);
                cycle.advance();
            }
            ++tile;
            in_window ^= 1;
            if (kTeams == 2) {
                if (tile != split_count) trade_at(2 * tile);
                if (restart <= 2 * tile) {
                    restart_at(2 * tile);
                    leave_run();
                }
            }
            if (kTeams == 2 || in_window == 0) {
                window += L::Window::kBytes;
                if (window == windows_begin + kWindows * L::Window::kBytes) window = windows_begin;
            }
            if (tile != stop) continue;
            if (tile == chains.chain_end) {
                all.add(sum, reinterpret_cast<float4*>(shared + L::kSumsAt));
                chains.end(split, tile, all.of(sum), write);
                if (tile == split_count) {
                    // The feeder waits for the first step, which may consist of this tile alone.
                    if (kTeams == 1 && L::kStepTiles != 1 && in_window == 1) barriers.release(cycle.stage);
                    break;
                }
            }
            if (kTeams == 1) {
                trade_at(tile);
                if (tile == restart) {
                    restart_at(tile);
                    leave_run();
                }
            }
            stop = next_stop(tile);
        }
        chains.finish(split, all.of(sum), write);
    }
}

}  // namespace flashllm
