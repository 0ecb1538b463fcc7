// What is asked for by name: scores of listed pairs, the whole matrix, the best of a gallery; and dot products.
#pragma once

#include <mutex>

#include "largest.h"
#include "scan.h"

namespace pddm::cpu {

// The distinct rows of a list of pairs, and the list in their terms; what no pair names is never touched.
struct Touched {
  std::vector<int64_t> rows, i, j;
  Touched(const Pairs& pairs, int64_t n) : i(static_cast<size_t>(pairs.count)), j(i.size()) {
    std::vector<int64_t> position(static_cast<size_t>(n), -1);
    for (int64_t t = 0; t < pairs.count; ++t) position[pairs.i[t]] = position[pairs.j[t]] = 0;
    for (int64_t r = 0; r < n; ++r)
      if (position[r] == 0) position[r] = int64_t(rows.size()), rows.push_back(r);
    for (int64_t t = 0; t < pairs.count; ++t) i[t] = position[pairs.i[t]], j[t] = position[pairs.j[t]];
  }
};

template <class T>
void score_pairs(const Engine<T>& engine, const Parallel& parallel, const Rows& rows, const Pairs& pairs,
                 const Unit& unit, T* scores) {
  if (pairs.count == 0) return;
  const Touched touched(pairs, rows.count);
  Prepared<T> p(engine, parallel, unit, int64_t(touched.rows.size()));
  p.set_rows({rows.data, int64_t(touched.rows.size())}, touched.rows.data());
  const Plan<Listed> plan{{}, Listed({touched.i.data(), touched.j.data(), pairs.count})};
  scan(p, plan, [&](int64_t, const Group& g, int64_t at, const T* s) { std::copy_n(s, g.count, scores + at); });
}

inline std::vector<int64_t> consecutive(int64_t first, int64_t count) {
  std::vector<int64_t> rows(static_cast<size_t>(count));
  for (int64_t r = 0; r < count; ++r) rows[r] = first + r;
  return rows;
}

template <class T>
void score_matrix(const Engine<T>& engine, const Parallel& parallel, const Rows& rows, int64_t split, const Unit& unit,
                  T* scores) {
  const int lanes = engine.lanes;
  if (split < 0) {
    const int64_t n = rows.count;
    if (n == 0) return;
    Prepared<T> p(engine, parallel, unit, n);
    p.set_rows(rows, nullptr);
    scan(p, triangle_plan(n, lanes, true), [&](int64_t, const Group& g, int64_t, const T* s) {
      for (int l = 0; l < g.count; ++l) {
        const RowPair at = pair_of(g, lanes, l);
        scores[at.i * n + at.j] = scores[at.j * n + at.i] = s[l];
      }
    });
    return;
  }
  const int64_t n = split, m = rows.count - split;
  if (n == 0 || m == 0) return;
  const T* data = static_cast<const T*>(rows.data);
  const int64_t base = engine.stride(m);  // the columns come first, so that their panels start at a panel
  Prepared<T> p(engine, parallel, unit, base + n);
  p.set_rows({data + n * unit.dim, m}, nullptr);
  p.set_rows({data, n}, nullptr, base);
  scan(p, rectangle_plan(consecutive(base, n), 0, m, lanes), [&](int64_t, const Group& g, int64_t, const T* s) {
    for (int l = 0; l < g.count; ++l) {
      const RowPair at = row_and_column(g, lanes, l);
      scores[(at.i - base) * m + at.j] = s[l];
    }
  });
}

// The gallery passes by in pieces, so that nothing but the k best of a query is kept. A heap per query has its worst on
// top; a query's heap is under one of a few locks, and as the order is total, it ends up the same whoever came first.
template <class T>
void topk(const Engine<T>& engine, const Parallel& parallel, const Rows& queries, const Rows& gallery, int64_t k,
          const Unit& unit, T* scores, int64_t* indices) {
  constexpr int64_t kPiece = 2048;
  constexpr size_t kLocks = 64;
  struct Entry {
    T score;
    int64_t index;
  };
  const auto better = [](const Entry& a, const Entry& b) { return comes_before(a.score, a.index, b.score, b.index); };
  const int64_t q = queries.count;
  if (q == 0 || k == 0) return;
  const int lanes = engine.lanes;
  const int64_t base = engine.stride(q);
  const int64_t piece = std::min(kPiece, gallery.count);
  Prepared<T> p(engine, parallel, unit, base + engine.stride(piece));
  p.set_rows(queries, nullptr);

  Arena arena;
  Entry* heaps = arena.take<Entry>(q * k);
  std::vector<int64_t> sizes(static_cast<size_t>(q), 0);
  std::vector<std::mutex> locks(kLocks);
  for (int64_t first = 0; first < gallery.count; first += piece) {
    const int64_t count = std::min(piece, gallery.count - first);
    p.set_rows({static_cast<const T*>(gallery.data) + first * unit.dim, count}, nullptr, base);
    const auto plan = rectangle_plan(consecutive(0, q), base, count, lanes);
    scan(p, plan, [&](int64_t, const Group& g, int64_t, const T* s) {
      for (int l = 0; l < g.count;) {
        const int64_t query = row_and_column(g, lanes, l).i;
        Entry* heap = heaps + query * k;
        const std::lock_guard<std::mutex> guard(locks[static_cast<size_t>(query) % kLocks]);
        int64_t& size = sizes[query];
        for (; l < g.count && row_and_column(g, lanes, l).i == query; ++l) {
          const Entry entry{s[l], first + row_and_column(g, lanes, l).j - base};
          if (size == k) {
            if (!better(entry, heap[0])) continue;
            std::pop_heap(heap, heap + size--, better);
          }
          heap[size++] = entry;
          std::push_heap(heap, heap + size, better);
        }
      }
    });
  }
  share(parallel, q, [&](int64_t, int64_t row) {
    Entry* heap = heaps + row * k;
    std::sort_heap(heap, heap + k, better);
    for (int64_t t = 0; t < k; ++t) scores[row * k + t] = heap[t].score, indices[row * k + t] = heap[t].index;
  });
}

// x · yᵀ of dense rows, (n, m): a library's products depend on the number of threads, these do not.
template <class T>
void dot_products(const Engine<T>& engine, const Parallel& parallel, const Rows& x, const Rows& y, int64_t dim,
                  T* out) {
  const int64_t lanes = engine.lanes, size = engine.stride(dim) * lanes, n = x.count, m = y.count;
  const int64_t panels = engine.stride(m) / lanes, square = lanes * lanes;
  Arena arena;
  T *packed = arena.take<T>(panels * size), *scratch = arena.take<T>(parallel.threads * (size + square));
  const auto pack = [&](T* panel, const Rows& rows, int64_t p) {
    engine.pack_rows(panel, static_cast<const T*>(rows.data), rows.count, dim, p * lanes);
  };
  share(parallel, panels, [&](int64_t, int64_t p) { pack(packed + p * size, y, p); });
  share(parallel, engine.stride(n) / lanes, [&](int64_t worker, int64_t p) {
    T *own = scratch + worker * (size + square), *products = own + size;
    pack(own, x, p);
    for (int64_t q = 0; q < panels; ++q) {
      engine.multiply(own, packed + q * size, dim, products);
      for (int64_t r = 0; r < std::min(lanes, n - p * lanes); ++r)
        std::copy_n(products + r * lanes, std::min(lanes, m - q * lanes), out + (p * lanes + r) * m + q * lanes);
    }
  });
}

}  // namespace pddm::cpu
