// From pairs to scores: one block of groups of kLanes pairs, owned by one thread.
//
//                 x (steps of u)      hidden (steps of u')        x again (steps of v')
//   per group    ┌────────┐  W_u     ┌────────┐                  ┌────────┐  W_c = [ W_cu | W_cv ]
//                │ d      │ ───────► │ h      │ ────────┐        │ h      │ ────────► c ► w_s·c + b_s
//                └────────┘ +b, relu └────────┘ ‖u'‖    └──────► └────────┘ ‖v'‖
//
// Loop order: a strip of weights (kStrip outputs) stays in the first-level cache while every group's panel, in the
// second level, streams past it. The block has as many groups as the second level holds (block_groups).
#pragma once

#include "panels.h"

namespace pddm::PDDM_ISA {

using cpu::Workspace;

// libm-free and branch-free enough for the handful of lanes it is used on.
PDDM_INLINE float root(float x) { return __builtin_sqrtf(x); }
PDDM_INLINE double root(double x) { return __builtin_sqrt(x); }

// NaN stays NaN, as in clamp_min.
template <class T>
PDDM_INLINE T clamped(T norm) {
  return norm < T(kNormFloor) ? T(kNormFloor) : norm;
}

template <class Op>
constexpr int64_t folded(int64_t steps) {
  return padded(steps, Op::kSteps) / Op::kFold;
}

// Lane-wise numbers of one group.
template <class T>
struct Lanes {
  T scale_u[kLanes<T>];                    // 1, or 1/‖u‖ with normalize_input
  T scale_v[kLanes<T>];                    // 1/2, or 1/(2‖v‖)
  T norm_u[kLanes<T>], norm_v[kLanes<T>];  // of u' and v', clamped
  T ratio[kLanes<T>];                      // ‖v'‖/‖u'‖
  T inverse_u[kLanes<T>], inverse_v[kLanes<T>];
};

template <class Op>
struct Block {
  using T = typename Op::Scalar;
  using Element = typename Op::Element;

  int64_t x_size, hidden_size;  // elements of one group's panels
  Element *x, *hidden;
  Lanes<T>* lanes;

  Block(const Workspace<T>& w, int64_t groups, void* memory) {
    const int64_t steps = w.f_stride > w.a_stride ? w.f_stride : w.a_stride;
    x_size = folded<Op>(steps) * kLanes<T>;
    hidden_size = folded<Op>(w.a_stride) * kLanes<T>;
    lanes = static_cast<Lanes<T>*>(memory);
    x = reinterpret_cast<Element*>(lanes + groups);
    hidden = x + groups * x_size;
  }

