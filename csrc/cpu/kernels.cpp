// The kernels of one instruction set, behind the Engine interface. Compiled once per set: PDDM_ISA names it,
// PDDM_VECTOR_BYTES is its register width, PDDM_HAS_BF16, PDDM_HAS_INT16 and PDDM_HAS_AMX say what else it multiplies.
#include "backward.h"
#include "meet.h"

namespace pddm::PDDM_ISA {
namespace {

// Of the second-level cache, for the panels of one block of groups; the rest is for the weights passing through.
constexpr int64_t kBlockBytes = 512 << 10;
constexpr int64_t kMaxBlockGroups = 16;

#if defined(PDDM_HAS_AMX)
// Of the four products of two halves and two halves.
inline int64_t spin_tiles(int64_t rounds, float* sink) {
  const Tiles held;
  float sums[4][kTileWords] = {};
  load_tile<4>(sums), load_tile<5>(sums), load_tile<6>(sums), load_tile<7>(sums);
  clear_tile<0>(), clear_tile<1>(), clear_tile<2>(), clear_tile<3>();
  for (int64_t r = 0; r < rounds; ++r)
    dot_bf16_tiles<0, 4, 6>(), dot_bf16_tiles<1, 4, 7>(), dot_bf16_tiles<2, 5, 6>(), dot_bf16_tiles<3, 5, 7>();
  store_tile<0>(sums[0]), store_tile<1>(sums[1]), store_tile<2>(sums[2]), store_tile<3>(sums[3]);
  *sink = sums[0][0] + sums[1][0] + sums[2][0] + sums[3][0];
  return rounds * 4 * kTileRows * kTileRows * 32 * 2;
}
#endif

template <class Op>
class Kernels final : public cpu::Engine<typename Op::Scalar> {
  using T = typename Op::Scalar;
  using Element = typename Op::Element;

 public:
  constexpr Kernels() : cpu::Engine<T>(kLanes<T>) {}

  cpu::PackedSizes packed_sizes(const Workspace<T>& w) const override {
    const int64_t hidden = padded(w.hidden, kUnitOf<Op>), combined = padded(w.combined, kUnitOf<Op>);
    return {hidden * folded<Op>(w.dim) * int64_t(sizeof(Element)),
            combined * 2 * folded<Op>(hidden) * int64_t(sizeof(Element)),
            padded(w.hidden, kUnit) * w.dim * int64_t(sizeof(T))};
  }

  int64_t block_groups(const Workspace<T>& w) const override {
    const int64_t groups = kBlockBytes / Block<Op>(w, 1, nullptr).bytes(1);
    return groups < 1 ? 1 : groups > kMaxBlockGroups ? kMaxBlockGroups : groups;
  }
  int64_t score_scratch_bytes(const Workspace<T>& w, int64_t groups) const override {
    return Block<Op>(w, groups, nullptr).bytes(groups);
  }

  int64_t pack_parts(const Workspace<T>& w) const override {
    return strip_count<Op>(w.hidden) + strip_count<Op>(w.combined) + strip_count<Plain<T>>(w.hidden) + 1;
  }

