// Of every row the rows of other classes with the largest dot products.
//
//                  group h of panels, passing by, its panel in the first-level cache
//                 ┌───┬───┬───┬───┬───
//   group g:      │   │   │   │   │       a product is offered to the lists of both its rows,
//   a chunk of  ──┤   │ × │   │   │       so of all products each is made once
//   its panels    │   │   │   │   │
//   (L2)          └───┴───┴───┴───┴───
//
// The rows' lists are the memory: twice as many entries as are wanted. A full one is cut down to the best, the least of
// which is from then on the floor that a product must pass. In every round of a tournament a group meets one other
// group, so no two threads ever touch one row. Products are ordered by value, then by row, and what a floor keeps out
// has enough before it: which ones are left does not depend on who came first.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>

#include "engine.h"
#include "memory.h"

namespace pddm::cpu {

template <class T>
class Nearest {
 public:
  // A row of a negative class is nobody's, and has none.
  Nearest(const Engine<T>& engine, const Parallel& parallel, const Rows& rows, int64_t dim, const int64_t* classes,
          int64_t count)
      : engine_(engine),
        parallel_(parallel),
        n_(rows.count),
        dim_(dim),
        lanes_(engine.lanes),
        panels_(engine.stride(n_) / lanes_),
        panel_size_(engine.stride(dim) * lanes_),
        wanted_(std::min(count, n_)),
        full_(wanted_ + std::max(wanted_, kLeastSlack)),
        room_(full_ + 2 * lanes_) {
    const int64_t room = panels_ * lanes_;
    data_ = arena_.take<T>(panels_ * panel_size_);
    values_ = arena_.take<T>(room * room_), rows_ = arena_.take<T>(room * room_);
    sizes_ = arena_.take_zeroed<int32_t>(room);
    numbers_ = arena_.take<T>(room), classes_ = arena_.take<T>(room);
    floor_ = arena_.take<T>(room), below_ = arena_.take<T>(room), last_ = arena_.take<T>(room);
    std::fill_n(floor_, room, -kInfinity), std::fill_n(below_, room, -kInfinity), std::fill_n(last_, room, kInfinity);
    for (int64_t row = 0; row < room; ++row) numbers_[row] = T(row), classes_[row] = T(row < n_ ? classes[row] : -1);
    share(parallel_, panels_, [&](int64_t, int64_t p) { pack(static_cast<const T*>(rows.data), p); });
    meet();
  }

  // Each row's in ascending order, (n, count), −1 where there are fewer.
  void write(int64_t* out, int64_t count) {
    share(parallel_, panels_, [&](int64_t, int64_t p) {
      for (int64_t row = p * lanes_; row < std::min(n_, (p + 1) * lanes_); ++row) {
        if (sizes_[row] > wanted_) cut(row, wanted_);
        int64_t* to = out + row * count;
        for (int64_t t = 0; t < sizes_[row]; ++t) to[t] = int64_t(rows_[row * room_ + t]);
        std::sort(to, to + sizes_[row]);
        std::fill(to + sizes_[row], to + count, int64_t(-1));
      }
    });
  }

 private:
  static constexpr T kInfinity = std::numeric_limits<T>::infinity();
  static constexpr int64_t kLeastSlack = 32;
  static constexpr int64_t kChunkBytes = 512 << 10;  // of the second-level cache
  static constexpr int64_t kLeastGroup = 4;          // panels, below which a round takes no longer than to begin it

  struct Entry {
    T value, row;
    bool operator<(const Entry& other) const {  // is better, and so before it
      return value > other.value || (value == other.value && row < other.row);
    }
  };

  void pack(const T* rows, int64_t p) {
    T* panel = data_ + p * panel_size_;
    engine_.pack_rows(panel, rows, n_, dim_, p * lanes_);
    for (int64_t lane = 0; lane < lanes_; ++lane) {
      const int64_t row = p * lanes_ + lane;
      if (classes_[row] >= 0) continue;
      for (int64_t k = 0; k < dim_; ++k) panel[k * lanes_ + lane] = std::numeric_limits<T>::quiet_NaN();
    }
  }

