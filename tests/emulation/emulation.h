// Kernels on the host: a block's threads are fibers of one host thread, and run one after the other.
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
};

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

}  // namespace pddm::emulation
