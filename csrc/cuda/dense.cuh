// Scores that are asked for by name: listed pairs, matrices, and the best of a gallery.
#pragma once

#include "prepared.cuh"

namespace pddm::cuda {

template <class A>
void score_pairs(const Context& context, const Rows& rows, const Pairs& pairs, const Unit& unit,
                 typename A::Real* scores) {
  if (pairs.count == 0) return;
  Prepared<A> p(context, rows, unit, pairs.count);
  Job<typename A::Real> job;
  job.walk = Walk::pairs, job.n = rows.count;
  job.i = pairs.i, job.j = pairs.j, job.count = pairs.count, job.scores = scores;
  p.score(job);
}

template <class A>
void score_matrix(const Context& context, const Rows& rows, int64_t split, const Unit& unit, typename A::Real* scores) {
  const int64_t n = rows.count;
  Job<typename A::Real> job;
  job.n = n, job.scores = scores;
  if (split < 0) {
    job.walk = Walk::triangle, job.diagonal = job.mirrored = true, job.pitch = n;
  } else {
    job.walk = Walk::rectangle, job.pitch = n - split;
    job.rows = split, job.first_column = split, job.columns = n - split;
  }
  const int64_t pairs = split < 0 ? n * (n + 1) / 2 : split * (n - split);
  if (pairs == 0) return;
  Prepared<A> p(context, rows, unit, pairs);
  p.score(job);
}

// Of two candidates: larger scores first, equal ones by index, NaN last.
template <class Real>
__device__ __forceinline__ bool precedes(Real score, int64_t index, Real other, int64_t other_index) {
  const bool nan = score != score, other_nan = other != other;
  if (nan || other_nan) return nan == other_nan ? index < other_index : other_nan;
  return score > other || (score == other && index < other_index);
}

template <class Real>
struct Ranking {
  Real* scores;  // (queries, k), best first
  int64_t* indices;
};

// A block merges one query's best so far, `have` of them, with the scores of `count` more gallery rows from `first` on:
// a candidate's place is the number of those that precede it.
constexpr int kMergeThreads = 256;
template <class Real>
__global__ void __launch_bounds__(kMergeThreads)
    merge_kernel(const Ranking<Real> old, int64_t have, const Real* chunk, int64_t first, int64_t count,
                 const Ranking<Real> merged, int64_t k) {
  const int64_t query = blockIdx.x;
  const Real *old_scores = old.scores + query * k, *fresh = chunk + query * count;
  const int64_t* old_indices = old.indices + query * k;
  for (int64_t at = threadIdx.x; at < have + count; at += kMergeThreads) {
    const bool is_old = at < have;
    const Real score = is_old ? old_scores[at] : fresh[at - have];
    const int64_t index = is_old ? old_indices[at] : first + at - have;
    // The old ones stand in order, and before all fresh ones of the same score.
    int64_t place = 0;
    if (is_old) {
      place = at;
    } else {
      int64_t low = 0, high = have;
      while (low < high) {
        const int64_t middle = (low + high) / 2;
        if (precedes(old_scores[middle], old_indices[middle], score, index))
          low = middle + 1;
        else
          high = middle;
      }
      place = low;
      if (place >= k) continue;
    }
    for (int64_t other = 0; other < count && place < k; ++other)
      place += precedes(fresh[other], first + other, score, index);
    if (place < k) merged.scores[query * k + place] = score, merged.indices[query * k + place] = index;
  }
}

constexpr int64_t kTopkScores = 4 << 20;

// Copies the gallery behind the queries.
template <class Real>
__global__ void join_kernel(const Real* a, int64_t a_count, const Real* b, int64_t b_count, Real* to) {
  const int64_t at = int64_t(blockIdx.x) * kPrepareThreads + threadIdx.x;
  if (at < a_count + b_count) to[at] = at < a_count ? a[at] : b[at - a_count];
}

template <class A>
void topk(const Context& context, const Rows& queries, const Rows& gallery, int64_t k, const Unit& unit,
          typename A::Real* scores, int64_t* indices) {
  using Real = typename A::Real;
  const int64_t q = queries.count, g = gallery.count;
  if (q == 0 || k == 0) return;
  Real* rows = context.take<Real>((q + g) * unit.dim);
  context.launch(join_kernel<Real>, divided_up((q + g) * unit.dim, kPrepareThreads), kPrepareThreads, 0,
                 static_cast<const Real*>(queries.data), q * unit.dim, static_cast<const Real*>(gallery.data),
                 g * unit.dim, rows);
  // All queries' chunks together are no longer than what is computed of the rows, or than the answer.
  const int64_t room = std::min((q + g) * (unit.hidden + unit.combined), kTopkScores) / q;
  const int64_t length = std::min(g, std::max({room, k, int64_t(kColumns)}));
  Prepared<A> p(context, {rows, q + g}, unit, q * length);
  Real* chunk = context.take<Real>(q * length);
  Ranking<Real> now{scores, indices}, other{context.take<Real>(q * k), context.take<int64_t>(q * k)};
  // The last merge must end in the caller's arrays.
  if (divided_up(g, length) % 2) std::swap(now, other);
  for (int64_t first = 0; first < g; first += length) {
    const int64_t count = std::min(length, g - first);
    Job<Real> job;
    job.walk = Walk::rectangle, job.n = q + g, job.rows = q, job.first_column = q + first, job.columns = count;
    job.scores = chunk, job.pitch = count;
    p.score(job);
    context.launch(merge_kernel<Real>, q, kMergeThreads, 0, now, std::min(first, k), chunk, first, count, other, k);
    std::swap(now, other);
  }
}

}  // namespace pddm::cuda
