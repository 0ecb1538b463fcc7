// Hard quadruplets. The argmin and argmax are the epilogue of the walk: no score outlives its block, except those that
// are asked for.
//
//   batch   the positive pairs, then row i and row j of the hardest: P + 2n scores
//   anchor  every unordered pair once; a score feeds the bests of both its rows
//   pair    the same, and every positive pair's own score is kept
#pragma once

#include <limits>
#include <numeric>

#include "scan.h"

namespace pddm::cpu {

// The best so far and where it was; a NaN never enters, and ties go to the lowest index whatever the order of arrival.
template <class T>
struct Best {
  T score;
  int64_t index;
  static constexpr int64_t kNone = std::numeric_limits<int64_t>::max();

  static Best none(bool smallest) {
    const T worst = std::numeric_limits<T>::infinity();
    return {smallest ? worst : -worst, kNone};
  }
  bool found() const { return index != kNone; }
  void smallest(T s, int64_t at) {
    if (s < score || (s == score && at < index)) score = s, index = at;
  }
  void largest(T s, int64_t at) {
    if (s > score || (s == score && at < index)) score = s, index = at;
  }
};

// Rows with equal labels next to each other, in their own order.
struct Classes {
  std::vector<int64_t> order, begin;  // begin has one more entry than there are classes
  Classes(const int64_t* labels, int64_t n) : order(static_cast<size_t>(n)) {
    std::iota(order.begin(), order.end(), 0);
    std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return labels[a] < labels[b]; });
    for (int64_t r = 0; r < n; ++r)
      if (r == 0 || labels[order[r]] != labels[order[r - 1]]) begin.push_back(r);
    begin.push_back(n);
  }
  int64_t count() const { return int64_t(begin.size()) - 1; }
};

template <class T>
struct Slots {
  const Quadruplets& out;
  void clear(int64_t q) const { write(q, {-1, -1}, -1, -1, T(0), T(0), T(0), false); }
  void write(int64_t q, RowPair p, int64_t k, int64_t l, T s_ij, T s_ik, T s_jl, bool valid) const {
    out.i[q] = p.i, out.j[q] = p.j, out.k[q] = k, out.l[q] = l;
    static_cast<T*>(out.s_ij)[q] = s_ij, static_cast<T*>(out.s_ik)[q] = s_ik, static_cast<T*>(out.s_jl)[q] = s_jl;
    out.valid[q] = valid;
  }
};

template <class T>
void mine_batch(const Engine<T>& engine, const Parallel& parallel, const Rows& rows, const int64_t* labels,
                const Unit& unit, const Classes& classes, const Slots<T>& slots) {
  const int64_t n = rows.count;
  const std::vector<int64_t>& order = classes.order;
  Prepared<T> p(engine, parallel, unit, n);
  p.set_rows(rows, order.data());

  // Pairs are compared by their rows as given; (i, j) with i < j as one number.
  Plan<Ranges> positives;
  for (int64_t c = 0; c < classes.count(); ++c)
    for (int64_t r = classes.begin[c]; r < classes.begin[c + 1]; ++r)
      positives.singles.add(r, r + 1, classes.begin[c + 1] - r - 1);
  struct Hardest {
    T score = std::numeric_limits<T>::infinity();
    RowPair at{Best<T>::kNone, Best<T>::kNone}, row{-1, -1};  // as given, and in the workspace
    void offer(T s, RowPair given, RowPair in) {
      if (s < score || (s == score && (given.i < at.i || (given.i == at.i && given.j < at.j))))
        score = s, at = given, row = in;
    }
  };
  std::vector<Hardest> hardest(static_cast<size_t>(parallel.threads));
  scan(p, positives, [&](int64_t worker, const Group& g, int64_t, const T* s) {
    for (int l = 0; l < g.count; ++l) {
      const RowPair in{g.j[l], g.i[l]};  // sorted stably, so order[in.i] < order[in.j]
      hardest[worker].offer(s[l], {order[in.i], order[in.j]}, in);
    }
  });
  Hardest best;
  for (const Hardest& h : hardest)
    if (h.row.i >= 0) best.offer(h.score, h.at, h.row);
  if (best.row.i < 0) return slots.clear(0);

  struct Hard {
    Best<T> k = Best<T>::none(false), l = k;
  };
  std::vector<Hard> hard(static_cast<size_t>(parallel.threads));
  const int64_t label = labels[best.at.i];
  const auto both = rectangle_plan({best.row.i, best.row.j}, 0, n, engine.lanes);
  scan(p, both, [&](int64_t worker, const Group& g, int64_t, const T* s) {
    for (int lane = 0; lane < g.count; ++lane) {
      const RowPair at = row_and_column(g, engine.lanes, lane);
      const int64_t column = order[at.j];
      if (labels[column] != label) (at.i == best.row.i ? hard[worker].k : hard[worker].l).largest(s[lane], column);
    }
  });
  Best<T> k = Best<T>::none(false), l = k;
  for (const Hard& h : hard) k.largest(h.k.score, h.k.index), l.largest(h.l.score, h.l.index);
  if (!k.found() || !l.found()) return slots.clear(0);
  slots.write(0, best.at, k.index, l.index, best.score, k.score, l.score, true);
}

