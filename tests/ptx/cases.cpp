#include "cases.h"

#include <cstdlib>
#include <fstream>
#include <iterator>
#include <map>
#include <random>
#include <tuple>
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
  bool tensor;
};
constexpr Arithmetic kArithmetics[] = {{"F32", Precision::float32, 1e-5, false},
                                       {"F64", Precision::float64, 1e-13, false},
                                       {"Tf32", Precision::tfloat32, 4e-3, true},
                                       {"Bf16", Precision::bfloat16, 3e-2, true},
                                       {"F16", Precision::float16, 4e-3, true}};

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

// The best of many rows for two of them, and nothing else.
template <class T>
Answers<T> ask_gallery(const Backend& backend, const Sizes& z) {
  constexpr int64_t kQueries = 2, kBest = 20;
  Normal<T> filled;
  const std::vector<T> rows = filled(z.n * z.dim), w_u = filled(z.hidden * z.dim), w_v = filled(z.hidden * z.dim),
                       w_c = filled(z.combined * 2 * z.hidden), small = filled(z.hidden + z.combined);
  const T* const b = small.data();
  const Unit unit{z.dim, z.hidden, z.combined, z.normalize_input, w_u.data(), b, w_v.data(), b, w_c.data(), b, b, b};
  Answers<T> a;
  a.listed.resize(kQueries * kBest), a.ranked.resize(kQueries * kBest);
  backend.topk({rows.data(), kQueries}, {rows.data(), z.n}, kBest, unit, a.listed.data(), a.ranked.data());
  return a;
}

template <class T>
Answers<T> ask_for(const Backend& backend, const Case& c) {
  return c.gallery ? ask_gallery<T>(backend, c.sizes) : ask<T>(backend, c.sizes);
}

