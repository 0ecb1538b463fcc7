// The double-header hinge loss of mined quadruplets, and its gradient.
//
//     E_m = σ(α + S_ik − S_ij) + σ(α + S_jl − S_ij)        σ = relu, whose slope at 0 is 0
//     E_e = σ(β + D_ij − D_ik) + σ(β + D_ij − D_jl)        D = ‖f − g‖² of unit rows
//     L   = Σ_valid (E_m + weight · E_e) / max(1, valid)
//
// Source: Huang, Loy, Tang, NIPS 2016, equations 3 to 5.
#pragma once

#include <algorithm>
#include <cmath>

#include "memory.h"

namespace pddm::cpu {

// A thread costs more than so many numbers do: the batches that most people train with stay on one.
constexpr int64_t kLossPart = 1 << 16;
constexpr int64_t kLossColumns = 64;  // at least, where columns are shared out: whole cache lines

// body(first, last) over all of [0, count), in parts of about kLossPart numbers.
template <class Body>
void in_parts(const Parallel& parallel, int64_t count, int64_t numbers, const Body& body) {
  const int64_t part = std::max<int64_t>(1, kLossPart / std::max<int64_t>(1, numbers));
  share(parallel, (count + part - 1) / part,
        [&](int64_t, int64_t p) { body(p * part, std::min(count, (p + 1) * part)); });
}

// Σ of term(0 … count−1), in sums that fill vectors of any width.
template <class T, class Term>
T sum_of(int64_t count, const Term& term) {
  constexpr int kLanes = 16;
  T lanes[kLanes] = {};
  int64_t c = 0;
  for (; c + kLanes <= count; c += kLanes)
    for (int lane = 0; lane < kLanes; ++lane) lanes[lane] += term(c + lane);
  for (; c < count; ++c) lanes[c % kLanes] += term(c);
  T sum = 0;
  for (int lane = 0; lane < kLanes; ++lane) sum += lanes[lane];
  return sum;
}

// Unit rows, and 1/‖x‖, of what a valid quadruplet names. The others, which may hold NaN, are left alone.
template <class T>
struct UnitRows {
  Arena arena;
  T* f;
  T* scale;
  bool* named;

