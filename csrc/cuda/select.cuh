// Which pairs a tile has, and what becomes of their scores.
//
//   pairs      a list; scores[t]
//   triangle   i < j (or i <= j), 16 × 16 blocks cut into tiles of 16 columns; a matrix, or the bests of rows
//   rectangle  some rows by some columns, tiles of 16 columns or, of few rows, more; a matrix
//   positives  pairs of one class, counted off along the rows sorted by label; the hardest of every lower row
//   partners   the two rows of the hardest positive pair by all rows; their hardest negatives
//
// The best of a row is one 64-bit word that only grows: the score in an order-preserving form above the complement of
// the index, so that the largest word is the best score at the lowest index, in whatever order they arrive. A float64
// score fills the word by itself; there a second pass finds the lowest index among those that reach it.
#pragma once

#include <cstdio>

#include "device.cuh"

namespace pddm::cuda {

using Word = unsigned long long;

// Larger is better; 0 is nothing yet. A NaN is never offered.
__device__ __forceinline__ Word ordered(float x) {
  const uint32_t bits = __float_as_uint(x + 0.0f);  // −0 is 0
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}
__device__ __forceinline__ Word ordered(double x) {
  const Word bits = static_cast<Word>(__double_as_longlong(x + 0.0)), sign = Word(1) << 63;
  return bits & sign ? ~bits : bits | sign;
}
__device__ __forceinline__ float unordered(Word key, float) {
  const auto bits = static_cast<uint32_t>(key);
  return __uint_as_float(bits & 0x80000000u ? bits ^ 0x80000000u : ~bits);
}
__device__ __forceinline__ double unordered(Word key, double) {
  const Word sign = Word(1) << 63;
  return __longlong_as_double(static_cast<long long>(key & sign ? key ^ sign : ~key));
}

// The largest score offered to every row, and its index.
template <class Real>
struct Bests;

template <>
struct Bests<float> {
  Word* best = nullptr;

  static constexpr int kPasses = 1, kWordsPerRow = 1;
  __host__ static Bests at(Word* words, int64_t) { return {words}; }

  __device__ static Word word(float score, int index) {
    return score == score ? ordered(score) << 32 | uint32_t(~index) : 0;
  }
  __device__ void offer(int64_t row, Word w, int) const {
    if (w) atomicMax(best + row, w);
  }
  __device__ void offer(int64_t row, float score, int index, int pass) const { offer(row, word(score, index), pass); }
  __device__ bool found(int64_t row) const { return best[row] != 0; }
  __device__ float score(int64_t row) const { return unordered(best[row] >> 32, 0.0f); }
  __device__ int index(int64_t row) const { return int(~uint32_t(best[row])); }
  __device__ Word score_word(int64_t row) const { return best[row] >> 32; }
};

template <>
struct Bests<double> {
  Word *best = nullptr, *where = nullptr;

  static constexpr int kPasses = 2, kWordsPerRow = 2;
  __host__ static Bests at(Word* words, int64_t rows) { return {words, words + rows}; }

  __device__ void offer(int64_t row, double score, int index, int pass) const {
    if (score != score) return;
    if (pass == 0) atomicMax(best + row, ordered(score));
    if (pass == 1 && best[row] == ordered(score)) atomicMax(where + row, Word(uint32_t(~index)));
  }
  __device__ bool found(int64_t row) const { return best[row] != 0; }
  __device__ double score(int64_t row) const { return unordered(best[row], 0.0); }
  __device__ int index(int64_t row) const { return int(~uint32_t(where[row])); }
  __device__ Word score_word(int64_t row) const { return best[row]; }
};

enum class Walk { pairs, triangle, rectangle, positives, partners };

constexpr int kTileColumns = 16;  // of a tile of the triangle or rectangle

template <class Real>
struct Job {
  Walk walk;
  int pass = 0;   // of Bests::kPasses
  int64_t n = 0;  // rows that a pair may name; triangle, partners: rows walked

  // pairs
  const int64_t *i = nullptr, *j = nullptr;
  int64_t count = 0;
  // rectangle
  int64_t first_row = 0, rows = 0, first_column = 0, columns = 0;
  // triangle
  bool diagonal = false, mirrored = false;
  // pairs, rectangle, triangle: where scores go, if anywhere; `pitch` is a matrix row's length
  Real* scores = nullptr;
  int64_t pitch = 0;

