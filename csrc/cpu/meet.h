// Two panels of rows, every row of the one with every row of the other, and which of the products may count.
//
//                  panel b: kLanes rows, (step, lane)
//                 ┌────────────────────────────┐   one call, owned by one thread: kLanes × kLanes products. Both
//   panel a:      │ dim steps pass by          │   panels, of 128 steps in float32, and the products fit the
//   kLanes rows,  └────────────────────────────┘   first-level cache.
//   laid out      ┌────────────────────────────┐   Before they leave the registers a bit says which are above the
//   likewise   ──►│ C rows × 2 vectors of acc  │   floor of their row or of their column. These are few, and go one
//                 └────────────────────────────┘   by one into the list of the row, of the column, or of both.
//
// A product is one chain of multiply-adds in the order of the steps, the same whichever of its rows is in a, and in
// which lane.
#pragma once

#include "panels.h"

namespace pddm::PDDM_ISA {

using cpu::Side;

template <class T>
PDDM_INLINE void meet_panels(const Side<T>& a, const Side<T>& b, int64_t dim) {
  constexpr int width = kWidth<T>, lanes = kLanes<T>;
  T products[lanes][lanes];
  uint32_t above[lanes];
  for_even_strips<T>(lanes, [&](auto columns, int64_t c) {
    constexpr int C = decltype(columns)::value;
    Tile<T, C> tile;
    tile.clear();
    multiply<Plain<T>>(tile, a.panel + c, {lanes, 1}, b.panel, lanes, dim);
    const Vec<T> floors[2] = {load(b.floors), load(b.floors + width)};
    PDDM_UNROLL
    for (int r = 0; r < C; ++r) {
      const Vec<T> floor = broadcast(a.floors[c + r]);
      above[c + r] = 0;
      PDDM_UNROLL
      for (int half = 0; half < 2; ++half) {
        const Vec<T> product = tile.acc[r][half];
        store(products[c + r] + half * width, product);
        above[c + r] |= (lanes_above<T>(product, floor) | lanes_above<T>(product, floors[half])) << (half * width);
      }
    }
  });
  // Whether a list takes an entry is nobody's guess, so there is no branch: it is written, and counts or does not.
  const auto offer = [](const Side<T>& own, int64_t lane, T product, T number, bool apart) {
    const int64_t at = lane * own.room + own.sizes[lane];
    own.values[at] = product, own.rows[at] = number;
    own.sizes[lane] += int32_t(apart) & int32_t(product > own.floors[lane]);
  };
  const bool others = a.panel != b.panel;
  for (int r = 0; r < lanes; ++r)
    for (uint32_t left = above[r]; left; left &= left - 1) {
      const int c = __builtin_ctz(left);
      const T product = products[r][c];
      const bool apart = a.classes[r] != b.classes[c];
      offer(a, r, product, b.numbers[c], apart);
      offer(b, c, product, a.numbers[r], apart & others);
    }
}

// By bisection between the least value and the largest.
template <class T>
PDDM_INLINE int64_t thin_list(T* values, T* rows, int64_t size, int64_t least, int64_t most, T* floor) {
  constexpr int width = kWidth<T>;
  constexpr int kTries = 24;
  const auto above = [&](int64_t t, T than) {
    const uint32_t there = size - t < width ? (1u << (size - t)) - 1 : ~0u;
    return lanes_above<T>(load(values + t), broadcast(than)) & there;
  };
  T low = values[0], high = low;
  for (int64_t t = 1; t < size; ++t)
    low = values[t] < low ? values[t] : low, high = values[t] > high ? values[t] : high;
  for (int tries = 0; tries < kTries; ++tries) {
    const T middle = low + (high - low) / 2;
    if (!(middle > low)) break;
    int64_t count = 0;
    for (int64_t t = 0; t < size; t += width) count += __builtin_popcount(above(t, middle));
    if (count > most) {
      low = middle;
    } else if (count < least) {
      high = middle;
    } else {
      int64_t left = 0;
      for (int64_t t = 0; t < size; t += width) {
        const uint32_t lanes = above(t, middle);
        store_lanes<T>(rows + left, load(rows + t), lanes);
        store_lanes<T>(values + left, load(values + t), lanes);
        left += __builtin_popcount(lanes);
      }
      *floor = middle;
      return left;
    }
  }
  return 0;
}

}  // namespace pddm::PDDM_ISA