  void pack(const Workspace<T>& w, const Unit& unit, int64_t part) const override {
    const T *w_u = static_cast<const T*>(unit.w_u), *w_v = static_cast<const T*>(unit.w_v),
            *w_c = static_cast<const T*>(unit.w_c);
    const int64_t dim = w.dim, hidden = w.hidden, combined = w.combined, half = padded(hidden, kUnitOf<Op>);
    if (part < strip_count<Op>(hidden))
      return for_strip<Op>(hidden, part, [&](auto columns, int64_t c) {
        constexpr int C = decltype(columns)::value;
        const int64_t steps = folded<Op>(dim);
        pack_strip<Op, C>(static_cast<Element*>(w.w_u) + c * steps, Matrix<T>{w_u, hidden, dim, dim}, c, steps);
      });
    part -= strip_count<Op>(hidden);
    if (part < strip_count<Plain<T>>(hidden))
      return for_strip<Plain<T>>(hidden, part, [&](auto columns, int64_t c) {
        constexpr int C = decltype(columns)::value;
        pack_strip<Plain<T>, C>(w.w_v + c * dim, Matrix<T>{w_v, hidden, dim, dim}, c, dim);
      });
    part -= strip_count<Plain<T>>(hidden);
    if (part < strip_count<Op>(combined))
      return for_strip<Op>(combined, part, [&](auto columns, int64_t c) {
        constexpr int C = decltype(columns)::value;
        const int64_t steps = folded<Op>(half);
        Element* strip = static_cast<Element*>(w.w_c) + c * 2 * steps;
        for (int which = 0; which < 2; ++which)
          pack_strip<Op, C>(strip + which * C * steps, Matrix<T>{w_c + which * hidden, combined, hidden, 2 * hidden}, c,
                            steps);
      });
    const auto copy = [](T* to, const void* from, int64_t n, int64_t stride) {
      for (int64_t k = 0; k < stride; ++k) to[k] = k < n ? static_cast<const T*>(from)[k] : T(0);
    };
    copy(w.b_u, unit.b_u, hidden, w.a_stride);
    copy(w.b_v, unit.b_v, hidden, w.a_stride);
    copy(w.b_c, unit.b_c, combined, padded(combined, kLanes<T>));
    copy(w.w_s, unit.w_s, combined, padded(combined, kLanes<T>));
  }

  void prepare_panels(const Workspace<T>& w, const T* const* rows, int64_t first, int64_t count) const override {
    prepare_rows<T>(w, rows, first, count);
  }
  void score(const Workspace<T>& w, const Group* groups, int64_t count, void* scratch, T* out) const override {
    score_groups<Op>(w, groups, count, scratch, out);
  }

  // Odd, or all panels of a row would lie in the same few sets of every cache.
  int64_t slab_rows(int64_t n) const override { return padded(n, kUnit) + 1; }
  int64_t stage_parts(const Backward<T>& b, Stage stage) const override { return stage_part_count<T>(b, stage); }
  void run(const Backward<T>& b, Stage stage, int64_t part, T* panel) const override {
    run_stage<T>(b, stage, part, panel);
  }

  void pack_rows(T* panel, const T* rows, int64_t n, int64_t dim, int64_t first) const override {
    PDDM_ISA::pack_rows<T>(panel, rows, dim, n, first, dim);
  }
  int32_t meet(const cpu::ListsOf<T>& lists, const cpu::Side<T>& a, const cpu::Side<T>& b, int64_t dim) const override {
    return meet_panels<Plain<T>>(lists, a, b, dim);
  }
  void multiply(const T* a, const T* b, int64_t dim, T* out) const override { panel_products<T>(a, b, dim, out); }
  void products(const T* rows, int64_t dim, int64_t row, const int32_t* others, int64_t count, T* out) const override {
    listed_products<T>(rows, dim, row, others, count, out);
  }
  int64_t thin(T* values, T* rows, int64_t size, int64_t least, int64_t most, T* floor) const override {
    return thin_list<T>(values, rows, size, least, most, floor);
  }

  int64_t spin(int64_t rounds, T* sink) const override {
#if defined(PDDM_HAS_AMX)
    if constexpr (std::is_same_v<Op, Bf16Tiles>) return spin_tiles(rounds, sink);
#endif
    Tile<T, kStrip> tile;
    for (int c = 0; c < kStrip; ++c) tile.acc[c][0] = broadcast(T(c)), tile.acc[c][1] = broadcast(T(c) / T(2));
    Element zeros[kLanes<T>] = {};
    const Vec<Element> x = load(zeros);
    for (int64_t r = 0; r < rounds; ++r) {
      Vec<Element> b = x;
      PDDM_OPAQUE(b);  // so that no round can be folded into the next
      PDDM_UNROLL
      for (int c = 0; c < kStrip; ++c)
        for (int half = 0; half < 2; ++half) tile.acc[c][half] = Op::multiply_add(tile.acc[c][half], b, x);
    }
    *sink = T(0);
    for (int c = 0; c < kStrip; ++c) *sink += sum_lanes<T>(tile.acc[c][0], tile.acc[c][1]);
    return rounds * kStrip * 2 * kWidth<T> * Op::kFold * 2;
  }
};

#if defined(PDDM_HAS_INT16)
class RoundedKernels : public cpu::RoundedEngine {
 protected:
  static constexpr int64_t kSlack = 64;

