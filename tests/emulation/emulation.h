// Kernels on the host: a block's threads, or those of the two blocks of a cluster, are fibers of one host thread, and
// run one after the other.
//
// A thread runs until it waits (for its block, or for the lanes of its warp) or ends; then the next one runs, and while
// a warp can go on, it does. In which order is up to PDDM_EMULATION_ORDER = ascending | descending | shuffled[:seed]:
// what depends on it lacks a barrier. Shared memory holds NaNs (bytes 0xFF) before a block writes to it.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "vector_types.h"

extern __thread uint3 threadIdx, blockIdx;
extern __thread dim3 blockDim, gridDim;

namespace pddm::emulation {

constexpr unsigned kLanes = 32, kAllLanes = ~0u, kMaxThreads = 1024;

struct Launch {
  dim3 grid, block;
  size_t shared_bytes;
  void (*body)(void*);  // of one thread
  void* context;
  unsigned cluster = 0;  // blocks of a cluster, neighbours along x; 0: launched without clusters
  int major = 0;         // of the device's compute capability; 0: whatever the kernel needs
};
constexpr unsigned kMaxCluster = 2;

// Returns when every block has ended. Throws what a thread throws, and std::runtime_error if no thread can go on.
void run(const Launch& launch);

struct Parameter {
  const void* value;
  size_t bytes, alignment;
};
using Parameters = std::vector<Parameter>;

// Where it is set, the runtime has it run a kernel, and not the kernel's own body: see tests/ptx.
extern void (*run_instead)(const Launch& launch, const void* kernel, const Parameters& parameters);

// The rest is for the threads.

[[noreturn]] void fail(const std::string& what);  // throws, and says which thread of which block it was

unsigned lane();
unsigned char* shared_memory();
bool is_shared(const void* address, size_t bytes);

// Waits for all lanes of `mask` to come to the same place; the last one does the work for all of them.
using Work = void (*)(void* const* arguments, unsigned mask);
void meet(const char* where, unsigned mask, Work work, void* argument);

// Waits for all threads of the block that have not ended. Whether one of them had a vote.
bool barrier(const char* where, bool vote);

// Asynchronous copies of 16 bytes. A copy's target holds NaNs from its start until a wait that covers its group: it may
// arrive as early or as late as that.
void copy_async(void* shared, const void* global);
void commit_copies();
void wait_copies(int pending);

// --- Hopper: clusters, barriers that count bytes, and the matrix unit of four warps
// ------------------------------------
//
// Blocks of a cluster are resident at once. Places in shared memory are offsets, the same in every block of a cluster.
//
// The asynchronous units (bulk copies, the matrix unit) see shared memory as it was last shown to them: what threads
// store shows only after show(). What they do themselves happens at a moment of its own: at once, when nobody can go on
// without it, or by chance in between. Until then a copy's target holds NaNs, for everyone.

constexpr uint32_t kSharedAddress = 0x1000;  // of a block's first byte, in the window of 32-bit addresses

// Fails where the bytes are not in this block's shared memory.
uint32_t shared_offset(const void* address, size_t bytes, const char* what);
unsigned char* aligned_shared_memory();

unsigned cluster_rank();
unsigned cluster_blocks();
void cluster_arrive();
void cluster_wait();

// bar.sync with a count.
void some_barrier(unsigned which, unsigned count);

// A phase ends when `count` have arrived and all bytes that were announced are there. Others than this block's threads
// may use a barrier only after it was published.
void init_barrier(uint32_t at, int count);
void publish_barriers();
void arrive(uint32_t at, unsigned rank, int announced_bytes);
// Whether the phase of that parity has ended; may wait until one has, and gives up at first.
bool try_wait(uint32_t at, unsigned parity);

// To the same place of every block in `mask`, in parts, which count at the same barrier of that block.
void copy_to_cluster(uint32_t to, const void* from, size_t bytes, uint32_t barrier, unsigned mask);

// What threads of this block stored: in those bytes, or wherever it differs from what was shown.
void show(uint32_t first, size_t bytes);
void show_all();

void change_registers(const char* where, unsigned count, bool more);

// Registers of a thread, one after the other or, of slots of 8 bytes each, those that are listed.
struct Registers {
  unsigned char* base = nullptr;
  const uint32_t* slots = nullptr;
  unsigned char* at(unsigned which) const { return base + (slots ? 8 * size_t(slots[which]) : 4 * size_t(which)); }
};

// product (16 × columns) = a (16 × 16) · bᵀ (columns × 16)
using Multiply = void (*)(float* product, const uint16_t* a, const uint16_t* b, unsigned columns);

struct MatrixInstruction {
  const char* where;
  Multiply multiply;
  unsigned columns;
  Registers sums, a;  // the latter null: a is in shared memory
  uint64_t a_tile, b_tile;
  bool add;
};

// All of these by all lanes of a warp, and the instruction by four warps, none of which waits in vain for the others:
// when one has waited for it, all have come to it, and it reads nothing any more. Sums hold kNoSum until the wait that
// covers them, and then they and the registers of a must be as they were.
constexpr uint32_t kNoSum = 0x7fe5a5e5;  // a NaN
void begin_products();
void multiply_async(MatrixInstruction instruction);
void commit_products();
void wait_products(int pending);

// Where piece `piece` (8 numbers) of row `row` of an operand is; throws std::invalid_argument where this is no
// descriptor of rows of 64 or 128 bytes, swizzled as wide.
uint32_t tile_address(uint64_t descriptor, unsigned row, unsigned piece);

}  // namespace pddm::emulation