  int64_t bytes(int64_t groups) const {
    return groups * (int64_t(sizeof(Lanes<T>)) + int64_t(sizeof(Element)) * (x_size + hidden_size));
  }
};

// Fills x with u, hidden with u', x again with v', and the lanes' norms.
template <class Op>
PDDM_INLINE void hidden_layer(const Workspace<typename Op::Scalar>& w, const Block<Op>& b, const Group* groups,
                              int64_t count) {
  using T = typename Op::Scalar;
  constexpr int width = kWidth<T>, lanes = kLanes<T>, fold = Op::kFold;
  const int64_t dim = folded<Op>(w.dim) * fold, hidden = padded(w.hidden, kUnitOf<Op>);
  constexpr int64_t kNear = 512 << 10;  // bytes of rows that stay in the second-level cache by themselves
  const bool scattered = w.rows * (w.f_stride + w.a_stride) * int64_t(sizeof(T)) > kNear;
  const auto next = [&](int64_t g) { return scattered && g + 1 < count ? groups + g + 1 : nullptr; };

  for (int64_t g = 0; g < count; ++g) {
    Vec<T> square[2] = {};
    for_each_step<T, fold, Difference>(w.f, w.f_panels, w.f_stride, groups[g], next(g), dim,
                                       [&](int64_t k, const Vec<T>(*u)[2]) {
                                         store_steps<Op>(b.x + g * b.x_size, k, u);
                                         if (w.normalize_input)
                                           for (int p = 0; p < fold; ++p)
                                             for (int half = 0; half < 2; ++half)
                                               square[half] += u[p][half] * u[p][half];
                                       });
    T* scale = b.lanes[g].scale_u;
    store(scale, square[0]), store(scale + width, square[1]);
    for (int l = 0; l < lanes; ++l) scale[l] = w.normalize_input ? T(1) / clamped(root(scale[l])) : T(1);
    for (int l = 0; l < lanes; ++l) b.lanes[g].norm_u[l] = T(0);
  }

  for_strips<Op>(w.hidden, [&](auto columns, int64_t c) {
    constexpr int C = decltype(columns)::value;
    const auto* strip = static_cast<const typename Op::Element*>(w.w_u) + c * folded<Op>(w.dim);
    for (int64_t g = 0; g < count; ++g) {
      Tile<T, C> tile;
      tile.clear();
      multiply_strip<Op>(tile, strip, b.x + g * b.x_size, folded<Op>(w.dim));
      Lanes<T>& lane = b.lanes[g];
      const Vec<T> scale[2] = {load(lane.scale_u), load(lane.scale_u + width)};
      Vec<T> square[2] = {load(lane.norm_u), load(lane.norm_u + width)};
      PDDM_UNROLL
      for (int k = 0; k < C; k += fold) {
        Vec<T> x[fold][2];
        PDDM_UNROLL
        for (int p = 0; p < fold; ++p) {
          const Vec<T> bias = broadcast(w.b_u[c + k + p]);
          PDDM_UNROLL
          for (int half = 0; half < 2; ++half) {
            x[p][half] = relu<T>(tile.acc[k + p][half] * scale[half] + bias);
            square[half] += x[p][half] * x[p][half];
          }
        }
        store_steps<Op>(b.hidden + g * b.hidden_size, c + k, x);
      }
      store(lane.norm_u, square[0]), store(lane.norm_u + width, square[1]);
    }
  });

  for (int64_t g = 0; g < count; ++g) {
    Lanes<T>& lane = b.lanes[g];
    Vec<T> square[2] = {};
    if (w.normalize_input)
      for_each_step<T, fold, Sum>(w.f, w.f_panels, w.f_stride, groups[g], next(g), dim,
                                  [&](int64_t, const Vec<T>(*v)[2]) {
                                    for (int p = 0; p < fold; ++p)
                                      for (int half = 0; half < 2; ++half) square[half] += v[p][half] * v[p][half];
                                  });
    store(lane.scale_v, square[0]), store(lane.scale_v + width, square[1]);
    for (int l = 0; l < lanes; ++l)
      lane.scale_v[l] = w.normalize_input ? T(0.5) / clamped(T(0.5) * root(lane.scale_v[l])) : T(0.5);

    const Vec<T> scale[2] = {load(lane.scale_v), load(lane.scale_v + width)};
    square[0] = square[1] = Vec<T>{};
    for_each_step<T, fold, Sum>(w.a, w.a_panels, w.a_stride, groups[g], next(g), hidden,
                                [&](int64_t k, const Vec<T>(*a)[2]) {
                                  Vec<T> v[fold][2];
                                  PDDM_UNROLL
                                  for (int p = 0; p < fold; ++p) {
                                    const Vec<T> bias = broadcast(w.b_v[k + p]);
                                    PDDM_UNROLL
                                    for (int half = 0; half < 2; ++half) {
                                      v[p][half] = relu<T>(a[p][half] * scale[half] + bias);
                                      square[half] += v[p][half] * v[p][half];
                                    }
                                  }
                                  store_steps<Op>(b.x + g * b.x_size, k, v);
                                });
    store(lane.norm_v, square[0]), store(lane.norm_v + width, square[1]);
    for (int l = 0; l < lanes; ++l) {
      lane.norm_u[l] = clamped(root(lane.norm_u[l]));
      lane.norm_v[l] = clamped(root(lane.norm_v[l]));
      lane.inverse_u[l] = T(1) / lane.norm_u[l];
      lane.inverse_v[l] = T(1) / lane.norm_v[l];
      lane.ratio[l] = lane.norm_v[l] * lane.inverse_u[l];
    }
  }
}

// emit(columns, c, g, tile): the tile holds W_c [û ; v̂] + b_c of outputs [c, c + C) for group g, before the relu.
template <class Op, class Emit>
PDDM_INLINE void combined_layer(const Workspace<typename Op::Scalar>& w, const Block<Op>& b, int64_t count,
                                const Emit& emit) {
  using T = typename Op::Scalar;
  const int64_t steps = folded<Op>(padded(w.hidden, kUnitOf<Op>));
  for_strips<Op>(w.combined, [&](auto columns, int64_t c) {
    constexpr int C = decltype(columns)::value;
    const auto* strip = static_cast<const typename Op::Element*>(w.w_c) + c * 2 * steps;
    for (int64_t g = 0; g < count; ++g) {
      Tile<T, C> tile;
      tile.clear();
      multiply_strip<Op>(tile, strip, b.hidden + g * b.hidden_size, steps);
      tile.scale(b.lanes[g].ratio);
      multiply_strip<Op>(tile, strip + C * steps, b.x + g * b.x_size, steps);
      tile.scale(b.lanes[g].inverse_v);
      PDDM_UNROLL
      for (int k = 0; k < C; ++k) {
        const Vec<T> bias = broadcast(w.b_c[c + k]);
        tile.acc[k][0] += bias;
        tile.acc[k][1] += bias;
      }
      emit(columns, c, g, tile);
    }
  });
}

template <class Op>
PDDM_INLINE void score_groups(const Workspace<typename Op::Scalar>& w, const Group* groups, int64_t count,
                              void* scratch, typename Op::Scalar* out) {
  using T = typename Op::Scalar;
  constexpr int width = kWidth<T>, lanes = kLanes<T>;
  const Block<Op> b(w, count, scratch);
  [[maybe_unused]] const typename Op::Held held;
  hidden_layer<Op>(w, b, groups, count);
  for (int64_t l = 0; l < count * lanes; ++l) out[l] = w.b_s;
  combined_layer<Op>(w, b, count, [&](auto columns, int64_t c, int64_t g, const auto& tile) {
    Vec<T> s[2] = {load(out + g * lanes), load(out + g * lanes + width)};
    PDDM_UNROLL
    for (int k = 0; k < decltype(columns)::value; ++k) {
      const Vec<T> weight = broadcast(w.w_s[c + k]);
      s[0] += weight * relu<T>(tile.acc[k][0]);
      s[1] += weight * relu<T>(tile.acc[k][1]);
    }
    store(out + g * lanes, s[0]), store(out + g * lanes + width, s[1]);
  });
}

// Rows to unit rows, their panels, and a = W_v f both ways, for panels [first, first + count).
template <class T>
PDDM_INLINE void prepare_rows(const Workspace<T>& w, const T* const* rows, int64_t first, int64_t count) {
  using Op = Plain<T>;
  constexpr int width = kWidth<T>, lanes = kLanes<T>;
  const auto f_panel = [&](int64_t panel) { return w.f_panels + panel * w.f_stride * lanes; };
  const auto a_panel = [&](int64_t panel) { return w.a_panels + panel * w.a_stride * lanes; };
  for (int64_t r = 0; r < count * lanes; ++r) {
    const int64_t row = first * lanes + r;
    T* f = w.f + row * w.f_stride;
    std::memset(static_cast<void*>(f), 0, sizeof(T) * w.f_stride);
    if (rows[r]) std::memcpy(f, rows[r], sizeof(T) * w.dim);
    Vec<T> square{};
    for (int64_t k = 0; k < w.f_stride; k += width) square += load(f + k) * load(f + k);
    const T norm = clamped(root(sum_lanes<T>(square, Vec<T>{})));
    for (int64_t k = 0; k < w.dim; ++k) f[k] /= norm;
  }
  for (int64_t panel = first; panel < first + count; ++panel) {
    const T* f = w.f + panel * lanes * w.f_stride;
    for (int64_t k0 = 0; k0 < w.f_stride; k0 += width)
      for (int half = 0; half < 2; ++half) {
        Vec<T> v[width];
        PDDM_UNROLL
        for (int r = 0; r < width; ++r) v[r] = load(f + (half * width + r) * w.f_stride + k0);
        transpose<T>(v);
        PDDM_UNROLL
        for (int r = 0; r < width; ++r) store(f_panel(panel) + (k0 + r) * lanes + half * width, v[r]);
      }
  }
  for_strips<Op>(w.hidden, [&](auto columns, int64_t c) {
    constexpr int C = decltype(columns)::value;
    for (int64_t panel = first; panel < first + count; ++panel) {
      Tile<T, C> tile;
      tile.clear();
      multiply_strip<Op>(tile, w.w_v + c * w.dim, f_panel(panel), w.dim);
      PDDM_UNROLL
      for (int k = 0; k < C; ++k) {
        store(a_panel(panel) + (c + k) * lanes, tile.acc[k][0]);
        store(a_panel(panel) + (c + k) * lanes + width, tile.acc[k][1]);
      }
    }
  });
  for (int64_t panel = first; panel < first + count; ++panel) {
    zero_steps(a_panel(panel), padded(w.hidden, kUnit), w.a_stride);
    T* a = w.a + panel * lanes * w.a_stride;
    for_each_lane<T>(a_panel(panel), w.a_stride,
                     [&](int lane, int64_t k, Vec<T> v) { store(a + lane * w.a_stride + k, v); });
  }
}

}  // namespace pddm::PDDM_ISA
