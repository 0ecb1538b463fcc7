// Operand panels: what the register tile eats, made on the way in.
//
// A panel is (steps, kLanes): step k of pair `lane` lies at k · kLanes + lane. |f_i − f_j| and a_i + a_j exist nowhere
// else. A row against a panel of rows needs one broadcast per step; listed pairs are read row by row, combined, and
// transposed in registers.
#pragma once

#include "engine.h"
#include "tile.h"

namespace pddm::PDDM_ISA {

using cpu::Group;

template <class T>
struct Difference {
  static PDDM_INLINE Vec<T> of(Vec<T> a, Vec<T> b) { return absolute<T>(a - b); }
};

template <class T>
struct Sum {
  static PDDM_INLINE Vec<T> of(Vec<T> a, Vec<T> b) { return a + b; }
};

// emit(k, x): x[p][half] is Combine(i, j) at step k + p, for p < Fold. Runs over `steps` (a multiple of Fold) steps of
// rows that are `stride` long. Rows of listed pairs lie anywhere: those of the next group, if one is named, are asked
// for meanwhile.
template <class T, int Fold, template <class> class Combine, class Emit>
PDDM_INLINE void for_each_step(const T* rows, const T* panels, int64_t stride, const Group& g, const Group* next,
                               int64_t steps, const Emit& emit) {
  constexpr int width = kWidth<T>;
  if (g.panel >= 0) {
    const T* row = rows + g.row * stride;
    const T* panel = panels + g.panel * stride * kLanes<T>;
    for (int64_t k = 0; k < steps; k += Fold) {
      Vec<T> x[Fold][2];
      PDDM_UNROLL
      for (int p = 0; p < Fold; ++p) {
        const Vec<T> own = broadcast(row[k + p]);
        x[p][0] = Combine<T>::of(own, load(panel + (k + p) * kLanes<T>));
        x[p][1] = Combine<T>::of(own, load(panel + (k + p) * kLanes<T> + width));
      }
      emit(k, x);
    }
    return;
  }
  const bool listed = next && next->panel < 0;
  for (int64_t k0 = 0; k0 < steps; k0 += width) {
    for (int lane = 0; listed && lane < kLanes<T>; ++lane) {
      PDDM_PREFETCH(rows + next->i[lane] * stride + k0);
      PDDM_PREFETCH(rows + next->j[lane] * stride + k0);
    }
    Vec<T> x[width][2];
    for (int half = 0; half < 2; ++half) {
      Vec<T> v[width];
      PDDM_UNROLL
      for (int r = 0; r < width; ++r) {
        const int lane = half * width + r;
        v[r] = Combine<T>::of(load(rows + g.i[lane] * stride + k0), load(rows + g.j[lane] * stride + k0));
      }
      transpose<T>(v);
      PDDM_UNROLL
      for (int r = 0; r < width; ++r) x[r][half] = v[r];
    }
    const int64_t left = steps - k0 < width ? steps - k0 : width;
    for (int64_t k = 0; k < left; k += Fold) emit(k0 + k, x + k);
  }
}

// Stores Fold steps as the product wants them.
template <class Op>
PDDM_INLINE void store_steps(typename Op::Element* panel, int64_t k, const Vec<typename Op::Scalar> (*x)[2]) {
  using T = typename Op::Scalar;
  auto* out = panel + k / Op::kFold * kLanes<T>;
  PDDM_UNROLL
  for (int half = 0; half < 2; ++half) {
    Vec<T> column[Op::kFold];
    PDDM_UNROLL
    for (int p = 0; p < Op::kFold; ++p) column[p] = x[p][half];
    store(out + half * kWidth<T>, Op::fold(column));
  }
}

// emit(lane, k0, v): v is steps k0 … k0 + kWidth − 1 of that lane. The panel has `stride` steps.
template <class T, class Emit>
PDDM_INLINE void for_each_lane(const T* panel, int64_t stride, const Emit& emit) {
  constexpr int width = kWidth<T>;
  for (int64_t k0 = 0; k0 < stride; k0 += width) {
    for (int half = 0; half < 2; ++half) {
      Vec<T> v[width];
      PDDM_UNROLL
      for (int r = 0; r < width; ++r) v[r] = load(panel + (k0 + r) * kLanes<T> + half * width);
      transpose<T>(v);
      PDDM_UNROLL
      for (int r = 0; r < width; ++r) emit(half * width + r, k0, v[r]);
    }
  }
}

template <class T>
PDDM_INLINE void zero_steps(T* panel, int64_t from, int64_t to) {
  if (to > from) std::memset(static_cast<void*>(panel + from * kLanes<T>), 0, sizeof(T) * (to - from) * kLanes<T>);
}

template <class T>
PDDM_INLINE T sum_lanes(Vec<T> a, Vec<T> b) {
  const Vec<T> v = a + b;
  T lane[kWidth<T>];
  store(lane, v);
  for (int n = kWidth<T> / 2; n > 0; n /= 2)
    for (int i = 0; i < n; ++i) lane[i] += lane[i + n];
  return lane[0];
}

// The first n elements of a vector, or all of it; zeros for the rest.
template <class T>
PDDM_INLINE Vec<T> load_some(const T* p, int64_t n) {
  if (n >= kWidth<T>) return load(p);
  Vec<T> v{};
  if (n > 0) std::memcpy(&v, p, sizeof(T) * n);
  return v;
}

template <class T>
PDDM_INLINE void store_some(T* p, Vec<T> v, int64_t n) {
  if (n >= kWidth<T>) return store(p, v);
  if (n > 0) std::memcpy(p, &v, sizeof(T) * n);
}

// Rows [c, c + kLanes) of a matrix as a panel, (step, lane), zero where it has ended; `steps` columns of it, and room
// for whole vectors. Of weights these are outputs of x · Wᵀ.
template <class T>
PDDM_INLINE void pack_rows(T* panel, const T* matrix, int64_t stride, int64_t rows, int64_t c, int64_t steps) {
  constexpr int width = kWidth<T>, lanes = kLanes<T>;
  for (int64_t k = 0; k < steps; k += width)
    for (int half = 0; half < 2; ++half) {
      const int64_t first = c + half * width;
      Vec<T> v[width];
      PDDM_UNROLL
      for (int r = 0; r < width; ++r)
        v[r] = first + r < rows ? load_some(matrix + (first + r) * stride + k, steps - k) : Vec<T>{};
      transpose<T>(v);
      PDDM_UNROLL
      for (int r = 0; r < width; ++r) store(panel + (k + r) * lanes + half * width, v[r]);
    }
}

// Packing of weights: strip by strip of kStrip outputs, (step, output) within a strip.

PDDM_INLINE float fold_weights(const float* x, const Plain<float>*) { return x[0]; }
PDDM_INLINE double fold_weights(const double* x, const Plain<double>*) { return x[0]; }
#if defined(PDDM_HAS_BF16)
PDDM_INLINE uint32_t fold_weights(const float* x, const Bf16*) {
  uint32_t out = 0;
  for (int p = 0; p < 2; ++p) {
    uint32_t bits;
    std::memcpy(&bits, x + p, sizeof bits);
    const bool nan = (bits & 0x7fffffffu) > 0x7f800000u;
    const uint32_t rounded = nan ? (bits >> 16) | 0x40u : (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    out |= rounded << (16 * p);
  }
  return out;
}
#endif

// A matrix of weights, (output, input), or the part of a wider one.
template <class T>
struct Matrix {
  const T* data;
  int64_t outputs, inputs, stride;
};

// The strip of outputs [c, c + C), zero where the matrix has ended.
template <class Op, int C>
PDDM_INLINE void pack_strip(typename Op::Element* strip, const Matrix<typename Op::Scalar>& m, int64_t c,
                            int64_t steps) {
  using T = typename Op::Scalar;
  const auto* op = static_cast<const Op*>(nullptr);
  const int64_t columns = m.outputs - c < C ? m.outputs - c : C, whole = m.inputs / Op::kFold;
  if (columns < C || whole < steps) std::memset(static_cast<void*>(strip), 0, sizeof(*strip) * size_t(steps * C));
  const T* from = m.data + c * m.stride;
#if defined(PDDM_HAS_AMX)
  if constexpr (std::is_same_v<Op, Bf16Tiles>) {
    for (int64_t column = 0; column < columns; ++column)
      for (int64_t k = 0; k < m.inputs; k += Op::kSteps) {
        const T* x = from + column * m.stride + k;
        store(strip + k / Op::kSteps * C * kTileRows + column * kTileRows,
              pack_bf16_pairs(load_some(x, m.inputs - k), load_some(x + kWidth<T>, m.inputs - k - kWidth<T>)));
      }
    return;
  }
#endif
  const auto pack = [&](int64_t s, int64_t column, int fold) {
    T x[Op::kFold] = {};
    for (int p = 0; p < fold; ++p) x[p] = from[column * m.stride + s * Op::kFold + p];
    strip[s * C + column] = fold_weights(x, op);
  };
  int64_t s = 0;
  if constexpr (C <= kWidth<T>) {
    // kWidth inputs of C outputs at a time, transposed. A store runs over into the next step, which is yet to come; the
    // last block is left to the loop below, for what comes after it is another thread's strip.
    constexpr int width = kWidth<T>, block = width / Op::kFold;
    for (; columns == C && (s + 2 * block) * Op::kFold <= m.inputs; s += block) {
      Vec<T> v[width] = {};
      PDDM_UNROLL
      for (int column = 0; column < C; ++column) v[column] = load(from + column * m.stride + s * Op::kFold);
      transpose<T>(v);
      PDDM_UNROLL
      for (int t = 0; t < block; ++t) store(strip + (s + t) * C, Op::fold(v + t * Op::kFold));
    }
  }
  for (int64_t column = 0; column < columns; ++column)
    for (int64_t t = s; t < whole; ++t) pack(t, column, Op::kFold);
  if (whole * Op::kFold < m.inputs)
    for (int64_t column = 0; column < columns; ++column) pack(whole, column, int(m.inputs % Op::kFold));
}

}  // namespace pddm::PDDM_ISA
