// The double-header hinge loss of mined quadruplets, and its gradient: what cpu/loss.h computes. Every sum has one
// order. Forward:
//
//     values_kernel   a warp for each quadruplet: its loss, and which of its hinges are open
//     mean_kernel     one block
//
// and backward:
//
//     scales_kernel   a warp for each row: 1 / ‖x‖; the last block counts the valid quadruplets
//     slopes_kernel   a thread for each quadruplet: the gradients of its scores, and which rows it names
//     rows_kernel     a block for each row: each warp adds up what a run of the quadruplets does to it, and what the
//                     runs do is added up in order; then back through the row's norm
//
// Quadruplets that are not valid name no row that is looked at.
#pragma once

#include "prepare.cuh"

namespace pddm::cuda {

constexpr int kLossThreads = 256, kLossWarps = kLossThreads / kWarp;

__device__ inline void refuse_quadruplet(int64_t at, int64_t row, int64_t rows) {
  printf("pddm: quadruplet %lld has row %lld, out of range for %lld rows\n", static_cast<long long>(at),
         static_cast<long long>(row), static_cast<long long>(rows));
  __trap();
}

// The rows i, j, k, l of a valid quadruplet.
struct Four {
  int64_t row[4];

  __device__ Four(const Picked& quads, int64_t q) : row{quads.i[q], quads.j[q], quads.k[q], quads.l[q]} {}
  __device__ void check(int64_t q, int64_t n) const {
    for (const int64_t r : row)
      if (r < 0 || r >= n) refuse_quadruplet(q, r, n);
  }
};

// 1 / ‖x‖ of a row, by a warp.
template <class Real>
__device__ __forceinline__ Real scale_of(const Real* row, int dim) {
  Real squares = 0;
  for (int c = lane_index(); c < dim; c += kWarp) squares += row[c] * row[c];
  return 1 / floored(sqrt(lanes_sum(squares)));
}

template <class Real>
struct MarginsAs {
  Real alpha, beta, weight;
};

// Where NaN comes in, NaN comes out.
template <class Real>
__device__ __forceinline__ Real open_hinge(Real x, Hinge which, unsigned& open) {
  if (x <= 0) return 0;
  open |= which;
  return x;
}

template <class Real>
__global__ void __launch_bounds__(kLossThreads)
    values_kernel(const Real* x, int64_t n, int dim, const __grid_constant__ Picked quads,
                  const __grid_constant__ MarginsAs<Real> margins, Real* values, uint8_t* opened) {
  const int64_t q = int64_t(blockIdx.x) * kLossWarps + warp_index();
  if (q >= quads.slots) return;
  const int lane = lane_index();
  Real value = 0;
  unsigned open = 0;
  if (quads.valid[q]) {
    const Four four(quads, q);
    if (lane == 0) four.check(q, n);
    __syncwarp();
    const Real* rows[4];
    Real scale[4];
#pragma unroll
    for (int which = 0; which < 4; ++which) {
      rows[which] = x + four.row[which] * dim;
      scale[which] = scale_of(rows[which], dim);
    }
    Real ij = 0, ik = 0, jl = 0;
    for (int c = lane; c < dim; c += kWarp) {
      const Real i = rows[0][c] * scale[0], j = rows[1][c] * scale[1];
      const Real to_j = i - j, to_k = i - rows[2][c] * scale[2], to_l = j - rows[3][c] * scale[3];
      ij += to_j * to_j, ik += to_k * to_k, jl += to_l * to_l;
    }
    ij = lanes_sum(ij), ik = lanes_sum(ik), jl = lanes_sum(jl);
    const auto score = [&](const void* of) { return static_cast<const Real*>(of)[q]; };
    const Real s_ij = score(quads.s_ij), s_ik = score(quads.s_ik), s_jl = score(quads.s_jl);
    value = open_hinge(s_ik - s_ij + margins.alpha, kScoreK, open);
    value += open_hinge(s_jl - s_ij + margins.alpha, kScoreL, open);
    Real distances = open_hinge(ij + margins.beta - ik, kDistanceK, open);
    distances += open_hinge(ij + margins.beta - jl, kDistanceL, open);
    value += margins.weight * distances;
  }
  if (lane == 0) values[q] = value, opened[q] = uint8_t(open);
}

// A sum over the block's threads, which all have it then. `parts` is for a number of each warp.
template <class Real>
__device__ __forceinline__ Real block_sum(Real x, Real* parts) {
  x = lanes_sum(x);
  __syncthreads();  // what was there may still be read
  if (lane_index() == 0) parts[warp_index()] = x;
  __syncthreads();
  Real sum = 0;
#pragma unroll
  for (int warp = 0; warp < kLossWarps; ++warp) sum += parts[warp];
  return sum;
}
constexpr int kBlockSumBytes = kLossWarps * int(sizeof(double));

// At least 1, to divide by.
__device__ __forceinline__ int64_t count_valid(const Picked& quads, double* parts) {
  double valid = 0;  // exact
  for (int64_t q = threadIdx.x; q < quads.slots; q += kLossThreads) valid += quads.valid[q];
  const auto count = int64_t(block_sum(valid, parts));
  return count > 1 ? count : 1;
}

template <class Real>
__global__ void __launch_bounds__(kLossThreads)
    mean_kernel(const __grid_constant__ Picked quads, const Real* values, Real* loss) {
  auto* const parts = reinterpret_cast<double*>(shared_memory());
  double sum = 0;
  for (int64_t q = threadIdx.x; q < quads.slots; q += kLossThreads) sum += double(values[q]);
  sum = block_sum(sum, parts);
  const int64_t count = count_valid(quads, parts);
  if (threadIdx.x == 0) *loss = Real(sum / double(count));
}

// The quadruplets that name a row are among [~not_first, end), which only grows; { 0, 0 } where there is none.
struct Span {
  Word not_first, end;
};

template <class Real>
__global__ void __launch_bounds__(kLossThreads)
    scales_kernel(const Real* x, int64_t n, int dim, const __grid_constant__ Picked quads, Real* scales, int64_t* count,
                  Span* spans) {
  if (blockIdx.x + 1 == gridDim.x) {
    const int64_t valid = count_valid(quads, reinterpret_cast<double*>(shared_memory()));
    if (threadIdx.x == 0) *count = valid;
    return;
  }
  const int64_t row = int64_t(blockIdx.x) * kLossWarps + warp_index();
  if (row >= n) return;
  const Real scale = scale_of(x + row * dim, dim);
  if (lane_index() == 0) scales[row] = scale, spans[row] = {0, 0};
}

// The rows that a valid quadruplet names, which go through their norm though no hinge is open; otherwise −1.
struct alignas(16) Named {
  int i = -1, j = -1, k = -1, l = -1;
};

// The gradients that the scores get, into `slopes`: of s_ij, s_ik, s_jl.
template <class Real>
struct Slopes {
  Real *s_ij, *s_ik, *s_jl;
};

template <class Real>
__global__ void __launch_bounds__(kLossThreads)
    slopes_kernel(int64_t n, const __grid_constant__ Picked quads, const uint8_t* open, const Real* upstream,
                  const int64_t* count, const __grid_constant__ Slopes<Real> slopes, Named* named, Span* spans) {
  const int64_t q = int64_t(blockIdx.x) * kLossThreads + threadIdx.x;
  if (q >= quads.slots) return;
  const unsigned hinges = quads.valid[q] ? open[q] : 0;
  const Real each = *upstream / Real(*count);
  const Real k = hinges & kScoreK ? each : Real(0), l = hinges & kScoreL ? each : Real(0);
  slopes.s_ij[q] = -(k + l), slopes.s_ik[q] = k, slopes.s_jl[q] = l;
  Named rows;
  if (quads.valid[q]) {
    const Four four(quads, q);
    four.check(q, n);
    rows = {int(four.row[0]), int(four.row[1]), int(four.row[2]), int(four.row[3])};
    for (const int64_t row : four.row)
      atomicMax(&spans[row].not_first, ~Word(q)), atomicMax(&spans[row].end, Word(q) + 1);
  }
  named[q] = rows;
}

constexpr int kRowPerLane = 16, kRowAtOnce = kRowPerLane * kWarp;
template <class Real>
constexpr int64_t kRowsBytes = kBlockSumBytes + int64_t(kLossWarps) * kRowAtOnce * int64_t(sizeof(Real));

template <class Real>
__global__ void __launch_bounds__(kLossThreads)
    rows_kernel(const Real* x, int dim, const Real* scales, const Span* spans, const Named* named, const uint8_t* open,
                Real embedding_weight, const Real* upstream, const int64_t* count, Real* d_x) {
  auto* const small = reinterpret_cast<Real*>(shared_memory());
  Real* const parts = reinterpret_cast<Real*>(shared_memory() + kBlockSumBytes);  // a warp's sums of kRowAtOnce columns
  const int row = int(blockIdx.x), lane = lane_index(), warp = warp_index();
  const Span span = spans[row];
  const bool any = span.end != 0;
  const auto from = any ? int64_t(~span.not_first) : 0, to_end = int64_t(span.end);
  const int64_t run = (to_end - from + kLossWarps - 1) / kLossWarps, begin = from + warp * run;
  const int64_t end = begin + run < to_end ? begin + run : to_end;
  const Real weight = 2 * (*upstream / Real(*count)) * embedding_weight, scale = scales[row];
  const Real* const own = x + int64_t(row) * dim;
  Real* const to = d_x + int64_t(row) * dim;
  Real along = 0;  // Σ d · f, this thread's part
  for (int first = 0; first < dim; first += kRowAtOnce) {
    Real sums[kRowPerLane] = {};
    for (int64_t at = begin; at < end; at += kWarp) {
      Named mine;
      if (at + lane < end) mine = named[at + lane];
      unsigned here = __ballot_sync(~0u, mine.i == row || mine.j == row || mine.k == row || mine.l == row);
      for (; here; here &= here - 1) {
        const int found = __ffs(int(here)) - 1;
        const int i = __shfl_sync(~0u, mine.i, found), j = __shfl_sync(~0u, mine.j, found);
        const int k = __shfl_sync(~0u, mine.k, found), l = __shfl_sync(~0u, mine.l, found);
        const unsigned hinges = open[at + found];
        const int on_k = (hinges & kDistanceK) != 0, on_l = (hinges & kDistanceL) != 0;
        // How often f_i − f_j, f_i − f_k and f_j − f_l are in this row's gradient.
        const int of_j = (on_k + on_l) * ((i == row) - (j == row));
        const int of_k = on_k * ((k == row) - (i == row)), of_l = on_l * ((l == row) - (j == row));
        const auto add = [&](int often, int a, int b) {
          if (often == 0) return;
          const Real times = weight * Real(often);
          const Real *of_a = x + int64_t(a) * dim + first, *of_b = x + int64_t(b) * dim + first;
          const Real scale_a = scales[a], scale_b = scales[b];
#pragma unroll
          for (int p = 0; p < kRowPerLane; ++p) {
            const int c = p * kWarp + lane;
            if (first + c < dim) sums[p] += times * (of_a[c] * scale_a - of_b[c] * scale_b);
          }
        };
        add(of_j, i, j), add(of_k, i, k), add(of_l, j, l);
      }
    }
    __syncthreads();  // the columns before may still be read
#pragma unroll
    for (int p = 0; p < kRowPerLane; ++p) parts[warp * kRowAtOnce + p * kWarp + lane] = sums[p];
    __syncthreads();
    for (int c = int(threadIdx.x); c < kRowAtOnce && first + c < dim; c += kLossThreads) {
      Real sum = 0;
#pragma unroll
      for (int of = 0; of < kLossWarps; ++of) sum += parts[of * kRowAtOnce + c];
      to[first + c] = sum;
      along += sum * (own[first + c] * scale);
    }
  }
  // A row that nothing names has no gradient, whatever it holds. Below the floor the norm is a constant.
  along = block_sum(along, small);
  if (scale >= Real(1 / kNormFloor)) along = 0;
  for (int c = int(threadIdx.x); c < dim; c += kLossThreads)
    if (any) to[c] = (to[c] - along * (own[c] * scale)) * scale;
}

template <class Real>
void quadruplet_loss(const Context& context, const Rows& rows, int64_t dim, const Picked& quads, const Margins& margins,
                     Real* loss, uint8_t* open) {
  Real* const values = context.take<Real>(quads.slots);
  const MarginsAs<Real> as{Real(margins.alpha), Real(margins.beta), Real(margins.weight)};
  context.launch(values_kernel<Real>, divided_up(quads.slots, kLossWarps), kLossThreads, 0,
                 static_cast<const Real*>(rows.data), rows.count, dim, quads, as, values, open);
  context.launch(mean_kernel<Real>, 1, kLossThreads, kBlockSumBytes, quads, values, loss);
}

template <class Real>
void quadruplet_loss_backward(const Context& context, const Rows& rows, int64_t dim, const Picked& quads,
                              double embedding_weight, const Real* upstream, const uint8_t* open, Real* d_rows,
                              const Slopes<Real>& slopes) {
  if (rows.count > 0x7fffffff) throw std::runtime_error("pddm: more than 2^31 rows");
  const auto* const x = static_cast<const Real*>(rows.data);
  Real* const scales = context.take<Real>(rows.count);
  int64_t* const count = context.take<int64_t>(1);
  Named* const named = context.take<Named>(quads.slots);
  Span* const spans = context.take<Span>(rows.count);
  context.launch(scales_kernel<Real>, divided_up(rows.count, kLossWarps) + 1, kLossThreads, kBlockSumBytes, x,
                 rows.count, dim, quads, scales, count, spans);
  context.launch(slopes_kernel<Real>, divided_up(quads.slots, kLossThreads), kLossThreads, 0, rows.count, quads, open,
                 upstream, count, slopes, named, spans);
  context.launch(rows_kernel<Real>, rows.count, kLossThreads, kRowsBytes<Real>, x, dim, scales, spans, named, open,
                 Real(embedding_weight), upstream, count, d_rows);
}

}  // namespace pddm::cuda
