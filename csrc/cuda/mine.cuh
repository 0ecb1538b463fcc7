// Hard quadruplets, without the host ever waiting: five or six launches for `batch`, four for `anchor`.
#pragma once

#include "prepared.cuh"

namespace pddm::cuda {

template <class Real>
struct Slots {
  int64_t *i, *j, *k, *l;
  Real *s_ij, *s_ik, *s_jl;
  bool* valid;

  explicit Slots(const Quadruplets& q)
      : i(q.i),
        j(q.j),
        k(q.k),
        l(q.l),
        s_ij(static_cast<Real*>(q.s_ij)),
        s_ik(static_cast<Real*>(q.s_ik)),
        s_jl(static_cast<Real*>(q.s_jl)),
        valid(q.valid) {}

  // near_i and near_j are the rows of `near` that know k and l.
  __device__ void write(int64_t q, int at_i, int at_j, Real score, const Bests<Real>& near, int64_t near_i,
                        int64_t near_j) const {
    const bool is = at_i >= 0 && at_j >= 0 && near.found(near_i) && near.found(near_j);
    i[q] = is ? at_i : -1, j[q] = is ? at_j : -1;
    k[q] = is ? near.index(near_i) : -1, l[q] = is ? near.index(near_j) : -1;
    s_ij[q] = is ? score : 0;
    s_ik[q] = is ? near.score(near_i) : 0, s_jl[q] = is ? near.score(near_j) : 0;
    valid[q] = is;
  }
};

constexpr int kFinishThreads = 128, kFinishBatchThreads = 1024;

template <class Real>
__global__ void __launch_bounds__(kFinishBatchThreads)
    finish_batch_kernel(int64_t n, Bests<Real> far, Bests<Real> near, const __grid_constant__ Slots<Real> out) {
  const Pair hardest = hardest_pair(far, n, shared_memory());
  if (threadIdx.x == 0)
    out.write(0, hardest.i, hardest.j, hardest.i < 0 ? Real(0) : 0 - far.score(hardest.i), near, 0, 1);
}

template <class Real>
__global__ void finish_anchor_kernel(int64_t n, Bests<Real> far, Bests<Real> near,
                                     const __grid_constant__ Slots<Real> out) {
  const int64_t i = int64_t(blockIdx.x) * kFinishThreads + threadIdx.x;
  if (i >= n) return;
  const bool found = far.found(i);
  const int j = found ? far.index(i) : -1;
  out.write(i, int(i), j, found ? 0 - far.score(i) : Real(0), near, i, found ? j : i);
}

// Row i's positive pairs have their slots one after the other; the walk has left their scores there.
template <class Real>
__global__ void finish_pair_kernel(int64_t n, const int64_t* slot, const __grid_constant__ Ranks ranks,
                                   Bests<Real> near, const __grid_constant__ Slots<Real> out) {
  const int64_t i = int64_t(blockIdx.x) * kFinishThreads + threadIdx.x;
  if (i >= n) return;
  for (int64_t q = slot[i]; q < slot[i + 1]; ++q) {
    const int j = ranks.order[ranks.rank[i] + 1 + (q - slot[i])];
    out.write(q, int(i), j, out.s_ij[q], near, i, j);
  }
}

// The only thing the host waits for: `pair` has as many slots as the data says.
inline int64_t count_positive_pairs(const Context& context, const int64_t* labels, int64_t n) {
  if (n == 0) return 0;
  const Ranks ranks{labels, context.take<int>(n), context.take<int>(n), context.take<int>(n), context.take<int>(n)};
  int64_t *before = context.take<int64_t>(n + 1), pairs = 0;
  context.launch(rank_kernel, divided_up(n, kPrepareWarps), kPrepareThreads, 0, ranks, n);
  context.launch(prefix_kernel, 1, kScanThreads, kScanBytes, Scan{ranks.later, before}, Scan{}, n);
  check(cudaMemcpyAsync(&pairs, before + n, sizeof pairs, cudaMemcpyDeviceToHost, context.stream()),
        "the number of positive pairs could not be read");
  check(cudaStreamSynchronize(context.stream()), "the number of positive pairs could not be read");
  return pairs;
}

template <class A>
void mine(const Context& context, const Rows& rows, const int64_t* labels, const Unit& unit, Mode mode,
          const Quadruplets& quadruplets) {
  using Real = typename A::Real;
  const int64_t n = rows.count, all = n * (n - 1) / 2;
  const Slots<Real> out(quadruplets);
  const bool batch = mode == Mode::batch;
  const int64_t far_rows = mode == Mode::pair ? 0 : n, near_rows = batch ? 2 : n;
  constexpr int kPerRow = Bests<Real>::kWordsPerRow;

  // For `batch` the shape is chosen for the 2n pairs of the second walk: how many the first has is the data's secret.
  Prepared<A> p(context, n, unit, batch ? 2 * n : all, labels, mode != Mode::anchor, (far_rows + near_rows) * kPerRow);
  p.prepare(rows, unit);
  Job<Real> job;
  job.n = n, job.labels = labels;
  const Bests<Real> far = Bests<Real>::at(p.words, far_rows);
  const Bests<Real> near = Bests<Real>::at(p.words + far_rows * kPerRow, near_rows);
  const int64_t finishes = divided_up(n, kFinishThreads);
  if (batch) {
    int64_t* before = context.take<int64_t>(n + 1);
    p.prefix(before, nullptr);
    job.order = p.ranks.order, job.before = before;
    job.walk = Walk::positives, job.far = far;
    p.score(job, all);
    job.walk = Walk::partners, job.near = near;
    p.score(job);
    context.launch(finish_batch_kernel<Real>, 1, kFinishBatchThreads, Hardest::kBytes, n, far, near, out);
  } else if (mode == Mode::anchor) {
    job.walk = Walk::triangle, job.far = far, job.near = near;
    p.score(job);
    context.launch(finish_anchor_kernel<Real>, finishes, kFinishThreads, 0, n, far, near, out);
  } else {
    int64_t *before = context.take<int64_t>(n + 1), *slot = context.take<int64_t>(n + 1);
    p.prefix(before, slot);
    job.walk = Walk::triangle, job.near = near;
    job.rank = p.ranks.rank, job.slot = slot, job.scores = out.s_ij;
    p.score(job);
    context.launch(finish_pair_kernel<Real>, finishes, kFinishThreads, 0, n, slot, p.ranks, near, out);
  }
}

}  // namespace pddm::cuda
