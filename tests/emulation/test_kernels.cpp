// The CUDA kernels, emulated, against the CPU's on arrays of exactly their size: what a sanitizer build is for, which
// sees a wrong index into global memory.
#include <cstdlib>
#include <type_traits>
#include <vector>

#include "../../csrc/cpu/backend.h"
#include "../../csrc/cuda/backend.h"
#include "../native/check.h"
#include "answers.h"

namespace {

using namespace pddm;

void run_here(int64_t count, void (*body)(void*, int64_t), void* context) {
  for (int64_t t = 0; t < count; ++t) body(context, t);
}

// Sizes that fill no tile, on the device of the environment.
const std::vector<Sizes> kSizes = {
    {1, 1, 1, 1, false}, {5, 3, 2, 4, true}, {33, 17, 40, 9, false}, {40, 33, 70, 67, true}};
// With warpgroups, which are for rows that are not normalised.
const std::vector<Sizes> kWarpgroupSizes = {{1, 1, 1, 1, false},
                                            {33, 17, 40, 9, false},
                                            {40, 33, 70, 67, false},
                                            {70, 64, 128, 64, false},
                                            {20, 70, 300, 260, false}};

template <class T>
void compare(Precision precision, const char* name, double tolerance, const std::vector<Sizes>& sizes = kSizes) {
  const Parallel alone{1, run_here};
  const auto cpu = cpu::make_backend(std::is_same_v<T, double> ? Precision::float64 : Precision::float32, alone);
  for (const Sizes& z : sizes) {
    Scratch scratch;
    const cuda::Caller caller{0, nullptr, Scratch::take, &scratch};
    const auto backend = cuda::make_backend(precision, caller);
    const Answers<T> got = ask<T>(*backend, z), expected = ask<T>(*cpu, z);
    CHECK(apart(got.scores, expected.scores) <= tolerance, "%s n=%ld: %g", name, long(z.n),
          apart(got.scores, expected.scores));
    CHECK(apart(got.gradient, expected.gradient) <= 20 * tolerance, "%s n=%ld: %g", name, long(z.n),
          apart(got.gradient, expected.gradient));
    CHECK(apart(got.sloped, expected.sloped) <= 20 * tolerance, "%s n=%ld: %g", name, long(z.n),
          apart(got.sloped, expected.sloped));
    CHECK(got.chosen == expected.chosen, "%s n=%ld", name, long(z.n));
    // Rounding this coarse may choose another pair.
    if (tolerance > 1e-4) continue;
    CHECK(apart(got.listed, expected.listed) <= tolerance, "%s n=%ld", name, long(z.n));
    for (int mode = 0; mode < 3; ++mode) CHECK(got.mined[mode] == expected.mined[mode], "%s mode %d", name, mode);
    CHECK(got.ranked == expected.ranked, "%s n=%ld", name, long(z.n));
  }
}

}  // namespace

int main() {
  compare<float>(Precision::float32, "float32", 1e-5);
  compare<double>(Precision::float64, "float64", 1e-13);
  compare<float>(Precision::tfloat32, "tfloat32", 4e-3);
  compare<float>(Precision::bfloat16, "bfloat16", 3e-2);
  compare<float>(Precision::float16, "float16", 4e-3);
  setenv("PDDM_EMULATION_DEVICE", "sm_90", 1);
  for (const char* multiprocessors : {"2", "5"}) {
    setenv("PDDM_EMULATION_MULTIPROCESSORS", multiprocessors, 1);
    compare<float>(Precision::bfloat16, "bfloat16 with warpgroups", 3e-2, kWarpgroupSizes);
    compare<float>(Precision::float16, "float16 with warpgroups", 4e-3, kWarpgroupSizes);
  }
  if (failures) std::printf("%d checks failed\n", failures);
  return failures != 0;
}
