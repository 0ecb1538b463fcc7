// The way back: pairs with a gradient are recomputed in chunks of fixed size, and each chunk is added to the
// parameters' gradients in order, so that no sum depends on the number of threads.
#pragma once

#include <numeric>

#include "dense.h"

namespace pddm::cpu {

// A chunk's pairs follow from the dimensions and their number alone. Where there are many, a chunk's buffers stay in
// the nearer caches, but each chunk is worth another pass over the weights and their gradients. Few are one chunk.
constexpr int64_t kChunkBytes = 4 << 20, kMostChunkBytes = 16 << 20;
constexpr int64_t kLeastChunkPairs = 288, kMostChunkPairs = 1024;

// The rows that the pairs name; see Backward.
template <class T>
struct NamedRows {
  Rows rows;
  const int64_t* source;
  T* gradient;
};

// next(i, j, weight) gives the pairs in order and returns false after the last; at most `most` of them.
template <class T, class Next>
void backward(const Engine<T>& engine, const Parallel& parallel, const NamedRows<T>& named, const Unit& unit,
              int64_t most, const Next& next, const UnitGradient& out) {
  const int64_t lanes = engine.lanes;
  const auto panels = [&](int64_t columns) { return engine.stride(columns) / lanes; };
  Backward<T> b{};
  b.unit = unit, b.gradient = out, b.threads = parallel.threads;
  b.rows = named.rows, b.source = named.source, b.d_rows = named.gradient;
  b.dim_panels = panels(unit.dim), b.hidden_panels = panels(unit.hidden), b.combined_panels = panels(unit.combined);

  Arena arena;
  const auto filled_up = [&](const void* from, int64_t n) {
    T* to = arena.take_zeroed<T>(engine.stride(n));
    return static_cast<const T*>(std::copy_n(static_cast<const T*>(from), n, to) - n);
  };
  b.b_u = filled_up(unit.b_u, unit.hidden), b.b_v = filled_up(unit.b_v, unit.hidden);
  b.b_c = filled_up(unit.b_c, unit.combined), b.w_s = filled_up(unit.w_s, unit.combined);

  const auto slab = [&](int64_t count, int64_t panels, bool zeroed = false) {
    const int64_t rows = engine.slab_rows(count), size = rows * panels * lanes;
    return Slab<T>{zeroed ? arena.take_zeroed<T>(size) : arena.take<T>(size), rows};
  };
  b.f = slab(b.rows.count, b.dim_panels), b.a = slab(b.rows.count, b.hidden_panels);
  b.d_f = slab(b.rows.count, b.dim_panels, true), b.d_a = slab(b.rows.count, b.hidden_panels, true);
  b.norm = arena.take<T>(b.rows.count);

  const int64_t of_input = unit.normalize_input ? 3 : 2;  // u, d|u|, and v
  const int64_t per_pair = lanes * (of_input * b.dim_panels + 4 * b.hidden_panels + b.combined_panels);
  const auto fit = [&](int64_t bytes) { return bytes / (per_pair * int64_t(sizeof(T))); };
  const int64_t room = std::min(fit(kMostChunkBytes), kMostChunkPairs);
  const int64_t of_many = std::min(std::max(fit(kChunkBytes), kLeastChunkPairs), room);
  const int64_t capacity = std::max<int64_t>(most > room ? of_many : most, 1);
  b.u = slab(capacity, b.dim_panels), b.d_input = slab(capacity, b.dim_panels);
  b.uv = slab(capacity, 2 * b.hidden_panels), b.d_uv = slab(capacity, 2 * b.hidden_panels);
  b.d_c = slab(capacity, b.combined_panels);
  if (unit.normalize_input) b.v = slab(capacity, b.dim_panels);
  b.numbers = arena.take<PairNumbers<T>>(capacity);
  int64_t *i = arena.take<int64_t>(capacity), *j = arena.take<int64_t>(capacity);
  T* weight = arena.take<T>(capacity);
  b.i = i, b.j = j, b.weight = weight;

  if (most > capacity) {
    const int64_t of_u = b.hidden_panels * b.dim_panels * lanes * lanes;
    const int64_t of_c = 2 * b.hidden_panels * b.combined_panels * lanes * lanes;
    b.packed_u = arena.take<T>(of_u), b.packed_c = arena.take<T>(of_c);
    b.packed_back_u = arena.take<T>(of_u), b.packed_back_c = arena.take<T>(of_c);
    b.tiles_u = arena.take<T>(of_u), b.tiles_c = arena.take<T>(of_c);
    if (unit.normalize_input) b.tiles_v = arena.take<T>(of_u);
  }

  const int64_t longest = std::max({b.dim_panels, 2 * b.hidden_panels, b.combined_panels});
  std::vector<T*> panel(static_cast<size_t>(parallel.threads));
  for (T*& p : panel) p = arena.take<T>(longest * lanes * lanes);
  static_assert(static_cast<int>(Stage::back_unit_rows) < kMostStages, "all of them may follow each other");
  const auto run = [&](Stage from, Stage to) {
    const auto stage = [&](int s) { return static_cast<Stage>(static_cast<int>(from) + s); };
    share_in_turn(
        parallel, static_cast<int>(to) - static_cast<int>(from) + 1,
        [&](int s) { return engine.stage_parts(b, stage(s)); },
        [&](int64_t worker, int s, int64_t part) {
          engine.run(b, stage(s), part, panel[static_cast<size_t>(worker)]);
        });
  };

  T& b_s = *static_cast<T*>(out.b_s) = T(0);
  int64_t next_i, next_j;
  T next_weight;
  b.first = true;
  for (bool more = next(&next_i, &next_j, &next_weight); b.first || more; b.first = false) {
    for (b.pairs = 0; more && b.pairs < capacity; more = next(&next_i, &next_j, &next_weight)) {
      i[b.pairs] = next_i, j[b.pairs] = next_j, weight[b.pairs] = next_weight;
      ++b.pairs;
    }
    b.last = !more;
    count_pairs(b.pairs);
    b_s += std::accumulate(weight, weight + b.pairs, T(0));
    run(b.first ? Stage::unit_rows : Stage::inputs, b.last ? Stage::back_unit_rows : Stage::to_rows);
  }
}

// d_rows arrives zeroed; the gradient is overwritten.
template <class T>
void score_pairs_backward(const Engine<T>& engine, const Parallel& parallel, const Rows& rows, const Pairs& pairs,
                          const T* weight, const Unit& unit, T* d_rows, const UnitGradient& out) {
  std::vector<int64_t> i, j;
  std::vector<T> kept;
  for (int64_t t = 0; t < pairs.count; ++t)
    if (pairs.i[t] >= 0 && pairs.j[t] >= 0 && weight[t] != T(0))
      i.push_back(pairs.i[t]), j.push_back(pairs.j[t]), kept.push_back(weight[t]);
  const int64_t count = int64_t(i.size());
  const Touched touched({i.data(), j.data(), count}, rows.count);
  int64_t t = 0;
  const auto next = [&](int64_t* a, int64_t* b, T* w) {
    if (t == count) return false;
    *a = touched.i[t], *b = touched.j[t], *w = kept[t++];
    return true;
  };
  const NamedRows<T> named{{rows.data, int64_t(touched.rows.size())}, touched.rows.data(), d_rows};
  backward(engine, parallel, named, unit, count, next, out);
}

template <class T>
void score_matrix_backward(const Engine<T>& engine, const Parallel& parallel, const Rows& rows, int64_t split,
                           const T* weight, const Unit& unit, T* d_rows, const UnitGradient& out) {
  const bool symmetric = split < 0;
  const int64_t n = symmetric ? rows.count : split, m = symmetric ? n : rows.count - split;
  int64_t i = 0, j = -1;
  const auto next = [&](int64_t* a, int64_t* b, T* w) {
    do {
      if (++j == m) j = symmetric ? ++i : (++i, 0);
      if (m == 0 || i >= n) return false;
      *w = weight[i * m + j];
      if (symmetric && i != j) *w += weight[j * m + i];
    } while (*w == T(0));
    *a = i, *b = symmetric ? j : n + j;
    return true;
  };
  const NamedRows<T> named{{rows.data, n * m ? rows.count : 0}, nullptr, d_rows};
  backward(engine, parallel, named, unit, n * m, next, out);
}

}  // namespace pddm::cpu
