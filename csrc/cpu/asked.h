// Lists of rows that rows ask for: the pairs, each once though both of its rows may ask, and the best of a list. A list
// is in ascending order, −1 after.
#pragma once

#include <algorithm>
#include <atomic>
#include <stdexcept>

#include "memory.h"

namespace pddm::cpu {

// Where row `other` is in the first list of `row`, or the second, −1 if it is not.
inline int64_t place_in_list(const Asked& asked, bool second, int64_t row, int64_t other) {
  const int64_t *begin = asked.lists + row * asked.room, *at = begin + (second ? asked.split : 0);
  for (int64_t left = second ? asked.room - asked.split : asked.split; left > 1;) {
    const int64_t half = left / 2;
    at += uint64_t(at[half]) <= uint64_t(other) ? half : 0;  // nobody's guess: no branch
    left -= half;
  }
  return *at == other ? at - begin : -1;
}

// body(row) for every row.
template <class Body>
void share_rows(const Parallel& parallel, int64_t rows, const Body& body) {
  constexpr int64_t kRows = 64;  // of a part
  share(parallel, (rows + kRows - 1) / kRows, [&](int64_t, int64_t part) {
    for (int64_t row = part * kRows; row < std::min(rows, (part + 1) * kRows); ++row) body(row);
  });
}

inline int64_t count_asked(const Parallel& parallel, const Asked& asked, int64_t* begins, int64_t* places) {
  std::atomic<bool> within{true};
  share_rows(parallel, asked.rows, [&](int64_t row) {
    int64_t own = 0;
    for (int64_t e = row * asked.room; e < (row + 1) * asked.room; ++e) {
      const int64_t other = asked.lists[e];
      if (other >= asked.rows) return void(within = false);
      // A pair is listed with its lower row, or with the only one that asks.
      const bool second = e >= row * asked.room + asked.split;
      const int64_t at = other >= 0 && other < row ? place_in_list(asked, second, other, row) : -1;
      places[e] = other < 0 ? Asked::kNone : at < 0 ? Asked::kOwn : Asked::kOthers - at;
      own += places[e] == Asked::kOwn;
    }
    begins[row + 1] = own;
  });
  if (!within) throw std::out_of_range("pddm: a list names a row that is not there");
  begins[0] = 0;
  for (int64_t row = 0; row < asked.rows; ++row) begins[row + 1] += begins[row];
  return begins[asked.rows];
}

inline void write_asked(const Parallel& parallel, const Asked& asked, const int64_t* begins, int64_t* i, int64_t* j,
                        int64_t* places) {
  share_rows(parallel, asked.rows, [&](int64_t row) {
    int64_t next = begins[row];
    for (int64_t e = row * asked.room; e < (row + 1) * asked.room; ++e) {
      if (places[e] != Asked::kOwn) continue;
      i[next] = std::min(row, asked.lists[e]), j[next] = std::max(row, asked.lists[e]);
      places[e] = next++;
    }
  });
  share_rows(parallel, asked.rows, [&](int64_t row) {
    for (int64_t e = row * asked.room; e < (row + 1) * asked.room; ++e)
      if (places[e] <= Asked::kOthers) places[e] = places[asked.lists[e] * asked.room + (Asked::kOthers - places[e])];
  });
}

template <class T>
void best_asked(const Parallel& parallel, const Asked& asked, bool second, const int64_t* places, const T* scores,
                int64_t count, bool lowest, const BestAsked& of) {
  std::atomic<bool> within{true};
  T* const best = static_cast<T*>(of.scores);
  share_rows(parallel, asked.rows, [&](int64_t row) {
    of.rows[row] = -1, best[row] = T(0), of.found[row] = false;
    const int64_t middle = row * asked.room + asked.split;
    for (int64_t e = second ? middle : row * asked.room; e < (second ? (row + 1) * asked.room : middle); ++e) {
      if (places[e] < 0) continue;
      if (places[e] >= count) return void(within = false);
      const T score = scores[places[e]];
      if (score != score || (of.found[row] && !(lowest ? score < best[row] : score > best[row]))) continue;
      of.rows[row] = asked.lists[e], best[row] = score, of.found[row] = true;
    }
  });
  if (!within) throw std::out_of_range("pddm: a list names a score that is not there");
}

template <class T>
void join_best(const Parallel& parallel, int64_t n, const BestAsked& positive, const BestAsked& negative,
               const Quadruplets& out) {
  const auto score = [](const void* scores, int64_t row) { return static_cast<const T*>(scores)[row]; };
  share_rows(parallel, n, [&](int64_t i) {
    const int64_t j = positive.rows[i];
    const bool valid = positive.found[i] && negative.found[i] && negative.found[j];
    out.valid[i] = valid;
    out.i[i] = valid ? i : -1, out.j[i] = valid ? j : -1;
    out.k[i] = valid ? negative.rows[i] : -1, out.l[i] = valid ? negative.rows[j] : -1;
    static_cast<T*>(out.s_ij)[i] = valid ? score(positive.scores, i) : T(0);
    static_cast<T*>(out.s_ik)[i] = valid ? score(negative.scores, i) : T(0);
    static_cast<T*>(out.s_jl)[i] = valid ? score(negative.scores, j) : T(0);
  });
}

}  // namespace pddm::cpu
