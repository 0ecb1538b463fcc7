// The register tile: every product of this backend is this loop.
//
//            x: 2 vectors = kLanes columns, contiguous per step
//            ┌────────────┬────────────┐
//   w: C   ──┤ acc[0][0]  │ acc[0][1]  │   one step:  2 loads of x, C broadcasts of w, 2·C multiply-adds
//   scalars  │    …       │     …      │   AVX-512:   C = 12, 24 accumulators + 2 + 1 of 32 registers
//   per    ──┤ acc[C-1]…  │            │   NEON:      the same
//   step     └────────────┴────────────┘   AVX2, SSE: C = 6, 12 + 2 + 1 of 16
//
// In the scoring products a column is a pair and a w is a weight, so that norms, biases, relu and the last product are
// lane-wise, nothing is ever shuffled, and the value of a pair depends neither on its lane nor on its neighbours. In
// the products over pairs (weight gradients) a step is a pair and a column is an input feature.
#pragma once

#include "simd.h"
#if defined(PDDM_HAS_AMX)
#include "amx.h"
#endif

namespace pddm::PDDM_ISA {

#if defined(__aarch64__)
constexpr int kRegisters = 32;
#else
constexpr int kRegisters = PDDM_VECTOR_BYTES == 64 ? 32 : 16;
#endif
constexpr int kUnit = kRegisters == 32 ? 4 : 2;  // weights are packed in strips of 3, 2 or 1 units of columns
constexpr int kStrip = 3 * kUnit;

constexpr int64_t padded(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

struct Nothing {};

// How operands are stored and multiplied. `kFold` steps of the mathematical product share one stored element, of kSteps
// a product has a multiple, and `Held` is what a thread must have meanwhile.
template <class T>
struct Plain {
  using Scalar = T;
  using Element = T;
  using Held = Nothing;
  static constexpr int kFold = 1, kSteps = 1;
  static PDDM_INLINE Vec<T> multiply_add(Vec<T> sum, Vec<T> a, Vec<T> b) { return sum + a * b; }
  static PDDM_INLINE Vec<T> fold(const Vec<T>* x) { return x[0]; }
};

#if defined(PDDM_HAS_BF16)
struct Bf16 {
  using Scalar = float;
  using Element = uint32_t;
  using Held = Nothing;
  static constexpr int kFold = 2, kSteps = 2;
  static PDDM_INLINE Vec<float> multiply_add(Vec<float> sum, Vec<uint32_t> a, Vec<uint32_t> b) {
    return dot_bf16(sum, a, b);
  }
  static PDDM_INLINE Vec<uint32_t> fold(const Vec<float>* x) { return pack_bf16(x[0], x[1]); }
};
#endif

#if defined(PDDM_HAS_AMX)
// The same numbers, in tiles.
struct Bf16Tiles : Bf16 {
  using Held = Tiles;
  static constexpr int kSteps = 32;
};
#endif

#if defined(PDDM_HAS_INT16)
struct Int16 {
  using Scalar = int32_t;
  using Element = int32_t;
  static constexpr int kFold = 2, kSteps = 2;
  static PDDM_INLINE Vec<int32_t> multiply_add(Vec<int32_t> sum, Vec<int32_t> a, Vec<int32_t> b) {
    return dot_int16(sum, a, b);
  }
};
#endif

template <class T>
constexpr int kLanes = 2 * kWidth<T>;
// What is padded to lanes has room for whole units.
static_assert(kLanes<float> % kUnit == 0 && kLanes<double> % kUnit == 0);

template <class T, int C>
struct Tile {
  static constexpr int kColumns = C;
  Vec<T> acc[C][2];

  PDDM_INLINE void clear() {
    PDDM_UNROLL
    for (int c = 0; c < C; ++c) acc[c][0] = acc[c][1] = Vec<T>{};
  }
  PDDM_INLINE void scale(const T* factor) {
    const Vec<T> f0 = load(factor), f1 = load(factor + kWidth<T>);
    PDDM_UNROLL
    for (int c = 0; c < C; ++c) acc[c][0] *= f0, acc[c][1] *= f1;
  }
};

#if defined(PDDM_HAS_AMX)
// sums (32 outputs, 32 lanes) += strip · panel, of 32 outputs as tiles, (16 steps, half of the outputs), and a panel as
// all others are.
PDDM_INLINE void multiply_tiles(Vec<float> (&sums)[2 * kTileRows][2], const uint32_t* strip, const uint32_t* panel,
                                int64_t steps) {
  constexpr int64_t lanes = kLanes<float>, row = lanes * int64_t(sizeof(float));
  static_assert(lanes == 2 * kTileRows);
  Vec<float>(*const below)[2] = sums + kTileRows;
  load_tile<0>(&sums[0][0], row), load_tile<1>(&sums[0][1], row);
  load_tile<2>(&below[0][0], row), load_tile<3>(&below[0][1], row);
  for (int64_t s = 0; s < steps; s += kTileRows, strip += 2 * kTileWords, panel += kTileRows * lanes) {
    // Into the first-level cache past the strip, which stays there.
    for (int64_t r = 2 * kTileRows; r < 3 * kTileRows; ++r)
      for (int64_t half = 0; half < lanes; half += kTileRows) __builtin_prefetch(panel + r * lanes + half, 0, 0);
    load_tile<4>(strip), load_tile<5>(strip + kTileWords);
    load_tile<6>(panel, row), load_tile<7>(panel + kTileRows, row);
    dot_bf16_tiles<0, 4, 6>(), dot_bf16_tiles<1, 4, 7>(), dot_bf16_tiles<2, 5, 6>(), dot_bf16_tiles<3, 5, 7>();
  }
  store_tile<0>(&sums[0][0], row), store_tile<1>(&sums[0][1], row);
  store_tile<2>(&below[0][0], row), store_tile<3>(&below[0][1], row);
}
#endif

// Strides of w: between steps, and between the C values of one step.
struct Strides {
  int64_t step, column;
};

// Steps by which a panel's lines are asked for before they are used: it comes from the second-level cache, and the
// hardware's own prefetcher falls behind the tile there.
#if defined(PDDM_HAS_AMX)
constexpr int64_t kAhead = 0;  // but not on these processors, which have all their loads' worth to do
#else
constexpr int64_t kAhead = 8;
#endif

// acc += Σ_s w[s] ⊗ x[s].
template <class Op, int C>
PDDM_INLINE void multiply(Tile<typename Op::Scalar, C>& tile, const typename Op::Element* w, Strides w_stride,
                          const typename Op::Element* x, int64_t x_step, int64_t steps) {
  using T = typename Op::Scalar;
  using Element = typename Op::Element;
  Tile<T, C> t = tile;
  for (int64_t s = 0; s < steps; ++s, w += w_stride.step, x += x_step) {
    const Vec<Element> x0 = load(x), x1 = load(x + kWidth<T>);
    if constexpr (kAhead > 0) {
      PDDM_PREFETCH(x + kAhead * x_step);
      if constexpr (kLanes<T> * sizeof(Element) > 64) PDDM_PREFETCH(x + kAhead * x_step + kWidth<T>);
    }
    PDDM_UNROLL
    for (int c = 0; c < C; ++c) {
      const Vec<Element> b = broadcast(w[c * w_stride.column]);
      t.acc[c][0] = Op::multiply_add(t.acc[c][0], b, x0);
      t.acc[c][1] = Op::multiply_add(t.acc[c][1], b, x1);
    }
  }
  tile = t;
}

// Weights in strips against one panel of pairs.
template <class Op, int C>
PDDM_INLINE void multiply_strip(Tile<typename Op::Scalar, C>& tile, const typename Op::Element* strip,
                                const typename Op::Element* panel, int64_t steps) {
#if defined(PDDM_HAS_AMX)
  if constexpr (std::is_same_v<Op, Bf16Tiles>)
    multiply_tiles(tile.acc, strip, panel, steps);
  else
#endif
    multiply<Op, C>(tile, strip, {C, 1}, panel, kLanes<typename Op::Scalar>, steps);
}

template <int C>
struct Columns {
  static constexpr int value = C;
};

// Units of columns of packed weights, and how many make a full strip.
template <class Op>
constexpr int kUnitOf = kUnit;
template <class Op>
constexpr int kStripOf = kStrip;
#if defined(PDDM_HAS_AMX)
template <>
constexpr int kUnitOf<Bf16Tiles> = 2 * kTileRows;
template <>
constexpr int kStripOf<Bf16Tiles> = 2 * kTileRows;
#endif

// One strip of those below by its number, for work that is shared out strip by strip.
template <class Op>
constexpr int64_t strip_count(int64_t n) {
  return (padded(n, kUnitOf<Op>) + kStripOf<Op> - 1) / kStripOf<Op>;
}

template <class Op, class Body>
PDDM_INLINE void for_strip(int64_t n, int64_t index, const Body& body) {
  constexpr int unit = kUnitOf<Op>, strip = kStripOf<Op>;
  const int64_t c = index * strip, left = padded(n, unit) - c;
  if (left >= strip) return body(Columns<strip>{}, c);
  if constexpr (strip > 2 * unit)
    if (left == 2 * unit) return body(Columns<2 * unit>{}, c);
  if constexpr (strip > unit) body(Columns<unit>{}, c);
}

// body(Columns<C>, first column) over ⌈n / unit⌉ units of columns, full strips first. The strip that starts at column c
// starts at element c · steps of its packed array.
template <class Op, class Body>
PDDM_INLINE void for_strips(int64_t n, const Body& body) {
  for (int64_t index = 0; index < strip_count<Op>(n); ++index) for_strip<Op>(n, index, body);
}

// A whole panel of columns in strips as even as can be, so that none has too few accumulators to hide a multiply-add.
template <class T, class Body>
PDDM_INLINE void for_even_strips(int64_t n, const Body& body) {
  constexpr int lanes = kLanes<T>, strips = (lanes + kStrip - 1) / kStrip, even = lanes / strips, more = lanes % strips;
  if (n < lanes) return for_strips<Plain<T>>(n, body);
  for (int s = 0; s < more; ++s) body(Columns<even + 1>{}, s * (even + 1));
  for (int s = more; s < strips; ++s) body(Columns<even>{}, s * even + more);
}

}  // namespace pddm::PDDM_ISA
