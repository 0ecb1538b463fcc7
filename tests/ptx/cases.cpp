#include "cases.h"

#include <cstdlib>
#include <fstream>
#include <iterator>
#include <type_traits>

#include "../../csrc/cpu/backend.h"
#include "../../csrc/cuda/backend.h"
#include "symbols.h"

namespace pddm::ptx {
namespace {

// The tolerances are those of test_kernels.cpp.
struct Arithmetic {
  const char* name;
  Precision precision;
  double tolerance;
};
constexpr Arithmetic kArithmetics[] = {{"F32", Precision::float32, 1e-5},
                                       {"F64", Precision::float64, 1e-13},
                                       {"Tf32", Precision::tfloat32, 4e-3},
                                       {"Bf16", Precision::bfloat16, 3e-2},
                                       {"F16", Precision::float16, 4e-3}};

const Arithmetic& arithmetic_of(const std::string& name) {
  for (const Arithmetic& a : kArithmetics)
    if (name == a.name) return a;
  throw std::invalid_argument("the arithmetic '" + name + "'; accepted are F32, F64, Tf32, Bf16 and F16");
}

const Module* module;  // that launches run

void run_ptx(const emulation::Launch& launch, const void* kernel, const emulation::Parameters& parameters) {
  ptx::launch(module->kernel(function_name(kernel)), launch, parameters);
}

template <class T>
struct Asked {
  Answers<T> answers;
  int64_t pairs_scored;
};

template <class T>
Asked<T> ask_kernels(const Arithmetic& arithmetic, const Sizes& sizes, const Module* ptx) {
  struct Running {
    explicit Running(const Module* m) { module = m, emulation::run_instead = m ? run_ptx : nullptr; }
    ~Running() { emulation::run_instead = nullptr; }
  } running(ptx);
  Scratch scratch;
  const cuda::Caller caller{0, nullptr, Scratch::take, &scratch};
  cuda::reset_counters();
  const Answers<T> answers = ask<T>(*cuda::make_backend(arithmetic.precision, caller), sizes);
  return {answers, cuda::read_counters().pairs_scored};
}

// As `apart`, but that NaNs are as good as each other.
template <class T>
double apart_or_nan(const std::vector<T>& a, const std::vector<T>& b) {
  std::vector<T> numbers[2];
  for (size_t e = 0; e < std::min(a.size(), b.size()); ++e) {
    if ((a[e] != a[e]) != (b[e] != b[e])) return INFINITY;
    if (a[e] == a[e]) numbers[0].push_back(a[e]), numbers[1].push_back(b[e]);
  }
  return a.size() == b.size() ? apart(numbers[0], numbers[1]) : INFINITY;
}

void run_here(int64_t count, void (*body)(void*, int64_t), void* context) {
  for (int64_t t = 0; t < count; ++t) body(context, t);
}

template <class T>
std::string difference_as(const Arithmetic& arithmetic, const Module& ptx, const Case& c) {
  setenv("PDDM_EMULATION_DEVICE", c.device, 1), setenv("PDDM_EMULATION_MULTIPROCESSORS", c.multiprocessors, 1);
  const Asked<T> asked = ask_kernels<T>(arithmetic, c.sizes, &ptx);
  const Asked<T> emulated_asked = ask_kernels<T>(arithmetic, c.sizes, nullptr);
  const Answers<T>&got = asked.answers, &emulated = emulated_asked.answers;
  const Parallel alone{1, run_here};
  const auto cpu = cpu::make_backend(std::is_same_v<T, double> ? Precision::float64 : Precision::float32, alone);
  const Answers<T> exact = ask<T>(*cpu, c.sizes);

  // The emulation rounds operands where the kernels do: no more than the order of sums is between them.
  const double close = std::is_same_v<T, double> ? 1e-13 : 2e-5, tolerance = arithmetic.tolerance;
  std::string found;
  const auto expect = [&](const char* what, double by, double at_most) {
    if (!(by <= at_most)) found += std::string(what) + " by " + std::to_string(by / at_most) + " times the tolerance; ";
  };
  expect("scores differ from the CPU's", apart_or_nan(got.scores, exact.scores), tolerance);
  expect("scores differ from the emulation's", apart_or_nan(got.scores, emulated.scores), close);
  expect("gradients differ from the CPU's", apart_or_nan(got.gradient, exact.gradient), 20 * tolerance);
  expect("gradients differ from the emulation's", apart_or_nan(got.gradient, emulated.gradient), 20 * close);
  expect("listed scores differ from the emulation's", apart_or_nan(got.listed, emulated.listed), close);
  for (int mode = 0; mode < 3; ++mode)
    if (got.mined[mode] != emulated.mined[mode]) found += "mode " + std::to_string(mode) + " mines other rows; ";
  if (got.ranked != emulated.ranked) found += "other rows are the best; ";
  if (asked.pairs_scored != emulated_asked.pairs_scored)
    found += std::to_string(asked.pairs_scored) + " pairs are counted instead of " +
             std::to_string(emulated_asked.pairs_scored) + "; ";
  return found;
}

}  // namespace

// Sizes that fill no tile and those that fill them; on one multiprocessor few large tiles are chosen, and on sm_86 there
// is too little shared memory for u' of many outputs. Many rows of small ones have a gallery in several chunks.
const std::vector<Case> kCases = {{{1, 1, 1, 1, false}, "sm_80", "3"},
                                  {{5, 3, 2, 4, true}, "sm_80", "3"},
                                  {{33, 17, 40, 9, false}, "sm_80", "3"},
                                  {{40, 33, 70, 67, true}, "sm_80", "3"},
                                  {{9, 20, 12, 8, true, true}, "sm_80", "3"},
                                  {{12, 8, 600, 8, false}, "sm_86", "1"},
                                  {{20, 64, 128, 64, false}, "sm_90", "1"},
                                  {{6, 140, 36, 150, true}, "sm_80", "132"},
                                  {{150, 2, 1, 1, false}, "sm_80", "1"}};

std::string contents(const std::string& path) {
  std::ifstream file(path);
  if (!file) throw std::runtime_error("cannot read " + path);
  return {std::istreambuf_iterator<char>(file), {}};
}

// A variable that only one source sees has that source's name before it, in nvcc's: a length, so much, then the rest.
Module read_kernels(const std::string& arithmetic, const std::string& text) {
  const std::string source = "emulated_" + arithmetic + ".cpp";
  return parse(text, [&](const std::string& name) -> void* {
    char* rest = nullptr;
    const size_t length = name.rfind("_ZN", 0) == 0 ? std::strtoul(name.c_str() + 3, &rest, 10) : 0;
    if (length == 0 || std::strncmp(rest, "_INTERNAL_", 10) != 0) return nullptr;
    return find_variable(source, "_ZN" + std::string(rest + length));
  });
}

std::string difference(const std::string& arithmetic, const Module& module, const Case& c) {
  const Arithmetic& a = arithmetic_of(arithmetic);
  return a.precision == Precision::float64 ? difference_as<double>(a, module, c) : difference_as<float>(a, module, c);
}

}  // namespace pddm::ptx
