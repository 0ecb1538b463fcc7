// The k best of a gallery for every query: scores in chunks of the gallery, each cut into segments that one block
// sorts, and sorted lists merged by rank, kFan at a time. The cost is O(gallery · log) in whatever order the scores
// come.
#pragma once

#include <stdexcept>

#include "prepared.cuh"

namespace pddm::cuda {

constexpr int kSegment = 1024, kFan = 8, kRankThreads = 256;
constexpr int64_t kTopkScores = 1 << 20;  // at once

// Sorted lists of scores in their order-preserving form, and of the gallery rows they are of. NaN is 0; below it only
// what fills up a list.
struct Ranked {
  Word* scores;
  int* rows;

  static constexpr int kFillerRow = 0x7fffffff;
  __device__ bool precedes(int64_t a, Word score, int row) const {
    return scores[a] > score || (scores[a] == score && rows[a] < row);
  }
  __device__ bool follows(int64_t a, Word score, int row) const {
    return scores[a] < score || (scores[a] == score && rows[a] > row);
  }
};

template <class Real>
__device__ __forceinline__ Word ranked_word(Real score) {
  return score == score ? ordered(score) : 0;
}

// Of every query the lists that are merged next, `kept` long each: first the best so far, `have` of them, then those of
// the segments of its row of `chunk`, which are of gallery rows from `first` on.
template <class Real>
__global__ void __launch_bounds__(kRankThreads)
    sort_segments_kernel(const Ranked best, int64_t have, int64_t k, const Real* chunk, int64_t first, int64_t count,
                         int segment, int64_t kept, int64_t lists, const Ranked out) {
  auto* const scores = reinterpret_cast<Word*>(shared_memory());
  int* const rows = reinterpret_cast<int*>(scores + segment);
  const int64_t query = blockIdx.x / lists, list = blockIdx.x % lists, old = (have + kept - 1) / kept;
  const int64_t to = (query * lists + list) * kept;
  if (list < old) {
    for (int64_t at = threadIdx.x; at < kept; at += kRankThreads) {
      const int64_t from = list * kept + at;
      out.scores[to + at] = from < have ? best.scores[query * k + from] : 0;
      out.rows[to + at] = from < have ? best.rows[query * k + from] : Ranked::kFillerRow;
    }
    return;
  }
  const int64_t start = (list - old) * segment;
  for (int at = int(threadIdx.x); at < segment; at += kRankThreads) {
    const bool there = start + at < count;
    scores[at] = there ? ranked_word(chunk[query * count + start + at]) : 0;
    rows[at] = there ? int(first + start + at) : Ranked::kFillerRow;
  }
  // Bitonic; `segment` is a power of two.
  const Ranked sorted{scores, rows};
  for (int size = 2; size <= segment; size *= 2) {
    for (int apart = size / 2; apart > 0; apart /= 2) {
      __syncthreads();
      for (int at = int(threadIdx.x); at < segment / 2; at += kRankThreads) {
        const int low = at / apart * 2 * apart + at % apart, high = low + apart;
        const bool best_first = (low & size) == 0;
        const Word score = scores[high];
        const int row = rows[high];
        if (best_first ? sorted.follows(low, score, row) : sorted.precedes(low, score, row)) {
          scores[high] = scores[low], rows[high] = rows[low];
          scores[low] = score, rows[low] = row;
        }
      }
    }
  }
  __syncthreads();
  for (int64_t at = threadIdx.x; at < kept; at += kRankThreads)
    out.scores[to + at] = scores[at], out.rows[to + at] = rows[at];
}

// Merges every kFan neighbouring lists of a query into one, of which the first `merged` are kept: an entry's place is
// its own and that in each of the other lists; of equals (which only fill up) the earlier list's come first.
static __global__ void __launch_bounds__(kRankThreads)
    merge_lists_kernel(const Ranked in, int64_t queries, int64_t lists, int64_t length, const Ranked out, int64_t pitch,
                       int64_t merged) {
  const int64_t at = int64_t(blockIdx.x) * kRankThreads + threadIdx.x, query = at / (lists * length);
  if (query >= queries) return;
  const int64_t list = at / length % lists, group = list / kFan, base = query * lists * length;
  const Word score = in.scores[at];
  const int row = in.rows[at];
  const int64_t first = group * kFan, end = first + kFan < lists ? first + kFan : lists;
  const int64_t to = query * pitch + group * merged;
  int64_t place = at % length;
  // The last group may have less than is kept of a group.
  if (list == first)
    for (int64_t empty = (end - first) * length + place; empty < merged; empty += length)
      out.scores[to + empty] = 0, out.rows[to + empty] = Ranked::kFillerRow;
  for (int64_t other = first; other < end && place < merged; ++other) {
    if (other == list) continue;
    const int64_t start = base + other * length;
    int64_t low = 0, high = length;
    while (low < high) {
      const int64_t middle = (low + high) / 2;
      if (other < list ? !in.follows(start + middle, score, row) : in.precedes(start + middle, score, row))
        low = middle + 1;
      else
        high = middle;
    }
    place += low;
  }
  if (place < merged) out.scores[to + place] = score, out.rows[to + place] = row;
}

template <class Real>
__global__ void __launch_bounds__(kRankThreads)
    give_ranked_kernel(const Ranked best, int64_t count, Real* scores, int64_t* indices) {
  const int64_t at = int64_t(blockIdx.x) * kRankThreads + threadIdx.x;
  if (at < count) scores[at] = unordered(best.scores[at], Real(0)), indices[at] = best.rows[at];
}

// Copies the gallery behind the queries.
template <class Real>
__global__ void __launch_bounds__(kRankThreads)
    join_kernel(const Real* a, int64_t a_count, const Real* b, int64_t b_count, Real* to) {
  const int64_t at = int64_t(blockIdx.x) * kRankThreads + threadIdx.x;
  if (at < a_count + b_count) to[at] = at < a_count ? a[at] : b[at - a_count];
}

template <class A>
void topk(const Context& context, const Rows& queries, const Rows& gallery, int64_t k, const Unit& unit,
          typename A::Real* scores, int64_t* indices) {
  using Real = typename A::Real;
  const int64_t q = queries.count, g = gallery.count;
  if (q == 0 || k == 0) return;
  const auto launch = [&](auto kernel, int64_t count, const auto&... arguments) {
    context.launch(kernel, divided_up(count, kRankThreads), kRankThreads, 0, arguments...);
  };
  Real* rows = context.take<Real>((q + g) * unit.dim);
  launch(join_kernel<Real>, (q + g) * unit.dim, static_cast<const Real*>(queries.data), q * unit.dim,
         static_cast<const Real*>(gallery.data), g * unit.dim, rows);
  // All queries' chunks together are no longer than what is computed of the rows, or than the answer; but for whole
  // segments, or a tile's columns.
  const int64_t room = std::min((q + g) * (unit.hidden + unit.combined), kTopkScores) / q;
  int64_t length = std::max({room, k, int64_t(kTileColumns)});
  if (length > kSegment) length = std::max(length / kSegment, divided_up(k, kSegment)) * kSegment;
  length = std::min(g, length);
  int segment = 2;
  while (segment < std::min<int64_t>(length, kSegment)) segment *= 2;
  const int64_t kept = std::min<int64_t>(k, segment);
  // Entries of the longest lists of all: the last group's may be longer than what it merges.
  int64_t most = 0;
  for (int64_t lists = divided_up(length, segment) + (g > length ? divided_up(k, kept) : 0), each = kept;;) {
    most = std::max(most, q * lists * each);
    if (lists == 1) break;
    lists = divided_up(lists, kFan), each = std::min(kFan * each, k);
  }

  Prepared<A> p(context, q + g, unit, q * length);
  p.prepare({rows, q + g}, unit);
  Real* chunk = context.take<Real>(q * length);
  const auto take = [&](int64_t count) { return Ranked{context.take<Word>(count), context.take<int>(count)}; };
  const Ranked best = take(q * k);
  Ranked now = take(most), next = take(most);
  int64_t have = 0;
  for (int64_t first = 0; first < g; first += length) {
    const int64_t count = std::min(length, g - first);
    Job<Real> job;
    job.walk = Walk::rectangle, job.n = q + g, job.rows = q, job.first_column = q + first, job.columns = count;
    job.scores = chunk, job.pitch = count;
    p.score(job);
    int64_t lists = divided_up(have, kept) + divided_up(count, segment), kept_now = kept;
    context.launch(sort_segments_kernel<Real>, q * lists, kRankThreads, segment * int64_t(sizeof(Word) + sizeof(int)),
                   best, have, k, chunk, first, count, segment, kept, lists, now);
    do {
      const int64_t groups = divided_up(lists, kFan), merged = std::min({kFan * kept_now, k, lists * kept_now});
      const bool last = groups == 1;
      if (q * lists * kept_now > most) throw std::logic_error("pddm: topk's lists do not fit");
      launch(merge_lists_kernel, q * lists * kept_now, now, q, lists, kept_now, last ? best : next,
             last ? k : groups * merged, merged);
      std::swap(now, next);
      lists = groups, kept_now = merged;
    } while (lists > 1);
    have = std::min(kept_now, k);
  }
  launch(give_ranked_kernel<Real>, q * k, best, q * k, scores, indices);
}

}  // namespace pddm::cuda
