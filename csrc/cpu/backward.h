// From weighted pairs back to the parameters and the rows, in two steps that alternate over chunks of pairs.
//
//   backward_groups   one thread, a few groups: recompute u', v' and c, then the three products downwards
//                         d_c = weight · w_s · [c > 0]          (combined)
//                         d[û ; v̂] = W_cᵀ d_c                   (2 · hidden)   → d_u, d_v through norm and relu
//                         d|u| = W_uᵀ d_u                       (dim)
//                     in lanes, as forward; what the weight gradients need as "one pair per step" is transposed.
//   reduce_*          one thread owns some outputs and adds the chunk's pairs in their order, so that the sum is the
//                     same whoever does it: dW_c += d_cᵀ [û ; v̂], dW_u += d_uᵀ u, and the rows' df and da.
//
// W_v is linear before its relu, so its gradient waits until all pairs are in: finish_* has dW_v = daᵀ f, df += da W_v.
// With normalize_input a pair of nearly opposite rows has a da of 1/‖v‖, which cancels in dW_v but would take all other
// pairs' digits with it; there dW_v is summed by pairs, as dW_u is.
#pragma once

#include "forward.h"

namespace pddm::PDDM_ISA {

using cpu::Chunk;
using cpu::Gradient;
using cpu::kMaxBackwardGroups;
using cpu::Strided;
using cpu::SumOffsets;

template <class T>
PDDM_INLINE SumOffsets sum_layout(const Workspace<T>& w) {
  const int64_t combined = padded(w.combined, kUnit);
  SumOffsets at{};
  at.b_v = at.b_u + w.a_stride;
  at.b_c = at.b_v + w.a_stride;
  at.w_s = at.b_c + combined;
  at.b_s = at.w_s + combined;
  at.stride = padded(at.b_s + 1, kLanes<T>);
  return at;
}

// Scratch of one thread: the forward block and the panels of d[û ; v̂] and d|u|.
template <class T>
struct BackwardBlock {
  Block<Plain<T>> forward;
  int64_t hidden_size, dim_size;
  T *d_hidden, *d_dim;  // (group, 2, steps, lane), (group, steps, lane)
  T* dot;               // (group, 2, lane): Σ u'·dû and Σ v'·dv̂

