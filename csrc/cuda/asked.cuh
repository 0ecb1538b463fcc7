// Lists of rows that rows ask for, as in cpu/asked.h; a warp for each row:
//
//     count_asked_kernel   pairs that are listed with the row
//     prefix_kernel        where they begin
//     write_asked_kernel   these pairs, and their places
//     share_places_kernel  the same of entries whose pairs are listed with the other row; a thread for each
//
//     best_asked_kernel    the best score of the row's list
//     join_best_kernel     quadruplets of the best; a thread for each
#pragma once

#include "prepare.cuh"

namespace pddm::cuda {

constexpr int kAskedThreads = 256, kAskedWarps = kAskedThreads / kWarp;

__device__ inline void refuse_entry(int64_t entry, int64_t what, int64_t count) {
  printf("pddm: entry %lld of the lists names %lld, out of range for %lld\n", static_cast<long long>(entry),
         static_cast<long long>(what), static_cast<long long>(count));
  __trap();
}

// Where row `other` is in the first list of `row`, or the second, −1 if it is not.
__device__ __forceinline__ int64_t place_in_list(const Asked& asked, bool second, int64_t row, int64_t other) {
  const int64_t* const list = asked.lists + row * asked.room;
  const int64_t end = second ? asked.room : asked.split;
  int64_t low = second ? asked.split : 0, high = end;
  while (low < high) {
    const int64_t middle = (low + high) / 2;
    if (Word(list[middle]) < Word(other))
      low = middle + 1;
    else
      high = middle;
  }
  return low < end && list[low] == other ? low : -1;
}

// A pair is listed with its lower row, or with the only one that asks.
static __global__ void __launch_bounds__(kAskedThreads)
    count_asked_kernel(const __grid_constant__ Asked asked, int* counts, int64_t* places) {
  const int64_t row = int64_t(blockIdx.x) * kAskedWarps + warp_index();
  if (row >= asked.rows) return;
  int own = 0;
  for (int64_t e = row * asked.room + lane_index(); e < (row + 1) * asked.room; e += kWarp) {
    const int64_t other = asked.lists[e];
    if (other >= asked.rows) refuse_entry(e, other, asked.rows);
    const bool second = e >= row * asked.room + asked.split;
    const int64_t at = other >= 0 && other < row ? place_in_list(asked, second, other, row) : -1;
    places[e] = other < 0 ? Asked::kNone : at < 0 ? Asked::kOwn : Asked::kOthers - at;
    own += other >= 0 && at < 0;
  }
  own = lanes_sum(own);
  if (lane_index() == 0) counts[row] = own;
}

static __global__ void __launch_bounds__(kAskedThreads)
    write_asked_kernel(const __grid_constant__ Asked asked, const int64_t* begins, int64_t* i, int64_t* j,
                       int64_t* places) {
  const int64_t row = int64_t(blockIdx.x) * kAskedWarps + warp_index();
  if (row >= asked.rows) return;
  int64_t next = begins[row];
  const int64_t end = (row + 1) * asked.room;
  for (int64_t start = row * asked.room; start < end; start += kWarp) {
    const int64_t e = start + lane_index();
    const bool own = e < end && places[e] == Asked::kOwn;
    const unsigned all = __ballot_sync(~0u, own);
    if (own) {
      const int64_t place = next + __popc(all & ((1u << lane_index()) - 1)), other = asked.lists[e];
      i[place] = row < other ? row : other, j[place] = row < other ? other : row;
      places[e] = place;
    }
    next += __popc(all);
  }
}

static __global__ void __launch_bounds__(kAskedThreads)
    share_places_kernel(const __grid_constant__ Asked asked, int64_t* places) {
  const int64_t e = int64_t(blockIdx.x) * kAskedThreads + threadIdx.x;
  if (e >= asked.rows * asked.room || places[e] > Asked::kOthers) return;
  places[e] = places[asked.lists[e] * asked.room + (Asked::kOthers - places[e])];
}

template <class Real>
__global__ void __launch_bounds__(kAskedThreads)
    best_asked_kernel(const __grid_constant__ Asked asked, bool second, const int64_t* places, const Real* scores,
                      int64_t count, bool lowest, const __grid_constant__ BestAsked best) {
  const int64_t row = int64_t(blockIdx.x) * kAskedWarps + warp_index();
  if (row >= asked.rows) return;
  Word word = 0;  // of the best so far, of a lane and then of all, and its entry
  long long entry = 0;
  const int64_t begin = second ? asked.split : 0, end = second ? asked.room : asked.split;
  for (int64_t e = begin + lane_index(); e < end; e += kWarp) {
    const int64_t place = places[row * asked.room + e];
    if (place >= count) refuse_entry(row * asked.room + e, place, count);
    const Real score = place < 0 ? Real(NAN) : scores[place];
    const Word own = score == score ? ordered(lowest ? -score : score) : 0;
    if (own > word) word = own, entry = e;
  }
  for (int apart = kWarp / 2; apart > 0; apart /= 2) {
    const Word others = __shfl_xor_sync(~0u, word, apart);
    const long long its = __shfl_xor_sync(~0u, entry, apart);
    if (others > word || (others == word && its < entry)) word = others, entry = its;
  }
  if (lane_index() != 0) return;
  const int64_t at = row * asked.room + entry;
  best.found[row] = word != 0;
  best.rows[row] = word ? asked.lists[at] : -1;
  static_cast<Real*>(best.scores)[row] = word ? scores[places[at]] : Real(0);
}

template <class Real>
__global__ void __launch_bounds__(kAskedThreads)
    join_best_kernel(int64_t n, const __grid_constant__ BestAsked positive, const __grid_constant__ BestAsked negative,
                     const __grid_constant__ Quadruplets out) {
  const int64_t i = int64_t(blockIdx.x) * kAskedThreads + threadIdx.x;
  if (i >= n) return;
  const int64_t j = positive.rows[i];
  const bool valid = positive.found[i] && negative.found[i] && negative.found[j];
  const auto score = [valid](const void* scores, int64_t row) {
    return valid ? static_cast<const Real*>(scores)[row] : Real(0);
  };
  out.valid[i] = valid;
  out.i[i] = valid ? i : -1, out.j[i] = valid ? j : -1;
  out.k[i] = valid ? negative.rows[i] : -1, out.l[i] = valid ? negative.rows[j] : -1;
  static_cast<Real*>(out.s_ij)[i] = score(positive.scores, i);
  static_cast<Real*>(out.s_ik)[i] = score(negative.scores, i);
  static_cast<Real*>(out.s_jl)[i] = score(negative.scores, j);
}

inline int64_t count_asked(const Context& context, const Asked& asked, int64_t* begins, int64_t* places) {
  int64_t pairs = 0;
  if (asked.rows * asked.room == 0) return pairs;
  int* const counts = context.take<int>(asked.rows);
  context.launch(count_asked_kernel, divided_up(asked.rows, kAskedWarps), kAskedThreads, 0, asked, counts, places);
  context.launch(prefix_kernel, 1, kScanThreads, kScanBytes, Scan{counts, begins}, Scan{}, asked.rows);
  check(cudaMemcpyAsync(&pairs, begins + asked.rows, sizeof pairs, cudaMemcpyDeviceToHost, context.stream()),
        "the number of pairs could not be read");
  check(cudaStreamSynchronize(context.stream()), "the number of pairs could not be read");
  return pairs;
}

inline void write_asked(const Context& context, const Asked& asked, const int64_t* begins, int64_t* i, int64_t* j,
                        int64_t* places) {
  if (asked.rows * asked.room == 0) return;
  context.launch(write_asked_kernel, divided_up(asked.rows, kAskedWarps), kAskedThreads, 0, asked, begins, i, j,
                 places);
  context.launch(share_places_kernel, divided_up(asked.rows * asked.room, kAskedThreads), kAskedThreads, 0, asked,
                 places);
}

template <class Real>
void best_asked(const Context& context, const Asked& asked, bool second, const int64_t* places, const Real* scores,
                int64_t count, bool lowest, const BestAsked& best) {
  context.launch(best_asked_kernel<Real>, divided_up(asked.rows, kAskedWarps), kAskedThreads, 0, asked, second, places,
                 scores, count, lowest, best);
}

template <class Real>
void join_best(const Context& context, int64_t n, const BestAsked& positive, const BestAsked& negative,
               const Quadruplets& out) {
  context.launch(join_best_kernel<Real>, divided_up(n, kAskedThreads), kAskedThreads, 0, n, positive, negative, out);
}

}  // namespace pddm::cuda
