// The kernels as nvcc compiled them against the same kernels as the emulation has them, and against the CPU's, on cases
// that take as many of their branches as a minute allows.
#pragma once

#include <string>
#include <vector>

#include "../emulation/answers.h"
#include "module.h"

namespace pddm::ptx {

// Where neither side fuses multiply-adds every bit must be the same. For so much the cases of fewer outputs are enough.
#if defined(PDDM_UNFUSED)
constexpr bool kUnfused = true;
#else
constexpr bool kUnfused = false;
#endif

struct Case {
  Sizes sizes;
  const char *device, *multiprocessors;
  bool gallery = false;  // only to be searched
};
// For a module of that target: those of sm_90a are for the kernels with warpgroups, and others for those without.
const std::vector<Case>& cases_for(const std::string& target);

std::string contents(const std::string& path);

// Of an arithmetic: F32, F64, Tf32, Bf16 or F16.
Module read_kernels(const std::string& arithmetic, const std::string& text);

// What differs; empty: nothing does. Throws what the kernels throw. The case is one of `cases_for`.
std::string difference(const std::string& arithmetic, const Module& module, const Case& c);

}  // namespace pddm::ptx
