// What every row keeps of the rows it meets, and the order in which they all meet.
//
//                   group h of panels, passing by, each in the first-level cache
//                  ┌───┬───┬───┬───┬─
//   group g:       │   │   │   │   │      a product is offered to the lists of both its rows,
//   a chunk of   ──┤   │ × │   │   │      so each is made once
//   its panels     │   │   │   │   │
//   (second level) └───┴───┴───┴───┴─
//
// Whoever works on two groups holds their locks.
#pragma once

#include <algorithm>
#include <mutex>
#include <vector>

#include "engine.h"
#include "largest.h"

namespace pddm::cpu {

// Whenever a list is full it is cut down, and what it holds says how good a product must be from then on.
template <class T>
struct Lists : ListsOf<T> {
  // Numbers of rows and classes that take part are exact in T.
  Lists(Arena& arena, int64_t n, int64_t lanes, const int64_t* class_of, int64_t full)
      : n(n), lanes(lanes), panels((n + lanes - 1) / lanes), full(full) {
    const int64_t padded = panels * lanes, room = full + 2 * lanes;
    T* numbers = arena.take<T>(padded);
    for (int64_t row = 0; row < padded; ++row) numbers[row] = T(row < n ? std::max<int64_t>(class_of[row], -1) : -1);
    this->values = arena.take<T>(padded * room), this->rows = arena.take<T>(padded * room), this->room = room;
    this->sizes = arena.take_zeroed<int32_t>(padded), this->classes = numbers;
  }

  // After panels a and b have met, which returned the size of the longest list: cuts those that are full.
  template <class Cut>
  void cut_full(int32_t longest, int64_t a, int64_t b, const Cut& cut) {
    for (const int64_t first : {a * lanes, b * lanes})
      for (int64_t row = first; longest > full && row < first + lanes; ++row)
        if (this->sizes[row] > full) cut(row);
  }

  const int64_t n, lanes, panels, full;
};

// block(a, b) for every two panels once, in either order, a panel and itself included, and nobody is at a panel
// that another is at. `chunk` panels stay while others pass by. What `around()` returns lives while a thread goes from
// block to block.
//
// Every group of panels meets itself, then every other, in the order of a tournament: one stays, the others go round
// it, and nobody meets two at a time.
template <class Around, class Block>
void every_two_panels(const Parallel& parallel, int64_t panels, int64_t chunk, const Around& around,
                      const Block& block) {
  constexpr int64_t kGroups = 4;       // of each thread, so that none waits long for the last
  constexpr int64_t kLeastPanels = 4;  // of a group
  const int64_t most = parallel.threads > 1 ? kGroups * int64_t(parallel.threads) : 1;
  const int64_t groups = std::max<int64_t>(1, std::min(most, panels / kLeastPanels / 2 * 2));
  const int64_t pairs = groups / 2, others = groups - 1;
  const auto visit = [&](int64_t g, int64_t h) {
    const auto begin = [&](int64_t group) { return group * panels / groups; };
    for (int64_t first = begin(g), end; first < begin(g + 1); first = end) {
      end = std::min(begin(g + 1), first + std::max<int64_t>(1, chunk));
      for (int64_t b = g == h ? first : begin(h); b < begin(h + 1); ++b)
        for (int64_t a = first; a < end && (g != h || a <= b); ++a) block(a, b);
    }
  };
  std::vector<std::mutex> locks(static_cast<size_t>(groups));
  share(parallel, groups + pairs * others, [&](int64_t, int64_t task) {
    [[maybe_unused]] const auto meanwhile = around();
    if (task < groups) {
      const std::lock_guard<std::mutex> guard(locks[task]);
      return visit(task, task);
    }
    const int64_t round = (task - groups) / pairs, k = (task - groups) % pairs;
    const int64_t g = k ? (round + k) % others : others, h = (round + others - k) % others;
    const std::scoped_lock guard(locks[g], locks[h]);
    visit(g, h);
  });
}

// A row that another has met.
template <class T>
struct Entry {
  T value, row;
  bool operator<(const Entry& other) const {  // is better, and so before it
    return value > other.value || (value == other.value && row < other.row);
  }
};

}  // namespace pddm::cpu