 public:
  explicit constexpr RoundedKernels(const cpu::RoundedEngine* finer) : cpu::RoundedEngine(kLanes<int32_t>, finer) {}

  int64_t elements(int64_t dim) const override { return (dim + 1) / 2; }
  int64_t slack(int64_t) const override { return kSlack; }
  void round(int32_t* rounded, const float* panel, const int32_t* classes, float scale, int64_t dim,
             float* error) const override {
    round_panel(rounded, panel, classes, scale, dim, error);
  }
  double error(int64_t) const override { return 0; }
  int32_t meet(const cpu::ListsOf<int32_t>& lists, const cpu::Side<int32_t>& a, const cpu::Side<int32_t>& b,
               int64_t dim) const override {
    return meet_panels<Int16>(lists, a, b, elements(dim));
  }
  void begin() const override {}
  void end() const override {}
  int64_t thin(int32_t* values, int32_t* rows, int64_t size, int64_t least, int64_t most, int32_t margin,
               int32_t* floor) const override {
    return thin_rounded(values, rows, size, least, most, margin, floor);
  }
};

constexpr RoundedKernels kWhole(nullptr);
#endif

#if defined(PDDM_HAS_AMX)
class TileKernels final : public RoundedKernels {
  static constexpr int64_t kFewColumns = 128;

 public:
  using RoundedKernels::RoundedKernels;

  int64_t elements(int64_t dim) const override { return padded(dim, kTileSteps); }
  // Products of rows without any order differ by 1 / √dim of what the margin is a share of: the more columns, the more
  // of them lie within it.
  int64_t slack(int64_t dim) const override {
    return dim <= kFewColumns ? kSlack : int64_t(kSlack * root(double(dim) / kFewColumns));
  }
  void round(int32_t* rounded, const float* panel, const int32_t* classes, float scale, int64_t dim,
             float* error) const override {
    tile_panel(rounded, panel, classes, scale, dim, error);
  }
  // An addition loses half a unit in the last place of what is at most the sum of all sizes; twice that, for nobody
  // says how many there are.
  double error(int64_t dim) const override { return double(padded(dim, kTileSteps)) / (1 << 23); }
  int32_t meet(const cpu::ListsOf<int32_t>& lists, const cpu::Side<int32_t>& a, const cpu::Side<int32_t>& b,
               int64_t dim) const override {
    return meet_tiles(lists, a, b, dim);
  }
  void begin() const override { take_tiles(); }
  void end() const override { leave_tiles(); }
};

constexpr TileKernels kTiles(&kWhole);
#endif

constexpr Kernels<Plain<float>> kFloat32;
constexpr Kernels<Plain<double>> kFloat64;
#if defined(PDDM_HAS_AMX)
constexpr Kernels<Bf16Tiles> kBfloat16;
#elif defined(PDDM_HAS_BF16)
constexpr Kernels<Bf16> kBfloat16;
#endif

}  // namespace

const cpu::Engine<float>* float32_engine() { return &kFloat32; }
const cpu::Engine<double>* float64_engine() { return &kFloat64; }
const cpu::Engine<float>* bfloat16_engine() {
#if defined(PDDM_HAS_BF16)
  return &kBfloat16;
#else
  return nullptr;
#endif
}
const cpu::RoundedEngine* rounded_engine() {
#if defined(PDDM_HAS_AMX)
  return &kTiles;
#elif defined(PDDM_HAS_INT16)
  return &kWhole;
#else
  return nullptr;
#endif
}

}  // namespace pddm::PDDM_ISA
