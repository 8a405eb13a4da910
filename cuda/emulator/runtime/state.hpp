// SPDX-License-Identifier: Apache-2.0
// Everything the emulator knows about a launch: threads, warps, blocks, workers.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdarg>
#include <map>
#include <memory>
#include <vector>

#include "emu/launch.hpp"
#include "emu/runtime.hpp"
#include "runtime/fiber.hpp"

namespace emu {

constexpr unsigned kMaxWarps = 32;
constexpr unsigned kNamedBarriers = 16;
// Where the shared window of a block begins, such that address 0 is never valid and swizzled operands stay aligned.
constexpr unsigned kSharedBase = 1024;
constexpr unsigned kSharedLimit = 256 * 1024;
constexpr unsigned kCanaryBytes = 1024;

struct Block;
struct Warp;
struct Worker;

struct AsyncCopy {
    unsigned address, bytes;
    const void* source;  // null: already performed
};

// cp.async of one thread: copies in the order issued, and where each closed group ends.
struct CopyQueue {
    std::vector<AsyncCopy> copies;
    std::vector<unsigned> group_ends;
    void clear() { copies.clear(), group_ends.clear(); }
};

// One thread's writes of one kind to shared memory. They become visible to the asynchronous proxy (wgmma) in two steps:
// the writer's fence ends an epoch, and the next barrier publishes all ended epochs. Or the writer arrives at an
// mbarrier, which releases what it wrote, and a fence of the reader publishes what has been released. An ordinary
// arrival releases ordinary stores; an arrival after copies releases copies.
struct Writes {
    unsigned epoch = 1, published = 1, released = 1;
    void release() { released = ++epoch; }
    void publish_released() { published = std::max(published, released); }
};

// Lives at the base of its own stack, see self().
struct Thread : ThreadView {
    Context context;
    Block* owner = nullptr;
    Warp* warp = nullptr;
    unsigned id = 0, lane = 0;
    Writes stores, copied;  // its ordinary stores; its cp.async whose completion it leaves to an mbarrier
    CopyQueue* copies = nullptr;
    unsigned looks = 0;                  // polls of global memory that another block writes, since the last __syncwarp
    bool last_look = false;
};

// What the lanes of a meeting are doing: all must do the same.
enum class Operation : unsigned char {
    syncwarp, shuffle, vote, ldmatrix_x2, ldmatrix_x4, ldmatrix_x4_trans, mma, mma_sp, wgmma_fence, wgmma,
    wgmma_commit, wgmma_wait
};
const char* name_of(Operation operation);

struct Meeting {
    Operation operation;
    unsigned mask, arrived;
};

// Addresses of the shared-memory stores of a warp since its lanes last met. The n-th store of each lane counts as one
// instruction: true of code that does not diverge in between, close to it elsewhere.
struct AccessLog {
    static constexpr unsigned kDepth = 192;
    unsigned longest = 0;
    unsigned short count[32] = {};
    unsigned address[kDepth][32];
};

struct WgmmaQueue;
struct WgmmaQueueDeleter {
    void operator()(WgmmaQueue* queue) const;
};

struct Warp {
    Block* block = nullptr;
    unsigned index = 0;
    unsigned live = 0, ready = 0;      // lanes that have not ended; of those, lanes that wait for nothing
    unsigned behind = 0;               // lanes that are ordered after the preceding launch, see is_behind
    unsigned rank = 0;                 // who goes first, where the worker ranks its warps
    unsigned meeting_count = 0;
    Meeting meetings[32];
    void* argument[32];                // what each lane brings to its meeting
    AccessLog scatters, stores4, stores16;
    std::unique_ptr<WgmmaQueue, WgmmaQueueDeleter> wgmma;
    unsigned wgmma_issued = 0;
};

struct Barrier {
    unsigned arrived = 0, expected = 0;  // expected 0: all live threads
    Reduce reduce = Reduce::none;
    int any = 0, all = 1, count = 0, result = 0;
    unsigned waiting[kMaxWarps] = {};    // lanes of each warp
};

struct BulkCopy {
    unsigned address, bytes, zeros;  // zeros: bytes to zero after the copied ones
    const void* source;
    unsigned mark;  // of the writer, as in Block::writer
};

struct TransactionBarrier {
    unsigned arrivals = 0, arrivals_left = 0;
    unsigned parity = 0;                 // of the current phase
    long long bytes_left = 0;            // announced but not copied; negative when a copy was faster
    std::vector<BulkCopy> copies;        // not performed yet
    unsigned waiting[kMaxWarps] = {};    // lanes of each warp
    // Whether a thread ordered after the preceding launch has arrived: so far, and by the end of the last ended phase.
    bool arrived_behind = false, behind = false;
};

struct Block : BlockView {
    Worker* worker = nullptr;
    unsigned long long number = 0;
    bool running = false;
    unsigned live_threads = 0;
    unsigned ready_warps = 0;
    unsigned warp_count = 0;
    std::unique_ptr<Warp[]> warps;
    Barrier barriers[kNamedBarriers];
    char* stacks = nullptr;              // one per thread
    std::unique_ptr<CopyQueue[]> copies;
    std::map<unsigned, TransactionBarrier> transactions;  // by shared address
    std::unique_ptr<unsigned[]> writer;  // of each 2 bytes of shared memory: see mark_of_stores; 0: none

