// test_core SET: the drivers and kernels of one instruction set against arithmetic anyone can check by eye.
#include <algorithm>
#include <array>
#include <atomic>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <map>
#include <random>
#include <string>
#include <thread>
#include <tuple>
#include <vector>

#include "../../csrc/cpu/backend.h"
#include "../../csrc/cpu/dense.h"
#include "../../csrc/cpu/gradient.h"
#include "../../csrc/cpu/mine.h"
#include "../../csrc/cpu/nearest.h"
#include "../../csrc/cpu/rounded.h"
#include "check.h"

PDDM_DECLARE_ENGINES(plain)
PDDM_DECLARE_ENGINES(emulated)
PDDM_DECLARE_ENGINES(emulated_amx)

namespace {

using namespace pddm;

void run_threads(int64_t count, void (*body)(void*, int64_t), void* context) {
  std::vector<std::thread> pool;
  for (int64_t t = 0; t < count; ++t) pool.emplace_back(body, context, t);
  for (std::thread& t : pool) t.join();
}

Parallel threads(int n) { return {n, run_threads}; }

struct Sizes {
  int64_t n, dim, hidden, combined;
  bool normalize_input;
};

// std::normal_distribution draws otherwise in every library, and some draws lie on a kink of relu, where differences of
// scores are no gradient.
double normal(std::mt19937& random) {
  const double radius = (random() + 1.0) / 4294967296.0, angle = random() / 4294967296.0;
  return std::sqrt(-2 * std::log(radius)) * std::cos(6.283185307179586 * angle);
}

// Parameters and rows as doubles, and the same in T for the engines.
struct Case {
  Sizes z;
  std::vector<double> rows, p[8];
  std::vector<int64_t> labels;

