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

using cpu::kMaxLanes;
using cpu::ListsOf;
using cpu::Side;

#if defined(PDDM_HAS_INT16)
static_assert(kLanes<float> == kLanes<int32_t>);
#endif

// The products of two panels, and bit by bit which are above the floor of their row, lane by lane, then of their
// column.
template <class T>
struct Met {
  alignas(64) T products[kLanes<T>][kLanes<T>];
  uint64_t above[kLanes<T>];
};

// Keeps a vector of a row's products; returns the row's bits.
template <class T>
PDDM_INLINE uint64_t keep(T* products, Vec<T> product, Vec<T> floor, Vec<T> column_floors, int half) {
  store(products + half * kWidth<T>, product);
  return uint64_t(lanes_above<T>(product, floor)) << (half * kWidth<T>) |
         uint64_t(lanes_above<T>(product, column_floors)) << (half * kWidth<T> + 32);
}

// take(row, bit) for every bit that is set. A row has none, or one, or many, and which is nobody's guess.
template <class Take>
PDDM_INLINE void for_bits(const uint64_t* rows, int count, uint64_t allowed, const Take& take) {
#if defined(__AVX512VBMI2__) && !defined(PDDM_PLAIN_VECTORS)
  // All are listed without a branch, by whole vectors.
  uint8_t row[kMaxLanes * 64 + 64], bit[kMaxLanes * 64 + 64];
  const __m512i all = _mm512_set_epi64(0x3f3e3d3c3b3a3938, 0x3736353433323130, 0x2f2e2d2c2b2a2928, 0x2726252423222120,
                                       0x1f1e1d1c1b1a1918, 0x1716151413121110, 0x0f0e0d0c0b0a0908, 0x0706050403020100);
  int64_t set = 0;
  for (int r = 0; r < count; ++r) {
    const uint64_t bits = rows[r] & allowed;
    _mm512_storeu_si512(bit + set, _mm512_maskz_compress_epi8(bits, all));
    _mm512_storeu_si512(row + set, _mm512_set1_epi8(char(r)));
    set += __builtin_popcountll(bits);
  }
  for (int64_t t = 0; t < set; ++t) take(row[t], bit[t]);
#else
  for (int r = 0; r < count; ++r)
    for (uint64_t left = rows[r] & allowed; left; left &= left - 1) take(r, __builtin_ctzll(left));
#endif
}

// Whose list, and whether it takes the entry, is nobody's guess, so there is no branch: it is written, and counts or
// does not.
template <class T>
PDDM_INLINE int32_t offer(const ListsOf<T>& lists, const Side<T>& a, const Side<T>& b, const Met<T>& met) {
  T *const values = lists.values, *const rows = lists.rows;
  const T* const classes = lists.classes;
  int32_t* const sizes = lists.sizes;
  const int64_t room = lists.room;
  int32_t longest = 0;
  for_bits(met.above, kLanes<T>, a.first == b.first ? 0xffffffffu : ~uint64_t(0), [&](int r, int bit) {
    const int c = bit & 31;
    const int64_t i = a.first + r, j = b.first + c, other = i ^ ((i ^ j) & (int64_t(bit >> 5) - 1)),
                  row = i ^ j ^ other;
    const T own = classes[row], its = classes[other];
    const int32_t size = sizes[row], more = size + ((own != its) & (own >= 0) & (its >= 0));
    values[row * room + size] = met.products[r][c], rows[row * room + size] = T(other);
    sizes[row] = more, longest = longest > more ? longest : more;
  });
  return longest;
}