    Thread& thread(unsigned id) { return *reinterpret_cast<Thread*>(stacks + id * kStackBytes); }
};

struct Launch {
    const Request* request;
    void (*body)(void* const*);
    dim3 grid;
    unsigned long long blocks = 0;
    std::unique_ptr<std::atomic<bool>[]> ended;  // by block number
    std::atomic<bool> failed{false};
    const char* module_begin = nullptr;     // of this shared object, whose __device__ variables are global memory
    const char* module_end = nullptr;
};

// One host thread and the blocks it runs, like a multiprocessor.
struct Worker {
    Launch* launch = nullptr;
    unsigned index = 0, count = 1;
    std::uint64_t random = 1;
    bool ranked = false;
    Context main;
    std::vector<std::unique_ptr<Block>> blocks;  // resident at the same time
    std::uint64_t counts[kCounters] = {};
    std::size_t last_extent = 0;

    unsigned draw() {  // xorshift64*
        random ^= random >> 12, random ^= random << 25, random ^= random >> 27;
        return static_cast<unsigned>(random * 0x2545f4914f6cdd1dull >> 32);
    }
    void add(Counter counter, std::uint64_t amount = 1) { counts[static_cast<unsigned>(counter)] += amount; }
};

inline Thread& current() { return *reinterpret_cast<Thread*>(fiber_base()); }

// Whether a thread is ordered after the preceding launch: it has waited for that launch, or has met a thread that was
// so ordered at a barrier.
inline bool is_behind(const Thread& thread) { return (thread.warp->behind >> thread.lane & 1) != 0; }
inline void put_behind(Thread& thread) { thread.warp->behind |= 1u << thread.lane; }

// Ends the launch with a message that says where; runs on a fiber and does not return.
[[noreturn]] void fail(const char* format, ...) __attribute__((format(printf, 1, 2)));

// ---- scheduler.cpp

void prepare_block(Block& block);
// Runs the worker's blocks until one ends or the launch fails.
void run_until_block_ends(Worker& worker);
// The lanes of `mask` meet; the last to arrive calls perform(warp, mask), with each lane's argument in place.
void meet(Operation operation, unsigned mask, void* argument, void (*perform)(Warp&, unsigned));

// Lets others run until wake() is called for the waiting lanes to which this thread has added itself.
void wait_for_wake(Thread& thread);
// `behind`: what they waited for orders them after the preceding launch.
void wake(Block& block, unsigned (&waiting)[kMaxWarps], bool behind);

// ---- shared.cpp

// The mark of what is written now: thread id << 20 | epoch, with the highest bit set for copies.
constexpr unsigned kCopiedMark = 1u << 31;
inline unsigned mark_of_stores(const Thread& thread) { return thread.id << 20 | (thread.stores.epoch & 0xfffffu); }
inline unsigned mark_of_copies(const Thread& thread) {
    return kCopiedMark | thread.id << 20 | (thread.copied.epoch & 0xfffffu);
}
void mark_written(Block& block, unsigned address, unsigned bytes, unsigned mark);
void check_shared(const Thread& thread, const char* what, unsigned address, unsigned bytes);
// Wavefronts of up to 8 rows of 16 bytes read or written together.
unsigned wavefronts16(const unsigned* addresses, unsigned count);
void flush_logs(Warp& warp);
inline unsigned char* shared_pointer(const Block& block, unsigned address) {
    return block.shared + (address - kSharedBase);
}

// ---- mbarrier.cpp

void check_transactions_done(Block& block);

// ---- wgmma.cpp

void reset_wgmma(Warp& warp);
// Problems only visible when a block barrier completes or the block ends; fails the launch.
void check_warpgroups(Block& block);
void check_wgmma_done(Warp& warp);

// ---- multiply.cpp: as tensor cores do

// c[16][columns] += a[16][16] b[columns][16]
void multiply_add(Value type, float* c, unsigned columns, const std::uint16_t* a, const std::uint16_t* b);
// c[16][8] += a[16][16] b[8][32], where element k of row m of a multiplies column place[m][k] of b
void multiply_add_sparse(Value type, float* c, const std::uint16_t* a, const std::uint16_t* b,
                         const unsigned char (*place)[16]);

}  // namespace emu
