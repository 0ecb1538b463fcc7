// Of a row of values the largest, by a block, and their columns in ascending order.
//
// Of few it is the largest of each thread's that tell: as many values as are wanted are above a bound that as many
// threads' largest reach, and hardly more. Of many, or where more than there is room for reach it, the bound is found
// digit by digit, from the highest, with how many of those that equal it are taken.
#pragma once

#include "topk.cuh"

namespace pddm::cuda {

constexpr int kLargestThreads = 256, kLargestWarps = kLargestThreads / kWarp;
constexpr int kFew = kLargestThreads / 2;
constexpr unsigned kRoom = 2 * kLargestThreads;
constexpr int kDigits = 256;
static_assert(kDigits % kWarp == 0);

// Larger for larger values; NaN is the least, and only 0, which takes no part, is less.
template <class Real>
using PartWord = std::conditional_t<sizeof(Real) == 4, uint32_t, Word>;
template <class Real>
__device__ __forceinline__ PartWord<Real> part_word(Real value) {
  return PartWord<Real>(ranked_word(value)) + 1;
}

template <class Real>
struct LargestShared {
  PartWord<Real> maxima[kLargestThreads], least;
  PartWord<Real> words[kRoom];
  int columns[kRoom];
  bool taken[kRoom];
  unsigned reach;  // how many reach the bound

  unsigned counts[kDigits];
  unsigned by_warp[2][2][kLargestWarps];  // (round, larger or equal, warp)
  unsigned digit, above, all;
};

// A row's words: what is read of a column, and the word that follows from it, apart, so that much is read at once.
template <class Real>
struct ValueWords {
  const Real* values;
  const int64_t* classes;
  int64_t own;