  UnitRows(const Parallel& parallel, const Rows& rows, int64_t dim, const Picked& quads)
      : f(arena.take<T>(rows.count * dim)),
        scale(arena.take<T>(rows.count)),
        named(arena.take_zeroed<bool>(rows.count)) {
    for (int64_t q = 0; q < quads.slots; ++q)
      if (quads.valid[q]) named[quads.i[q]] = named[quads.j[q]] = named[quads.k[q]] = named[quads.l[q]] = true;
    in_parts(parallel, rows.count, dim, [&](int64_t first, int64_t last) {
      for (int64_t r = first; r < last; ++r) {
        if (!named[r]) continue;
        const T* x = static_cast<const T*>(rows.data) + r * dim;
        scale[r] = T(1) / std::max(std::sqrt(sum_of<T>(dim, [&](int64_t c) { return x[c] * x[c]; })), T(kNormFloor));
        for (int64_t c = 0; c < dim; ++c) f[r * dim + c] = x[c] * scale[r];
      }
    });
  }
};

// Where NaN comes in, NaN comes out, as of torch's relu.
template <class T>
T hinge(T x, Hinge which, uint8_t& open) {
  if (x <= T(0)) return T(0);
  open |= which;
  return x;
}

inline int64_t count_valid(const Picked& quads) {
  return std::max<int64_t>(1, std::count(quads.valid, quads.valid + quads.slots, true));
}

template <class T>
void quadruplet_loss(const Parallel& parallel, const Rows& rows, int64_t dim, const Picked& quads,
                     const Margins& margins, T* loss, uint8_t* open) {
  const UnitRows<T> unit(parallel, rows, dim, quads);
  const T *s_ij = static_cast<const T*>(quads.s_ij), *s_ik = static_cast<const T*>(quads.s_ik),
          *s_jl = static_cast<const T*>(quads.s_jl);
  const T alpha = T(margins.alpha), beta = T(margins.beta), weight = T(margins.weight);
  Arena arena;
  T* value = arena.take<T>(quads.slots);
  in_parts(parallel, quads.slots, 3 * dim, [&](int64_t first, int64_t last) {
    for (int64_t q = first; q < last; ++q) {
      value[q] = 0, open[q] = 0;
      if (!quads.valid[q]) continue;
      const auto apart = [&](int64_t a, int64_t b) {
        const T *x = unit.f + a * dim, *y = unit.f + b * dim;
        return sum_of<T>(dim, [&](int64_t c) { return (x[c] - y[c]) * (x[c] - y[c]); });
      };
      const int64_t i = quads.i[q], j = quads.j[q];
      const T d_ij = apart(i, j), d_ik = apart(i, quads.k[q]), d_jl = apart(j, quads.l[q]);
      const T scores =
          hinge(s_ik[q] - s_ij[q] + alpha, kScoreK, open[q]) + hinge(s_jl[q] - s_ij[q] + alpha, kScoreL, open[q]);
      const T distances =
          hinge(d_ij + beta - d_ik, kDistanceK, open[q]) + hinge(d_ij + beta - d_jl, kDistanceL, open[q]);
      value[q] = scores + weight * distances;
    }
  });
  double sum = 0;
  for (int64_t q = 0; q < quads.slots; ++q) sum += double(value[q]);
  *loss = T(sum / double(count_valid(quads)));
}

// `open` is what the loss gave. d_rows is zero where no valid quadruplet names a row.
template <class T>
void quadruplet_loss_backward(const Parallel& parallel, const Rows& rows, int64_t dim, const Picked& quads,
                              double embedding_weight, T upstream, const uint8_t* open, T* d_rows, T* d_s_ij, T* d_s_ik,
                              T* d_s_jl) {
  const UnitRows<T> unit(parallel, rows, dim, quads);
  const T each = upstream / T(count_valid(quads)), weight = T(2) * each * T(embedding_weight);
  for (int64_t q = 0; q < quads.slots; ++q) {
    const uint8_t hinges = quads.valid[q] ? open[q] : 0;
    const T k = hinges & kScoreK ? each : T(0), l = hinges & kScoreL ? each : T(0);
    d_s_ij[q] = -(k + l), d_s_ik[q] = k, d_s_jl[q] = l;
  }
  std::fill_n(d_rows, rows.count * dim, T(0));
  // Of unit rows, by columns, so that the quadruplets of a row are added in one order on any number of threads.
  in_parts(parallel, dim, std::min(8 * quads.slots, kLossPart / kLossColumns), [&](int64_t first, int64_t last) {
    for (int64_t q = 0; q < quads.slots; ++q) {
      const bool on_k = open[q] & kDistanceK, on_l = open[q] & kDistanceL;
      if (!quads.valid[q] || (!on_k && !on_l)) continue;
      const T pull = weight * T(on_k + on_l), push_k = on_k ? weight : T(0), push_l = on_l ? weight : T(0);
      const int64_t i = quads.i[q] * dim, j = quads.j[q] * dim, k = quads.k[q] * dim, l = quads.l[q] * dim;
      const T *f_i = unit.f + i, *f_j = unit.f + j, *f_k = unit.f + k, *f_l = unit.f + l;
      // Row by row, since some of the four may be one.
      for (int64_t c = first; c < last; ++c) d_rows[i + c] += pull * (f_i[c] - f_j[c]) - push_k * (f_i[c] - f_k[c]);
      for (int64_t c = first; c < last; ++c) d_rows[j + c] += pull * (f_j[c] - f_i[c]) - push_l * (f_j[c] - f_l[c]);
      for (int64_t c = first; c < last; ++c) d_rows[k + c] += push_k * (f_i[c] - f_k[c]);
      for (int64_t c = first; c < last; ++c) d_rows[l + c] += push_l * (f_j[c] - f_l[c]);
    }
  });
  // Through f = x / ‖x‖; below the floor the norm is a constant.
  in_parts(parallel, rows.count, 2 * dim, [&](int64_t first, int64_t last) {
    for (int64_t r = first; r < last; ++r) {
      if (!unit.named[r]) continue;
      T* d = d_rows + r * dim;
      const T* f = unit.f + r * dim;
      const bool at_floor = unit.scale[r] >= T(1) / T(kNormFloor);
      const T along = at_floor ? T(0) : sum_of<T>(dim, [&](int64_t c) { return d[c] * f[c]; });
      for (int64_t c = 0; c < dim; ++c) d[c] = (d[c] - along * f[c]) * unit.scale[r];
    }
  });
}

}  // namespace pddm::cpu
