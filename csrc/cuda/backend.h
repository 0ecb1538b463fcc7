// The CUDA room's door: a backend for one call, on the caller's device and stream.
#pragma once

#include <memory>

#include "../problem.h"

namespace pddm::cuda {

// What a call may use: memory is asked of the host framework, which frees it when the stream has passed.
struct Caller {
  int device;
  void* stream;  // cudaStream_t
  void* (*allocate)(void* context, int64_t bytes);
  void* context;
  int64_t slab = 0;  // bytes to ask for at once, for what is small; 0 asks for everything by itself
};

// The caller has made `device` current. Throws std::runtime_error for CUDA's errors.
std::unique_ptr<const Backend> make_backend(Precision precision, const Caller& caller);

// Whether hopper.cuh scores there in this precision, where a unit's size lets it.
bool warpgroups(Precision precision, int device);

// Over all streams of the current device; waits for it. Kernel launches are the host's count.
Counters read_counters();
void reset_counters();

}  // namespace pddm::cuda