  BackwardBlock(const Workspace<T>& w, int64_t groups, void* memory) : forward(w, groups, memory) {
    hidden_size = w.a_stride * kLanes<T>;
    dim_size = w.f_stride * kLanes<T>;
    d_hidden = reinterpret_cast<T*>(static_cast<char*>(memory) + forward.bytes(groups));
    d_dim = d_hidden + groups * 2 * hidden_size;
    dot = d_dim + groups * dim_size;
  }
  int64_t bytes(int64_t groups) const {
    return forward.bytes(groups) + groups * int64_t(sizeof(T)) * (2 * hidden_size + dim_size + 2 * kLanes<T>);
  }
};

// Panel of d_hidden[which] → through the norm and the relu of `hidden`, in place. Leaves lane sums.
template <class T>
PDDM_INLINE void through_norm(const T* hidden, T* gradient, const T* dot, const T* norm, const T* inverse,
                              int64_t steps, T* sums) {
  constexpr int width = kWidth<T>, lanes = kLanes<T>;
  T along[lanes];  // d/d‖x‖, per unit of x: Σ x·dx̂ / ‖x‖², nothing where the norm was clamped
  for (int l = 0; l < lanes; ++l) along[l] = norm[l] > T(kNormFloor) ? dot[l] * inverse[l] * inverse[l] : T(0);
  for (int64_t k = 0; k < steps; ++k) {
    Vec<T> d[2];
    PDDM_UNROLL
    for (int half = 0; half < 2; ++half) {
      T* at = gradient + k * lanes + half * width;
      const Vec<T> x = load(hidden + k * lanes + half * width);
      d[half] = where_alive<T>(x, (load(at) - x * load(along + half * width)) * load(inverse + half * width));
      store(at, d[half]);
    }
    sums[k] = sum_lanes<T>(d[0], d[1]);
  }
}

// normalize_input: Σ_k d[k] (x[k] − bias[k]) per lane, which is d · (W x / ‖x‖), the pull on the input's norm.
template <class T>
PDDM_INLINE void pull_on_norm(const T* x, const T* d, const T* bias, int64_t steps, T* pull) {
  constexpr int width = kWidth<T>, lanes = kLanes<T>;
  Vec<T> p[2] = {};
  for (int64_t k = 0; k < steps; ++k)
    for (int half = 0; half < 2; ++half)
      p[half] += load(d + k * lanes + half * width) * (load(x + k * lanes + half * width) - broadcast(bias[k]));
  store(pull, p[0]), store(pull + width, p[1]);
}

template <class T>
PDDM_INLINE void backward_groups(const Workspace<T>& w, const Chunk<T>& chunk, int64_t first, int64_t count,
                                 void* scratch) {
  using Op = Plain<T>;
  constexpr int width = kWidth<T>, lanes = kLanes<T>;
  const BackwardBlock<T> b(w, count, scratch);
  const SumOffsets at = sum_layout<T>(w);
  const int64_t hidden = padded(w.hidden, kUnit), combined = padded(w.combined, kUnit), dim = padded(w.dim, kUnit);
  const auto group = [&](int64_t g) {
    return Group{0, -1, chunk.i + (first + g) * lanes, chunk.j + (first + g) * lanes, lanes};
  };
  const auto weight = [&](int64_t g) { return chunk.weight + (first + g) * lanes; };
  const auto sums = [&](int64_t g) { return chunk.sums + (first + g) * at.stride; };

  Group groups[kMaxBackwardGroups];
  for (int64_t g = 0; g < count; ++g) groups[g] = group(g);
  hidden_layer<Op>(w, b.forward, groups, count);

  combined_layer<Op>(w, b.forward, count, [&](auto columns, int64_t c, int64_t g, const auto& tile) {
    T* d_c = chunk.d_c + ((first + g) * combined + c) * lanes;
    for (int k = 0; k < decltype(columns)::value; ++k) {
      Vec<T> d[2], ws[2];
      for (int half = 0; half < 2; ++half) {
        const Vec<T> upstream = load(weight(g) + half * width);
        d[half] = where_alive<T>(tile.acc[k][half], upstream * broadcast(w.w_s[c + k]));
        ws[half] = upstream * relu<T>(tile.acc[k][half]);
        store(d_c + k * lanes + half * width, d[half]);
      }
      sums(g)[at.b_c + c + k] = sum_lanes<T>(d[0], d[1]);
      sums(g)[at.w_s + c + k] = sum_lanes<T>(ws[0], ws[1]);
    }
  });

  std::memset(static_cast<void*>(b.dot), 0, sizeof(T) * count * 2 * lanes);
  for (int which = 0; which < 2; ++which)
    for_strips(w.hidden, [&](auto columns, int64_t c) {
      constexpr int C = decltype(columns)::value;
      const T* strip = w.w_c_t + (which * hidden + c) * w.combined;
      for (int64_t g = 0; g < count; ++g) {
        Tile<T, C> tile;
        tile.clear();
        multiply_strip<Op>(tile, strip, chunk.d_c + (first + g) * combined * lanes, w.combined);
        const T* x = (which ? b.forward.x + g * b.forward.x_size : b.forward.hidden + g * b.forward.hidden_size);
        T* out = b.d_hidden + (2 * g + which) * b.hidden_size;
        T* dot = b.dot + (2 * g + which) * lanes;
        PDDM_UNROLL
        for (int half = 0; half < 2; ++half) {
          Vec<T> sum = load(dot + half * width);
          PDDM_UNROLL
          for (int k = 0; k < C; ++k) {
            store(out + (c + k) * lanes + half * width, tile.acc[k][half]);
            sum += tile.acc[k][half] * load(x + (c + k) * lanes + half * width);
          }
          store(dot + half * width, sum);
        }
      }
    });

  for (int64_t g = 0; g < count; ++g) {
    const Lanes<T>& lane = b.forward.lanes[g];
    T* hidden_panel = b.forward.hidden + g * b.forward.hidden_size;
    T* x_panel = b.forward.x + g * b.forward.x_size;
    T* d_u = b.d_hidden + 2 * g * b.hidden_size;
    T* d_v = d_u + b.hidden_size;
    const int64_t pair = (first + g) * lanes;
    sums(g)[at.b_s] = sum_lanes<T>(load(weight(g)), load(weight(g) + width));
    through_norm<T>(hidden_panel, d_u, b.dot + 2 * g * lanes, lane.norm_u, lane.inverse_u, hidden, sums(g) + at.b_u);
    through_norm<T>(x_panel, d_v, b.dot + (2 * g + 1) * lanes, lane.norm_v, lane.inverse_v, hidden, sums(g) + at.b_v);

    T* pull_u = b.dot + 2 * g * lanes;  // the dots are spent
    if (w.normalize_input) {
      T pull_v[lanes];
      pull_on_norm<T>(hidden_panel, d_u, w.b_u, hidden, pull_u);
      pull_on_norm<T>(x_panel, d_v, w.b_v, hidden, pull_v);
      for (int l = 0; l < lanes; ++l) {
        const T s_u = lane.scale_u[l], s_v = T(2) * lane.scale_v[l];
        const T most = T(0.999) / T(kNormFloor);  // a clamped norm pulls on nothing
        pull_u[l] = s_u < most ? pull_u[l] * s_u * s_u : T(0);
        chunk.pull[pair + l] = s_v < most ? -T(0.25) * pull_v[l] * s_v * s_v : T(0);
      }
    }

    // d_u as W_u's gradient wants it, d_v as a's does, then everything that is needed pair by pair.
    T *kept = chunk.d_u + (first + g) * hidden * lanes, *kept_v = chunk.d_v + (first + g) * hidden * lanes;
    for (int64_t k = 0; k < hidden; ++k)
      for (int half = 0; half < 2; ++half) {
        const int64_t e = k * lanes + half * width;
        store(kept + e, load(d_u + e) * load(lane.scale_u + half * width));
        store(d_v + e, load(d_v + e) * load(lane.scale_v + half * width));
        if (w.normalize_input) store(kept_v + e, load(d_v + e));
        store(hidden_panel + e, load(hidden_panel + e) * load(lane.inverse_u + half * width));
        store(x_panel + e, load(x_panel + e) * load(lane.inverse_v + half * width));
      }
    zero_steps(hidden_panel, hidden, w.a_stride);
    zero_steps(x_panel, hidden, w.a_stride);
    zero_steps(d_v, hidden, w.a_stride);
    const T* halves[2] = {hidden_panel, x_panel};
    for (int which = 0; which < 2; ++which)
      for_each_lane<T>(halves[which], w.a_stride, [&](int l, int64_t k, Vec<T> v) {
        const int64_t strip = (which * w.a_stride + k) / lanes;
        store(chunk.uv + (strip * chunk.capacity + pair + l) * lanes + k % lanes, v);
      });
    for_each_lane<T>(d_v, w.a_stride,
                     [&](int l, int64_t k, Vec<T> v) { store(chunk.row_a + (pair + l) * w.a_stride + k, v); });
  }

  for_strips(w.dim, [&](auto columns, int64_t c) {
    constexpr int C = decltype(columns)::value;
    for (int64_t g = 0; g < count; ++g) {
      Tile<T, C> tile;
      tile.clear();
      multiply_strip<Op>(tile, w.w_u_t + c * w.hidden, chunk.d_u + (first + g) * hidden * lanes, w.hidden);
      T* out = b.d_dim + g * b.dim_size + c * lanes;
      PDDM_UNROLL
      for (int k = 0; k < C; ++k) {
        store(out + k * lanes, tile.acc[k][0]);
        store(out + k * lanes + width, tile.acc[k][1]);
      }
    }
  });

  for (int64_t g = 0; g < count; ++g) {
    T* d_dim = b.d_dim + g * b.dim_size;
    const T* pull_u = b.dot + 2 * g * lanes;
    zero_steps(d_dim, dim, w.f_stride);
    for_each_lane<T>(d_dim, w.f_stride, [&](int l, int64_t k, Vec<T> d) {
      const int64_t pair = (first + g) * lanes + l;
      const Vec<T> f_i = load(w.f + chunk.i[pair] * w.f_stride + k), f_j = load(w.f + chunk.j[pair] * w.f_stride + k);
      const Vec<T> e = f_i - f_j;
      const int64_t at = (k / lanes * chunk.capacity + pair) * lanes + k % lanes;
      store(chunk.u + at, absolute<T>(e));
      Vec<T> signed_d = where_alive<T>(e, d) - where_alive<T>(Vec<T>{} - e, d);
      if (w.normalize_input) {
        store(chunk.v + at, f_i + f_j);
        signed_d = signed_d - e * broadcast(pull_u[l]);
      }
      store(chunk.row_f + pair * w.f_stride + k, signed_d);
    });
  }
}

// dW[c …][:] += Σ_pairs d[c …] ⊗ x, for the strip of outputs c. `d` is (group, outputs, lane).
template <class T, int C>
PDDM_INLINE void add_weight_strip(const Chunk<T>& chunk, const T* d, int64_t outputs, int64_t c, const T* x,
                                  int64_t strips, const Strided<T>& gradient) {
  constexpr int lanes = kLanes<T>, width = kWidth<T>;
  for (int64_t s = 0; s < strips; ++s) {
    Tile<T, C> tile;
    const int64_t stride = gradient.stride;
    T* out = gradient.data + c * stride + s * lanes;
    tile.clear();
    if (!chunk.first) {
      PDDM_UNROLL
      for (int k = 0; k < C; ++k) {
        tile.acc[k][0] = load(out + k * stride);
        tile.acc[k][1] = load(out + k * stride + width);
      }
    }
    for (int64_t g = 0; g < chunk.groups; ++g) {
      const int64_t left = chunk.pairs - g * lanes;
      multiply<Plain<T>>(tile, d + (g * outputs + c) * lanes, {1, lanes}, x + (s * chunk.capacity + g * lanes) * lanes,
                         lanes, left < lanes ? left : lanes);
    }
    PDDM_UNROLL
    for (int k = 0; k < C; ++k) {
      store(out + k * stride, tile.acc[k][0]);
      store(out + k * stride + width, tile.acc[k][1]);
    }
  }
}

// Columns of the rows' gradients that one task adds.
template <class T>
constexpr int64_t kSlice = 2 * kLanes<T>;

template <class T>
PDDM_INLINE int64_t slices(int64_t stride) {
  return (stride + kSlice<T> - 1) / kSlice<T>;
}

template <class T>
PDDM_INLINE int64_t reduce_part_count(const Workspace<T>& w) {
  return strip_count(w.combined) + (w.normalize_input ? 2 : 1) * strip_count(w.hidden) + slices<T>(w.f_stride) +
         slices<T>(w.a_stride) + 1;
}

template <class T>
PDDM_INLINE void reduce_part(const Workspace<T>& w, const Chunk<T>& chunk, const Gradient<T>& g, int64_t part) {
  constexpr int width = kWidth<T>, lanes = kLanes<T>;
  if (part < strip_count(w.combined)) {
    const int64_t strips = w.a_stride / lanes, outputs = padded(w.combined, kUnit);
    return for_strip(w.combined, part, [&](auto columns, int64_t c) {
      constexpr int C = decltype(columns)::value;
      add_weight_strip<T, C>(chunk, chunk.d_c, outputs, c, chunk.uv, strips, g.w_c_u);
      add_weight_strip<T, C>(chunk, chunk.d_c, outputs, c, chunk.uv + strips * chunk.capacity * lanes, strips, g.w_c_v);
    });
  }
  part -= strip_count(w.combined);
  if (part < strip_count(w.hidden))
    return for_strip(w.hidden, part, [&](auto columns, int64_t c) {
      add_weight_strip<T, decltype(columns)::value>(chunk, chunk.d_u, padded(w.hidden, kUnit), c, chunk.u,
                                                    w.f_stride / lanes, g.w_u);
    });
  part -= strip_count(w.hidden);
  if (w.normalize_input) {
    if (part < strip_count(w.hidden))
      return for_strip(w.hidden, part, [&](auto columns, int64_t c) {
        add_weight_strip<T, decltype(columns)::value>(chunk, chunk.d_v, padded(w.hidden, kUnit), c, chunk.v,
                                                      w.f_stride / lanes, g.w_v);
      });
    part -= strip_count(w.hidden);
  }
  if (part < slices<T>(w.f_stride)) {
    const int64_t from = part * kSlice<T>, to = from + kSlice<T> < w.f_stride ? from + kSlice<T> : w.f_stride;
    for (int64_t p = 0; p < chunk.pairs; ++p) {
      const int64_t i = chunk.i[p] * w.f_stride, j = chunk.j[p] * w.f_stride;
      for (int64_t k = from; k < to; k += width) {
        const Vec<T> d = load(chunk.row_f + p * w.f_stride + k);
        Vec<T> to_i = d, to_j = Vec<T>{} - d;
        if (w.normalize_input) {
          const Vec<T> both = (load(w.f + i + k) + load(w.f + j + k)) * broadcast(chunk.pull[p]);
          to_i += both, to_j += both;
        }
        store(g.f + i + k, load(g.f + i + k) + to_i);
        store(g.f + j + k, load(g.f + j + k) + to_j);
      }
    }
    return;
  }
  part -= slices<T>(w.f_stride);
  if (part < slices<T>(w.a_stride)) {
    const int64_t from = part * kSlice<T>, to = from + kSlice<T> < w.a_stride ? from + kSlice<T> : w.a_stride;
    for (int64_t p = 0; p < chunk.pairs; ++p)
      for (const int64_t row : {chunk.i[p], chunk.j[p]})
        for (int64_t k = from; k < to; k += width) {
          T* at = g.a + row * w.a_stride + k;
          store(at, load(at) + load(chunk.row_a + p * w.a_stride + k));
        }
    return;
  }
  const int64_t stride = sum_layout<T>(w).stride;
  for (int64_t group = 0; group < chunk.groups; ++group)
    for (int64_t k = 0; k < stride; ++k) g.sums[k] += chunk.sums[group * stride + k];
}

template <class T>
PDDM_INLINE int64_t finish_part_count(const Workspace<T>& w) {
  return (w.normalize_input ? 0 : strip_count(w.hidden)) + strip_count(w.used);
}

template <class T>
PDDM_INLINE void finish_part(const Workspace<T>& w, const Gradient<T>& g, int64_t part) {
  constexpr int width = kWidth<T>, lanes = kLanes<T>;
  const int64_t weights = w.normalize_input ? 0 : strip_count(w.hidden);
  if (part < weights)
    return for_strip(w.hidden, part, [&](auto columns, int64_t c) {
      constexpr int C = decltype(columns)::value;
      for (int64_t k = 0; k < w.f_stride; k += lanes) {
        Tile<T, C> tile;
        tile.clear();
        multiply<Plain<T>>(tile, g.a + c, {w.a_stride, 1}, w.f + k, w.f_stride, w.used);
        for (int r = 0; r < C; ++r) {
          store(g.w_v.data + (c + r) * g.w_v.stride + k, tile.acc[r][0]);
          store(g.w_v.data + (c + r) * g.w_v.stride + k + width, tile.acc[r][1]);
        }
      }
    });
  for_strip(w.used, part - weights, [&](auto columns, int64_t row) {
    constexpr int C = decltype(columns)::value;
    for (int64_t k = 0; k < w.f_stride; k += lanes) {
      Tile<T, C> tile;
      T* out = g.f + row * w.f_stride + k;
      for (int r = 0; r < C; ++r) {
        tile.acc[r][0] = load(out + r * w.f_stride);
        tile.acc[r][1] = load(out + r * w.f_stride + width);
      }
      multiply<Plain<T>>(tile, g.a + row * w.a_stride, {1, w.a_stride}, w.w_v_rows + k, w.f_stride, w.hidden);
      for (int r = 0; r < C; ++r) {
        store(out + r * w.f_stride, tile.acc[r][0]);
        store(out + r * w.f_stride + width, tile.acc[r][1]);
      }
    }
    for (int r = 0; r < C; ++r) {  // through x / ‖x‖; a clamped norm is a constant
      const T* f = w.f + (row + r) * w.f_stride;
      T* d = g.f + (row + r) * w.f_stride;
      const T inverse = w.inverse_norm[row + r];
      Vec<T> dot{};
      for (int64_t k = 0; k < w.f_stride; k += width) dot += load(f + k) * load(d + k);
      const T along = inverse < T(0.999) / T(kNormFloor) ? sum_lanes<T>(dot, Vec<T>{}) : T(0);
      for (int64_t k = 0; k < w.f_stride; k += width)
        store(d + k, (load(d + k) - load(f + k) * broadcast(along)) * broadcast(inverse));
    }
  });
}

}  // namespace pddm::PDDM_ISA
