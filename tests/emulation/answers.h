// What a backend makes of one unit and some rows, through every door, on arrays of exactly their size.
#pragma once

#include <algorithm>
#include <cmath>
#include <memory>
#include <random>
#include <vector>

#include "../../csrc/problem.h"

namespace pddm {

struct Scratch {
  std::vector<std::unique_ptr<unsigned char[]>> taken;
  static void* take(void* context, int64_t bytes) {
    auto& self = *static_cast<Scratch*>(context);
    self.taken.emplace_back(new unsigned char[static_cast<size_t>(bytes)]);
    return self.taken.back().get();
  }
};

struct Sizes {
  int64_t n, dim, hidden, combined;
  bool normalize_input;
  bool odd = false;  // with a row of zeros and one that holds a NaN
};

// So many numbers, and the next time others.
template <class T>
struct Normal {
  std::mt19937 random{7};
  std::normal_distribution<T> normal;
  std::vector<T> operator()(int64_t count) {
    std::vector<T> v(static_cast<size_t>(count));
    for (T& x : v) x = normal(random);
    return v;
  }
};

template <class T>
struct Answers {
  std::vector<int64_t> mined[3], ranked;
  std::vector<int64_t> chosen;              // of given values, so exactly
  std::vector<T> scores, listed, gradient;  // of the matrix, of the list, of everything through both
  std::vector<T> sloped;                    // what the loss's gradients are
};

template <class T>
Answers<T> ask(const Backend& backend, const Sizes& z) {
  Normal<T> filled;
  std::vector<T> rows = filled(z.n * z.dim);
  if (z.odd) std::fill_n(rows.begin(), z.dim, T(0)), rows.back() = NAN;
  const std::vector<T> p[8] = {
      filled(z.hidden * z.dim),          filled(z.hidden),   filled(z.hidden * z.dim), filled(z.hidden),
      filled(z.combined * 2 * z.hidden), filled(z.combined), filled(z.combined),       filled(1)};
  std::vector<int64_t> labels(static_cast<size_t>(z.n));
  for (int64_t i = 0; i < z.n; ++i) labels[i] = i * 7 % 5;
  const Rows given{rows.data(), z.n};
  const Unit unit{z.dim,       z.hidden,    z.combined,  z.normalize_input, p[0].data(), p[1].data(),
                  p[2].data(), p[3].data(), p[4].data(), p[5].data(),       p[6].data(), p[7].data()};

  Answers<T> a;
  for (int mode = 0; mode < 3; ++mode) {
    const int64_t slots = mode == 0 ? 1 : mode == 1 ? z.n : backend.count_positive_pairs(labels.data(), z.n);
    std::vector<int64_t> at[4];
    std::vector<T> score[3];
    for (auto& v : at) v.resize(static_cast<size_t>(slots));
    for (auto& v : score) v.resize(static_cast<size_t>(slots));
    const std::unique_ptr<bool[]> valid(new bool[static_cast<size_t>(slots)]);
    backend.mine(given, labels.data(), unit, static_cast<Mode>(mode),
                 {slots, at[0].data(), at[1].data(), at[2].data(), at[3].data(), score[0].data(), score[1].data(),
                  score[2].data(), valid.get()});
    for (const auto& v : at) a.mined[mode].insert(a.mined[mode].end(), v.begin(), v.end());
    for (const auto& v : score) a.listed.insert(a.listed.end(), v.begin(), v.end());
  }
  a.scores.resize(static_cast<size_t>(z.n * z.n));
  backend.score_matrix(given, -1, unit, a.scores.data());
  const int64_t split = z.n / 3;
  std::vector<T> across(static_cast<size_t>(split * (z.n - split)));
  backend.score_matrix(given, split, unit, across.data());
  a.scores.insert(a.scores.end(), across.begin(), across.end());

  std::vector<int64_t> i{0, z.n - 1, z.n / 2}, j{z.n - 1, z.n - 1, 0};
  // Of many rows one has more pairs than a block of the backward pass takes.
  for (int64_t other = 0; z.n >= 100 && other < 70; ++other) i.push_back(0), j.push_back(other);
  const Pairs pairs{i.data(), j.data(), int64_t(i.size())};
  std::vector<T> listed(i.size());
  backend.score_pairs(given, pairs, unit, listed.data());
  a.listed.insert(a.listed.end(), listed.begin(), listed.end());

  const int64_t k = std::min<int64_t>(z.n, 4);
  a.ranked.resize(static_cast<size_t>(split * k));
  std::vector<T> best(static_cast<size_t>(split * k));
  backend.topk({rows.data(), split}, given, k, unit, best.data(), a.ranked.data());
  a.listed.insert(a.listed.end(), best.begin(), best.end());

  // Values of which many are equal and some NaN, and classes of which one takes no part.
  for (const int64_t columns : {z.n, 3 * z.n + 700}) {
    const int64_t some = std::min<int64_t>(z.n, 8);
    std::vector<T> values(static_cast<size_t>(some * columns));
    std::vector<int64_t> own(static_cast<size_t>(some)), classes(static_cast<size_t>(columns));
    for (int64_t e = 0; e < int64_t(values.size()); ++e)
      values[e] = e % 11 == 5 ? T(NAN) : T((e * 7919) % 23 - 9) * T(e % 3 ? 0.125 : 1e6);
    for (int64_t r = 0; r < some; ++r) own[r] = r % 6 - 1;
    for (int64_t c = 0; c < columns; ++c) classes[c] = c % 5 - 1;
    for (const int64_t count : {int64_t(1), columns / 3 + 1, columns + 2}) {
      std::vector<int64_t> found(static_cast<size_t>(some * count), -7);
      backend.largest(values.data(), some, columns, own.data(), classes.data(), count, found.data());
      a.chosen.insert(a.chosen.end(), found.begin(), found.end());
    }
  }

  // Lists of different lengths, which name rows that name them or do not, and scores of which some are NaN or equal.
  for (const int64_t room : {int64_t(0), int64_t(3), int64_t(70)}) {
    std::vector<int64_t> lists(static_cast<size_t>(z.n * room), -1), begins(static_cast<size_t>(z.n) + 1);
    std::vector<int64_t> places(lists.size()), columns(static_cast<size_t>(z.n));
    for (int64_t r = 0; r < z.n; ++r)
      for (int64_t other = r * 5 % 3, e = 0; other < z.n && e < room && e < r; other += 1 + other * r % 3)
        if (other != r) lists[r * room + e++] = other;
    const Asked asked{lists.data(), z.n, room};
    const int64_t count = backend.count_asked(asked, begins.data(), places.data());
    std::vector<int64_t> first(static_cast<size_t>(count)), second(first.size());
    backend.write_asked(asked, begins.data(), first.data(), second.data(), places.data());
    std::vector<T> scores(first.size()), most(static_cast<size_t>(z.n));
    for (size_t t = 0; t < scores.size(); ++t) scores[t] = t % 7 == 3 ? T(NAN) : T((t * 31) % 13) - 6;
    for (const bool lowest : {false, true}) {
      const std::unique_ptr<bool[]> found(new bool[static_cast<size_t>(z.n)]);
      backend.best_asked(asked, places.data(), scores.data(), count, lowest, columns.data(), most.data(), found.get());
      a.listed.insert(a.listed.end(), most.begin(), most.end());
      for (int64_t r = 0; r < z.n; ++r) columns[r] += found[r] * 1000;
      a.chosen.insert(a.chosen.end(), columns.begin(), columns.end());
    }
    for (const auto& v : {begins, first, second, places}) a.chosen.insert(a.chosen.end(), v.begin(), v.end());
  }

  const std::vector<T> weights = filled(std::max<int64_t>(z.n * z.n, 3));
  for (int which = 0; which < 3; ++which) {
    std::vector<T> d_rows(rows.size(), T(0)), d[8];
    for (int q = 0; q < 8; ++q) d[q].resize(p[q].size());
    const UnitGradient to{d[0].data(), d[1].data(), d[2].data(), d[3].data(),
                          d[4].data(), d[5].data(), d[6].data(), d[7].data()};
    if (which == 0) backend.score_pairs_backward(given, pairs, weights.data(), unit, d_rows.data(), to);
    if (which > 0)
      backend.score_matrix_backward(given, which == 1 ? -1 : split, weights.data(), unit, d_rows.data(), to);
    a.gradient.insert(a.gradient.end(), d_rows.begin(), d_rows.end());
    for (const auto& v : d) a.gradient.insert(a.gradient.end(), v.begin(), v.end());
  }

  // The loss of quadruplets of other rows than the odd ones. Some are not valid, and one row is in many.
  const int64_t slots = z.n + 40, usual = std::max<int64_t>(z.n - 2 * z.odd, 1);
  std::vector<int64_t> rows_of[4];
  for (int of = 0; of < 4; ++of)
    for (int64_t q = 0; q < slots; ++q)
      rows_of[of].push_back(z.odd + (of == 2 && q % 3 ? 0 : q * (2 * of + 1) + of) % usual);
  const std::unique_ptr<bool[]> valid(new bool[static_cast<size_t>(slots)]);
  for (int64_t q = 0; q < slots; ++q) valid[q] = q % 5 != 1;
  const std::vector<T> s_ij = filled(slots), s_ik = filled(slots), s_jl = filled(slots), upstream = filled(1);
  const Picked picked{slots,       rows_of[0].data(), rows_of[1].data(), rows_of[2].data(), rows_of[3].data(),
                      s_ij.data(), s_ik.data(),       s_jl.data(),       valid.get()};
  std::vector<uint8_t> open(static_cast<size_t>(slots));
  T loss = 0;
  backend.quadruplet_loss(given, z.dim, picked, {0.5, 1.0, 0.5}, &loss, open.data());
  a.scores.push_back(loss);
  std::vector<T> d_x(rows.size()), d_ij(s_ij.size()), d_ik(s_ij.size()), d_jl(s_ij.size());
  backend.quadruplet_loss_backward(given, z.dim, picked, 0.5, upstream.data(), open.data(), d_x.data(), d_ij.data(),
                                   d_ik.data(), d_jl.data());
  for (const auto& v : {d_x, d_ij, d_ik, d_jl}) a.sloped.insert(a.sloped.end(), v.begin(), v.end());
  return a;
}

// Largest difference over largest magnitude.
template <class T>
double apart(const std::vector<T>& a, const std::vector<T>& b) {
  if (a.size() != b.size()) return INFINITY;
  double most = 0, size = 1e-30;
  for (size_t e = 0; e < a.size(); ++e) {
    if (!(std::isfinite(double(a[e])))) return INFINITY;
    most = std::max(most, std::abs(double(a[e]) - double(b[e]))), size = std::max(size, std::abs(double(b[e])));
  }
  return most / size;
}

}  // namespace pddm