  // All groups by themselves, then round by round the one that stays with its guest, the others in pairs around it.
  void meet() {
    const int64_t most = parallel_.threads == 1 ? 1 : 4 * int64_t(parallel_.threads);
    const int64_t groups = std::max<int64_t>(1, std::min(most, panels_ / kLeastGroup / 2 * 2)), others = groups - 1;
    const auto begin = [&](int64_t g) { return g * panels_ / groups; };
    share(parallel_, groups, [&](int64_t, int64_t g) { visit(begin(g), begin(g + 1), begin(g), begin(g + 1)); });
    for (int64_t round = 0; round < others; ++round)
      share(parallel_, groups / 2, [&](int64_t, int64_t k) {
        const int64_t g = k ? (round + k) % others : others, h = (round + others - k) % others;
        visit(begin(g), begin(g + 1), begin(h), begin(h + 1));
      });
  }

  // Panels [a0, a1) with panels [b0, b1), which are others, or the same.
  void visit(int64_t a0, int64_t a1, int64_t b0, int64_t b1) {
    const int64_t chunk = std::max<int64_t>(1, kChunkBytes / (panel_size_ * int64_t(sizeof(T))));
    for (int64_t a = a0; a < a1; a += chunk)
      for (int64_t b = a0 == b0 ? a : b0; b < b1; ++b)
        for (int64_t p = a, end = std::min(a1, a + chunk); p < end && (a0 != b0 || p <= b); ++p) block(p, b);
  }

  void block(int64_t a, int64_t b) {
    T floors[2][kMaxLanes];
    engine_.meet(side(a, b, floors[0]), side(b, a, floors[1]), dim_);
    cut_full(a);
    if (a != b) cut_full(b);
  }

  // Panel p as it meets another. Of products that equal a floor those of lower rows than the last may yet count.
  Side<T> side(int64_t p, int64_t other, T* floors) const {
    const int64_t first = p * lanes_;
    const T lowest = numbers_[other * lanes_];
    for (int64_t lane = 0; lane < lanes_; ++lane)
      floors[lane] = last_[first + lane] < lowest ? floor_[first + lane] : below_[first + lane];
    return {data_ + p * panel_size_, floors, classes_ + first, numbers_ + first, values_ + first * room_,
            rows_ + first * room_,   room_,  sizes_ + first};
  }

  void cut_full(int64_t p) {
    const int32_t* sizes = sizes_ + p * lanes_;
    int32_t largest = 0;
    for (int64_t lane = 0; lane < lanes_; ++lane) largest = std::max(largest, sizes[lane]);
    if (largest <= full_) return;
    for (int64_t row = p * lanes_; row < (p + 1) * lanes_; ++row)
      if (sizes_[row] > full_) cut(row, wanted_ + wanted_ / 8);
  }

  // To `most`, or to those that are wanted.
  void cut(int64_t row, int64_t most) {
    T *values = values_ + row * room_, *rows = rows_ + row * room_;
    if (const int64_t left = engine_.thin(values, rows, sizes_[row], wanted_, most, floor_ + row)) {
      sizes_[row] = int32_t(left);
      below_[row] = floor_[row];  // which no product of those left equals
      return;
    }
    std::vector<Entry> list(static_cast<size_t>(sizes_[row]));
    for (int32_t t = 0; t < sizes_[row]; ++t) list[t] = {values[t], rows[t]};
    const auto worst = list.begin() + wanted_ - 1;
    std::nth_element(list.begin(), worst, list.end());
    for (int32_t t = 0; t < wanted_; ++t) values[t] = list[t].value, rows[t] = list[t].row;
    sizes_[row] = int32_t(wanted_);
    floor_[row] = worst->value, last_[row] = worst->row;
    below_[row] = std::nextafter(worst->value, -kInfinity);
  }

  const Engine<T>& engine_;
  const Parallel& parallel_;
  int64_t n_, dim_, lanes_, panels_, panel_size_;
  int64_t wanted_, full_, room_;
  Arena arena_;
  T* data_;
  T *values_, *rows_;  // lists, (row, room), of which `sizes` are taken
  int32_t* sizes_;
  T *numbers_, *classes_;
  // Of the worst that is wanted, once there are as many: its value, the one just below it, and its row.
  T *floor_, *below_, *last_;
};

}  // namespace pddm::cpu
