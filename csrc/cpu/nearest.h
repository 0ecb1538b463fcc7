// Of every row the rows of other classes with the largest dot products.
//
//                   group h of panels, passing by, each in the first-level cache
//                  ┌───┬───┬───┬───┬─
//   group g:       │   │   │   │   │      a product is offered to the lists of both its rows,
//   a chunk of   ──┤   │ × │   │   │      so each is made once
//   its panels     │   │   │   │   │
//   (second level) └───┴───┴───┴───┴─
//
// A row's list holds about twice as many entries as are wanted. Whenever it is full it is cut down to the best of them,
// the least of which is from then on the floor that a product must be above. Whoever works on two groups holds their
// locks. Products are ordered by value, then by row, and what is left out has as many before it as are wanted: what
// remains depends on nobody's coming first.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>
#include <mutex>

#include "engine.h"
#include "memory.h"

namespace pddm::cpu {

template <class T>
class Nearest {
 public:
  // A row of a negative class is nobody's, and has none. Numbers of rows and classes are exact in T.
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
        full_(std::min(wanted_ + std::max(wanted_, kLeastSlack), n_)),
        room_(full_ + 2 * lanes_) {
    const int64_t padded = panels_ * lanes_;
    data_ = arena_.take<T>(panels_ * panel_size_);
    values_ = arena_.take<T>(padded * room_), rows_ = arena_.take<T>(padded * room_);
    sizes_ = arena_.take_zeroed<int32_t>(padded);
    numbers_ = arena_.take<T>(padded), classes_ = arena_.take<T>(padded);
    floor_ = arena_.take<T>(padded), below_ = arena_.take<T>(padded), last_ = arena_.take<T>(padded);
    std::fill_n(floor_, padded, -kInfinity), std::fill_n(below_, padded, -kInfinity);
    std::fill_n(last_, padded, kInfinity);
    for (int64_t row = 0; row < padded; ++row) numbers_[row] = T(row), classes_[row] = T(row < n_ ? classes[row] : -1);
    share(parallel_, panels_, [&](int64_t, int64_t p) { pack(static_cast<const T*>(rows.data), p); });
    meet();
  }

  // Every row's in ascending order, (n, count), −1 where there are fewer.
  void write(int64_t* out, int64_t count) {
    share(parallel_, panels_, [&](int64_t, int64_t p) {
      for (int64_t row = p * lanes_; row < std::min(n_, (p + 1) * lanes_); ++row) {
        if (sizes_[row] > wanted_) cut(row, wanted_);
        const T* list = rows_ + row * room_;
        int64_t *to = out + row * count, *end = std::copy(list, list + sizes_[row], to);
        std::sort(to, end);
        std::fill(end, to + count, int64_t(-1));
      }
    });
  }

 private:
  static constexpr T kInfinity = std::numeric_limits<T>::infinity();
  static constexpr int64_t kLeastSlack = 32;         // entries beyond those that are wanted
  static constexpr int64_t kChunkBytes = 512 << 10;  // of the second-level cache
  static constexpr int64_t kGroups = 4;              // of each thread, so that none waits long for the last
  static constexpr int64_t kLeastPanels = 4;         // of a group

  struct Entry {
    T value, row;
    bool operator<(const Entry& other) const {  // is better, and so before it
      return value > other.value || (value == other.value && row < other.row);
    }
  };

  // What takes no part is NaN, and so are its products, which are above nothing.
  void pack(const T* rows, int64_t p) {
    T* panel = data_ + p * panel_size_;
    engine_.pack_rows(panel, rows, n_, dim_, p * lanes_);
    for (int64_t lane = 0; lane < lanes_; ++lane)
      for (int64_t k = 0; classes_[p * lanes_ + lane] < 0 && k < dim_; ++k)
        panel[k * lanes_ + lane] = std::numeric_limits<T>::quiet_NaN();
  }

