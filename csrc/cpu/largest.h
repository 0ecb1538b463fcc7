// Of each row of a matrix the largest values.
#pragma once

#include <algorithm>
#include <vector>

#include "memory.h"

namespace pddm::cpu {

template <class T>
void largest(const Parallel& parallel, const T* values, int64_t rows, int64_t columns, const int64_t* own,
             const int64_t* classes, int64_t count, int64_t* indices) {
  share(parallel, rows, [&](int64_t, int64_t row) {
    const T* of = values + row * columns;
    std::vector<int64_t> there;
    for (int64_t c = 0; own[row] >= 0 && c < columns; ++c)
      if (classes[c] >= 0 && classes[c] != own[row]) there.push_back(c);
    const auto better = [&](int64_t a, int64_t b) {
      const bool a_nan = of[a] != of[a], b_nan = of[b] != of[b];
      if (a_nan != b_nan) return b_nan;
      if (!a_nan && of[a] != of[b]) return of[a] > of[b];
      return a < b;
    };
    const auto end = there.begin() + std::min(count, int64_t(there.size()));
    if (end != there.end()) std::nth_element(there.begin(), end, there.end(), better);
    std::sort(there.begin(), end);
    std::fill(std::copy(there.begin(), end, indices + row * count), indices + (row + 1) * count, int64_t(-1));
  });
}

}  // namespace pddm::cpu