  Case(Sizes z, unsigned seed, bool round_to_float) : z(z) {
    std::mt19937 random(seed);
    const auto fill = [&](std::vector<double>& v, int64_t size, double scale) {
      v.resize(size);
      for (double& x : v) {
        x = scale * normal(random);
        if (round_to_float) x = double(float(x));
      }
    };
    const double by_dim = 1 / std::sqrt(double(z.dim)), by_hidden = 1 / std::sqrt(double(z.hidden));
    fill(rows, z.n * z.dim, 1);
    fill(p[0], z.hidden * z.dim, by_dim), fill(p[1], z.hidden, 0.1);
    fill(p[2], z.hidden * z.dim, by_dim), fill(p[3], z.hidden, 0.1);
    fill(p[4], z.combined * 2 * z.hidden, by_hidden), fill(p[5], z.combined, 0.1);
    fill(p[6], z.combined, 1), fill(p[7], 1, 1);
    for (int64_t r = 0; r < z.n; ++r) labels.push_back(int64_t(random() % (z.n / 3 + 1)) - 1);
    if (z.n > 4) {  // a duplicate and an opposite: u = 0 and v = 0
      for (int64_t k = 0; k < z.dim; ++k) {
        rows[2 * z.dim + k] = rows[k];
        rows[3 * z.dim + k] = -rows[z.dim + k];
      }
    }
  }
};

double norm(const std::vector<double>& x) {
  double sum = 0;
  for (double v : x) sum += v * v;
  return std::max(std::sqrt(sum), kNormFloor);
}

double naive_score(const Case& c, const std::vector<double>& rows, const std::vector<double>* p, int64_t i, int64_t j) {
  const Sizes& z = c.z;
  std::vector<double> f[2], u(z.dim), v(z.dim);
  for (int side = 0; side < 2; ++side) {
    const int64_t r = side ? j : i;
    f[side].assign(rows.begin() + r * z.dim, rows.begin() + (r + 1) * z.dim);
    const double length = norm(f[side]);
    for (double& x : f[side]) x /= length;
  }
  for (int64_t k = 0; k < z.dim; ++k) u[k] = std::abs(f[0][k] - f[1][k]), v[k] = (f[0][k] + f[1][k]) / 2;
  if (z.normalize_input) {
    const double nu = norm(u), nv = norm(v);
    for (int64_t k = 0; k < z.dim; ++k) u[k] /= nu, v[k] /= nv;
  }
  std::vector<double> both[2];
  for (int which = 0; which < 2; ++which) {
    const std::vector<double>& x = which ? v : u;
    for (int64_t o = 0; o < z.hidden; ++o) {
      double sum = p[2 * which + 1][o];
      for (int64_t k = 0; k < z.dim; ++k) sum += p[2 * which][o * z.dim + k] * x[k];
      both[which].push_back(std::max(sum, 0.0));
    }
    const double length = norm(both[which]);
    for (double& x : both[which]) x /= length;
  }
  double score = p[7][0];
  for (int64_t o = 0; o < z.combined; ++o) {
    double sum = p[5][o];
    for (int which = 0; which < 2; ++which)
      for (int64_t k = 0; k < z.hidden; ++k) sum += p[4][o * 2 * z.hidden + which * z.hidden + k] * both[which][k];
    score += p[6][o] * std::max(sum, 0.0);
  }
  return score;
}

// The case in the engine's type.
template <class T>
struct Typed {
  std::vector<T> rows, p[8];
  Unit unit;
  explicit Typed(const Case& c) : rows(c.rows.begin(), c.rows.end()) {
    for (int k = 0; k < 8; ++k) p[k].assign(c.p[k].begin(), c.p[k].end());
    unit = {c.z.dim,     c.z.hidden,  c.z.combined, c.z.normalize_input, p[0].data(), p[1].data(),
            p[2].data(), p[3].data(), p[4].data(),  p[5].data(),         p[6].data(), p[7].data()};
  }
  Rows all(const Case& c) const { return {rows.data(), c.z.n}; }
};

template <class T>
std::vector<T> matrix(const cpu::Engine<T>& engine, const Case& c, const Typed<T>& t, int thread_count) {
  std::vector<T> s(c.z.n * c.z.n, T(-77));
  cpu::score_matrix<T>(engine, threads(thread_count), t.all(c), -1, t.unit, s.data());
  return s;
}

template <class T>
void test_scores(const cpu::Engine<T>& engine, const Case& c, double tolerance) {
  const Typed<T> t(c);
  const std::vector<T> s = matrix(engine, c, t, 2);
  for (int64_t i = 0; i < c.z.n; ++i)
    for (int64_t j = 0; j < c.z.n; ++j) {
      const double truth = naive_score(c, c.rows, c.p, i, j);
      CHECK(std::abs(s[i * c.z.n + j] - truth) <= tolerance, "S(%ld, %ld) = %.9g, not %.9g", long(i), long(j),
            double(s[i * c.z.n + j]), truth);
      CHECK(s[i * c.z.n + j] == s[j * c.z.n + i], "not symmetric");
    }
  CHECK(matrix(engine, c, t, 1) == s && matrix(engine, c, t, 5) == s, "the number of threads shows");

  std::vector<int64_t> i, j;
  for (int64_t p = 0; p < 3 * c.z.n; ++p) i.push_back(p * 7 % c.z.n), j.push_back(p * 5 % c.z.n);
  std::vector<T> listed(i.size());
  cpu::score_pairs<T>(engine, threads(3), t.all(c), {i.data(), j.data(), int64_t(i.size())}, t.unit, listed.data());
  for (size_t p = 0; p < i.size(); ++p)
    CHECK(listed[p] == s[i[p] * c.z.n + j[p]], "a listed pair differs from the matrix");

  const int64_t split = c.z.n / 3;
  std::vector<T> rectangle(split * (c.z.n - split));
  cpu::score_matrix<T>(engine, threads(2), t.all(c), split, t.unit, rectangle.data());
  for (int64_t r = 0; r < split; ++r)
    for (int64_t column = split; column < c.z.n; ++column)
      CHECK(rectangle[r * (c.z.n - split) + column - split] == s[r * c.z.n + column], "the rectangle differs");

  const int64_t k = std::min<int64_t>(c.z.n, 6);
  std::vector<T> best(c.z.n * k);
  std::vector<int64_t> at(c.z.n * k);
  cpu::topk<T>(engine, threads(2), t.all(c), t.all(c), k, t.unit, best.data(), at.data());
  for (int64_t q = 0; q < c.z.n; ++q) {
    std::vector<int64_t> order(c.z.n);
    std::iota(order.begin(), order.end(), 0);
    std::stable_sort(order.begin(), order.end(),
                     [&](int64_t a, int64_t b) { return s[q * c.z.n + a] > s[q * c.z.n + b]; });
    for (int64_t r = 0; r < k; ++r)
      CHECK(at[q * k + r] == order[r] && best[q * k + r] == s[q * c.z.n + order[r]], "top-k of query %ld", long(q));
  }
}

// By brute force on the engine's own matrix, whose scores are the miner's to the bit.
template <class T>
void test_mining(const cpu::Engine<T>& engine, const Case& c) {
  const Typed<T> t(c);
  const int64_t n = c.z.n;
  const std::vector<T> s = matrix(engine, c, t, 1);
  std::vector<int64_t> hardest_negative(n, -1), hardest_positive(n, -1);
  for (int64_t a = 0; a < n; ++a)
    for (int64_t b = 0; b < n; ++b) {
      if (a == b) continue;
      int64_t& best = c.labels[a] == c.labels[b] ? hardest_positive[a] : hardest_negative[a];
      const bool smaller = c.labels[a] == c.labels[b];
      if (best < 0 || (smaller ? s[a * n + b] < s[a * n + best] : s[a * n + b] > s[a * n + best])) best = b;
    }
  using Quad = std::tuple<int64_t, int64_t, int64_t, int64_t, bool>;
  const auto complete = [&](int64_t i, int64_t j) {
    const bool valid = i >= 0 && j >= 0 && hardest_negative[i] >= 0 && hardest_negative[j] >= 0;
    return valid ? Quad{i, j, hardest_negative[i], hardest_negative[j], true} : Quad{-1, -1, -1, -1, false};
  };
  std::vector<Quad> expected[3];
  int64_t first = -1, second = -1;
  for (int64_t i = 0; i < n; ++i) {
    expected[1].push_back(complete(i, hardest_positive[i]));
    for (int64_t j = i + 1; j < n; ++j)
      if (c.labels[i] == c.labels[j]) {
        expected[2].push_back(complete(i, j));
        if (first < 0 || s[i * n + j] < s[first * n + second]) first = i, second = j;
      }
  }
  expected[0].push_back(complete(first, second));

  for (int mode = 0; mode < 3; ++mode)
    for (int workers : {1, 2, 5}) {
      const int64_t slots = int64_t(expected[mode].size());
      std::vector<int64_t> at[4];
      for (auto& v : at) v.assign(slots + 1, -9);
      std::vector<T> score[3];
      for (auto& v : score) v.assign(slots + 1, T(-9));
      std::vector<char> valid(slots + 1);
      cpu::mine<T>(engine, threads(workers), t.all(c), c.labels.data(), t.unit, Mode(mode),
                   {slots, at[0].data(), at[1].data(), at[2].data(), at[3].data(), score[0].data(), score[1].data(),
                    score[2].data(), reinterpret_cast<bool*>(valid.data())});
      for (int64_t q = 0; q < slots; ++q) {
        const Quad got{at[0][q], at[1][q], at[2][q], at[3][q], valid[q] != 0};
        CHECK(got == expected[mode][q], "mode %d, slot %ld: (%ld, %ld, %ld, %ld)", mode, long(q), long(at[0][q]),
              long(at[1][q]), long(at[2][q]), long(at[3][q]));
        const auto [i, j, k, l, ok] = expected[mode][q];
        CHECK(score[0][q] == (ok ? s[i * n + j] : T(0)) && score[1][q] == (ok ? s[i * n + k] : T(0)) &&
                  score[2][q] == (ok ? s[j * n + l] : T(0)),
              "mode %d, slot %ld: scores", mode, long(q));
      }
    }
}

template <class T>
struct Gradients {
  std::vector<T> rows, p[8];
};

template <class T>
Gradients<T> backward(const cpu::Engine<T>& engine, const Case& c, const std::vector<int64_t>& i,
                      const std::vector<int64_t>& j, const std::vector<double>& weight, int workers) {
  const Typed<T> t(c);
  const std::vector<T> w(weight.begin(), weight.end());
  Gradients<T> g;
  g.rows.assign(t.rows.size(), T(0));
  for (int k = 0; k < 8; ++k) g.p[k].assign(t.p[k].size(), T(-5));
  const UnitGradient to{g.p[0].data(), g.p[1].data(), g.p[2].data(), g.p[3].data(),
                        g.p[4].data(), g.p[5].data(), g.p[6].data(), g.p[7].data()};
  cpu::score_pairs_backward<T>(engine, threads(workers), t.all(c), {i.data(), j.data(), int64_t(i.size())}, w.data(),
                               t.unit, g.rows.data(), to);
  return g;
}

// Against central differences of the naive scores.
template <class T>
void test_gradients(const cpu::Engine<T>& engine, const Case& c, double tolerance) {
  std::vector<int64_t> i, j;
  std::vector<double> weight;
  for (int64_t p = 0; p < 40; ++p) {
    const int64_t a = 4 + p * 3 % (c.z.n - 4), b = 4 + (p * 5 + 1) % (c.z.n - 4);  // no kinks: neither u nor v is 0
    if (a == b) continue;
    i.push_back(a), j.push_back(b), weight.push_back(p % 4 ? std::cos(double(p)) : 0);
  }
  i.push_back(-1), j.push_back(-1), weight.push_back(1);  // a slot that is not valid
  const Gradients<T> g = backward(engine, c, i, j, weight, 2);
  const auto total = [&](const std::vector<double>& rows, const std::vector<double>* p) {
    double sum = 0;
    for (size_t q = 0; q + 1 < i.size(); ++q) sum += weight[q] * naive_score(c, rows, p, i[q], j[q]);
    return sum;
  };
  const double step = 1e-6;
  const auto compare = [&](const char* what, double got, double up, double down) {
    const double slope = (up - down) / (2 * step);
    CHECK(std::abs(got - slope) <= tolerance * (1 + std::abs(slope)), "d/d%s = %.9g, not %.9g", what, got, slope);
  };
  for (size_t e = 0; e < c.rows.size(); e += 3) {
    std::vector<double> up = c.rows, down = c.rows;
    up[e] += step, down[e] -= step;
    compare("rows", g.rows[e], total(up, c.p), total(down, c.p));
  }
  const char* names[8] = {"w_u", "b_u", "w_v", "b_v", "w_c", "b_c", "w_s", "b_s"};
  for (int k = 0; k < 8; ++k)
    for (size_t e = 0; e < c.p[k].size(); e += c.p[k].size() / 50 + 1) {
      std::vector<double> up[8], down[8];
      for (int q = 0; q < 8; ++q) up[q] = down[q] = c.p[q];
      up[k][e] += step, down[k][e] -= step;
      compare(names[k], g.p[k][e], total(c.rows, up), total(c.rows, down));
    }

  for (int workers : {1, 5}) {
    const Gradients<T> other = backward(engine, c, i, j, weight, workers);
    bool same = other.rows == g.rows;
    for (int k = 0; k < 8; ++k) same = same && other.p[k] == g.p[k];
    CHECK(same, "the number of threads shows in the gradient");
  }
}

// More pairs than one chunk holds, and the dense backward, against the listed one.
template <class T>
void test_chunks(const cpu::Engine<T>& engine, const Case& c, double tolerance) {
  const int64_t n = c.z.n;
  const Typed<T> t(c);
  std::vector<T> weight(n * n);
  for (int64_t p = 0; p < n * n; ++p) weight[p] = T(p % 7 - 3) / T(8);
  Gradients<T> dense, listed;
  const auto fresh = [&](Gradients<T>& g) {
    g.rows.assign(t.rows.size(), T(0));
    for (int k = 0; k < 8; ++k) g.p[k].assign(t.p[k].size(), T(-5));
    return UnitGradient{g.p[0].data(), g.p[1].data(), g.p[2].data(), g.p[3].data(),
                        g.p[4].data(), g.p[5].data(), g.p[6].data(), g.p[7].data()};
  };
  const UnitGradient to_dense = fresh(dense), to_listed = fresh(listed);
  cpu::score_matrix_backward<T>(engine, threads(2), t.all(c), -1, weight.data(), t.unit, dense.rows.data(), to_dense);
  std::vector<int64_t> i, j;
  for (int64_t p = 0; p < n * n; ++p) i.push_back(p / n), j.push_back(p % n);
  cpu::score_pairs_backward<T>(engine, threads(2), t.all(c), {i.data(), j.data(), n * n}, weight.data(), t.unit,
                               listed.rows.data(), to_listed);
  const auto close = [&](const std::vector<T>& a, const std::vector<T>& b) {
    double most = 0, size = 0;
    for (size_t e = 0; e < a.size(); ++e)
      most = std::max(most, std::abs(double(a[e]) - double(b[e]))), size = std::max(size, std::abs(double(b[e])));
    return most <= tolerance * (1 + size);
  };
  CHECK(close(dense.rows, listed.rows), "rows of the dense backward");
  for (int k = 0; k < 8; ++k) CHECK(close(dense.p[k], listed.p[k]), "parameter %d of the dense backward", k);
}

// Stages follow each other, every part is done once, and a part that throws holds nobody up.
void test_stages() {
  const auto run = [](int64_t count, void (*body)(void*, int64_t), void* context) {
    std::vector<std::thread> pool;
    for (int64_t t = 0; t < count; ++t)
      pool.emplace_back([=] {
        try {
          body(context, t);
        } catch (int) {
        }
      });
    for (std::thread& t : pool) t.join();
  };
  for (const bool throws : {false, true}) {
    std::atomic<int> done[3] = {};
    std::atomic<bool> in_turn{true};
    cpu::share_in_turn(
        {3, run}, 3, [](int stage) { return 40 - 10 * stage; },
        [&](int64_t, int stage, int64_t part) {
          if (stage && done[stage - 1] < 50 - 10 * stage) in_turn = false;
          ++done[stage];
          if (throws && stage == 0 && part == 7) throw 1;
        });
    CHECK(in_turn && done[0] == 40 && done[1] == 30 && done[2] == 20, "parts of stages that follow each other%s",
          throws ? ", one of which throws" : "");
  }
}

// Rows of small numbers, whose products are exact, so that many are equal.
template <class T>
void test_nearest(const cpu::Engine<T>& engine) {
  std::mt19937 random(7);
  for (const auto& [n, dim, count] : {std::array<int64_t, 3>{1, 1, 1}, {9, 3, 8}, {33, 17, 5}, {300, 5, 40}}) {
    std::vector<T> rows(n * dim);
    std::vector<int64_t> classes(n), expected(n * count, -1);
    for (T& x : rows) x = T(int(random() % 5)) - 2;
    for (int64_t& c : classes) c = int64_t(random() % 8) - 1;
    for (int64_t i = 0; i < n; ++i) {
      std::vector<std::pair<T, int64_t>> others;
      for (int64_t j = 0; j < n; ++j) {
        T product = 0;
        for (int64_t k = 0; k < dim; ++k) product += rows[i * dim + k] * rows[j * dim + k];
        if (classes[i] >= 0 && classes[j] >= 0 && classes[i] != classes[j]) others.push_back({-product, j});
      }
      std::sort(others.begin(), others.end());
      const auto found = std::min<int64_t>(count, int64_t(others.size()));
      for (int64_t t = 0; t < found; ++t) expected[i * count + t] = others[t].second;
      std::sort(expected.begin() + i * count, expected.begin() + i * count + found);
    }
    for (const int workers : {1, 3}) {
      std::vector<int64_t> got(n * count);
      const Parallel parallel = threads(workers);
      cpu::Nearest<T>(engine, parallel, {rows.data(), n}, dim, classes.data(), count).write(got.data(), count);
      CHECK(got == expected, "the %ld nearest of %ld rows, %d threads", long(count), long(n), workers);
    }
  }
}

enum class Kind { far_apart, clusters, among_some, among_many, low_classes, sizes, tiny, nan, all_alike, zero, nobody };

// By whole numbers the choice is the same, or none is made.
void test_rounded(const cpu::RoundedEngine& rounded, const cpu::Engine<float>& engine) {
  std::mt19937 random(8);
  for (const auto& [n, dim, count] :
       {std::array<int64_t, 3>{600, 1, 3}, {1100, 17, 1}, {1500, 130, 32}, {400, 33, 399}})
    for (const Kind kind : {Kind::far_apart, Kind::clusters, Kind::among_some, Kind::among_many, Kind::low_classes,
                            Kind::sizes, Kind::tiny, Kind::nan, Kind::all_alike, Kind::zero, Kind::nobody}) {
      const int64_t equals = kind == Kind::among_some ? 60 : kind == Kind::among_many ? 300 : 0;
      std::vector<float> rows(n * dim), centres(8 * dim);
      std::vector<int64_t> classes(n);
      for (float& x : centres) x = float(normal(random));
      for (int64_t i = 0; i < n; ++i) {
        classes[i] = kind == Kind::nobody || i % 41 == 7 ? -1 : i / 3;
        if (kind == Kind::low_classes && i % 5 == 3) classes[i] = -(int64_t(1) << (31 + i % 32)) - i % 2;
        double size = 0;
        for (int64_t k = 0; k < dim; ++k) {
          float& x = rows[i * dim + k];
          const double centre = centres[i % 8 * dim + k], own = normal(random);
          x = kind == Kind::clusters ? float(centre + own / 8) : kind == Kind::all_alike ? 1.f : float(own);
          if (k == 0 && i <= equals) x = 0;
          size += double(x) * x;
        }
        for (int64_t k = 0; k < dim; ++k) {
          float& x = rows[i * dim + k];
          x = kind == Kind::zero ? 0.f : float(x / std::sqrt(size)) * (kind == Kind::sizes && i % 5 ? 1e-3f : 1.f);
          // The first row has others that are as good as each other, but for their rounding.
          if (i == 0 && equals) x = k == 0 ? 1.f : 0.f;
          if (i > 0 && i <= equals) x = k == 0 ? 0.7f + 1e-6f * float(random() % 3) : 0.7f * x;
          if (i % 41 == 7 || (kind == Kind::nan && i % 300 == 5 && k == dim / 2)) x = std::nanf("");
          if (kind == Kind::tiny) x *= 1e-11f;
        }
      }
      const std::vector<int64_t> untouched(n * count, -7);
      std::vector<int64_t> expected = untouched;
      cpu::Nearest<float>(engine, threads(1), {rows.data(), n}, dim, classes.data(), count)
          .write(expected.data(), count);
      for (const int workers : {1, 3}) {
        std::vector<int64_t> got = untouched;
        const Parallel parallel = threads(workers);
        cpu::RoundedNearest nearest(rounded, engine, parallel, {rows.data(), n}, dim, classes.data(), count);
        const bool made = nearest.find(got.data());
        CHECK(got == (made ? expected : untouched), "kind %d: the %ld nearest of %ld rows by whole numbers, %d threads",
              int(kind), long(count), long(n), workers);
        // Clusters are too close together for an engine that leaves them to a finer one.
        const bool fine_enough = kind < Kind::sizes && !(kind == Kind::clusters && rounded.finer);
        if (dim > 17 && fine_enough) CHECK(made, "kind %d of %ld rows", int(kind), long(n));
        if (kind == Kind::nan || kind == Kind::zero || kind == Kind::nobody)
          CHECK(!made, "kind %d of %ld rows", int(kind), long(n));
      }
    }
}

void test_counters(const cpu::Engine<float>& engine) {
  const Case c({90, 8, 8, 8, false}, 3, true);
  const Typed<float> t(c);
  cpu::reset_counters();
  matrix(engine, c, t, 2);
  CHECK(cpu::read_counters().pairs_scored == 90 * 91 / 2, "%ld pairs", long(cpu::read_counters().pairs_scored));
  CHECK(cpu::read_counters().bytes_peak > 0, "no bytes counted");
  const int64_t peak = cpu::read_counters().bytes_peak;
  cpu::reset_counters();
  matrix(engine, c, t, 2);
  CHECK(cpu::read_counters().bytes_peak == peak, "scratch was left alive");
}

template <class T>
void test_engine(const cpu::Engine<T>& engine, double tolerance, bool gradients) {
  const bool single = sizeof(T) == 4;
  const Sizes sizes[] = {{1, 1, 1, 1, false},     {5, 3, 2, 4, false},    {37, 7, 5, 3, true},
                         {33, 16, 33, 12, false}, {70, 33, 17, 29, true}, {101, 20, 40, 66, false}};
  unsigned seed = 1;
  for (const Sizes& z : sizes) {
    const Case c(z, seed++, single);
    test_scores(engine, c, tolerance);
    test_mining(engine, c);
    if (gradients && z.n > 8) test_gradients(engine, c, single ? 2e-4 : 1e-6);
  }
  if (gradients) test_chunks(engine, Case({45, 6, 9, 5, true}, 9, single), single ? 1e-5 : 1e-12);
}

}  // namespace