  // Mining. Rows sorted by label and then by index: `order[r]` is the row at rank r, `rank` the inverse; before[r]
  // positive pairs have their lower row at a rank below r, slot[i] below row i.
  const int64_t* labels = nullptr;
  const int *order = nullptr, *rank = nullptr;
  const int64_t *before = nullptr, *slot = nullptr;
  Bests<Real> far, near;  // hardest positives (by −S) and negatives
};

struct Pair {
  int i, j;  // −1: there is none
};

template <int TilePairs>
__host__ __device__ constexpr int64_t tiles_of(int64_t pairs) {
  return (pairs + TilePairs - 1) / TilePairs;
}

// Of a tile of a rectangle: few rows leave none of it empty.
template <int TilePairs>
__host__ __device__ constexpr int rectangle_rows(int64_t rows) {
  int most = 1;
  while (most < rows && most < TilePairs / kTileColumns) most *= 2;
  return most;
}

// How many tiles of a rectangle are side by side.
template <int TilePairs, class Real>
__host__ __device__ int64_t rectangle_across(const Job<Real>& job) {
  const int64_t columns = TilePairs / rectangle_rows<TilePairs>(job.rows);
  return (job.columns + columns - 1) / columns;
}

// `positives` is the number of positive pairs, which only the device knows; at most n (n − 1) / 2.
template <int TilePairs, class Real>
__host__ __device__ int64_t count_tiles(const Job<Real>& job, int64_t positives) {
  constexpr int kTileRows = TilePairs / kTileColumns;
  const int64_t blocks = (job.n + kTileColumns - 1) / kTileColumns;
  switch (job.walk) {
    case Walk::pairs: return tiles_of<TilePairs>(job.count);
    case Walk::triangle: return blocks * (blocks + 1) / 2 * (kTileColumns / kTileRows);
    case Walk::rectangle: {
      const int64_t rows = rectangle_rows<TilePairs>(job.rows);
      return (job.rows + rows - 1) / rows * rectangle_across<TilePairs>(job);
    }
    case Walk::positives: return tiles_of<TilePairs>(positives);
    case Walk::partners: return tiles_of<TilePairs>(2 * job.n);
  }
  return 0;
}

// The largest r with before[r] <= at, among 0..n.
__device__ __forceinline__ int64_t last_not_above(const int64_t* before, int64_t n, int64_t at) {
  int64_t low = 0, high = n;
  while (low < high) {
    const int64_t middle = (low + high + 1) / 2;
    if (before[middle] <= at)
      low = middle;
    else
      high = middle - 1;
  }
  return low;
}

// Entry (g, c) of a triangle, g <= c, is number c (c + 1) / 2 + g: the column of number `at`.
__device__ __forceinline__ int64_t triangle_column(int64_t at) {
  auto c = int64_t((sqrt(8.0 * double(at) + 1.0) - 1.0) / 2.0);  // but for rounding
  while (c * (c + 1) / 2 > at) --c;
  while ((c + 1) * (c + 2) / 2 <= at) ++c;
  return c;
}

__device__ inline void refuse_pair(int64_t at, int64_t i, int64_t j, int64_t rows) {
  printf("pddm: pair %lld is (%lld, %lld), out of range for %lld rows\n", static_cast<long long>(at),
         static_cast<long long>(i), static_cast<long long>(j), static_cast<long long>(rows));
  __trap();
}

// Pair `p` of a tile of the triangle: cut `cut` of 16 × 16 block (g, c).
template <int TilePairs, class Real>
__device__ __forceinline__ Pair triangle_pair(const Job<Real>& job, int64_t g, int64_t c, int cut, int p) {
  constexpr int kTileRows = TilePairs / kTileColumns;
  const int64_t i = g * kTileColumns + cut * kTileRows + p / kTileColumns, j = c * kTileColumns + p % kTileColumns;
  return j < job.n && (i < j || (job.diagonal && i == j)) ? Pair{int(i), int(j)} : Pair{-1, -1};
}

// Of tile (down, across) of a rectangle.
template <int TilePairs, class Real>
__device__ __forceinline__ Pair rectangle_pair(const Job<Real>& job, int64_t down, int64_t across, int p) {
  const int rows = rectangle_rows<TilePairs>(job.rows), columns = TilePairs / rows;
  const int64_t r = down * rows + p / columns, c = across * columns + p % columns;
  return r < job.rows && c < job.columns ? Pair{int(job.first_row + r), int(job.first_column + c)} : Pair{-1, -1};
}

// Pair `p` of tile `tile`. `partner` is the hardest positive pair, for Walk::partners.
template <int TilePairs, class Real>
__device__ Pair pair_at(const Job<Real>& job, int64_t tile, int p, const Pair& partner) {
  constexpr int kCuts = kTileColumns * kTileColumns / TilePairs;
  const int64_t at = tile * TilePairs + p;
  switch (job.walk) {
    case Walk::pairs: {
      if (at >= job.count) return {-1, -1};
      return {int(job.i[at]), int(job.j[at])};  // looked at before
    }
    case Walk::triangle: {
      const int64_t block = tile / kCuts, c = triangle_column(block), g = block - c * (c + 1) / 2;
      return triangle_pair<TilePairs>(job, g, c, int(tile % kCuts), p);
    }
    case Walk::rectangle: {
      const int64_t across = rectangle_across<TilePairs>(job);
      return rectangle_pair<TilePairs>(job, tile / across, tile % across, p);
    }
    case Walk::positives: {
      if (at >= job.before[job.n]) return {-1, -1};
      const int64_t r = last_not_above(job.before, job.n, at);
      return {job.order[r], job.order[r + 1 + at - job.before[r]]};
    }
    case Walk::partners:
      if (at >= 2 * job.n || partner.i < 0) return {-1, -1};
      return at < job.n ? Pair{partner.i, int(at)} : Pair{partner.j, int(at - job.n)};
  }
  return {-1, -1};
}

// The hardest positive pair of all, found by the whole block in Hardest::kBytes of shared memory and known to all of
// it. Ties go to the lowest row, whose word has the lowest partner.
struct Hardest {
  Word score;
  int64_t row;

