// What comes first, and of each row of a matrix the largest values.
#pragma once

#include <algorithm>
#include <vector>

#include "memory.h"

namespace pddm::cpu {

// Whether a comes before b, each with its number: the larger first, NaN after everything else, ties to the lower
// number.
template <class T>
bool comes_before(T a, int64_t a_number, T b, int64_t b_number) {
  const bool a_nan = a != a, b_nan = b != b;
  if (a_nan != b_nan) return b_nan;
  if (!a_nan && a != b) return a > b;
  return a_number < b_number;
}

// Row numbers in ascending order, and −1 up to `count` of them.
template <class T>
void write_rows(const T* rows, int64_t size, int64_t* out, int64_t count) {
  int64_t* end = std::copy(rows, rows + size, out);
  std::sort(out, end);
  std::fill(end, out + count, int64_t(-1));
}

template <class T>
void largest(const Parallel& parallel, const T* values, int64_t rows, int64_t columns, const int64_t* own,
             const int64_t* classes, int64_t count, int64_t* indices) {
  share(parallel, rows, [&](int64_t, int64_t row) {
    const T* of = values + row * columns;
    std::vector<int64_t> there;
    for (int64_t c = 0; own[row] >= 0 && c < columns; ++c)
      if (classes[c] >= 0 && classes[c] != own[row]) there.push_back(c);
    const auto better = [&](int64_t a, int64_t b) { return comes_before(of[a], a, of[b], b); };
    const int64_t found = std::min(count, int64_t(there.size()));
    if (found < int64_t(there.size())) std::nth_element(there.begin(), there.begin() + found, there.end(), better);
    write_rows(there.data(), found, indices + row * count, count);
  });
}

}  // namespace pddm::cpu