int main(int argc, char** argv) {
  const std::string set = argc > 1 ? argv[1] : "portable";
  const cpu::Engine<float>* float32 = nullptr;
  const cpu::Engine<double>* float64 = nullptr;
  const cpu::Engine<float>* bfloat16 = nullptr;
  const cpu::RoundedEngine* rounded = nullptr;
  bool supported = false;
  std::map<std::string, bool> here;
  for (const cpu::Capability& capability : cpu::capabilities()) here[capability.name] = capability.supported;
  if (here[set]) cpu::set_capability(set);  // asks for what it needs
  here["plain"] = true, here["emulated"] = here["emulated_amx"] = here["avx512"];
#define PDDM_USE(isa)                                                                                \
  if (set == #isa && (supported = here[#isa]))                                                       \
  float32 = isa::float32_engine(), float64 = isa::float64_engine(), rounded = isa::rounded_engine(), \
  bfloat16 = isa::bfloat16_engine()
  PDDM_USE(portable);
  PDDM_USE(plain);
#if defined(PDDM_X86)
  PDDM_USE(avx2);
  PDDM_USE(avx512);
  PDDM_USE(emulated);
  PDDM_USE(emulated_amx);
#if defined(PDDM_AVX512_BF16)
  PDDM_USE(avx512_bf16);
#endif
#if defined(PDDM_AMX)
  PDDM_USE(amx);
#endif
#endif
  if (!supported) {
    std::printf("%s does not run on this machine\n", set.c_str());
    return 77;
  }
  test_engine(*float64, 1e-12, true);
  test_engine(*float32, 2e-5, true);
  test_nearest(*float64);
  test_nearest(*float32);
  for (; rounded; rounded = rounded->finer) test_rounded(*rounded, *float32);
  test_counters(*float32);
  test_stages();
  // Operands are rounded to 8 bits: u, u', v' and three weights, each by 2^-9 of itself at most, in sums that partly
  // cancel. Its backward runs in float32.
  if (bfloat16) test_engine(*bfloat16, 6e-2, true);
  std::printf("%s: %d failures\n", set.c_str(), failures);
  return failures ? 1 : 0;
}
