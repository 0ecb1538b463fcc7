// The way back: pairs with a gradient are recomputed in chunks of fixed size, and each chunk is added to the
// parameters' gradients in order, so that no sum depends on the number of threads.
#pragma once

#include "dense.h"

namespace pddm::cpu {

// Bytes of a chunk's buffers; the pairs in it follow from the dimensions alone.
constexpr int64_t kChunkBytes = 8 << 20;
constexpr int64_t kMaxChunkPairs = 1024;

// next(i, j, weight) gives the pairs in order and returns false after the last; at most `most` of them. Indices are
// p's rows.
template <class T, class Next>
void backward(Prepared<T>& p, int64_t most, const Next& next, T* const* d_rows, const UnitGradient& out) {
  const Engine<T>& engine = p.engine;
  const Workspace<T>& w = p.work;
  const int64_t lanes = engine.lanes;
  const int64_t hidden = engine.padded_outputs(w.hidden), combined = engine.padded_outputs(w.combined);
  const SumOffsets at = engine.sum_offsets(w);

  Arena arena;
  Gradient<T> g{};
  g.f = arena.take_zeroed<T>(w.rows * w.f_stride), g.a = arena.take_zeroed<T>(w.rows * w.a_stride);
  // Weight gradients grow where they are wanted if whole strips fit there, and are copied there otherwise.
  struct Part {
    T* to;
    int64_t to_stride, outputs, inputs;
    Strided<T>* at;
  };
  T* w_c = static_cast<T*>(out.w_c);
  const Part parts[] = {{static_cast<T*>(out.w_u), w.dim, w.hidden, w.dim, &g.w_u},
                        {static_cast<T*>(out.w_v), w.dim, w.hidden, w.dim, &g.w_v},
                        {w_c, 2 * w.hidden, w.combined, w.hidden, &g.w_c_u},
                        {w_c + w.hidden, 2 * w.hidden, w.combined, w.hidden, &g.w_c_v}};
  for (const Part& part : parts) {
    const int64_t stride = engine.stride(part.inputs), outputs = engine.padded_outputs(part.outputs);
    const bool fits = stride == part.inputs && outputs == part.outputs;
    *part.at = fits ? Strided<T>{part.to, part.to_stride} : Strided<T>{arena.take<T>(outputs * stride), stride};
  }
  g.sums = arena.take_zeroed<T>(at.stride);

  const int64_t by_pairs = w.normalize_input ? 2 : 1;  // W_u's gradient, and W_v's
  const int64_t per_pair = combined + by_pairs * (hidden + w.f_stride) + 3 * w.a_stride + w.f_stride;
  int64_t capacity = std::min({kChunkBytes / (per_pair * int64_t(sizeof(T))), kMaxChunkPairs, most});
  capacity = engine.stride(std::max<int64_t>(capacity, 1));
  Chunk<T> chunk{};
  chunk.capacity = capacity;
  int64_t *i = arena.take<int64_t>(capacity), *j = arena.take<int64_t>(capacity);
  T* weight = arena.take<T>(capacity);
  chunk.i = i, chunk.j = j, chunk.weight = weight;
  chunk.d_c = arena.take<T>(capacity * combined), chunk.d_u = arena.take<T>(capacity * hidden);
  chunk.u = arena.take<T>(capacity * w.f_stride), chunk.uv = arena.take<T>(capacity * 2 * w.a_stride);
  chunk.row_f = arena.take<T>(capacity * w.f_stride), chunk.row_a = arena.take<T>(capacity * w.a_stride);
  if (w.normalize_input) {
    chunk.d_v = arena.take<T>(capacity * hidden), chunk.v = arena.take<T>(capacity * w.f_stride);
    chunk.pull = arena.take<T>(capacity);
  }
  chunk.sums = arena.take_zeroed<T>(capacity / lanes * at.stride);

  const int64_t threads = p.parallel.threads;
  std::vector<void*> scratch(static_cast<size_t>(workers(p.parallel, capacity / lanes)));
  for (void*& s : scratch) s = arena.take_bytes(engine.backward_scratch_bytes(w, kMaxBackwardGroups));

  chunk.first = true;
  for (bool more = true; more; chunk.first = false) {
    chunk.pairs = 0;
    while (chunk.pairs < capacity && (more = next(i + chunk.pairs, j + chunk.pairs, weight + chunk.pairs)))
      ++chunk.pairs;
    if (chunk.pairs == 0 && !chunk.first) break;
    count_pairs(chunk.pairs);
    chunk.groups = (chunk.pairs + lanes - 1) / lanes;
    for (int64_t t = chunk.pairs; t < chunk.groups * lanes; ++t) i[t] = i[0], j[t] = j[0], weight[t] = T(0);
    const int64_t block =
        std::min(kMaxBackwardGroups, std::max<int64_t>(1, (chunk.groups + 2 * threads - 1) / (2 * threads)));
    share(p.parallel, (chunk.groups + block - 1) / block, [&](int64_t worker, int64_t b) {
      engine.backward(w, chunk, b * block, std::min(block, chunk.groups - b * block), scratch[worker]);
    });
    share(p.parallel, engine.reduce_parts(w), [&](int64_t, int64_t part) { engine.reduce(w, chunk, g, part); });
  }
  share(p.parallel, engine.finish_parts(w), [&](int64_t, int64_t part) { engine.finish(w, g, part); });

  share(p.parallel, w.rows, [&](int64_t, int64_t r) {
    if (d_rows[r]) std::copy_n(g.f + r * w.f_stride, w.dim, d_rows[r]);
  });
  for (const Part& part : parts)
    if (part.at->data != part.to)
      for (int64_t r = 0; r < part.outputs; ++r)
        std::copy_n(part.at->data + r * part.at->stride, part.inputs, part.to + r * part.to_stride);
  std::copy_n(g.sums + at.b_u, w.hidden, static_cast<T*>(out.b_u));
  std::copy_n(g.sums + at.b_v, w.hidden, static_cast<T*>(out.b_v));
  std::copy_n(g.sums + at.b_c, w.combined, static_cast<T*>(out.b_c));
  std::copy_n(g.sums + at.w_s, w.combined, static_cast<T*>(out.w_s));
  *static_cast<T*>(out.b_s) = g.sums[at.b_s];
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
  const int64_t n = int64_t(touched.rows.size());
  Prepared<T> p(engine, parallel, unit, n, true);
  p.work.used = n;
  p.set_rows({rows.data, n}, touched.rows.data());
  std::vector<T*> to(static_cast<size_t>(p.work.rows), nullptr);
  for (int64_t r = 0; r < n; ++r) to[r] = d_rows + touched.rows[r] * unit.dim;
  int64_t t = 0;
  const auto next = [&](int64_t* a, int64_t* b, T* w) {
    if (t == count) return false;
    *a = touched.i[t], *b = touched.j[t], *w = kept[t++];
    return true;
  };
  backward(p, count, next, to.data(), out);
}

template <class T>
void score_matrix_backward(const Engine<T>& engine, const Parallel& parallel, const Rows& rows, int64_t split,
                           const T* weight, const Unit& unit, T* d_rows, const UnitGradient& out) {
  const bool symmetric = split < 0;
  const int64_t n = symmetric ? rows.count : split, m = symmetric ? n : rows.count - split;
  Prepared<T> p(engine, parallel, unit, rows.count, true);
  p.work.used = rows.count;
  p.set_rows(rows, nullptr);
  std::vector<T*> to(static_cast<size_t>(p.work.rows), nullptr);
  for (int64_t r = 0; r < rows.count; ++r) to[r] = d_rows + r * unit.dim;
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
  backward(p, n * m, next, to.data(), out);
}

}  // namespace pddm::cpu
