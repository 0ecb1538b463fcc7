// What a backend makes of one unit and some rows, through every door, on arrays of exactly their size.
#pragma once

#include <algorithm>
#include <cmath>
#include <memory>
#include <numeric>
#include <random>
#include <vector>

#include "../../csrc/cuda/backend.h"

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
  std::vector<unsigned char> stored;        // of a device, rows that are to be multiplied, and numbers of other types
};

// Numbers in each other type and back.
template <class T>
void ask_conversions(const cuda::DeviceBackend& device, Answers<T>& a) {
  using cuda::Number;
  std::vector<T> from{T(0), T(-0.0), T(1) / 3, T(-65504), T(65520), T(1e-8), T(-6e-8), T(1e-39), T(1e30), T(INFINITY)};
  while (from.size() < 1500) from.push_back(-from[from.size() - 10] * T(1.25));
  const auto own = std::is_same_v<T, double> ? Number::float64 : Number::float32;
  constexpr Number kAll[] = {Number::float32, Number::float64, Number::bfloat16, Number::float16};
  std::vector<double> there[4];
  std::vector<T> back[4];
  cuda::Conversion to[4], from_there[4];
  for (int k = 0; k < 4; ++k) {
    const int64_t count = k == 2 ? 0 : int64_t(from.size()) - 7 * k;  // one of nothing
    there[k].resize(from.size()), back[k].resize(from.size());
    to[k] = {from.data(), there[k].data(), count, own, kAll[k]};
    from_there[k] = {there[k].data(), back[k].data(), count, kAll[k], own};
  }
  device.convert(to, 4), device.convert(from_there, 4), device.convert(to, 0);
  to[0] = to[2], to[0].count = 1024, from_there[0] = from_there[2], from_there[0].count = 1024;
  device.convert(to, 1), device.convert(from_there, 1);
  for (const auto& v : back) {
    const auto* const bytes = reinterpret_cast<const unsigned char*>(v.data());
    a.stored.insert(a.stored.end(), bytes, bytes + v.size() * sizeof(T));
  }
}

// As candidates() of a device chooses them, by sorting: one list.
template <class T>
std::vector<int64_t> by_sorting(std::vector<int64_t> columns, int64_t count, const std::vector<T>& values, T sign) {
  const auto least = [&](int64_t c) { return values[c] != values[c]; };
  std::stable_sort(columns.begin(), columns.end(), [&](int64_t a, int64_t b) {
    return least(a) != least(b) ? least(b) : !least(a) && sign * values[a] > sign * values[b];
  });
  columns.resize(std::min<size_t>(columns.size(), size_t(count)));
  std::sort(columns.begin(), columns.end());
  columns.resize(size_t(count), -1);
  return columns;
}

