// What kernels.cu leaves for the rest of the room, of every arithmetic.
#pragma once

#include <memory>

#include "backend.h"

namespace pddm::cuda {

struct Kernels {
  std::unique_ptr<const DeviceBackend> (*make_backend)(const Caller& caller);
  bool (*warpgroups)(int device);
  int64_t (*read_scored)();
  void (*reset_scored)();
};

Kernels kernels_F32();
Kernels kernels_F64();
Kernels kernels_Tf32();
Kernels kernels_Bf16();
Kernels kernels_F16();

}  // namespace pddm::cuda
