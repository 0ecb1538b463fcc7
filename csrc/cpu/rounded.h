// The nearest rows once more, most of the work in numbers of fewer bits: x = s q + e, where q is rounded and e is what
// it leaves.
//
//   x_i · x_j = s² q_i · q_j + s q_i · e_j + e_i · x_j,  |rest| ≤ ‖e‖ (2 ‖x‖ + ‖e‖) of the largest norms
//
// With what the products of q lose, and what nearest.h itself loses in float32, this is the margin, the same for all. A
// row keeps what may be among its best, give or take the margin. In the end it is certain of most of these, and only of
// the others are the true products made, in the order of operations of nearest.h: the choice is its choice. Where too
// many others of a row are nearly as good as each other all of its products are made; where there are many such rows
// the whole is left to a finer engine, and to nearest.h after the last.
#pragma once

#include <atomic>
#include <cmath>
#include <limits>

#include "lists.h"

namespace pddm::cpu {

class RoundedNearest {
 public:
  // Whether it is worth while: of few rows most would be kept, and few columns are quickly multiplied as they are.
  static bool suits(const RoundedEngine& rounded, int64_t n, int64_t dim, int64_t count) {
    return n >= kLeastRows && room_of(rounded, dim, count) <= n / 8 && dim >= kLeastDim && dim <= kMostDim;
  }

  // Refers to all that it is given.
  RoundedNearest(const RoundedEngine& rounded, const Engine<float>& engine, const Parallel& parallel, const Rows& rows,
                 int64_t dim, const int64_t* classes, int64_t count)
      : rounded_(rounded),
        engine_(engine),
        parallel_(parallel),
        rows_(static_cast<const float*>(rows.data)),
        dim_(dim),
        lanes_(rounded.lanes),
        elements_(rounded.elements(dim)),
        wanted_(count),
        lists_(arena_, rows.count, lanes_, classes, room_of(rounded, dim, count)) {}

  // Finds, once, every row's in ascending order, (n, count), −1 where there are fewer; false where nothing was written.
  bool find(int64_t* out) {
    if (lists_.n == 0 || !round()) return false;
    every_two_panels(
        parallel_, lists_.panels, kChunkBytes / (elements_ * lanes_ * int64_t(sizeof(int32_t))),
        [&] { return Meetings(rounded_); }, [&](int64_t a, int64_t b) { block(a, b); });
    if (hopeless()) return false;
    share(parallel_, lists_.panels, [&](int64_t, int64_t p) {
      Finish finish(*this);
      for (int64_t row = p * lanes_; row < std::min(lists_.n, (p + 1) * lanes_); ++row)
        finish(row, out + row * wanted_);
    });
    return true;
  }

 private:
  struct Meetings {
    explicit Meetings(const RoundedEngine& rounded) : rounded(rounded) { rounded.begin(); }
    ~Meetings() { rounded.end(); }
    Meetings(const Meetings&) = delete;
    const RoundedEngine& rounded;
  };

  static constexpr int64_t kLeastRows = 1024, kLeastDim = 32, kMostDim = 1 << 16;
  static constexpr int64_t kChunkBytes = 512 << 10;  // of the second-level cache
  static constexpr int64_t kPatience = 128;          // of so many rows one may have all of its products made
  // The largest norm of a rounded row, give or take its rounding; what no product is below; what none is above. From
  // the lowest product to the largest is less than 2³¹, and so is a product and two margins on top: a margin is below
  // 2²⁵ up to the largest dimension.
  static constexpr int32_t kLargest = 32000, kNone = -1100000000, kNothing = std::numeric_limits<int32_t>::max();

  static int64_t room_of(const RoundedEngine& rounded, int64_t dim, int64_t count) {
    return count + std::max(count, rounded.slack(dim));
  }

  bool round() {
    const int64_t padded = lists_.panels * lanes_;
    data_ = arena_.take<int32_t>(padded * elements_);
    floor_ = arena_.take<int32_t>(padded);
    for (int64_t row = 0; row < padded; ++row) floor_[row] = lists_.classes[row] < 0 ? kNothing : kNone;
    auto *size = arena_.take<float>(padded), *error = arena_.take<float>(padded);
    share(parallel_, lists_.panels, [&](int64_t, int64_t p) {
      for (int64_t row = p * lanes_; row < (p + 1) * lanes_; ++row)
        size[row] = lists_.classes[row] < 0 ? 0 : squared(rows_ + row * dim_);
    });
    const double rounding = double(dim_ + 4) / (1 << 24), more = 1 + rounding;
    const bool numbers = std::none_of(size, size + padded, [](float x) { return std::isnan(x); });
    const double largest = std::sqrt(double(*std::max_element(size, size + padded))) * more;
    // Squares are well within float32, those of what is left, too, or are nothing beside the margin.
    if (!numbers || !(largest > 1e-12 && largest < 1e15)) return false;
    const float scale = float(largest / kLargest);
    auto* scratch = arena_.take<float>(parallel_.threads * engine_.stride(dim_) * lanes_);
    share(parallel_, lists_.panels, [&](int64_t worker, int64_t p) {
      const int64_t first = p * lanes_;
      float* panel = scratch + worker * engine_.stride(dim_) * lanes_;
      engine_.pack_rows(panel, rows_, lists_.n, dim_, first);
      rounded_.round(data_ + first * elements_, panel, lists_.classes + first, scale, dim_, error + first);
    });
    const double widest = std::sqrt(double(*std::max_element(error, error + padded))) * more;
    // Of what rounding leaves of both rows, and of what true products lose in float32.
    const double margin = widest * (2 * largest + widest) * more + 2 * rounding * largest * largest;
    const double largest_rounded = largest + widest;
    margin_ =
        int32_t(std::ceil((margin + rounded_.error(dim_) * largest_rounded * largest_rounded) / scale / scale)) + 1;
    return true;
  }

