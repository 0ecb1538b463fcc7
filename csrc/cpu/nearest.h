// Of every row the rows of other classes with the largest dot products.
//
// A row's list holds about twice as many entries as are wanted. When it is cut down to the best of them, the least of
// these is from then on the floor that a product must be above. Products are ordered by value, then by row, and what is
// left out has as many before it as are wanted: what remains depends on nobody's coming first.
#pragma once

#include <cmath>
#include <limits>

#include "lists.h"

namespace pddm::cpu {

template <class T>
class Nearest {
 public:
  Nearest(const Engine<T>& engine, const Parallel& parallel, const Rows& rows, int64_t dim, const int64_t* classes,
          int64_t count)
      : engine_(engine),
        parallel_(parallel),
        dim_(dim),
        lanes_(engine.lanes),
        wanted_(std::min(count, rows.count)),
        lists_(arena_, rows.count, lanes_, classes, std::min(wanted_ + std::max(wanted_, kLeastSlack), rows.count)),
        panel_size_(engine.stride(dim) * lanes_) {
    const int64_t padded = lists_.panels * lanes_;
    data_ = arena_.take<T>(lists_.panels * panel_size_);
    floor_ = arena_.take<T>(padded), below_ = arena_.take<T>(padded), last_ = arena_.take<T>(padded);
    std::fill_n(floor_, padded, -kInfinity), std::fill_n(below_, padded, -kInfinity);
    std::fill_n(last_, padded, kInfinity);
    share(parallel_, lists_.panels, [&](int64_t, int64_t p) { pack(static_cast<const T*>(rows.data), p); });
    every_two_panels(
        parallel_, lists_.panels, kChunkBytes / (panel_size_ * int64_t(sizeof(T))), [] { return 0; },
        [&](int64_t a, int64_t b) { block(a, b); });
  }

  // Every row's in ascending order, (n, count), −1 where there are fewer.
  void write(int64_t* out, int64_t count) {
    share(parallel_, lists_.panels, [&](int64_t, int64_t p) {
      for (int64_t row = p * lanes_; row < std::min(lists_.n, (p + 1) * lanes_); ++row) {
        if (lists_.sizes[row] > wanted_) cut(row, wanted_);
        write_rows(lists_.rows + row * lists_.room, lists_.sizes[row], out + row * count, count);
      }
    });
  }

 private:
  static constexpr T kInfinity = std::numeric_limits<T>::infinity();
  static constexpr int64_t kLeastSlack = 32;         // entries beyond those that are wanted
  static constexpr int64_t kChunkBytes = 512 << 10;  // of the second-level cache

  // What takes no part is NaN, and so are its products, which are above nothing and cost no look at the classes.
  void pack(const T* rows, int64_t p) {
    T* panel = data_ + p * panel_size_;
    engine_.pack_rows(panel, rows, lists_.n, dim_, p * lanes_);
    for (int64_t lane = 0; lane < lanes_; ++lane)
      for (int64_t k = 0; lists_.classes[p * lanes_ + lane] < 0 && k < dim_; ++k)
        panel[k * lanes_ + lane] = std::numeric_limits<T>::quiet_NaN();
  }

  void block(int64_t a, int64_t b) {
    T floors[2][kMaxLanes];
    const int32_t longest = engine_.meet(lists_, side(a, b, floors[0]), side(b, a, floors[1]), dim_);
    lists_.cut_full(longest, a, b, [&](int64_t row) { cut(row, wanted_ + wanted_ / 8); });
  }

  // Panel p as it meets another one. Of products that equal a floor those of rows before the last may yet count.
  Side<T> side(int64_t p, int64_t other, T* floors) const {
    const int64_t first = p * lanes_;
    const auto lowest = T(other * lanes_);
    for (int64_t lane = 0; lane < lanes_; ++lane)
      floors[lane] = last_[first + lane] < lowest ? floor_[first + lane] : below_[first + lane];
    return {data_ + p * panel_size_, first, floors};
  }

  // To those that are wanted, or up to `most` where that is quickly done.
  void cut(int64_t row, int64_t most) {
    T *values = lists_.values + row * lists_.room, *rows = lists_.rows + row * lists_.room;
    int32_t& size = lists_.sizes[row];
    if (const int64_t left = engine_.thin(values, rows, size, wanted_, most, floor_ + row)) {
      size = int32_t(left);
      below_[row] = floor_[row];  // as many are above it
      return;
    }
    std::vector<Entry<T>> list(static_cast<size_t>(size));
    for (size_t t = 0; t < list.size(); ++t) list[t] = {values[t], rows[t]};
    const auto worst = list.begin() + wanted_ - 1;
    std::nth_element(list.begin(), worst, list.end());
    for (int64_t t = 0; t < wanted_; ++t) values[t] = list[t].value, rows[t] = list[t].row;
    size = int32_t(wanted_);
    floor_[row] = worst->value, last_[row] = worst->row;
    // Less in any rounding, where numbers this close to zero are taken for it, and of infinity.
    using Limits = std::numeric_limits<T>;
    const T value = std::min(worst->value, Limits::max());
    below_[row] = value - (std::abs(value) * Limits::epsilon() + Limits::min());
  }

  const Engine<T>& engine_;
  const Parallel& parallel_;
  const int64_t dim_, lanes_, wanted_;
  Arena arena_;
  Lists<T> lists_;
  const int64_t panel_size_;
  T* data_;  // (panel, step, lane)
  // Once a list was cut down: a floor, a number a little below it, and the last row that counts of those that equal it.
  T *floor_, *below_, *last_;
};

}  // namespace pddm::cpu