  static constexpr int kBytes = 2 * kWarp * int(sizeof(Word));

  __device__ void offer(Word other, int64_t other_row) {
    if (other > score || (other == score && other_row < row)) score = other, row = other_row;
  }
  __device__ void settle_warp() {
    for (int apart = kWarp / 2; apart > 0; apart /= 2) {
      const Word other = __shfl_xor_sync(~0u, score, apart);
      offer(other, __shfl_xor_sync(~0u, static_cast<long long>(row), apart));
    }
  }
};

template <class Real>
__device__ Pair hardest_pair(const Bests<Real>& far, int64_t n, unsigned char* shared) {
  Hardest hardest{0, n};
#pragma unroll 4
  for (int64_t r = threadIdx.x; r < n; r += blockDim.x) hardest.offer(far.score_word(r), r);
  hardest.settle_warp();
  auto* const scores = reinterpret_cast<Word*>(shared);
  auto* const rows = reinterpret_cast<long long*>(scores + kWarp);
  if (lane_index() == 0) scores[warp_index()] = hardest.score, rows[warp_index()] = hardest.row;
  __syncthreads();
  hardest = {0, n};
  for (unsigned warp = 0; warp < blockDim.x / kWarp; ++warp) hardest.offer(scores[warp], rows[warp]);
  __syncthreads();
  return hardest.score ? Pair{int(hardest.row), far.index(hardest.row)} : Pair{-1, -1};
}

// Offers of a tile of the triangle, by the warps that hold its pairs: lane % 16 is the column.
template <class Real>
__device__ void offer_both(const Job<Real>& job, const Pair& at, Real score) {
  const bool there = at.i >= 0, positive = there && job.labels[at.i] == job.labels[at.j];
  const bool negative = there && !positive;
  const Bests<Real>& far = job.far;
  if constexpr (sizeof(Real) == 4) {
    // Lanes of a row, and those of a column, settle it among themselves first.
    const auto settle = [&](const Bests<Real>& bests, bool offered, Real value) {
      Word row = offered ? bests.word(value, at.j) : 0, column = offered ? bests.word(value, at.i) : 0;
      for (int apart = kTileColumns / 2; apart > 0; apart /= 2) {
        const Word other = __shfl_xor_sync(~0u, row, apart);
        row = other > row ? other : row;
      }
      const Word other = __shfl_xor_sync(~0u, column, kTileColumns);
      column = other > column ? other : column;
      // Whichever lane of the row or column has the winning pair knows the row's number.
      if (offered && row == bests.word(value, at.j)) bests.offer(at.i, row, 0);
      if (offered && column == bests.word(value, at.i)) bests.offer(at.j, column, 0);
    };
    settle(job.near, negative, score);
    if (far.best) settle(far, positive, -score);
  } else {
    if (negative) {
      job.near.offer(at.i, score, at.j, job.pass);
      job.near.offer(at.j, score, at.i, job.pass);
    }
    if (positive && far.best) {
      far.offer(at.i, -score, at.j, job.pass);
      far.offer(at.j, -score, at.i, job.pass);
    }
  }
  if (positive && job.slot) job.scores[job.slot[at.i] + job.rank[at.j] - job.rank[at.i] - 1] = score;
}

// By all lanes of the warp, those without a pair too.
template <int TilePairs, class Real>
__device__ void take_score(const Job<Real>& job, int64_t tile, int p, const Pair& at, Real score) {
  if (job.walk == Walk::triangle && !job.mirrored) return offer_both(job, at, score);
  if (at.i < 0) return;
  switch (job.walk) {
    case Walk::pairs: job.scores[tile * TilePairs + p] = score; break;
    case Walk::triangle:
      job.scores[at.i * job.pitch + at.j] = score;
      job.scores[at.j * job.pitch + at.i] = score;
      break;
    case Walk::rectangle: job.scores[(at.i - job.first_row) * job.pitch + (at.j - job.first_column)] = score; break;
    case Walk::positives: job.far.offer(at.i, -score, at.j, job.pass); break;
    case Walk::partners:
      // Row 0 of `near` is for i, row 1 for j.
      if (job.labels[at.i] != job.labels[at.j])
        job.near.offer(tile * TilePairs + p < job.n ? 0 : 1, score, at.j, job.pass);
      break;
  }
}

}  // namespace pddm::cuda
