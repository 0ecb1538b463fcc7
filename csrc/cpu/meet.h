// Two panels of rows, every row of the one with every row of the other, and which of the products may count.
//
//                  panel b: kLanes rows, (step, lane)
//                 ┌────────────────────────────┐   one call, owned by one thread: kLanes × kLanes products. Both
//   panel a:      │ dim steps pass by          │   panels, of 128 steps, and the products fit a first-level cache of
//   kLanes rows,  └────────────────────────────┘   48 KiB.
//   laid out      ┌────────────────────────────┐   Before they leave the registers a bit says which are above the
//   likewise   ──►│ C rows × 2 vectors of acc  │   floor of their row or of their column. These are few, and go one
//                 └────────────────────────────┘   by one into the list of the row, of the column, or of both.
//
// A product is one chain of multiply-adds in the order of the steps, the same whichever of its rows is in a, and in
// which lane.
#pragma once

#include "panels.h"

namespace pddm::PDDM_ISA {

using cpu::ListsOf;
using cpu::Side;

#if defined(PDDM_HAS_INT16)
static_assert(kLanes<float> == kLanes<int32_t>);
#endif

template <class Op>
PDDM_INLINE int32_t meet_panels(const ListsOf<typename Op::Scalar>& lists, const Side<typename Op::Scalar>& a,
                                const Side<typename Op::Scalar>& b, int64_t steps) {
  using T = typename Op::Scalar;
  constexpr int width = kWidth<T>, lanes = kLanes<T>;
  T products[lanes][lanes];
  uint64_t above[lanes];  // of the row's floor, lane by lane; then of the columns'
  const uint64_t both = a.first == b.first ? 0xffffffffu : ~uint64_t(0);
  for_even_strips<T>(lanes, [&](auto columns, int64_t c) {
    constexpr int C = decltype(columns)::value;
    Tile<T, C> tile;
    tile.clear();
    multiply<Op>(tile, a.panel + c, {lanes, 1}, b.panel, lanes, steps);
    const Vec<T> floors[2] = {load(b.floors), load(b.floors + width)};
    PDDM_UNROLL
    for (int r = 0; r < C; ++r) {
      const Vec<T> floor = broadcast(a.floors[c + r]);
      uint64_t lanes_of[2] = {0, 0};
      PDDM_UNROLL
      for (int half = 0; half < 2; ++half) {
        const Vec<T> product = tile.acc[r][half];
        store(products[c + r] + half * width, product);
        lanes_of[0] |= lanes_above<T>(product, floor) << (half * width);
        lanes_of[1] |= lanes_above<T>(product, floors[half]) << (half * width);
      }
      above[c + r] = (lanes_of[0] | lanes_of[1] << 32) & both;
    }
  });
  // Whose list, and whether it takes the entry, is nobody's guess, so there is no branch: it is written, and counts or
  // does not.
  T *const values = lists.values, *const rows = lists.rows;
  const T* const classes = lists.classes;
  int32_t* const sizes = lists.sizes;
  const int64_t room = lists.room;
  int32_t longest = 0;
  for (int r = 0; r < lanes; ++r)
    for (uint64_t left = above[r]; left; left &= left - 1) {
      const int bit = __builtin_ctzll(left), c = bit & 31;
      const int64_t i = a.first + r, j = b.first + c, other = i ^ ((i ^ j) & (int64_t(bit >> 5) - 1)),
                    row = i ^ j ^ other;
      const T own = classes[row], its = classes[other];
      const int32_t size = sizes[row], more = size + ((own != its) & (own >= 0) & (its >= 0));
      values[row * room + size] = products[r][c], rows[row * room + size] = T(other);
      sizes[row] = more, longest = longest > more ? longest : more;
    }
  return longest;
}

template <class T>
PDDM_INLINE void panel_products(const T* a, const T* b, int64_t steps, T* out) {
  constexpr int width = kWidth<T>, lanes = kLanes<T>;
  for_even_strips<T>(lanes, [&](auto columns, int64_t c) {
    constexpr int C = decltype(columns)::value;
    Tile<T, C> tile;
    tile.clear();
    multiply<Plain<T>>(tile, a + c, {lanes, 1}, b, lanes, steps);
    PDDM_UNROLL
    for (int r = 0; r < C; ++r) {
      store(out + (c + r) * lanes, tile.acc[r][0]);
      store(out + (c + r) * lanes + width, tile.acc[r][1]);
    }
  });
}

// A row and a vector of others: their lanes' multiply-adds are those of a tile.
template <class T>
PDDM_INLINE void listed_products(const T* rows, int64_t dim, int64_t row, const int32_t* others, int64_t count,
                                 T* out) {
  constexpr int width = kWidth<T>;
  for (int64_t first = 0; first < count; first += width) {
    Vec<T> sum{};
    for (int64_t k0 = 0; k0 < dim; k0 += width) {
      Vec<T> v[width];
      PDDM_UNROLL
      for (int r = 0; r < width; ++r)
        v[r] = first + r < count ? load_some(rows + others[first + r] * dim + k0, dim - k0) : Vec<T>{};
      transpose<T>(v);
      PDDM_UNROLL
      for (int k = 0; k < width; ++k)
        if (k0 + k < dim) sum = Plain<T>::multiply_add(sum, broadcast(rows[row * dim + k0 + k]), v[k]);
    }
    store_some(out + first, sum, count - first);
  }
}

// A list was written a while ago.
template <class T>
PDDM_INLINE void ask_for_list(const T* values, const T* rows, int64_t size) {
  for (int64_t t = 0; t < size; t += kWidth<T>) {
    PDDM_PREFETCH(values + t);
    PDDM_PREFETCH(rows + t);
  }
}

// Of a list, after which there is a vector that is not above `than`.
template <class T>
PDDM_INLINE int64_t count_above(const T* values, int64_t size, T than) {
  int64_t count = 0;
  for (int64_t t = 0; t < size; t += kWidth<T>)
    count += __builtin_popcount(lanes_above<T>(load(values + t), broadcast(than)));
  return count;
}
template <class T>
PDDM_INLINE int64_t keep_above(T* values, T* rows, int64_t size, T than) {
  int64_t left = 0;
  for (int64_t t = 0; t < size; t += kWidth<T>) {
    const uint32_t lanes = lanes_above<T>(load(values + t), broadcast(than));
    store_lanes<T>(rows + left, load(rows + t), lanes);
    store_lanes<T>(values + left, load(values + t), lanes);
    left += __builtin_popcount(lanes);
  }
  return left;
}

// By bisection between the least value and the largest.
template <class T>
PDDM_INLINE int64_t thin_list(T* values, T* rows, int64_t size, int64_t least, int64_t most, T* floor) {
  constexpr int kTries = 24;
  ask_for_list(values, rows, size);
  T low = values[0], high = low;
  for (int64_t t = 1; t < size; ++t)
    low = values[t] < low ? values[t] : low, high = values[t] > high ? values[t] : high;
  store(values + size, broadcast(low));
  for (int tries = 0; tries < kTries; ++tries) {
    const T middle = low + (high - low) / 2;
    if (!(middle > low)) break;
    const int64_t above = count_above(values, size, middle);
    if (above > most) {
      low = middle;
    } else if (above < least) {
      high = middle;
    } else {
      *floor = middle;
      return keep_above(values, rows, size, middle);
    }
  }
  return 0;
}

#if defined(PDDM_HAS_INT16)

PDDM_INLINE void round_panel(int32_t* whole, const float* panel, const int32_t* classes, float scale, int64_t dim,
                             float* error) {
  constexpr int width = kWidth<float>, lanes = kLanes<float>;
  for (int half = 0; half < lanes; half += width) {
    Vec<int32_t> there{};
    for (int lane = 0; lane < width; ++lane) there[lane] = classes[half + lane] < 0 ? 0 : -1;
    Vec<float> left{};
    for (int64_t k = 0; k < dim; k += Int16::kFold) {
      Vec<int32_t> q[Int16::kFold] = {};
      for (int p = 0; p < Int16::kFold && k + p < dim; ++p) {
        const Vec<float> x = there ? load(panel + (k + p) * lanes + half) : Vec<float>{};
        q[p] = round_to_int(x * (1 / scale));
        const Vec<float> rest = x - to_float(q[p]) * scale;
        left += rest * rest;
      }
      store(whole + k / Int16::kFold * lanes + half, (q[0] & 0xffff) | (q[1] << 16));
    }
    store(error + half, left);
  }
}

// By bisection, too, to the end if need be.
PDDM_INLINE int64_t thin_rounded(int32_t* values, int32_t* rows, int64_t size, int64_t least, int64_t most,
                                 int32_t margin, int32_t* floor) {
  constexpr int width = kWidth<int32_t>;
  ask_for_list(values, rows, size);
  store(values + size, broadcast(INT32_MIN));
  Vec<int32_t> best = broadcast(values[0]), worst = best;
  for (int64_t t = 0; t < size; t += width) {
    const Vec<int32_t> next = load(values + t), there = next > *floor ? next : best;
    best = best > next ? best : next, worst = worst < there ? worst : there;
  }
  int32_t lowest[width], highest[width];
  store(lowest, worst), store(highest, best);
  for (int half = width / 2; half > 0; half /= 2)
    for (int lane = 0; lane < half; ++lane) {
      lowest[lane] = lowest[lane + half] < lowest[lane] ? lowest[lane + half] : lowest[lane];
      highest[lane] = highest[lane + half] > highest[lane] ? highest[lane + half] : highest[lane];
    }
  int32_t low = lowest[0] - 1, high = highest[0];
  for (int64_t count = size; count > most && high - low > 1;) {
    const int32_t middle = low + (high - low) / 2;
    const int64_t above = count_above(values, size, middle);
    const bool few = above < least;  // as often as not: no branch
    high = few ? middle : high, low = few ? low : middle, count = few ? count : above;
  }
  *floor = low;
  return keep_above(values, rows, size, low - margin);
}

#endif

}  // namespace pddm::PDDM_ISA