  // Every group with itself, then with every other, in the order of a tournament: one stays, the others go round it,
  // and nobody meets two at a time.
  void meet() {
    const int64_t most = parallel_.threads > 1 ? kGroups * int64_t(parallel_.threads) : 1;
    const int64_t groups = std::max<int64_t>(1, std::min(most, panels_ / kLeastPanels / 2 * 2));
    const int64_t pairs = groups / 2, others = groups - 1;
    std::vector<std::mutex> locks(static_cast<size_t>(groups));
    share(parallel_, groups + pairs * others, [&](int64_t, int64_t task) {
      if (task < groups) {
        const std::lock_guard<std::mutex> guard(locks[task]);
        return visit(task, task, groups);
      }
      const int64_t round = (task - groups) / pairs, k = (task - groups) % pairs;
      const int64_t g = k ? (round + k) % others : others, h = (round + others - k) % others;
      const std::scoped_lock guard(locks[g], locks[h]);
      visit(g, h, groups);
    });
  }

  void visit(int64_t g, int64_t h, int64_t groups) {
    const auto begin = [&](int64_t group) { return group * panels_ / groups; };
    const int64_t chunk = std::max<int64_t>(1, kChunkBytes / (panel_size_ * int64_t(sizeof(T))));
    for (int64_t first = begin(g), end; first < begin(g + 1); first = end) {
      end = std::min(begin(g + 1), first + chunk);
      for (int64_t b = g == h ? first : begin(h); b < begin(h + 1); ++b)
        for (int64_t a = first; a < end && (g != h || a <= b); ++a) block(a, b);
    }
  }

  void block(int64_t a, int64_t b) {
    T floors[2][kMaxLanes];
    engine_.meet(side(a, b, floors[0]), side(b, a, floors[1]), dim_);
    cut_full(a);
    if (a != b) cut_full(b);
  }

  // Panel p as it meets another one. Of products that equal a floor those of rows before the last may yet count.
  Side<T> side(int64_t p, int64_t other, T* floors) const {
    const int64_t first = p * lanes_;
    const T lowest = numbers_[other * lanes_];
    for (int64_t lane = 0; lane < lanes_; ++lane)
      floors[lane] = last_[first + lane] < lowest ? floor_[first + lane] : below_[first + lane];
    return {data_ + p * panel_size_, floors, classes_ + first, numbers_ + first, values_ + first * room_,
            rows_ + first * room_,   room_,  sizes_ + first};
  }

  void cut_full(int64_t p) {
    const int64_t first = p * lanes_;
    int32_t largest = 0;
    for (int64_t lane = 0; lane < lanes_; ++lane) largest = std::max(largest, sizes_[first + lane]);
    for (int64_t row = first; largest > full_ && row < first + lanes_; ++row)
      if (sizes_[row] > full_) cut(row, wanted_ + wanted_ / 8);
  }

  // To those that are wanted, or up to `most` where that is quickly done.
  void cut(int64_t row, int64_t most) {
    T *values = values_ + row * room_, *rows = rows_ + row * room_;
    if (const int64_t left = engine_.thin(values, rows, sizes_[row], wanted_, most, floor_ + row)) {
      sizes_[row] = int32_t(left);
      below_[row] = floor_[row];  // as many are above it
      return;
    }
    std::vector<Entry> list(static_cast<size_t>(sizes_[row]));
    for (size_t t = 0; t < list.size(); ++t) list[t] = {values[t], rows[t]};
    const auto worst = list.begin() + wanted_ - 1;
    std::nth_element(list.begin(), worst, list.end());
    for (int64_t t = 0; t < wanted_; ++t) values[t] = list[t].value, rows[t] = list[t].row;
    sizes_[row] = int32_t(wanted_);
    floor_[row] = worst->value, last_[row] = worst->row;
    // Less in any rounding, where numbers this close to zero are taken for it, and of infinity.
    using Limits = std::numeric_limits<T>;
    const T value = std::min(worst->value, Limits::max());
    below_[row] = value - (std::abs(value) * Limits::epsilon() + Limits::min());
  }

  const Engine<T>& engine_;
  const Parallel& parallel_;
  const int64_t n_, dim_, lanes_, panels_, panel_size_, wanted_, full_, room_;
  Arena arena_;
  T* data_;                // (panel, step, lane)
  T *values_, *rows_;      // the lists, (row, room)
  int32_t* sizes_;         // of them
  T *numbers_, *classes_;  // of the rows
  // Once a list was cut down: a floor, a number a little below it, and the last row that counts of those that equal it.
  T *floor_, *below_, *last_;
};

}  // namespace pddm::cpu