template <class T>
Asked<T> ask_kernels(const Arithmetic& arithmetic, const Case& c, const Module* ptx) {
  struct Running {
    explicit Running(const Module* m) { module = m, emulation::run_instead = m ? run_ptx : nullptr; }
    ~Running() { emulation::run_instead = nullptr; }
  } running(ptx);
  Scratch scratch;
  const cuda::Caller caller{0, nullptr, Scratch::take, &scratch};
  cuda::reset_counters();
  const Answers<T> answers = ask_for<T>(*cuda::make_backend(arithmetic.precision, caller), c);
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
struct Others {
  Asked<T> emulated;
  Answers<T> exact;  // the CPU's
};

// Remembered: they are the same for every module.
template <class T>
const Others<T>& ask_others(const Arithmetic& arithmetic, const Case& c) {
  static std::map<std::tuple<const Arithmetic*, const Case*, std::string>, Others<T>> known;
  const char* const order = std::getenv("PDDM_EMULATION_ORDER");
  const auto [at, first_time] = known.try_emplace({&arithmetic, &c, order ? order : ""});
  if (first_time) {
    const Parallel alone{1, run_here};
    const auto cpu = cpu::make_backend(std::is_same_v<T, double> ? Precision::float64 : Precision::float32, alone);
    at->second = {ask_kernels<T>(arithmetic, c, nullptr), ask_for<T>(*cpu, c)};
  }
  return at->second;
}

template <class T>
std::string difference_as(const Arithmetic& arithmetic, const Module& ptx, const Case& c) {
  setenv("PDDM_EMULATION_DEVICE", c.device, 1), setenv("PDDM_EMULATION_MULTIPROCESSORS", c.multiprocessors, 1);
  setenv("PDDM_WARPGROUPS", ptx.target == "sm_90a" ? "on" : "off", 1);
  const Asked<T> asked = ask_kernels<T>(arithmetic, c, &ptx);
  const Others<T>& others_asked = ask_others<T>(arithmetic, c);
  const Answers<T>&got = asked.answers, &emulated = others_asked.emulated.answers, &exact = others_asked.exact;

  // Only where sums round is between the emulation and the kernels; but of two numbers that differ in their last digit
  // one may be rounded up to an operand of the matrix instruction, and the other one down.
  const double tolerance = arithmetic.tolerance;
  const double close = kUnfused ? 0 : arithmetic.tensor ? tolerance / 10 : tolerance;
  std::string found;
  const auto expect = [&](const char* what, double by, double at_most) {
    if (!(by <= at_most)) found += std::string(what) + " by " + std::to_string(by / at_most) + " times the tolerance; ";
  };
  expect("scores differ from the CPU's", apart_or_nan(got.scores, exact.scores), tolerance);
  expect("scores differ from the emulation's", apart_or_nan(got.scores, emulated.scores), close);
  expect("the loss's gradients differ from the CPU's", apart_or_nan(got.sloped, exact.sloped), 20 * tolerance);
  expect("gradients differ from the CPU's", apart_or_nan(got.gradient, exact.gradient), 20 * tolerance);
  expect("the loss's gradients differ from the emulation's", apart_or_nan(got.sloped, emulated.sloped), 20 * close);
  expect("gradients differ from the emulation's", apart_or_nan(got.gradient, emulated.gradient), 20 * close);
  expect("listed scores differ from the emulation's", apart_or_nan(got.listed, emulated.listed), close);
  for (int mode = 0; mode < 3; ++mode)
    if (got.mined[mode] != emulated.mined[mode]) found += "mode " + std::to_string(mode) + " mines other rows; ";
  // Of two scores that differ in their last digit either may come first.
  size_t others = 0;
  for (size_t e = 0; e < got.ranked.size(); ++e) others += got.ranked[e] != emulated.ranked[e];
  if (others > (kUnfused ? 0 : 1 + got.ranked.size() / 20)) found += "other rows are the best; ";
  if (got.stored != emulated.stored) found += "other rows are to be multiplied; ";
  if (got.chosen != exact.chosen) found += "other rows are chosen; ";
  if (asked.pairs_scored != others_asked.emulated.pairs_scored)
    found += std::to_string(asked.pairs_scored) + " pairs are counted instead of " +
             std::to_string(others_asked.emulated.pairs_scored) + "; ";
  return found;
}

// Sizes that fill no tile and those that fill them. On one multiprocessor large tiles are chosen where they are full,
// u' of many outputs finds no room in shared memory, and the gallery of many rows comes in several chunks.
const std::vector<Case> kPortable = {
    {{1, 1, 1, 1, false}, "sm_80", "3"},        {{5, 3, 2, 4, true}, "sm_80", "3"},
    {{33, 17, 40, 9, false}, "sm_80", "3"},     {{40, 33, 70, 67, true}, "sm_80", "3"},
    {{9, 20, 12, 8, true, true}, "sm_80", "3"}, {{12, 8, 600, 8, false}, "sm_86", "1"},
    {{20, 64, 128, 64, false}, "sm_90", "1"},   {{6, 140, 36, 150, true}, "sm_80", "132"},
    {{16, 8, 250, 250, false}, "sm_80", "1"},   {{16, 20, 250, 250, true}, "sm_80", "1"},
    {{16, 8, 450, 250, false}, "sm_80", "1"},   {{16, 36, 450, 250, true}, "sm_80", "1"},
    {{30, 12, 120, 128, false}, "sm_80", "1"},  {{100, 72, 12, 8, false}, "sm_80", "1"},
    {{2, 8, 1032, 8, false}, "sm_80", "1"},     {{1100, 8, 12, 8, false}, "sm_80", "1", true}};

// On few multiprocessors, so that a cluster has several tiles one after the other.
const std::vector<Case> kWarpgroups = {
    {{1, 1, 1, 1, false}, "sm_90", "2"},          {{5, 3, 2, 4, false}, "sm_90", "132"},
    {{33, 20, 40, 9, false, true}, "sm_90", "2"}, {{33, 17, 40, 9, false}, "sm_90", "2"},
    {{40, 33, 70, 67, false}, "sm_90", "4"},      {{20, 70, 300, 260, false}, "sm_90", "3"},
    {{24, 36, 250, 256, false}, "sm_90", "2"}};

}  // namespace

const std::vector<Case>& cases_for(const std::string& target) { return target == "sm_90a" ? kWarpgroups : kPortable; }

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
