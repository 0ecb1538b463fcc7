// Scores that are asked for by name: listed pairs and matrices.
#pragma once

#include "prepared.cuh"

namespace pddm::cuda {

template <class A>
void score_pairs(const Context& context, const Rows& rows, const Pairs& pairs, const Unit& unit,
                 typename A::Real* scores) {
  if (pairs.count == 0) return;
  Prepared<A> p(context, rows.count, unit, pairs.count);
  p.prepare(rows, unit, pairs);
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
  Prepared<A> p(context, n, unit, pairs);
  p.prepare(rows, unit);
  p.score(job);
}

}  // namespace pddm::cuda