template <class Op>
PDDM_INLINE int32_t meet_panels(const ListsOf<typename Op::Scalar>& lists, const Side<typename Op::Scalar>& a,
                                const Side<typename Op::Scalar>& b, int64_t steps) {
  using T = typename Op::Scalar;
  constexpr int width = kWidth<T>, lanes = kLanes<T>;
  Met<T> met;
  for_even_strips<T>(lanes, [&](auto columns, int64_t c) {
    constexpr int C = decltype(columns)::value;
    Tile<T, C> tile;
    tile.clear();
    multiply<Op>(tile, a.panel + c, {lanes, 1}, b.panel, lanes, steps);
    const Vec<T> floors[2] = {load(b.floors), load(b.floors + width)};
    PDDM_UNROLL
    for (int r = 0; r < C; ++r) {
      const Vec<T> floor = broadcast(a.floors[c + r]);
      met.above[c + r] = 0;
      PDDM_UNROLL
      for (int half = 0; half < 2; ++half)
        met.above[c + r] |= keep<T>(met.products[c + r], tile.acc[r][half], floor, floors[half], half);
    }
  });
  return offer(lists, a, b, met);
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
    const Vec<int32_t> there = load(classes + half) >= 0;
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

#if defined(PDDM_HAS_AMX)

// A panel lies there twice, as tiles to the left of a product and to its right: (left or right, block of steps, half of
// the lanes).
constexpr int64_t kTileSteps = 32;

PDDM_INLINE void tile_panel(int32_t* tiles, const float* panel, const int32_t* classes, float scale, int64_t dim,
                            float* error) {
  constexpr int width = kWidth<float>, lanes = kLanes<float>, words = kTileSteps / 2;
  // What a panel has after `dim` is read, and counts for nothing.
  static_assert(width == kTileRows && words == kTileRows && kTileSteps <= lanes);
  int32_t* const right = tiles + padded(dim, kTileSteps) / kTileSteps * 2 * kTileWords;
  for (int half = 0; half < 2; ++half) {
    const Vec<int32_t> there = load(classes + half * width) >= 0;
    Vec<float> left{};
    for (int64_t k = 0; k < dim; k += kTileSteps) {
      const int64_t tile = (k / kTileSteps * 2 + half) * kTileWords;
      Vec<int32_t> row[words];
      for (int w = 0; w < words; ++w) {
        const auto step = [&](int64_t at) {
          return at < dim && there ? load(panel + at * lanes + half * width) : Vec<float>{};
        };
        const Vec<float> x[2] = {step(k + 2 * w), step(k + 2 * w + 1)};
        const Vec<uint32_t> word = pack_bf16(x[0] * (1 / scale), x[1] * (1 / scale));
        const Vec<float> rest[2] = {x[0] - Vec<float>(word << 16) * scale,
                                    x[1] - Vec<float>(word & 0xffff0000u) * scale};
        left += rest[0] * rest[0] + rest[1] * rest[1];
        row[w] = Vec<int32_t>(word);
        store(right + tile + w * width, row[w]);
      }
      transpose<int32_t>(row);
      for (int r = 0; r < kTileRows; ++r) store(tiles + tile + r * width, row[r]);
    }
    store(error + half * width, left);
  }
}

PDDM_INLINE int32_t meet_tiles(const ListsOf<int32_t>& lists, const Side<int32_t>& a, const Side<int32_t>& b,
                               int64_t dim) {
  constexpr int width = kWidth<int32_t>, lanes = kLanes<int32_t>;
  const int64_t blocks = padded(dim, kTileSteps) / kTileSteps;
  const int32_t *left = a.panel, *right = b.panel + blocks * 2 * kTileWords;
  clear_tile<0>(), clear_tile<1>(), clear_tile<2>(), clear_tile<3>();
  for (int64_t block = 0; block < blocks; ++block, left += 2 * kTileWords, right += 2 * kTileWords) {
    load_tile<4>(left), load_tile<5>(left + kTileWords), load_tile<6>(right), load_tile<7>(right + kTileWords);
    dot_bf16_tiles<0, 4, 6>(), dot_bf16_tiles<1, 4, 7>(), dot_bf16_tiles<2, 5, 6>(), dot_bf16_tiles<3, 5, 7>();
  }
  alignas(64) float products[4][kTileWords];
  store_tile<0>(products[0]), store_tile<1>(products[1]), store_tile<2>(products[2]), store_tile<3>(products[3]);
  const Vec<int32_t> floors[2] = {load(b.floors), load(b.floors + width)};
  Met<int32_t> met;
  PDDM_UNROLL
  for (int r = 0; r < lanes; ++r) {
    const Vec<int32_t> floor = broadcast(a.floors[r]);
    met.above[r] = 0;
    PDDM_UNROLL
    for (int half = 0; half < 2; ++half) {
      const Vec<int32_t> product = nearest_int(load(products[r / width * 2 + half] + r % width * width));
      met.above[r] |= keep<int32_t>(met.products[r], product, floor, floors[half], half);
    }
  }
  return offer(lists, a, b, met);
}

#endif

}  // namespace pddm::PDDM_ISA
