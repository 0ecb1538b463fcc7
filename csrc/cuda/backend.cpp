#include "backend.h"

#include <algorithm>
#include <atomic>

#include "kernels.h"

namespace pddm::cuda {

std::atomic<int64_t> launches{0}, allocations{0}, bytes_alive{0}, bytes_peak{0};

namespace {

const Kernels& kernels(Precision precision) {
  static const Kernels all[] = {kernels_F32(), kernels_F64(), kernels_Bf16(), kernels_F16(), kernels_Tf32()};
  return all[static_cast<int>(precision)];
}
constexpr Precision kAll[] = {Precision::float32, Precision::float64, Precision::bfloat16, Precision::float16,
                              Precision::tfloat32};

}  // namespace

std::unique_ptr<const DeviceBackend> make_backend(Precision precision, const Caller& caller) {
  return kernels(precision).make_backend(caller);
}

bool warpgroups(Precision precision, int device) { return kernels(precision).warpgroups(device); }

Counters read_counters() {
  Counters counters{0, bytes_peak, launches, allocations};
  for (Precision precision : kAll) counters.pairs_scored += kernels(precision).read_scored();
  return counters;
}

void reset_counters() {
  for (Precision precision : kAll) kernels(precision).reset_scored();
  launches = 0, allocations = 0, bytes_peak = bytes_alive.load();
}

}  // namespace pddm::cuda