// Whose pairs are scored: what a device chooses by itself, and elsewhere what it has to choose.
template <class T>
void ask_candidates(const Backend& backend, const Sizes& z, Answers<T>& a) {
  const auto* const device = dynamic_cast<const cuda::DeviceBackend*>(&backend);
  for (const int64_t n : {z.n, 3 * z.n + 700}) {
    // Numbers whose squares are summed exactly.
    std::vector<T> rows(static_cast<size_t>(n * z.dim)), weights(static_cast<size_t>(n));
    std::vector<int64_t> labels(weights.size());
    for (int64_t e = 0; e < n * z.dim; ++e) rows[e] = T((e * 7919) % 23 - 11) * T(e / z.dim % 2 ? 0.25 : 1024);
    for (int64_t r = 0; r < n; ++r) labels[r] = r % 9 ? r * 7 % 5 - 2 : 3;
    if (z.odd) std::fill_n(rows.begin(), z.dim, T(0)), rows.back() = NAN;
    std::vector<int> classes(4 * weights.size());
    const cuda::Classes of{classes.data(), classes.data() + n, classes.data() + 2 * n, classes.data() + 3 * n};
    if (device) {
      std::vector<unsigned char> stored(rows.size() * sizeof(T));
      device->candidate_rows({rows.data(), n}, z.dim, labels.data(), stored.data(), weights.data(), of);
      // Not the last, if it is NaN: of many bits, all as good.
      a.stored.insert(a.stored.end(), stored.begin(), stored.end() - (z.odd ? z.dim * int64_t(sizeof(T)) : 0));
    } else {
      std::iota(of.order, of.order + n, 0);
      std::stable_sort(of.order, of.order + n, [&](int x, int y) { return labels[x] < labels[y]; });
      for (int64_t r = 0; r < n; ++r) {
        of.begins[r] = int(std::count_if(labels.begin(), labels.end(), [&](int64_t y) { return y < labels[r]; }));
        of.sizes[r] = int(std::count(labels.begin(), labels.end(), labels[r]));
        of.of[r] = z.odd && r == n - 1 ? -1 : of.begins[r];
      }
    }
    a.chosen.insert(a.chosen.end(), classes.begin(), classes.end());

    const int64_t some = std::min<int64_t>(n, 4), first = n - some;
    for (T& w : weights) w = T(1 + (&w - weights.data()) % 3);
    for (const bool equals : {false, true}) {  // many of them, and of NaN
      std::vector<T> products(static_cast<size_t>(some * n));
      for (int64_t e = 0; e < some * n; ++e) {
        const int64_t x = e * 7919 % 10007;
        products[e] = !equals ? T(x - 5000) : x % 11 == 5 ? T(NAN) : T(x % 3 - 1);
      }
      for (const int64_t count : {int64_t(1), int64_t(9), n / 3 + 1}) {
        std::vector<int64_t> lists(static_cast<size_t>(some * 2 * count), -7);
        if (device) {
          device->candidates(products.data(), some, n, first, weights.data(), of, count, lists.data());
        } else {
          lists.clear();
          for (int64_t row = first; row < n; ++row) {
            std::vector<T> values(weights.size());
            std::vector<int64_t> others, own;
            for (int64_t c = 0; c < n; ++c) {
              values[c] = products[(row - first) * n + c] * weights[c];
              if (of.of[row] >= 0 && of.of[c] >= 0 && of.of[c] != of.of[row]) others.push_back(c);
              if (c != row && labels[c] == labels[row]) own.push_back(c);
            }
            for (const auto& list : {by_sorting(others, count, values, T(1)), by_sorting(own, count, values, T(-1))})
              lists.insert(lists.end(), list.begin(), list.end());
          }
        }
        a.chosen.insert(a.chosen.end(), lists.begin(), lists.end());
      }
    }
  }
}

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
    // The same rows in both lists, which are none of each other's pairs.
    std::vector<int64_t> twice(2 * lists.size());
    for (int64_t r = 0; r < z.n; ++r)
      for (const int64_t at : {int64_t(0), room})
        std::copy_n(lists.begin() + r * room, room, twice.begin() + r * 2 * room + at);
    const Asked asked{twice.data(), z.n, 2 * room, room};
    places.resize(twice.size());
    const int64_t count = backend.count_asked(asked, begins.data(), places.data());
    std::vector<int64_t> first(static_cast<size_t>(count)), second(first.size());
    backend.write_asked(asked, begins.data(), first.data(), second.data(), places.data());
    std::vector<T> scores(first.size()), most[2];
    std::vector<int64_t> partners[2];
    for (size_t t = 0; t < scores.size(); ++t) scores[t] = t % 7 == 3 ? T(NAN) : T((t * 31) % 13) - 6;
    const std::unique_ptr<bool[]> found[2]{std::unique_ptr<bool[]>(new bool[static_cast<size_t>(z.n)]),
                                           std::unique_ptr<bool[]>(new bool[static_cast<size_t>(z.n)])};
    for (const bool second : {false, true}) {
      most[second].resize(static_cast<size_t>(z.n)), partners[second].resize(static_cast<size_t>(z.n));
      const BestAsked best{partners[second].data(), most[second].data(), found[second].get()};
      for (const bool lowest : {!second, second}) {
        backend.best_asked(asked, second, places.data(), scores.data(), count, lowest, best);
        a.listed.insert(a.listed.end(), most[second].begin(), most[second].end());
        for (int64_t r = 0; r < z.n; ++r) columns[r] = partners[second][r] + found[second][r] * 1000;
        a.chosen.insert(a.chosen.end(), columns.begin(), columns.end());
      }
    }
    std::vector<int64_t> quads[4];
    std::vector<T> their[3];
    for (auto& v : quads) v.resize(static_cast<size_t>(z.n));
    for (auto& v : their) v.resize(static_cast<size_t>(z.n));
    const std::unique_ptr<bool[]> valid(new bool[static_cast<size_t>(z.n)]);
    backend.join_best(z.n, {partners[1].data(), most[1].data(), found[1].get()},
                      {partners[0].data(), most[0].data(), found[0].get()},
                      {z.n, quads[0].data(), quads[1].data(), quads[2].data(), quads[3].data(), their[0].data(),
                       their[1].data(), their[2].data(), valid.get()});
    for (int64_t r = 0; r < z.n; ++r) quads[0][r] += valid[r] * 1000;
    for (const auto& v : quads) a.chosen.insert(a.chosen.end(), v.begin(), v.end());
    for (const auto& v : their) a.listed.insert(a.listed.end(), v.begin(), v.end());
    for (const auto& v : {begins, first, second, places}) a.chosen.insert(a.chosen.end(), v.begin(), v.end());
  }

  ask_candidates(backend, z, a);
  if (const auto* const device = dynamic_cast<const cuda::DeviceBackend*>(&backend)) ask_conversions(*device, a);

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
