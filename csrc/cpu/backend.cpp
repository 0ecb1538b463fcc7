#include "backend.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdlib>
#include <numeric>
#include <stdexcept>
#include <unordered_map>

#if defined(PDDM_AMX)
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include "asked.h"
#include "dense.h"
#include "gradient.h"
#include "largest.h"
#include "loss.h"
#include "mine.h"
#include "nearest.h"
#include "rounded.h"

namespace pddm {

namespace cpu {
namespace {

struct InstructionSet {
  const char* name;
  bool (*supported)();
  const Engine<float>* (*float32)();
  const Engine<double>* (*float64)();
  const Engine<float>* (*bfloat16)();
  const RoundedEngine* (*rounded)();
};

#if defined(PDDM_AMX)
constexpr long kTileData = 18;  // XFEATURE_XTILE_DATA

bool has_tiles() {
  constexpr long kSupported = 0x1021;  // ARCH_GET_XCOMP_SUPP
  uint64_t features = 0;
  return __builtin_cpu_supports("amx-tile") && __builtin_cpu_supports("amx-bf16") &&
         syscall(SYS_arch_prctl, kSupported, &features) == 0 && (features >> kTileData & 1);
}

// For the whole process and for good, whose threads' signal stacks must have room for tiles from then on; refused where
// one has not.
bool ask_for_tiles() {
  constexpr long kRequest = 0x1023;  // ARCH_REQ_XCOMP_PERM
  return syscall(SYS_arch_prctl, kRequest, kTileData) == 0;
}
#endif

#define PDDM_SET(isa, supported)   \
  {#isa,                           \
   [] { return bool(supported); }, \
   isa::float32_engine,            \
   isa::float64_engine,            \
   isa::bfloat16_engine,           \
   isa::rounded_engine}

const InstructionSet kSets[] = {
    PDDM_SET(portable, true),
#if defined(PDDM_X86)
    PDDM_SET(avx2, __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")),
    PDDM_SET(avx512, __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")),
#if defined(PDDM_AVX512_BF16)
    PDDM_SET(avx512_bf16, __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vnni") &&
                              __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
                              __builtin_cpu_supports("avx512vl")),
#endif
#if defined(PDDM_AMX)
    PDDM_SET(amx, __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vnni") &&
                      __builtin_cpu_supports("avx512vbmi2") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") && has_tiles()),
#endif
#endif
};

std::atomic<const InstructionSet*>& current() {
  static std::atomic<const InstructionSet*> set{nullptr};
  return set;
}

const InstructionSet* chosen() {
  if (!current().load()) {
    const char* forced = std::getenv("PDDM_CPU_CAPABILITY");
    set_capability(forced ? forced : "");
  }
  return current().load();
}

template <class T>
class CpuBackend final : public Backend {
 public:
  CpuBackend(const Engine<T>& engine, const Parallel& parallel) : engine_(engine), parallel_(parallel) {}

  int64_t count_positive_pairs(const int64_t* labels, int64_t n) const override {
    std::unordered_map<int64_t, int64_t> seen;
    int64_t pairs = 0;
    for (int64_t r = 0; r < n; ++r) pairs += seen[labels[r]]++;
    return pairs;
  }
  void mine(const Rows& rows, const int64_t* labels, const Unit& unit, Mode mode,
            const Quadruplets& out) const override {
    cpu::mine<T>(engine_, parallel_, rows, labels, unit, mode, out);
  }
  void score_pairs(const Rows& rows, const Pairs& pairs, const Unit& unit, void* scores) const override {
    cpu::score_pairs<T>(engine_, parallel_, rows, pairs, unit, static_cast<T*>(scores));
  }
  void score_matrix(const Rows& rows, int64_t split, const Unit& unit, void* scores) const override {
    cpu::score_matrix<T>(engine_, parallel_, rows, split, unit, static_cast<T*>(scores));
  }
  void topk(const Rows& queries, const Rows& gallery, int64_t k, const Unit& unit, void* scores,
            int64_t* indices) const override {
    cpu::topk<T>(engine_, parallel_, queries, gallery, k, unit, static_cast<T*>(scores), indices);
  }
  void largest(const void* values, int64_t rows, int64_t columns, const int64_t* own, const int64_t* classes,
               int64_t count, int64_t* indices) const override {
    cpu::largest(parallel_, static_cast<const T*>(values), rows, columns, own, classes, count, indices);
  }
  int64_t count_asked(const Asked& asked, int64_t* begins, int64_t* places) const override {
    return cpu::count_asked(parallel_, asked, begins, places);
  }
  void write_asked(const Asked& asked, const int64_t* begins, int64_t* i, int64_t* j, int64_t* places) const override {
    cpu::write_asked(parallel_, asked, begins, i, j, places);
  }
  void best_asked(const Asked& asked, bool second, const int64_t* places, const void* scores, int64_t count,
                  bool lowest, const BestAsked& best) const override {
    cpu::best_asked(parallel_, asked, second, places, static_cast<const T*>(scores), count, lowest, best);
  }
  void join_best(int64_t n, const BestAsked& positive, const BestAsked& negative,
                 const Quadruplets& out) const override {
    cpu::join_best<T>(parallel_, n, positive, negative, out);
  }
  void score_pairs_backward(const Rows& rows, const Pairs& pairs, const void* weight, const Unit& unit,
                            void* rows_gradient, const UnitGradient& gradient) const override {
    cpu::score_pairs_backward<T>(engine_, parallel_, rows, pairs, static_cast<const T*>(weight), unit,
                                 static_cast<T*>(rows_gradient), gradient);
  }
  void score_matrix_backward(const Rows& rows, int64_t split, const void* weight, const Unit& unit, void* rows_gradient,
                             const UnitGradient& gradient) const override {
    cpu::score_matrix_backward<T>(engine_, parallel_, rows, split, static_cast<const T*>(weight), unit,
                                  static_cast<T*>(rows_gradient), gradient);
  }
  void quadruplet_loss(const Rows& rows, int64_t dim, const Picked& quads, const Margins& margins, void* loss,
                       uint8_t* open) const override {
    cpu::quadruplet_loss(parallel_, rows, dim, quads, margins, static_cast<T*>(loss), open);
  }
  void quadruplet_loss_backward(const Rows& rows, int64_t dim, const Picked& quads, double embedding_weight,
                                const void* upstream, const uint8_t* open, void* d_rows, void* d_s_ij, void* d_s_ik,
                                void* d_s_jl) const override {
    cpu::quadruplet_loss_backward(parallel_, rows, dim, quads, embedding_weight, *static_cast<const T*>(upstream), open,
                                  static_cast<T*>(d_rows), static_cast<T*>(d_s_ij), static_cast<T*>(d_s_ik),
                                  static_cast<T*>(d_s_jl));
  }

 private:
  const Engine<T>& engine_;
  const Parallel& parallel_;
};

template <class T>
std::unique_ptr<const Backend> made(const Engine<T>* engine, const Parallel& parallel) {
  return std::make_unique<CpuBackend<T>>(*engine, parallel);
}

}  // namespace

std::vector<Capability> capabilities() {
  std::vector<Capability> all;
  for (const InstructionSet& set : kSets) all.push_back({set.name, set.supported()});
  return all;
}

std::string capability() { return chosen()->name; }

void set_capability(const std::string& name) {
  const InstructionSet* found = nullptr;
  std::string usable;
  for (const InstructionSet& set : kSets) {
    if (!set.supported()) continue;
    usable += std::string(usable.empty() ? "" : ", ") + set.name;
    if (!name.empty() && name != set.name) continue;
#if defined(PDDM_AMX)
    if (set.float32 == amx::float32_engine && !ask_for_tiles()) {
      if (name.empty()) continue;
      throw std::invalid_argument(
          "PDDM_CPU_CAPABILITY is 'amx', and the kernel does not grant its tiles to this process");
    }
#endif
    found = &set;
  }
  if (!found)
    throw std::invalid_argument("PDDM_CPU_CAPABILITY is '" + name + "'; this build on this machine has " + usable);
  current() = found;
}

Precision effective(Precision precision) {
  return precision == Precision::bfloat16 && !chosen()->bfloat16() ? Precision::float32 : precision;
}

std::unique_ptr<const Backend> make_backend(Precision precision, const Parallel& parallel) {
  const InstructionSet* set = chosen();
  switch (effective(precision)) {
    case Precision::float64: return made(set->float64(), parallel);
    case Precision::bfloat16: return made(set->bfloat16(), parallel);
    default: return made(set->float32(), parallel);
  }
}

void nearest(Precision precision, const Parallel& parallel, const Rows& rows, int64_t dim, const int64_t* classes,
             int64_t count, int64_t* indices) {
  const InstructionSet* set = chosen();
  if (precision == Precision::float64)
    return Nearest<double>(*set->float64(), parallel, rows, dim, classes, count).write(indices, count);
  for (const RoundedEngine* rounded = set->rounded(); rounded; rounded = rounded->finer)
    if (RoundedNearest::suits(*rounded, rows.count, dim, count) &&
        RoundedNearest(*rounded, *set->float32(), parallel, rows, dim, classes, count).find(indices))
      return;
  Nearest<float>(*set->float32(), parallel, rows, dim, classes, count).write(indices, count);
}

void dot_products(Precision precision, const Parallel& parallel, const Rows& x, const Rows& y, int64_t dim,
                  void* products) {
  const InstructionSet* set = chosen();
  if (precision == Precision::float64)
    return dot_products(*set->float64(), parallel, x, y, dim, static_cast<double*>(products));
  dot_products(*set->float32(), parallel, x, y, dim, static_cast<float*>(products));
}

namespace {

template <class T>
double measure_peak(const Engine<T>* engine, const Parallel& parallel, double seconds) {
  using Clock = std::chrono::steady_clock;
  std::vector<double> rate(static_cast<size_t>(parallel.threads), 0.0);
  std::atomic<int> ready{0};
  share(parallel, parallel.threads, [&](int64_t, int64_t index) {
    // Every thread spins while the others do; a pool that gives fewer threads than it promised must not hang this.
    const auto patience = Clock::now() + std::chrono::milliseconds(20);
    for (++ready; ready < parallel.threads && Clock::now() < patience;) {
    }
    const auto start = Clock::now();
    double operations = 0, elapsed = 0;
    for (T sink; elapsed < seconds;) {
      operations += double(engine->spin(20000, &sink));
      elapsed = std::chrono::duration<double>(Clock::now() - start).count();
    }
    rate[static_cast<size_t>(index)] = operations / elapsed;
  });
  return std::accumulate(rate.begin(), rate.end(), 0.0);
}

}  // namespace

double multiply_add_peak(Precision precision, const Parallel& parallel, double seconds) {
  const InstructionSet* set = chosen();
  switch (effective(precision)) {
    case Precision::float64: return measure_peak(set->float64(), parallel, seconds);
    case Precision::bfloat16: return measure_peak(set->bfloat16(), parallel, seconds);
    default: return measure_peak(set->float32(), parallel, seconds);
  }
}

}  // namespace cpu
}  // namespace pddm