template <class T>
void mine_rows(const Engine<T>& engine, const Parallel& parallel, const Rows& rows, const int64_t* labels,
               const Unit& unit, const Classes& classes, Mode mode, const Slots<T>& slots) {
  const int64_t n = rows.count, threads = parallel.threads;
  Prepared<T> p(engine, parallel, unit, n);
  p.set_rows(rows, nullptr);

  // Where a positive pair's slot is: pairs in the order of i, then j.
  std::vector<int64_t> slot, rank;
  if (mode == Mode::pair) {
    rank.resize(n), slot.resize(n);
    std::vector<int64_t> later(n);
    for (int64_t c = 0; c < classes.count(); ++c)
      for (int64_t r = classes.begin[c]; r < classes.begin[c + 1]; ++r) {
        rank[classes.order[r]] = r;
        later[classes.order[r]] = classes.begin[c + 1] - r - 1;
      }
    for (int64_t i = 0, at = 0; i < n; ++i) slot[i] = at, at += later[i];
  }

  Arena arena;
  Best<T>* negative = arena.take<Best<T>>(threads * n);
  Best<T>* positive = mode == Mode::anchor ? arena.take<Best<T>>(threads * n) : nullptr;
  std::fill_n(negative, threads * n, Best<T>::none(false));
  if (positive) std::fill_n(positive, threads * n, Best<T>::none(true));
  T* s_ij = static_cast<T*>(slots.out.s_ij);
  scan(p, triangle_plan(n, engine.lanes, false), [&](int64_t worker, const Group& g, int64_t, const T* s) {
    Best<T>* far = positive ? positive + worker * n : nullptr;
    Best<T>* near = negative + worker * n;
    for (int l = 0; l < g.count; ++l) {
      const RowPair at = pair_of(g, engine.lanes, l);  // i < j
      if (labels[at.i] != labels[at.j]) {
        near[at.i].largest(s[l], at.j);
        near[at.j].largest(s[l], at.i);
      } else if (mode == Mode::anchor) {
        far[at.i].smallest(s[l], at.j);
        far[at.j].smallest(s[l], at.i);
      } else {
        const int64_t q = slot[at.i] + rank[at.j] - rank[at.i] - 1;
        slots.out.i[q] = at.i, slots.out.j[q] = at.j, s_ij[q] = s[l];
      }
    }
  });
  for (int64_t t = 1; t < threads; ++t)
    for (int64_t r = 0; r < n; ++r) {
      negative[r].largest(negative[t * n + r].score, negative[t * n + r].index);
      if (mode == Mode::anchor) positive[r].smallest(positive[t * n + r].score, positive[t * n + r].index);
    }

  for (int64_t q = 0; q < slots.out.slots; ++q) {
    const int64_t i = mode == Mode::anchor ? q : slots.out.i[q];
    const int64_t j = mode == Mode::anchor ? positive[q].index : slots.out.j[q];
    const bool valid = j != Best<T>::kNone && negative[i].found() && negative[j].found();
    if (!valid) {
      slots.clear(q);
      continue;
    }
    const T s = mode == Mode::anchor ? positive[q].score : s_ij[q];
    slots.write(q, {i, j}, negative[i].index, negative[j].index, s, negative[i].score, negative[j].score, true);
  }
}

template <class T>
void mine(const Engine<T>& engine, const Parallel& parallel, const Rows& rows, const int64_t* labels, const Unit& unit,
          Mode mode, const Quadruplets& out) {
  const Slots<T> slots{out};
  const Classes classes(labels, rows.count);
  const bool hopeless = classes.count() < 2 || classes.count() == rows.count;  // no negative, or no positive
  if (hopeless) {
    for (int64_t q = 0; q < out.slots; ++q) slots.clear(q);
  } else if (mode == Mode::batch) {
    mine_batch(engine, parallel, rows, labels, unit, classes, slots);
  } else {
    mine_rows(engine, parallel, rows, labels, unit, classes, mode, slots);
  }
}

}  // namespace pddm::cpu