  struct Column {
    Real value;
    int64_t its;
  };
  __device__ Column read(int64_t c) const { return {values[c], classes[c]}; }
  __device__ PartWord<Real> word(const Column& column) const {
    const PartWord<Real> word = part_word(column.value);
    return own >= 0 && column.its >= 0 && column.its != own ? word : 0;
  }
};

// Calls body(column, word) for the thread's columns.
template <class Words, class Body>
__device__ __forceinline__ void each_word(const Words& words, int64_t columns, const Body& body) {
  constexpr int kAtOnce = 8;
  typename Words::Column read[kAtOnce];
  int64_t start = threadIdx.x;
  for (; start + (kAtOnce - 1) * kLargestThreads < columns; start += kAtOnce * kLargestThreads) {
#pragma unroll
    for (int m = 0; m < kAtOnce; ++m) read[m] = words.read(start + m * kLargestThreads);
#pragma unroll
    for (int m = 0; m < kAtOnce; ++m) body(start + m * kLargestThreads, words.word(read[m]));
  }
#pragma unroll
  for (int m = 0; m < kAtOnce - 1; ++m)
    if (start + m * kLargestThreads < columns) read[m] = words.read(start + m * kLargestThreads);
#pragma unroll
  for (int m = 0; m < kAtOnce - 1; ++m)
    if (start + m * kLargestThreads < columns) body(start + m * kLargestThreads, words.word(read[m]));
}

// The largest digit that less than `wanted` are above, how many these are, and how many there are of all, by one warp.
template <class Real>
__device__ __forceinline__ void find_digit(LargestShared<Real>& shared, unsigned wanted) {
  constexpr int kEach = kDigits / kWarp;
  const int lane = lane_index(), first = kDigits - 1 - lane * kEach;  // downwards
  unsigned own = 0;
  for (int d = 0; d < kEach; ++d) own += shared.counts[first - d];
  const unsigned sum = lanes_prefix(own);
  if (lane == kWarp - 1) shared.all = sum;
  unsigned above = sum - own;
  if (above < wanted && wanted <= sum) {
    int digit = first;
    for (; above + shared.counts[digit] < wanted; --digit) above += shared.counts[digit];
    shared.digit = unsigned(digit), shared.above = above;
  }
}

// A bound that `wanted` of the threads' largest words reach, or all that are anything, by one warp. What is below its
// leading bits would take as many steps again, and make it little closer.
template <class Real>
__device__ __forceinline__ void find_bound(LargestShared<Real>& shared, int wanted) {
  using Own = PartWord<Real>;
  constexpr int kEach = kLargestThreads / kWarp, kHighest = 8 * int(sizeof(Own)) - 1, kSteps = 22;
  Own own[kEach];
#pragma unroll
  for (int m = 0; m < kEach; ++m) own[m] = shared.maxima[m * kWarp + lane_index()];
  Own bound = 0;
  for (int bit = kHighest; bit > kHighest - kSteps; --bit) {
    const Own higher = bound | Own(1) << bit;
    int reach = 0;
#pragma unroll
    for (int m = 0; m < kEach; ++m) reach += __popc(__ballot_sync(~0u, own[m] >= higher));
    if (reach >= wanted) bound = higher;
  }
  if (lane_index() == 0) shared.least = bound ? bound : 1, shared.reach = 0;
}

// By a whole block. A column's word is larger for larger values, and 0 where it takes no part; put(place, column) takes
// the columns, −1 after the last.
template <class Real, class Words, class Put>
__device__ __forceinline__ void put_largest(LargestShared<Real>& shared, const Words& words, int64_t columns,
                                            int64_t count, const Put& put) {
  using Own = PartWord<Real>;
  const int thread = int(threadIdx.x);
  if (count <= kFew) {
    Own most = 0;
    each_word(words, columns, [&](int64_t, Own word) { most = word > most ? word : most; });
    shared.maxima[thread] = most;
    __syncthreads();
    if (warp_index() == 0) find_bound<Real>(shared, int(count));
    __syncthreads();
    const Own bound = shared.least;
    if (most >= bound) {
      each_word(words, columns, [&](int64_t column, Own word) {
        if (word < bound) return;
        const unsigned at = atomicAdd(&shared.reach, 1u);
        if (at < kRoom) shared.words[at] = word, shared.columns[at] = int(column);
      });
    }
    __syncthreads();
    const unsigned reach = shared.reach;
    if (reach <= kRoom) {
      for (unsigned own = threadIdx.x; own < reach; own += kLargestThreads) {
        const Own word = shared.words[own];
        const int column = shared.columns[own];
        unsigned before = 0;
        for (unsigned x = 0; x < reach; ++x) {
          const Own other = shared.words[x];
          before += other > word || (other == word && shared.columns[x] < column);
        }
        shared.taken[own] = before < count;
      }
      __syncthreads();
      for (unsigned own = threadIdx.x; own < reach; own += kLargestThreads) {
        if (!shared.taken[own]) continue;
        const int column = shared.columns[own];
        int64_t place = 0;
        for (unsigned x = 0; x < reach; ++x) place += shared.taken[x] && shared.columns[x] < column;
        put(place, column);
      }
      for (int64_t at = reach + thread; at < count; at += kLargestThreads) put(at, -1);
      return;
    }
  }

  Own least = 1, known = 0;  // of the least word: what is known, and where
  auto equal = unsigned(count < columns ? count : columns);
  for (int shift = 8 * int(sizeof(Real) - 1); shift >= 0; shift -= 8) {
    for (int d = thread; d < kDigits; d += kLargestThreads) shared.counts[d] = 0;
    __syncthreads();
    for (int64_t c = thread; c < columns; c += kLargestThreads) {
      const Own word = words.word(words.read(c));
      if (word && (word & known) == (least & known)) atomicAdd(&shared.counts[word >> shift & (kDigits - 1)], 1u);
    }
    __syncthreads();
    if (warp_index() == 0) find_digit(shared, equal);
    __syncthreads();
    if (shared.all <= equal && known == 0) {  // all are taken
      equal = unsigned(columns);
      break;
    }
    if (known == 0) least = 0;
    known |= Own(kDigits - 1) << shift;
    least |= Own(shared.digit) << shift;
    equal -= shared.above;
  }

  unsigned larger_before = 0, equal_before = 0;  // of this round's columns
  int round = 0;
  for (int64_t start = 0; start < columns; start += kLargestThreads, round ^= 1) {
    const int64_t c = start + thread;
    const Own word = c < columns ? words.word(words.read(c)) : 0;
    const unsigned larger = __ballot_sync(~0u, word > least), same = __ballot_sync(~0u, word == least);
    if (lane_index() == 0)
      shared.by_warp[round][0][warp_index()] = __popc(larger), shared.by_warp[round][1][warp_index()] = __popc(same);
    __syncthreads();
    const unsigned lower = (1u << lane_index()) - 1;
    unsigned larger_first = larger_before + __popc(larger & lower), same_first = equal_before + __popc(same & lower);
    for (int warp = 0; warp < kLargestWarps; ++warp) {
      const unsigned a = shared.by_warp[round][0][warp], b = shared.by_warp[round][1][warp];
      if (warp < warp_index()) larger_first += a, same_first += b;
      larger_before += a, equal_before += b;
    }
    if (word > least || (word == least && same_first < equal))
      put(larger_first + (same_first < equal ? same_first : equal), c);
  }
  const int64_t taken = larger_before + (equal_before < equal ? equal_before : equal);
  for (int64_t at = taken + thread; at < count; at += kLargestThreads) put(at, -1);
}

template <class Real>
__global__ void __launch_bounds__(kLargestThreads)
    largest_kernel(const Real* values, int64_t columns, const int64_t* own, const int64_t* classes, int64_t count,
                   int64_t* indices) {
  auto& shared = *reinterpret_cast<LargestShared<Real>*>(shared_memory());
  const int64_t row = blockIdx.x;
  const ValueWords<Real> words{values + row * columns, classes, own[row]};
  int64_t* const to = indices + row * count;
  put_largest<Real>(shared, words, columns, count, [&](int64_t place, int64_t column) { to[place] = column; });
}

template <class Real>
void largest(const Context& context, const Real* values, int64_t rows, int64_t columns, const int64_t* own,
             const int64_t* classes, int64_t count, int64_t* indices) {
  context.launch(largest_kernel<Real>, rows, kLargestThreads, sizeof(LargestShared<Real>), values, columns, own,
                 classes, count, indices);
}

}  // namespace pddm::cuda
