// From weighted pairs back to the parameters and the rows: the kernels of the stages that engine.h lists.
//
// Everything lies in slabs, (panel of kLanes columns, row, column). A row is a pair, or a row of features. That one
// layout serves a product both ways, each of which is one panel of outputs, owned by one thread:
//
//     rows × weights          C rows of a slab, broadcast        ⊗   a panel of weights (step, kLanes), packed on the
//     (û W, and d Wᵀ back)    (a panel at a time, from one block)    way in by whoever owns it: (64 … 128 KiB, L2)
//
//     weight gradient         C columns of d's panel, broadcast  ⊗   a panel of the layer's input: a step is a pair
//
// so that few pairs cost little more than reading the weights and writing their gradients once. Of many, chunk after
// chunk reads panels that were packed once. A sum over pairs is taken in their order by one owner, and is the same
// whoever that is.
#pragma once

#include "forward.h"

namespace pddm::PDDM_ISA {

using cpu::Backward;
using cpu::Slab;
using cpu::Stage;

template <class T>
PDDM_INLINE T* at(const Slab<T>& s, int64_t panel, int64_t row) {
  return s.data + (panel * s.rows + row) * kLanes<T>;
}

// body(panel, offset in it, column) for every vector of a row of `panels` panels.
template <class T, class Body>
PDDM_INLINE void for_vectors(int64_t panels, const Body& body) {
  for (int64_t p = 0; p < panels; ++p)
    for (int64_t o = 0; o < kLanes<T>; o += kWidth<T>) body(p, o, p * kLanes<T> + o);
}

// Outputs [c, c + kLanes) of x · W: the panel is W's columns as they lie, `steps` rows of it.
template <class T>
PDDM_INLINE void pack_columns(T* panel, const T* weights, int64_t stride, int64_t columns, int64_t c, int64_t steps) {
  constexpr int width = kWidth<T>, lanes = kLanes<T>;
  const T* from = weights + c;
  for (int64_t s = 0; s < steps; ++s, from += stride) {
    PDDM_PREFETCH(from + 16 * stride);  // a page further each step: no hardware would guess
    PDDM_PREFETCH(from + 16 * stride + width);
    store(panel + s * lanes, load_some(from, columns - c));
    store(panel + s * lanes + width, load_some(from + width, columns - c - width));
  }
}

// A panel of weights, and those that this thread will probably need next: some of their lines are asked for in turn,
// so that they have come from afar by then.
template <class T>
struct Panel {
  const T *now, *next = nullptr, *end = nullptr;
};

// tile += rows [row, row + C) of x, from its panel `first` on, times a panel's steps. The rows' lines of the panel
// after the next are asked for: panels lie a slab apart, where no hardware would guess.
template <class T, int C>
PDDM_INLINE void accumulate(Tile<T, C>& tile, const Slab<T>& x, int64_t first, int64_t row, Panel<T>& weights,
                            const T* panel, int64_t steps) {
  constexpr int lanes = kLanes<T>;
  constexpr int64_t kLines = 4, line = 64 / sizeof(T);
  Tile<T, C> t = tile;
  const T* from = at(x, first, row);
  const int64_t apart = x.rows * lanes;
  for (int64_t s = 0; s < steps; s += lanes, from += apart, panel += lanes * lanes) {
    PDDM_UNROLL
    for (int c = 0; c < C; ++c) {
      PDDM_PREFETCH(from + 2 * apart + c * lanes);
      PDDM_PREFETCH(from + 2 * apart + c * lanes + kWidth<T>);
    }
    if (weights.next < weights.end) {
      PDDM_UNROLL
      for (int64_t k = 0; k < kLines; ++k) PDDM_PREFETCH_FAR(weights.next + k * line);
      weights.next += kLines * line;
    }
    multiply<Plain<T>>(t, from, {1, lanes}, panel, lanes, steps - s < lanes ? steps - s : lanes);
  }
  tile = t;
}

// Blocks of rows that the owners of `panels` panels are split into when there are fewer of them than threads to feed.
template <class T>
PDDM_INLINE int64_t row_blocks(const Backward<T>& b, int64_t rows, int64_t panels) {
  const int64_t wanted = (4 * b.threads + panels - 1) / panels, most = (rows + 8 * kStrip - 1) / (8 * kStrip);
  return wanted < most ? wanted : most;
}

// The product of one part: `pack` gives the panel, `fill(tile, row, panel)` multiplies, `use(panel, row, x)` takes a
// row.
template <class T, class Pack, class Fill, class Use>
PDDM_INLINE void product(const Backward<T>& b, int64_t rows, int64_t panels, int64_t part, const Pack& pack,
                         const Fill& fill, const Use& use) {
  const int64_t blocks = row_blocks(b, rows, panels), panel = part % panels;
  const int64_t size = padded((rows + blocks - 1) / blocks, kStrip), begin = part / panels * size;
  if (begin >= rows) return;
  Panel<T> weights = pack(panel);
  for_strips<Plain<T>>(rows - begin < size ? rows - begin : size, [&](auto columns, int64_t r) {
    Tile<T, decltype(columns)::value> tile;
    tile.clear();
    fill(tile, begin + r, weights);
    PDDM_UNROLL
    for (int c = 0; c < decltype(columns)::value; ++c) use(panel, begin + r + c, tile.acc[c]);
  });
}

// Where a weight's gradient is summed: in tiles from chunk to chunk, in the gradient itself at last.
template <class T>
struct Sums {
  void* gradient;
  int64_t stride;
  T* tiles;  // (panel of outputs, panel of inputs, lanes, lanes)
  bool first, last;
};

// sums[o][:] += Σ_row d[row][o] · x[row][:], for the outputs of one panel of d. A panel of x comes from afar once and
// serves all of them. What the next panel of x will be added to is asked for while this one is.
template <class T>
PDDM_INLINE void weight_gradient(const Sums<T>& sums, int64_t outputs, int64_t inputs, const Slab<T>& d,
                                 int64_t d_first, int64_t panel, const Slab<T>& x, int64_t x_first, int64_t rows) {
  constexpr int width = kWidth<T>, lanes = kLanes<T>;
  const int64_t o = panel * lanes, left = outputs - o < lanes ? outputs - o : lanes;
  T* out = static_cast<T*>(sums.gradient) + o * sums.stride;
  T* tiles = sums.tiles ? sums.tiles + panel * padded(inputs, lanes) * lanes : nullptr;
  for (int64_t k = 0; k < inputs; k += lanes)
    for_even_strips<T>(left, [&](auto columns, int64_t c) {
      constexpr int C = decltype(columns)::value;
      T *kept = tiles ? tiles + (k + c) * lanes : nullptr, *to = out + c * sums.stride + k;
      Tile<T, C> tile;
      tile.clear();
      if (!sums.first)
        for (int r = 0; r < C && c + r < left; ++r)
          for (int half = 0; half < 2; ++half) {
            tile.acc[r][half] = load(kept + r * lanes + half * width);
            PDDM_PREFETCH(kept + (lanes + r) * lanes + half * width);
          }
      multiply<Plain<T>>(tile, at(d, d_first + panel, 0) + c, {lanes, 1}, at(x, x_first + k / lanes, 0), lanes, rows);
      for (int r = 0; r < C && c + r < left; ++r)
        for (int half = 0; half < 2; ++half)
          if (sums.last)
            store_some(to + r * sums.stride + half * width, tile.acc[r][half], inputs - k - half * width);
          else
            store(kept + r * lanes + half * width, tile.acc[r][half]);
    });
}

// The same for a bias: out[o] (+)= the sum over a chunk's pairs.
template <class T>
PDDM_INLINE void add_sum(void* gradient, int64_t o, int64_t outputs, Vec<T> sum, bool first) {
  T* out = static_cast<T*>(gradient) + o;
  store_some(out, first ? sum : load_some(out, outputs - o) + sum, outputs - o);
}

template <class T>
PDDM_INLINE void bias_gradient(void* gradient, int64_t outputs, const Slab<T>& d, int64_t d_first, int64_t panel,
                               int64_t rows, bool first) {
  constexpr int width = kWidth<T>, lanes = kLanes<T>;
  Vec<T> sum[2][2] = {};  // even and odd rows apart, or each addition would wait for the one before
  const T* from = at(d, d_first + panel, 0);
  for (int64_t r = 0; r < rows; r += 2)
    for (int64_t odd = 0; odd < 2 && r + odd < rows; ++odd)
      for (int half = 0; half < 2; ++half) sum[odd][half] += load(from + (r + odd) * lanes + half * width);
  for (int half = 0; half < 2; ++half)
    add_sum<T>(gradient, panel * lanes + half * width, outputs, sum[0][half] + sum[1][half], first);
}

// x /= max(‖x‖, floor) for a row of `panels` panels, whose squares `square` has of either half of a panel; returns the
// clamped norm.
template <class T>
PDDM_INLINE T normalize(const Slab<T>& x, int64_t first, int64_t panels, int64_t row, const Vec<T> (&square)[2]) {
  const T norm = clamped(root(sum_lanes<T>(square[0], square[1])));
  const Vec<T> inverse = broadcast(T(1) / norm);
  for_vectors<T>(panels, [&](int64_t p, int64_t o, int64_t) {
    T* to = at(x, first + p, row) + o;
    store(to, load(to) * inverse);
  });
  return norm;
}

template <class T>
PDDM_INLINE T normalize(const Slab<T>& x, int64_t first, int64_t panels, int64_t row) {
  Vec<T> square[2] = {};
  for_vectors<T>(panels, [&](int64_t p, int64_t o, int64_t) {
    const Vec<T> v = load(at(x, first + p, row) + o);
    square[o > 0] += v * v;
  });
  return normalize(x, first, panels, row, square);
}

// d/dx̂ → d/dx of a row that `normalize` left as x̂: use(panel, offset, column, d). A clamped norm is a constant.
template <class T, class Use>
PDDM_INLINE void through_norm(const Slab<T>& unit, const Slab<T>& d, int64_t first, int64_t panels, int64_t row, T norm,
                              const Use& use) {
  Vec<T> dot[2] = {};
  for_vectors<T>(panels, [&](int64_t p, int64_t o, int64_t) {
    dot[o > 0] += load(at(unit, first + p, row) + o) * load(at(d, first + p, row) + o);
  });
  const Vec<T> along = broadcast(norm > T(kNormFloor) ? sum_lanes<T>(dot[0], dot[1]) : T(0));
  const Vec<T> inverse = broadcast(T(1) / norm);
  for_vectors<T>(panels, [&](int64_t p, int64_t o, int64_t k) {
    const Vec<T> x = load(at(unit, first + p, row) + o);
    use(p, o, k, x, (load(at(d, first + p, row) + o) - x * along) * inverse);
  });
}

template <class T>
PDDM_INLINE void unit_row(const Backward<T>& b, int64_t row) {
  const T* from = static_cast<const T*>(b.rows.data) + (b.source ? b.source[row] : row) * b.unit.dim;
  for_vectors<T>(b.dim_panels, [&](int64_t p, int64_t o, int64_t k) {
    store(at(b.f, p, row) + o, load_some(from + k, b.unit.dim - k));
  });
  b.norm[row] = normalize(b.f, 0, b.dim_panels, row);
}

// u, and with normalize_input v, over their norms.
template <class T>
PDDM_INLINE void pair_inputs(const Backward<T>& b, int64_t pair) {
  const int64_t i = b.i[pair], j = b.j[pair];
  auto& number = b.numbers[pair];
  Vec<T> square{};
  for_vectors<T>(b.dim_panels, [&](int64_t p, int64_t o, int64_t) {
    const Vec<T> f_i = load(at(b.f, p, i) + o), f_j = load(at(b.f, p, j) + o), both = f_i + f_j;
    store(at(b.u, p, pair) + o, absolute<T>(f_i - f_j));
    if (!b.unit.normalize_input) return;
    store(at(b.v, p, pair) + o, both);
    square += both * both;
  });
  number.scale_u = T(1), number.scale_v = T(0.5);
  if (b.unit.normalize_input) {
    number.scale_u = T(1) / normalize(b.u, 0, b.dim_panels, pair);
    number.scale_v = T(0.5) / clamped(T(0.5) * root(sum_lanes<T>(square, Vec<T>{})));
    const Vec<T> scale = broadcast(number.scale_v);
    for_vectors<T>(b.dim_panels, [&](int64_t p, int64_t o, int64_t) {
      T* v = at(b.v, p, pair) + o;
      store(v, load(v) * scale);
    });
  }
}

// û, and v̂ from the rows' a.
template <class T>
PDDM_INLINE void pair_norms(const Backward<T>& b, int64_t pair) {
  const int64_t i = b.i[pair], j = b.j[pair], hidden = b.hidden_panels;
  auto& number = b.numbers[pair];
  const Vec<T> scale = broadcast(number.scale_v);
  Vec<T> square[2] = {};
  for_vectors<T>(hidden, [&](int64_t p, int64_t o, int64_t k) {
    const Vec<T> a = load(at(b.a, p, i) + o) + load(at(b.a, p, j) + o), v = relu<T>(a * scale + load(b.b_v + k));
    store(at(b.uv, hidden + p, pair) + o, v);
    square[o > 0] += v * v;
  });
  number.norm_u = normalize(b.uv, 0, hidden, pair);
  number.norm_v = normalize(b.uv, hidden, hidden, pair, square);
}

// Columns of one panel of c → d_c, and the sums over pairs that the last two parameters want of them.
template <class T>
PDDM_INLINE void score_gradient(const Backward<T>& b, int64_t panel) {
  for (int64_t o = 0; o < kLanes<T>; o += kWidth<T>) {
    const int64_t k = panel * kLanes<T> + o;
    const Vec<T> w_s = load(b.w_s + k);
    Vec<T> d_b{}, d_w{};
    for (int64_t pair = 0; pair < b.pairs; ++pair) {
      T* c = at(b.d_c, panel, pair) + o;
      const Vec<T> upstream = broadcast(b.weight[pair]), d = where_alive<T>(load(c), upstream * w_s);
      d_w += upstream * relu<T>(load(c));
      d_b += d;
      store(c, d);
    }
    add_sum<T>(b.gradient.b_c, k, b.unit.combined, d_b, b.first);
    add_sum<T>(b.gradient.w_s, k, b.unit.combined, d_w, b.first);
  }
}

// d[û ; v̂] → d of W_u's and W_v's outputs, in place, and with normalize_input the pulls on ‖u‖ and ‖v‖: d · W x / ‖x‖.
template <class T>
PDDM_INLINE void pair_through_norms(const Backward<T>& b, int64_t pair) {
  auto& number = b.numbers[pair];
  T pull[2];
  for (int which = 0; which < 2; ++which) {
    const T norm = which ? number.norm_v : number.norm_u;
    const T* bias = which ? b.b_v : b.b_u;
    Vec<T> sum{};
    through_norm<T>(b.uv, b.d_uv, which * b.hidden_panels, b.hidden_panels, pair, norm,
                    [&](int64_t p, int64_t o, int64_t k, Vec<T> x, Vec<T> d) {
                      d = where_alive<T>(x, d);
                      store(at(b.d_uv, which * b.hidden_panels + p, pair) + o, d);
                      if (b.unit.normalize_input) sum += d * (x * broadcast(norm) - load(bias + k));
                    });
    pull[which] = sum_lanes<T>(sum, Vec<T>{});
  }
  const T s_u = number.scale_u, s_v = T(2) * number.scale_v;
  const T most = T(0.999) / T(kNormFloor);  // a clamped norm pulls on nothing
  number.pull_u = b.unit.normalize_input && s_u < most ? pull[0] * s_u * s_u : T(0);
  number.pull_v = b.unit.normalize_input && s_v < most ? T(-0.25) * pull[1] * s_v * s_v : T(0);
}

// own(pair, offset, of i, of j) is what a pair adds to a vector of row i and of row j, in one panel of a slab of rows.
template <class T, class Own>
PDDM_INLINE void add_to_panel(const Backward<T>& b, T* panel, const Own& own) {
  for (int64_t pair = 0; pair < b.pairs; ++pair) {
    T *to_i = panel + b.i[pair] * kLanes<T>, *to_j = panel + b.j[pair] * kLanes<T>;
    for (int64_t o = 0; o < kLanes<T>; o += kWidth<T>) {
      Vec<T> of_i, of_j;
      own(pair, o, of_i, of_j);
      store(to_i + o, load(to_i + o) + of_i);
      store(to_j + o, load(to_j + o) + of_j);
    }
  }
}

// Columns of one panel of the rows' df, which |f_i − f_j| and the pulls reach, or of their da.
template <class T>
PDDM_INLINE void add_to_rows(const Backward<T>& b, int64_t panel) {
  constexpr int lanes = kLanes<T>;
  if (panel >= b.dim_panels) {
    const int64_t p = panel - b.dim_panels;
    const T* d_v = at(b.d_uv, b.hidden_panels + p, 0);
    return add_to_panel(b, at(b.d_a, p, 0), [&](int64_t pair, int64_t o, Vec<T>& of_i, Vec<T>& of_j) {
      of_i = of_j = load(d_v + pair * lanes + o) * broadcast(b.numbers[pair].scale_v);
    });
  }
  const T *f = at(b.f, panel, 0), *d_input = at(b.d_input, panel, 0);
  const auto apart = [](Vec<T> e, Vec<T> d) { return where_alive<T>(e, d) - where_alive<T>(Vec<T>{} - e, d); };
  if (!b.unit.normalize_input)
    return add_to_panel(b, at(b.d_f, panel, 0), [&](int64_t pair, int64_t o, Vec<T>& of_i, Vec<T>& of_j) {
      const Vec<T> e = load(f + b.i[pair] * lanes + o) - load(f + b.j[pair] * lanes + o);
      of_i = apart(e, load(d_input + pair * lanes + o)), of_j = Vec<T>{} - of_i;
    });
  add_to_panel(b, at(b.d_f, panel, 0), [&](int64_t pair, int64_t o, Vec<T>& of_i, Vec<T>& of_j) {
    const auto& number = b.numbers[pair];
    const Vec<T> f_i = load(f + b.i[pair] * lanes + o), f_j = load(f + b.j[pair] * lanes + o), e = f_i - f_j;
    const Vec<T> d = load(d_input + pair * lanes + o) * broadcast(number.scale_u);
    const Vec<T> across = apart(e, d) - e * broadcast(number.pull_u), both = (f_i + f_j) * broadcast(number.pull_v);
    of_i = both + across, of_j = both - across;
  });
}

// Pairs of one part where a pair's own row is all there is to do.
constexpr int64_t kPairs = 16;
constexpr int64_t parts_of(int64_t pairs) { return (pairs + kPairs - 1) / kPairs; }

// The weights that a stage's product of pairs reads: panels of `size` elements.
template <class T>
struct Weights {
  T* packed;
  int64_t panels, size;
};

template <class T>
PDDM_INLINE Weights<T> weights_of(const Backward<T>& b, Stage stage) {
  constexpr int64_t square = kLanes<T> * kLanes<T>;
  switch (stage) {
    case Stage::hidden: return {b.packed_u, b.hidden_panels, b.dim_panels * square};
    case Stage::combined: return {b.packed_c, b.combined_panels, 2 * b.hidden_panels * square};
    case Stage::back_combined: return {b.packed_back_c, 2 * b.hidden_panels, b.combined_panels * square};
    default: return {b.packed_back_u, b.dim_panels, b.hidden_panels * square};
  }
}

template <class T>
PDDM_INLINE void pack_weights(const Backward<T>& b, Stage stage, int64_t p, T* to) {
  constexpr int64_t lanes = kLanes<T>;
  const int64_t dim = b.unit.dim, hidden = b.unit.hidden, combined = b.unit.combined;
  const T *w_u = static_cast<const T*>(b.unit.w_u), *w_c = static_cast<const T*>(b.unit.w_c);
  switch (stage) {
    case Stage::hidden: return pack_rows(to, w_u, dim, hidden, p * lanes, dim);
    case Stage::combined:
      pack_rows(to, w_c, 2 * hidden, combined, p * lanes, hidden);
      return pack_rows(to + b.hidden_panels * lanes * lanes, w_c + hidden, 2 * hidden, combined, p * lanes, hidden);
    case Stage::back_combined:
      return pack_columns(to, w_c + p / b.hidden_panels * hidden, 2 * hidden, hidden, p % b.hidden_panels * lanes,
                          combined);
    default: return pack_columns(to, w_u, dim, dim, p * lanes, hidden);
  }
}

constexpr Stage kReadWeights[] = {Stage::hidden, Stage::combined, Stage::back_combined, Stage::back_hidden};

template <class T>
PDDM_INLINE int64_t stage_part_count(const Backward<T>& b, Stage stage) {
  const int64_t pairs = parts_of(b.pairs), rows = parts_of(b.rows.count);
  const int64_t dim = b.dim_panels, hidden = b.hidden_panels, combined = b.combined_panels;
  const auto products = [&](int64_t of, int64_t panels) { return row_blocks(b, of, panels) * panels; };
  switch (stage) {
    case Stage::unit_rows: {
      int64_t packed = 0;
      for (const Stage read : kReadWeights) packed += b.packed_u ? weights_of(b, read).panels : 0;
      return rows + packed;
    }
    case Stage::inputs: return pairs;
    case Stage::hidden: return products(b.pairs, hidden) + (b.first ? products(b.rows.count, hidden) : 0);
    case Stage::norms: return pairs;
    case Stage::combined: return products(b.pairs, combined);
    case Stage::score: return pairs < 1 ? 1 : pairs < combined ? pairs : combined;
    case Stage::back_combined: return products(b.pairs, 2 * hidden);
    case Stage::back_norms: return pairs;
    case Stage::back_hidden: return products(b.pairs, dim) + hidden + 2 * combined;
    case Stage::to_rows: return pairs < dim + hidden ? pairs : dim + hidden;
    case Stage::back_rows: return products(b.rows.count, dim) + (b.unit.normalize_input ? 0 : hidden);
    case Stage::back_unit_rows: return rows;
  }
  return 0;
}

template <class T>
PDDM_INLINE void run_stage(const Backward<T>& b, Stage stage, int64_t part, T* panel) {
  constexpr int width = kWidth<T>, lanes = kLanes<T>;
  const int64_t dim = b.unit.dim, hidden = b.unit.hidden, combined = b.unit.combined;
  const int64_t dim_panels = b.dim_panels, hidden_panels = b.hidden_panels;
  const T* w_v = static_cast<const T*>(b.unit.w_v);
  const auto each = [&](int64_t count, const auto& body) {
    for (int64_t r = part * kPairs; r < (part + 1) * kPairs && r < count; ++r) body(r);
  };
  const auto stepping = [&](int64_t panels, const auto& body) {
    for (int64_t p = part; p < panels; p += stage_part_count(b, stage)) body(p);
  };
  const auto store_row = [](T* to, const Vec<T>* x) { store(to, x[0]), store(to + width, x[1]); };
  const auto weights = [&](int64_t p) -> Panel<T> {
    const Weights<T> all = weights_of(b, stage);
    if (!all.packed) return pack_weights(b, stage, p, panel), Panel<T>{panel};
    const T* now = all.packed + p * all.size;
    if (p + b.threads >= all.panels) return {now};
    return {now, now + b.threads * all.size, now + (b.threads + 1) * all.size};  // parts are taken in turn
  };

  switch (stage) {
    case Stage::unit_rows: {
      const int64_t rows = parts_of(b.rows.count);
      if (part < rows) return each(b.rows.count, [&](int64_t row) { unit_row(b, row); });
      part -= rows;
      for (const Stage read : kReadWeights) {
        const Weights<T> all = weights_of(b, read);
        if (part < all.panels) return pack_weights(b, read, part, all.packed + part * all.size);
        part -= all.panels;
      }
      return;
    }
    case Stage::inputs: return each(b.pairs, [&](int64_t pair) { pair_inputs(b, pair); });
    case Stage::hidden:
      if (part < row_blocks(b, b.pairs, hidden_panels) * hidden_panels)
        return product(
            b, b.pairs, hidden_panels, part, weights,
            [&](auto& tile, int64_t pair, Panel<T>& w) { accumulate(tile, b.u, 0, pair, w, w.now, dim); },
            [&](int64_t p, int64_t pair, const Vec<T>* x) {
              const T* bias = b.b_u + p * lanes;
              const Vec<T> alive[2] = {relu<T>(x[0] + load(bias)), relu<T>(x[1] + load(bias + width))};
              store_row(at(b.uv, p, pair), alive);
            });
      part -= row_blocks(b, b.pairs, hidden_panels) * hidden_panels;
      return product(
          b, b.rows.count, hidden_panels, part,
          [&](int64_t p) { return pack_rows(panel, w_v, dim, hidden, p * lanes, dim), Panel<T>{panel}; },
          [&](auto& tile, int64_t row, Panel<T>& w) { accumulate(tile, b.f, 0, row, w, w.now, dim); },
          [&](int64_t p, int64_t row, const Vec<T>* x) { store_row(at(b.a, p, row), x); });
    case Stage::norms: return each(b.pairs, [&](int64_t pair) { pair_norms(b, pair); });
    case Stage::combined:
      return product(
          b, b.pairs, b.combined_panels, part, weights,
          [&](auto& tile, int64_t pair, Panel<T>& w) {
            accumulate(tile, b.uv, 0, pair, w, w.now, hidden);
            accumulate(tile, b.uv, hidden_panels, pair, w, w.now + hidden_panels * lanes * lanes, hidden);
          },
          [&](int64_t p, int64_t pair, const Vec<T>* x) {
            const T* bias = b.b_c + p * lanes;
            const Vec<T> biased[2] = {x[0] + load(bias), x[1] + load(bias + width)};
            store_row(at(b.d_c, p, pair), biased);
          });
    case Stage::score: return stepping(b.combined_panels, [&](int64_t p) { score_gradient(b, p); });
    case Stage::back_combined:
      return product(
          b, b.pairs, 2 * hidden_panels, part, weights,
          [&](auto& tile, int64_t pair, Panel<T>& w) { accumulate(tile, b.d_c, 0, pair, w, w.now, combined); },
          [&](int64_t p, int64_t pair, const Vec<T>* x) { store_row(at(b.d_uv, p, pair), x); });
    case Stage::back_norms: return each(b.pairs, [&](int64_t pair) { pair_through_norms(b, pair); });
    case Stage::back_hidden:
      if (part < hidden_panels) {
        weight_gradient<T>({b.gradient.w_u, dim, b.tiles_u, b.first, b.last}, hidden, dim, b.d_uv, 0, part, b.u, 0,
                           b.pairs);
        bias_gradient(b.gradient.b_u, hidden, b.d_uv, 0, part, b.pairs, b.first);
        bias_gradient(b.gradient.b_v, hidden, b.d_uv, hidden_panels, part, b.pairs, b.first);
        if (b.unit.normalize_input)
          weight_gradient<T>({b.gradient.w_v, dim, b.tiles_v, b.first, b.last}, hidden, dim, b.d_uv, hidden_panels,
                             part, b.v, 0, b.pairs);
        return;
      }
      part -= hidden_panels;
      if (part < 2 * b.combined_panels) {
        const int64_t which = part % 2;
        T* tiles = b.tiles_c ? b.tiles_c + which * hidden_panels * b.combined_panels * lanes * lanes : nullptr;
        return weight_gradient<T>(
            {static_cast<T*>(b.gradient.w_c) + which * hidden, 2 * hidden, tiles, b.first, b.last}, combined, hidden,
            b.d_c, 0, part / 2, b.uv, which * hidden_panels, b.pairs);
      }
      part -= 2 * b.combined_panels;
      return product(
          b, b.pairs, dim_panels, part, weights,
          [&](auto& tile, int64_t pair, Panel<T>& w) { accumulate(tile, b.d_uv, 0, pair, w, w.now, hidden); },
          [&](int64_t p, int64_t pair, const Vec<T>* x) { store_row(at(b.d_input, p, pair), x); });
    case Stage::to_rows: return stepping(dim_panels + hidden_panels, [&](int64_t p) { add_to_rows(b, p); });
    case Stage::back_rows: {
      const int64_t gradients = b.unit.normalize_input ? 0 : hidden_panels;
      if (part < gradients)
        return weight_gradient<T>({b.gradient.w_v, dim, nullptr, true, true}, hidden, dim, b.d_a, 0, part, b.f, 0,
                                  b.rows.count);
      return product(
          b, b.rows.count, dim_panels, part - gradients,
          [&](int64_t p) { return pack_columns(panel, w_v, dim, dim, p * lanes, hidden), Panel<T>{panel}; },
          [&](auto& tile, int64_t row, Panel<T>& w) { accumulate(tile, b.d_a, 0, row, w, w.now, hidden); },
          [&](int64_t p, int64_t row, const Vec<T>* x) {
            T* to = at(b.d_f, p, row);
            const Vec<T> sum[2] = {load(to) + x[0], load(to + width) + x[1]};
            store_row(to, sum);
          });
    }
    case Stage::back_unit_rows:
      return each(b.rows.count, [&](int64_t row) {
        T* to = b.d_rows + (b.source ? b.source[row] : row) * dim;
        through_norm<T>(b.f, b.d_f, 0, dim_panels, row, b.norm[row],
                        [&](int64_t, int64_t, int64_t k, Vec<T>, Vec<T> d) { store_some(to + k, d, dim - k); });
      });
  }
}

}  // namespace pddm::PDDM_ISA