  float squared(const float* row) const {
    float sums[8] = {};
    int64_t k = 0;
    for (; k + 8 <= dim_; k += 8)
      for (int64_t t = 0; t < 8; ++t) sums[t] += row[k + t] * row[k + t];
    for (; k < dim_; ++k) sums[0] += row[k] * row[k];
    for (int64_t t = 1; t < 8; ++t) sums[0] += sums[t];
    return sums[0];
  }

  bool hopeless() const { return without_bounds_.load(std::memory_order_relaxed) > lists_.n / kPatience; }

  void block(int64_t a, int64_t b) {
    if (hopeless()) return;
    const auto side = [&](int64_t p) {
      const int64_t first = p * lanes_;
      return Side<int32_t>{data_ + first * elements_, first, floor_ + first};
    };
    lists_.cut_full(rounded_.meet(lists_, side(a), side(b), dim_), a, b, [&](int64_t row) {
      if (thin(row, wanted_ + wanted_ / 8) <= lists_.full - lists_.full / 4) {
        floor_[row] -= 2 * margin_;
        return;
      }
      floor_[row] = kNothing, lists_.sizes[row] = 0;
      without_bounds_.fetch_add(1, std::memory_order_relaxed);
    });
  }

  // Leaves what may be among the best, and in floor_ a number that as many as are wanted, or up to `most`, are above.
  int64_t thin(int64_t row, int64_t most) {
    int32_t& size = lists_.sizes[row];
    size = int32_t(rounded_.thin(lists_.values + row * lists_.room, lists_.rows + row * lists_.room, size, wanted_,
                                 most, 2 * margin_, floor_ + row));
    return size;
  }

  // The best of one row after the other.
  class Finish {
   public:
    explicit Finish(RoundedNearest& all) : all_(all) {}

    void operator()(int64_t row, int64_t* out) {
      const Lists<int32_t>& lists = all_.lists_;
      const int64_t wanted = all_.wanted_;
      const int32_t *values = lists.values + row * lists.room, *rows = lists.rows + row * lists.room;
      sure_.clear(), unsure_.clear();
      const int32_t own = lists.classes[row];
      if (all_.floor_[row] == kNothing) {
        for (int64_t other = 0; own >= 0 && other < lists.n; ++other)
          if (lists.classes[other] >= 0 && lists.classes[other] != own) unsure_.push_back(int32_t(other));
      } else if (lists.sizes[row] <= wanted) {
        sure_.assign(rows, rows + lists.sizes[row]);
      } else {
        // As many as are wanted are above the floor. What is more than two margins above the best of the others is
        // among the largest; what is as far below the last of the wanted is not.
        all_.thin(row, wanted);
        const int32_t size = lists.sizes[row], floor = all_.floor_[row];
        int32_t next = kNone, last = kNothing;
        int64_t above = 0;
        for (int32_t t = 0; t < size; ++t)
          if (values[t] > floor)
            last = std::min(last, values[t]), ++above;
          else
            next = std::max(next, values[t]);
        if (above > wanted) next = last;  // equal ones
        for (int32_t t = 0; t < size; ++t)
          if (values[t] > next + 2 * all_.margin_)
            sure_.push_back(rows[t]);
          else if (values[t] >= last - 2 * all_.margin_)
            unsure_.push_back(rows[t]);
      }
      choose(row, wanted - int64_t(sure_.size()));
      write_rows(sure_.data(), int64_t(sure_.size()), out, wanted);
    }

   private:
    void choose(int64_t row, int64_t count) {
      if (int64_t(unsure_.size()) > count) {
        products_.resize(unsure_.size()), list_.resize(unsure_.size());
        all_.engine_.products(all_.rows_, all_.dim_, row, unsure_.data(), int64_t(unsure_.size()), products_.data());
        for (size_t t = 0; t < list_.size(); ++t) list_[t] = {products_[t], float(unsure_[t])};
        std::nth_element(list_.begin(), list_.begin() + count, list_.end());
        for (int64_t t = 0; t < count; ++t) unsure_[t] = int32_t(list_[t].row);
        unsure_.resize(count);
      }
      sure_.insert(sure_.end(), unsure_.begin(), unsure_.end());
    }

    RoundedNearest& all_;
    std::vector<int32_t> sure_, unsure_;
    std::vector<float> products_;
    std::vector<Entry<float>> list_;
  };

  const RoundedEngine& rounded_;
  const Engine<float>& engine_;
  const Parallel& parallel_;
  const float* rows_;
  const int64_t dim_, lanes_, elements_, wanted_;
  Arena arena_;
  Lists<int32_t> lists_;
  int32_t* data_ = nullptr;  // panels, as the engine has them
  int32_t* floor_ = nullptr;
  int32_t margin_ = 0;
  std::atomic<int64_t> without_bounds_{0};
};

}  // namespace pddm::cpu
