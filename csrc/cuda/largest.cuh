// Of each row of a matrix the largest values, a block for each row: digit by digit, from the highest, it finds the
// least value that is taken, and how many of those that equal it. Then the columns are written in their order.
#pragma once

#include "topk.cuh"

namespace pddm::cuda {

constexpr int kLargestThreads = 256, kLargestWarps = kLargestThreads / kWarp;
constexpr int kDigits = 256;
static_assert(kDigits % kWarp == 0);

struct LargestShared {
  unsigned counts[kDigits];
  unsigned by_warp[2][2][kLargestWarps];  // (round, larger or equal, warp)
  unsigned digit, above, all;
};

// A row as words, larger for larger values; 0 takes no part.
template <class Real>
struct Words {
  const Real* values;
  const int64_t* classes;
  int64_t own;

  __device__ Word operator()(int64_t column) const {
    const int64_t its = classes[column];
    return own >= 0 && its >= 0 && its != own ? ranked_word(values[column]) + 1 : 0;
  }
};

// The largest digit that less than `wanted` are above, how many these are, and how many there are of all, by one warp.
__device__ __forceinline__ void find_digit(LargestShared& shared, unsigned wanted) {
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

template <class Real>
__global__ void __launch_bounds__(kLargestThreads)
    largest_kernel(const Real* values, int64_t columns, const int64_t* own, const int64_t* classes, int64_t count,
                   int64_t* indices) {
  auto& shared = *reinterpret_cast<LargestShared*>(shared_memory());
  const int64_t row = blockIdx.x;
  const Words<Real> words{values + row * columns, classes, own[row]};
  int64_t* const to = indices + row * count;
  const int thread = int(threadIdx.x);

  Word least = 1, known = 0;  // of the least word: what is known, and where
  auto equal = unsigned(count < columns ? count : columns);
  for (int shift = 8 * int(sizeof(Real) - 1); shift >= 0; shift -= 8) {
    for (int d = thread; d < kDigits; d += kLargestThreads) shared.counts[d] = 0;
    __syncthreads();
    for (int64_t c = thread; c < columns; c += kLargestThreads) {
      const Word word = words(c);
      if (word && (word & known) == (least & known)) atomicAdd(&shared.counts[word >> shift & (kDigits - 1)], 1u);
    }
    __syncthreads();
    if (warp_index() == 0) find_digit(shared, equal);
    __syncthreads();
    if (shared.all <= equal && known == 0) {  // all are taken
      equal = columns;
      break;
    }
    if (known == 0) least = 0;
    known |= Word(kDigits - 1) << shift;
    least |= Word(shared.digit) << shift;
    equal -= shared.above;
  }

  unsigned larger_before = 0, equal_before = 0;  // of this round's columns
  int round = 0;
  for (int64_t start = 0; start < columns; start += kLargestThreads, round ^= 1) {
    const int64_t c = start + thread;
    const Word word = c < columns ? words(c) : 0;
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
      to[larger_first + (same_first < equal ? same_first : equal)] = c;
  }
  const int64_t taken = larger_before + (equal_before < equal ? equal_before : equal);
  for (int64_t at = taken + thread; at < count; at += kLargestThreads) to[at] = -1;
}

template <class Real>
void largest(const Context& context, const Real* values, int64_t rows, int64_t columns, const int64_t* own,
             const int64_t* classes, int64_t count, int64_t* indices) {
  context.launch(largest_kernel<Real>, rows, kLargestThreads, sizeof(LargestShared), values, columns, own, classes,
                 count, indices);
}

}  // namespace pddm::cuda
