// The way back. Pairs with a gradient are recomputed, a chunk of them at a time, as plain matrix products; every sum
// has one order.
//
//     u = |f_i − f_j|                   pairs × dim             recomputed (to unit norm with normalize_input)
//     X  = [u'/‖u'‖ ; v'/‖v'‖]          pairs × 2 hidden        recomputed
//     C  = σ(X W_cᵀ + b_c)              pairs × combined        recomputed, then dC in its place
//     dX = dC W_c                       pairs × 2 hidden        then the gradients before the relus, dZ
//     dW_c += dCᵀ X    dW_u += dZ_uᵀ u
//     du = dZ_u W_u                     pairs × dim, in place of u; then added to the pairs' rows
//
// v goes by rows where its product is linear and the pairs are more than the rows:
//
//     A = f W_vᵀ + b_v                  n × hidden, before the chunks; v' = σ((A_i + A_j) / 2)
//     dA_i += dZ_v / 2, dA_j += dZ_v / 2
//     df += dA W_v, dW_v = dAᵀ f        after the chunks
//
// and otherwise by pairs, as u does: v = (f_i + f_j) / 2, dW_v += dZ_vᵀ v, dv = dZ_v W_v.
//
// What is an operand of a product is kept as one, the weights too.
#pragma once

#include "multiply.cuh"
#include "prepare.cuh"

namespace pddm::cuda {

// Bytes of a chunk's buffers and pairs in it, at most: of a list; and of a matrix, beside whose scores more memory is
// little, and whose chunks give every product as many blocks as fill a device.
constexpr int64_t kListBytes = 20 << 20, kListPairs = 2048, kMatrixBytes = 96 << 20, kMatrixPairs = 8192;
// Bytes of A and dA beside a list, at most.
constexpr int64_t kByRowsBytes = 16 << 20;
// Of a product with few outputs: blocks that fill the device, and the least inputs that are worth one.
constexpr int64_t kWeightBlocks = 128, kPairsOfPart = 512;
constexpr int kGradientThreads = 256, kGradientWarps = kGradientThreads / kWarp;

// Where pairs come from: a list, or the entries of a matrix (of all rows with themselves, i <= j, where both entries'
// weights add up; or of the first `split` rows with the others).
template <class Real>
struct Source {
  const int64_t *i = nullptr, *j = nullptr;
  const Real* weight;
  int64_t n, split = -1, count;
};

// A chunk's pairs: of a list those from `first` on; of a matrix the entries of so many rows by so many columns, which
// are rows of f from `row` and from `column` on.
struct Part {
  int64_t first;
  int row, column, rows, columns, count;
};

template <class Real>
struct Chunk {
  int *i, *j;                      // −1: no gradient, not recomputed
  int* order;                      // of a list, the ends of its pairs (2 pair, 2 pair + 1) by the rows that they name
  Real *weight, *over_u, *over_v;  // over_u = 1 / ‖u‖ and over_v with normalize_input, else null
  Real *norm_u, *norm_v, *x, *c, *dx;
  Real *du, *dv;  // first u and v; dv is null where v goes by rows
};

template <class Real>
__global__ void __launch_bounds__(kGradientThreads)
    list_kernel(const __grid_constant__ Source<Real> source, const __grid_constant__ Part part,
                const __grid_constant__ Chunk<Real> chunk) {
  const int t = int(blockIdx.x) * kGradientThreads + int(threadIdx.x);
  int64_t i = -1, j = -1;
  Real weight = 0;
  if (t < part.count) {
    if (source.i) {
      const int64_t at = part.first + t;
      i = source.i[at], j = source.j[at], weight = source.weight[at];
      if (i >= source.n || j >= source.n) refuse_pair(at, i, j, source.n);
    } else {
      i = part.row + t / part.columns, j = part.column + t % part.columns;
      if (source.split >= 0) {
        weight = source.weight[i * (source.n - source.split) + j - source.split];
      } else if (i <= j) {
        weight = source.weight[i * source.n + j];
        if (i != j) weight += source.weight[j * source.n + i];
      }
    }
    if (i < 0 || j < 0 || weight == 0) i = j = -1, weight = 0;
    chunk.i[t] = int(i), chunk.j[t] = int(j), chunk.weight[t] = weight;
  }
  const unsigned there = __ballot_sync(~0u, i >= 0);
  if (lane_index() == 0 && there) atomicAdd(&scored_pairs, static_cast<unsigned long long>(__popc(there)));
}

// The row that an end of a pair names. Ends of pairs without a gradient come after all others.
constexpr int kNoRow = 0x7fffffff;
template <class Real>
__device__ __forceinline__ int row_of_end(const Chunk<Real>& chunk, int end) {
  const int row = (end % 2 ? chunk.j : chunk.i)[end / 2];
  return row < 0 ? kNoRow : row;
}

// By one warp for each end: its rank is the number of ends before it, counted.
template <class Real>
__global__ void __launch_bounds__(kGradientThreads)
    order_ends_kernel(int count, const __grid_constant__ Chunk<Real> chunk) {
  const int own = int(blockIdx.x) * kGradientWarps + warp_index();
  if (own >= 2 * count) return;
  const int row = row_of_end(chunk, own);
  int before = 0;
  for (int end = lane_index(); end < 2 * count; end += kWarp) {
    const int other = row_of_end(chunk, end);
    before += other < row || (other == row && end < own);
  }
  before = lanes_sum(before);
  if (lane_index() == 0) chunk.order[before] = own;
}

// A warp has pair `warp of the grid`.
#define PDDM_PAIR_OF_WARP(count)                                    \
  const int pair = int(blockIdx.x) * kGradientWarps + warp_index(); \
  if (pair >= (count)) return;                                      \
  const int lane = lane_index();

template <class A>
__global__ void __launch_bounds__(kGradientThreads)
    operands_kernel(const typename A::Real* from, int64_t length, typename A::Real* to) {
  const int64_t at = int64_t(blockIdx.x) * kGradientThreads + threadIdx.x;
  if (at < length) to[at] = as_operand<A>(from[at]);
}

template <class Real>
__device__ __forceinline__ Real difference_of(Real a, Real b) {
  return absolute(a - b);
}
template <class Real>
__device__ __forceinline__ Real mean_of(Real a, Real b) {
  return (a + b) / 2;
}

// u and, by pairs, v; by rows v' to unit norm.
template <class A>
__global__ void __launch_bounds__(kGradientThreads)
    pair_rows_kernel(const typename A::Real* f, const typename A::Real* a, int dim, int hidden, int count,
                     const __grid_constant__ Chunk<typename A::Real> chunk) {
  using Real = typename A::Real;
  PDDM_PAIR_OF_WARP(count)
  const int64_t i = chunk.i[pair], j = chunk.j[pair];
  const bool there = i >= 0;
  const Real *f_i = f + (there ? i : 0) * dim, *f_j = f + (there ? j : 0) * dim;
  Real *u = chunk.du + int64_t(pair) * dim, *v = chunk.dv ? chunk.dv + int64_t(pair) * dim : nullptr;
  Real over_u = 1, over_v = 1;
  if (chunk.over_u) {
    Real u_squares = 0, v_squares = 0;
    for (int k = lane; k < dim && there; k += kWarp) {
      const Real difference = difference_of(f_i[k], f_j[k]), mean = mean_of(f_i[k], f_j[k]);
      u_squares += difference * difference, v_squares += mean * mean;
    }
    over_u = 1 / floored(sqrt(lanes_sum(u_squares))), over_v = 1 / floored(sqrt(lanes_sum(v_squares)));
    if (lane == 0) chunk.over_u[pair] = over_u, chunk.over_v[pair] = over_v;
  }
#pragma unroll 4
  for (int k = lane; k < dim; k += kWarp) {
    const Real x = there ? f_i[k] : Real(0), y = there ? f_j[k] : Real(0);
    u[k] = as_operand<A>(difference_of(x, y) * over_u);
    if (v) v[k] = as_operand<A>(mean_of(x, y) * over_v);
  }
  if (v) return;
  const Real *a_i = a + (there ? i : 0) * hidden, *a_j = a + (there ? j : 0) * hidden;
  const auto made = [&](int k) { return there ? relu(mean_of(a_i[k], a_j[k])) : Real(0); };
  Real* const x = chunk.x + (int64_t(pair) * 2 + 1) * hidden;
  Real squares = 0;
#pragma unroll 4
  for (int k = lane; k < hidden; k += kWarp) squares += made(k) * made(k);
  const Real norm = sqrt(lanes_sum(squares)), over = 1 / floored(norm);
#pragma unroll 4
  for (int k = lane; k < hidden; k += kWarp) x[k] = as_operand<A>(made(k) * over);
  if (lane == 0) chunk.norm_v[pair] = norm;
}

// u' and, if there are two halves, v' to unit norm.
template <class A>
__global__ void __launch_bounds__(kGradientThreads)
    unit_norms_kernel(int hidden, int halves, int count, const __grid_constant__ Chunk<typename A::Real> chunk) {
  using Real = typename A::Real;
  PDDM_PAIR_OF_WARP(count)
  for (int half = 0; half < halves; ++half) {
    Real* x = chunk.x + (int64_t(pair) * 2 + half) * hidden;
    Real squares = 0;
#pragma unroll 4
    for (int k = lane; k < hidden; k += kWarp) squares += x[k] * x[k];
    const Real norm = sqrt(lanes_sum(squares)), over = 1 / floored(norm);
#pragma unroll 4
    for (int k = lane; k < hidden; k += kWarp) x[k] = as_operand<A>(x[k] * over);
    if (lane == 0) (half ? chunk.norm_v : chunk.norm_u)[pair] = norm;
  }
}

// Sums over pairs: each kSlab of a chunk have one, which goes on from chunk to chunk; in the end these are added up in
// order. A thread has a column.
constexpr int kSlab = 64;
template <class Real>
struct Slabs {
  Real *w_s, *b_s, *b_c, *b_u, *b_v;
};

// c to dC, and the gradients of w_s, b_c and (in one column more) b_s.
template <class A>
__global__ void __launch_bounds__(kGradientThreads)
    through_score_kernel(int combined, int count, bool add, const typename A::Real* w_s,
                         const __grid_constant__ Chunk<typename A::Real> chunk,
                         const __grid_constant__ Slabs<typename A::Real> slabs) {
  using Real = typename A::Real;
  constexpr int kAtOnce = 8;
  const int across = combined / kGradientThreads + 1, slab = int(blockIdx.x) / across;
  const int column = int(blockIdx.x) % across * kGradientThreads + int(threadIdx.x);
  const int first = slab * kSlab, end = first + kSlab < count ? first + kSlab : count;
  const auto give = [&](Real* to, Real sum) { *to = add ? *to + sum : sum; };
  if (column > combined) return;
  if (column == combined) {
    Real sum = 0;
    for (int pair = first; pair < end; ++pair) sum += __ldg(chunk.weight + pair);
    return give(slabs.b_s + slab, sum);
  }
  const Real own = __ldg(w_s + column);
  Real d_w_s = 0, d_b_c = 0;
  for (int pair = first; pair < end; pair += kAtOnce) {
    Real c[kAtOnce];
    Real* const at = chunk.c + int64_t(pair) * combined + column;
#pragma unroll
    for (int p = 0; p < kAtOnce; ++p) c[p] = pair + p < end ? at[int64_t(p) * combined] : Real(0);
#pragma unroll
    for (int p = 0; p < kAtOnce; ++p) {
      if (pair + p >= end) break;
      const Real weight = __ldg(chunk.weight + pair + p);
      // 0 for a pair without a gradient, whatever it holds.
      if (weight != 0) d_w_s += weight * c[p];
      const Real d_c = weight == 0 || c[p] <= 0 ? Real(0) : weight * own;
      d_b_c += d_c;
      at[int64_t(p) * combined] = as_operand<A>(d_c);
    }
  }
  const int64_t to = int64_t(slab) * combined + column;
  give(slabs.w_s + to, d_w_s), give(slabs.b_c + to, d_b_c);
}

// From the unit vectors back through their norms and relus, in place, and the gradients of b_u and b_v. A block has a
// slab: of kNormWarps pairs at a time the warps find x · dx, and then threads go down the columns.
constexpr int kNormThreads = 512, kNormWarps = kNormThreads / kWarp;
template <class Real>
constexpr int64_t kNormBytes = 4 * kNormWarps * int64_t(sizeof(Real));
template <class A>
__global__ void __launch_bounds__(kNormThreads)
    through_norms_kernel(int hidden, int count, bool add, const __grid_constant__ Chunk<typename A::Real> chunk,
                         const __grid_constant__ Slabs<typename A::Real> slabs) {
  using Real = typename A::Real;
  Real* const dots = reinterpret_cast<Real*>(shared_memory());  // by half and warp
  Real* const over = dots + 2 * kNormWarps;                     // 1 / norm, 0 for a pair without a gradient
  const int warp = warp_index(), lane = lane_index(), first = int(blockIdx.x) * kSlab;
  for (int step = 0; step < kSlab && first + step < count; step += kNormWarps) {
    const int own = first + step + warp;
    for (int half = 0; half < 2 && own < count; ++half) {
      const int64_t at = (int64_t(own) * 2 + half) * hidden;
      Real dot = 0;
#pragma unroll 8
      for (int k = lane; k < hidden; k += kWarp) dot += chunk.x[at + k] * chunk.dx[at + k];
      dot = lanes_sum(dot);
      const Real norm = (half ? chunk.norm_v : chunk.norm_u)[own];
      if (norm < Real(kNormFloor)) dot = 0;  // divided by a constant
      if (lane == 0) {
        dots[half * kNormWarps + warp] = dot;
        over[half * kNormWarps + warp] = chunk.i[own] < 0 ? Real(0) : 1 / floored(norm);
      }
    }
    __syncthreads();
    const int left = count - first - step, pairs = left < kNormWarps ? left : kNormWarps;
    for (int column = int(threadIdx.x); column < 2 * hidden; column += kNormThreads) {
      const int half = column >= hidden;
      Real sum = 0;
#pragma unroll 4
      for (int p = 0; p < pairs; ++p) {
        const int64_t at = int64_t(first + step + p) * 2 * hidden + column;
        const Real x = chunk.x[at], d = chunk.dx[at], scale = over[half * kNormWarps + p];
        const Real dz = scale == 0 || x <= 0 ? Real(0) : (d - x * dots[half * kNormWarps + p]) * scale;
        sum += dz;
        chunk.dx[at] = as_operand<A>(dz);
      }
      Real& to = (half ? slabs.b_v : slabs.b_u)[int64_t(blockIdx.x) * hidden + column - half * hidden];
      to = add || step > 0 ? to + sum : sum;
    }
    __syncthreads();
  }
}

// From u/‖u‖ and v/‖v‖ back to u and v, in place.
template <class Real>
__global__ void __launch_bounds__(kGradientThreads)
    through_input_norms_kernel(const Real* f, int dim, int count, const __grid_constant__ Chunk<Real> chunk) {
  PDDM_PAIR_OF_WARP(count)
  const int64_t i = chunk.i[pair], j = chunk.j[pair];
  if (i < 0) return;
  for (int half = 0; half < 2; ++half) {
    const auto made = [&](int k) {
      const Real a = f[i * dim + k], b = f[j * dim + k];
      return half ? mean_of(a, b) : difference_of(a, b);
    };
    const Real over = (half ? chunk.over_v : chunk.over_u)[pair];
    Real* d = (half ? chunk.dv : chunk.du) + int64_t(pair) * dim;
    Real dot = 0;
    for (int k = lane; k < dim; k += kWarp) dot += made(k) * over * d[k];
    dot = lanes_sum(dot);
    if (over >= Real(1 / kNormFloor)) dot = 0;  // divided by a constant
    for (int k = lane; k < dim; k += kWarp) d[k] = (d[k] - made(k) * over * dot) * over;
  }
}

// The gradients of a row's pairs, added to it. A block has a row of a matrix's chunk, or at most `run` of a list's ends
// that name one, and kGathered columns: of the row of f, or of that of A after these. The warps take turns at the ends,
// and their parts are added in order. What a list's run of ends has beyond its first block waits in `rest` for
// gather_rest_kernel.
constexpr int kGatheredPerLane = 4, kGathered = kGatheredPerLane * kWarp, kRun = 64;
template <class Real>
constexpr int64_t kGatherBytes = int64_t(kGradientWarps) * kGathered * sizeof(Real);
template <class Real>
struct Gather {
  const Real* f;
  int dim, hidden;  // hidden is 0 where there is no A
  int run;
  Real *d_f, *d_a;
  Real* rest;  // dim + hidden for every `run` ends

  __host__ __device__ static int blocks(int columns) { return (columns + kGathered - 1) / kGathered; }
  __host__ __device__ int across() const { return blocks(dim) + blocks(hidden); }
};
// What a block has of the columns.
struct Gathered {
  int own, first_column, width;
  bool of_a;

  template <class Real>
  __device__ explicit Gathered(const Gather<Real>& g) {
    const int across = g.across(), group = int(blockIdx.x) % across;
    own = int(blockIdx.x) / across, of_a = group >= g.blocks(g.dim);
    first_column = (group - (of_a ? g.blocks(g.dim) : 0)) * kGathered, width = of_a ? g.hidden : g.dim;
  }
  template <class Real>
  __device__ Real* gradient(const Gather<Real>& g, int row) const {
    return (of_a ? g.d_a : g.d_f) + int64_t(row) * width + first_column;
  }
  template <class Real>
  __device__ Real* rest(const Gather<Real>& g, int which) const {
    return g.rest + int64_t(which - 1) * (g.dim + g.hidden) + (of_a ? g.dim : 0) + first_column;
  }
};

template <class Real>
__global__ void __launch_bounds__(kGradientThreads, 4)
    gather_kernel(const __grid_constant__ Gather<Real> g, const __grid_constant__ Part part,
                  const __grid_constant__ Chunk<Real> chunk) {
  Real* const parts = reinterpret_cast<Real*>(shared_memory());
  const Gathered at(g);
  const bool listed = part.rows == 0;
  const int own = at.own, lane = lane_index();
  // Ends: of a list those from `own` on in their order, of a matrix a row's and then a column's, where it is both.
  int row, ends, in_row = 0, column = 0;
  bool goes_on = false;
  if (listed) {
    row = row_of_end(chunk, chunk.order[own]);
    goes_on = own > 0 && row_of_end(chunk, chunk.order[own - 1]) == row;
    if (row == kNoRow || (goes_on && own % g.run != 0)) return;
    const int all = 2 * part.count - own, most = g.run - own % g.run;
    ends = all < most ? all : most;
  } else {
    const bool by_row = own < part.rows;
    row = by_row ? part.row + own : part.column + own - part.rows;
    column = row - part.column;
    if (!by_row && row >= part.row && row < part.row + part.rows) return;  // the row's block has both
    in_row = by_row ? part.columns : 0;
    ends = in_row + (column >= 0 && column < part.columns ? part.rows : 0);
  }

  const Real* const own_f = g.f + int64_t(row) * g.dim + at.first_column;
  Real mine[kGatheredPerLane], sums[kGatheredPerLane] = {};
#pragma unroll
  for (int q = 0; q < kGatheredPerLane; ++q) {
    const int k = lane + q * kWarp;
    mine[q] = !at.of_a && at.first_column + k < at.width ? own_f[k] : Real(0);
  }
#pragma unroll 2
  for (int e = warp_index(); e < ends; e += kGradientWarps) {
    int pair, other;
    if (listed) {
      const int end = chunk.order[own + e];
      if (row_of_end(chunk, end) != row) break;
      pair = end / 2, other = (end % 2 ? chunk.i : chunk.j)[pair];
    } else {
      pair = e < in_row ? own * part.columns + e : (e - in_row) * part.columns + column;
      other = (e < in_row ? chunk.j : chunk.i)[pair];
    }
    if (other < 0) continue;
    // d|f_i − f_j| has the sign of own less other, whichever is i.
    const Real* const f = g.f + int64_t(other) * g.dim + at.first_column;
    const Real* const u = at.of_a ? nullptr : chunk.du + int64_t(pair) * g.dim + at.first_column;
    const Real* const v = at.of_a    ? chunk.dx + (int64_t(pair) * 2 + 1) * g.hidden + at.first_column
                          : chunk.dv ? chunk.dv + int64_t(pair) * g.dim + at.first_column
                                     : nullptr;
#pragma unroll
    for (int q = 0; q < kGatheredPerLane; ++q) {
      const int k = lane + q * kWarp;
      if (at.first_column + k >= at.width) break;
      if (u) {
        const Real theirs = f[k], d = u[k];
        sums[q] += mine[q] > theirs ? d : mine[q] < theirs ? -d : Real(0);
      }
      if (v) sums[q] += v[k] / 2;
    }
  }
#pragma unroll
  for (int q = 0; q < kGatheredPerLane; ++q) parts[warp_index() * kGathered + q * kWarp + lane] = sums[q];
  __syncthreads();
  const int k = int(threadIdx.x);
  if (k >= kGathered || at.first_column + k >= at.width) return;
  Real sum = 0;
  for (int warp = 0; warp < kGradientWarps; ++warp) sum += parts[warp * kGathered + k];
  if (goes_on)
    at.rest(g, own / g.run)[k] = sum;
  else
    at.gradient(g, row)[k] += sum;
}

template <class Real>
__global__ void __launch_bounds__(kGathered)
    gather_rest_kernel(const __grid_constant__ Gather<Real> g, int count, const __grid_constant__ Chunk<Real> chunk) {
  const Gathered at(g);
  const int k = int(threadIdx.x), first = at.own + 1;
  const auto row_at = [&](int place) { return row_of_end(chunk, chunk.order[place]); };
  const int row = row_at(first * g.run);
  // The first block beyond a run's first one adds up all.
  if (row == kNoRow || row_at(first * g.run - 1) != row) return;
  if (first > 1 && row_at((first - 1) * g.run - 1) == row) return;
  if (at.first_column + k >= at.width) return;
  Real sum = at.gradient(g, row)[k];
  for (int which = first; which * g.run < 2 * count && row_at(which * g.run) == row; ++which)
    sum += at.rest(g, which)[k];
  at.gradient(g, row)[k] = sum;
}

// Of one array after the other: its parts, added in order.
template <class Real>
struct Total {
  const Real* parts;
  int64_t count, length;
  Real* to;
};
template <class Real>
struct Totals {
  Total<Real> each[8];
};
template <class Real>
__global__ void __launch_bounds__(kGradientThreads) totals_kernel(const __grid_constant__ Totals<Real> totals) {
  int64_t at = int64_t(blockIdx.x) * kGradientThreads + threadIdx.x;
#pragma unroll
  for (const Total<Real>& total : totals.each) {
    if (at >= 0 && at < total.length) {
      Real sum = 0;
      for (int64_t part = 0; part < total.count; ++part) sum += total.parts[part * total.length + at];
      total.to[at] = sum;
    }
    at -= total.length;
  }
}

// From the unit rows back to the rows as given, in place. Then f is an operand, where it has a part in d_a: a row
// without a gradient has none, whatever it holds.
template <class A>
__global__ void __launch_bounds__(kGradientThreads)
    through_row_norms_kernel(int64_t n, typename A::Real* f, const typename A::Real* norms, int dim,
                             const typename A::Real* d_a, int hidden, typename A::Real* d_f) {
  using Real = typename A::Real;
  const int64_t row = int64_t(blockIdx.x) * kGradientWarps + warp_index();
  if (row >= n) return;
  Real* const unit = f + row * dim;
  Real* const d = d_f + row * dim;
  const Real norm = norms[row];
  Real dot = 0;
  bool any = false;
  for (int k = lane_index(); k < dim; k += kWarp) dot += unit[k] * d[k], any |= d[k] != 0;
  dot = lanes_sum(dot);
  if (__ballot_sync(~0u, any)) {
    if (norm < Real(kNormFloor)) dot = 0;
    for (int k = lane_index(); k < dim; k += kWarp) d[k] = (d[k] - unit[k] * dot) / floored(norm);
  }
  if (!d_a) return;
  any = false;
  for (int k = lane_index(); k < hidden; k += kWarp) any |= d_a[row * hidden + k] != 0;
  any = __ballot_sync(~0u, any) != 0;
  for (int k = lane_index(); k < dim; k += kWarp) unit[k] = any ? as_operand<A>(unit[k]) : Real(0);
}

template <class Real>
__global__ void __launch_bounds__(kGradientThreads)
    unit_rows_kernel(const Real* rows, int64_t n, int dim, Real* f, Real* norm) {
  const int64_t row = int64_t(blockIdx.x) * kGradientWarps + warp_index();
  if (row < n) normalise_row(rows + row * dim, dim, dim, f + row * dim, norm + row);
}

// The chunks of a source, in order. The first is as large as any.
template <class Real, class F>
void each_part(const Source<Real>& source, int64_t most, const F& f) {
  if (source.i) {
    for (int64_t first = 0; first < source.count; first += most)
      f(Part{first, 0, 0, 0, 0, int(std::min(most, source.count - first))});
    return;
  }
  // Rectangles, about twice as wide as high, so that few rows are gathered for many pairs.
  const bool triangle = source.split < 0;
  const int64_t first_column = triangle ? 0 : source.split;
  const int64_t all_rows = triangle ? source.n : source.split, all_columns = source.n - first_column;
  const auto evenly = [](int64_t all, int64_t at_most) { return divided_up(all, divided_up(all, at_most)); };
  int64_t high = 1;
  while (2 * (2 * high) * (2 * high) <= most) high *= 2;
  const int64_t columns = evenly(all_columns, std::min(all_columns, most / std::min(high, all_rows)));
  const int64_t rows = evenly(all_rows, std::min(all_rows, most / columns));
  for (int64_t column = 0; column < all_columns; column += columns) {
    const int64_t across = std::min(columns, all_columns - column);
    for (int64_t row = 0; row < (triangle ? std::min(column + across, all_rows) : all_rows); row += rows) {
      const int64_t down = std::min(rows, all_rows - row);
      f(Part{0, int(row), int(first_column + column), int(down), int(across), int(down * across)});
    }
  }
}

template <class A>
void backward(const Context& context, const Rows& rows, Source<typename A::Real> source, const Unit& unit,
              typename A::Real* d_rows, const UnitGradient& gradient) {
  using Real = typename A::Real;
  const int64_t n = rows.count, d = unit.dim, h = unit.hidden, m = unit.combined;
  const auto given = [](const void* p) { return static_cast<const Real*>(p); };
  const auto wanted = [](void* p) { return static_cast<Real*>(p); };
  const auto clear = [&](void* to, int64_t length) {
    check(cudaMemsetAsync(to, 0, size_t(length) * sizeof(Real), context.stream()), "memory could not be cleared");
  };
  if (n > 0x7fffffff) throw std::runtime_error("pddm: more than 2^31 rows");
  clear(d_rows, n * d);
  if (source.count == 0) {
    const std::pair<void*, int64_t> all[] = {{gradient.w_u, h * d}, {gradient.b_u, h},         {gradient.w_v, h * d},
                                             {gradient.b_v, h},     {gradient.w_c, m * 2 * h}, {gradient.b_c, m},
                                             {gradient.w_s, m},     {gradient.b_s, 1}};
    for (const auto& [to, length] : all) clear(to, length);
    return;
  }

  const bool listed = source.i != nullptr;
  const bool by_rows =
      !unit.normalize_input && source.count > n && (!listed || 2 * n * h * int64_t(sizeof(Real)) <= kByRowsBytes);
  const int64_t per_pair = (4 * h + m + (by_rows ? 1 : 2) * d) * int64_t(sizeof(Real));
  const int64_t fit = std::max<int64_t>((listed ? kListBytes : kMatrixBytes) / per_pair, 1);
  const int64_t at_most = std::min(listed ? kListPairs : kMatrixPairs, fit);
  int64_t most = 0;
  each_part(source, at_most, [&](const Part& part) { most = std::max<int64_t>(most, part.count); });

  // The weights as operands.
  const auto operands = [&](const void* from, int64_t length) {
    if constexpr (!A::kTensor) {
      return given(from);
    } else {
      Real* const to = context.take<Real>(length);
      context.launch(operands_kernel<A>, divided_up(length, kGradientThreads), kGradientThreads, 0, given(from), length,
                     to);
      return static_cast<const Real*>(to);
    }
  };
  const Real *w_u = operands(unit.w_u, h * d), *w_v = operands(unit.w_v, h * d), *w_c = operands(unit.w_c, m * 2 * h);

  Real *f = context.take<Real>(n * d), *norm = context.take<Real>(n);
  context.launch(unit_rows_kernel<Real>, divided_up(n, kGradientWarps), kGradientThreads, 0, given(rows.data), n,
                 int(d), f, norm);
  Real *a = nullptr, *d_a = nullptr;
  if (by_rows) {
    a = context.take<Real>(n * h), d_a = context.take<Real>(n * h);
    clear(d_a, n * h);
    // As everything that is no product of pairs: f is not an operand yet.
    using Exact = std::conditional_t<sizeof(Real) == 8, ArithmeticF64, ArithmeticF32>;
    multiply<Exact>(context, Operand<Real>{f, n, d, d, 1}, Operand<Real>{given(unit.w_v), h, d, d, 1},
                    {a, h, given(unit.b_v)});
  }

  Chunk<Real> c{};
  c.i = context.take<int>(most), c.j = context.take<int>(most), c.weight = context.take<Real>(most);
  if (listed) c.order = context.take<int>(2 * most);
  if (unit.normalize_input) c.over_u = context.take<Real>(most), c.over_v = context.take<Real>(most);
  c.norm_u = context.take<Real>(most), c.norm_v = context.take<Real>(most);
  c.x = context.take<Real>(most * 2 * h), c.c = context.take<Real>(most * m), c.dx = context.take<Real>(most * 2 * h);
  c.du = context.take<Real>(most * d);
  if (!by_rows) c.dv = context.take<Real>(most * d);
  const int64_t slab_count = divided_up(most, kSlab);
  const Slabs<Real> slabs{context.take<Real>(slab_count * m), context.take<Real>(slab_count),
                          context.take<Real>(slab_count * m), context.take<Real>(slab_count * h),
                          context.take<Real>(slab_count * h)};
  // Gradients of weights have few outputs of many inputs: with a matrix in parts, so that blocks fill the device.
  Totals<Real> totals{};
  int summed = 0;
  const auto total = [&](const Real* parts, int64_t count, int64_t length, void* to) {
    totals.each[summed++] = {parts, count, length, wanted(to)};
  };
  const auto weight_gradient = [&](void* to, int64_t outputs, int64_t inputs) {
    const int64_t blocks = divided_up(outputs, 128) * divided_up(inputs, 128);
    const int64_t parts = listed ? 1 : std::max<int64_t>(std::min(kWeightBlocks / blocks, most / kPairsOfPart), 1);
    Output<Real> out{wanted(to), inputs};
    if (parts == 1) return out;
    out.to = context.take<Real>(parts * outputs * inputs), out.parts = parts, out.part_pitch = outputs * inputs;
    total(out.to, parts, outputs * inputs, to);
    return out;
  };
  Output<Real> d_w_u = weight_gradient(gradient.w_u, h, d), d_w_c = weight_gradient(gradient.w_c, m, 2 * h);
  Output<Real> d_w_v{wanted(gradient.w_v), d};
  if (!by_rows) d_w_v = weight_gradient(gradient.w_v, h, d);
  total(slabs.w_s, slab_count, m, gradient.w_s), total(slabs.b_s, slab_count, 1, gradient.b_s);
  total(slabs.b_c, slab_count, m, gradient.b_c);
  total(slabs.b_u, slab_count, h, gradient.b_u), total(slabs.b_v, slab_count, h, gradient.b_v);
  const int a_columns = by_rows ? int(h) : 0;
  const int run = int(std::max<int64_t>(kRun, divided_up(d + a_columns, h)));  // so that x has room for the rest
  const Gather<Real> gather{f, int(d), a_columns, run, d_rows, d_a, c.x};

  // Arrays with an operand's rows, or its inputs, `pitch` apart.
  const auto along_inputs = [](const Real* data, int64_t rows, int64_t inputs, int64_t pitch) {
    return Operand<Real>{data, rows, inputs, pitch, 1};
  };
  const auto along_rows = [](const Real* data, int64_t rows, int64_t inputs, int64_t pitch) {
    return Operand<Real>{data, rows, inputs, 1, pitch};
  };
  bool add = false;
  each_part(source, at_most, [&](const Part& part) {
    const int count = part.count;
    const auto by_warps = [&](auto kernel, const auto&... arguments) {
      context.launch(kernel, divided_up(count, kGradientWarps), kGradientThreads, 0, arguments...);
    };
    context.launch(list_kernel<Real>, divided_up(count, kGradientThreads), kGradientThreads, 0, source, part, c);
    by_warps(pair_rows_kernel<A>, f, a, int(d), int(h), count, c);
    // X, C
    multiply<A>(context, along_inputs(c.du, count, d, d), along_inputs(w_u, h, d, d),
                {c.x, 2 * h, given(unit.b_u), true});
    if (!by_rows)
      multiply<A>(context, along_inputs(c.dv, count, d, d), along_inputs(w_v, h, d, d),
                  {c.x + h, 2 * h, given(unit.b_v), true});
    by_warps(unit_norms_kernel<A>, int(h), by_rows ? 1 : 2, count, c);
    multiply<A>(context, along_inputs(c.x, count, 2 * h, 2 * h), along_inputs(w_c, m, 2 * h, 2 * h),
                {c.c, m, given(unit.b_c), true});
    // dC, dX, dZ
    context.launch(through_score_kernel<A>, divided_up(count, kSlab) * divided_up(m + 1, kGradientThreads),
                   kGradientThreads, 0, int(m), count, add, given(unit.w_s), c, slabs);
    multiply<A, true, false>(context, along_inputs(c.c, count, m, m), along_rows(w_c, 2 * h, m, 2 * h), {c.dx, 2 * h});
    context.launch(through_norms_kernel<A>, divided_up(count, kSlab), kNormThreads, kNormBytes<Real>, int(h), count,
                   add, c, slabs);
    // dW_c, dW_u, du, and those of v
    d_w_u.add = d_w_c.add = d_w_v.add = add;
    multiply<A, false, false>(context, along_rows(c.c, m, count, m), along_rows(c.x, 2 * h, count, 2 * h), d_w_c);
    multiply<A, false, false>(context, along_rows(c.dx, h, count, 2 * h), along_rows(c.du, d, count, d), d_w_u);
    multiply<A, true, false>(context, along_inputs(c.dx, count, h, 2 * h), along_rows(w_u, d, h, d), {c.du, d});
    if (!by_rows) {
      multiply<A, false, false>(context, along_rows(c.dx + h, h, count, 2 * h), along_rows(c.dv, d, count, d), d_w_v);
      multiply<A, true, false>(context, along_inputs(c.dx + h, count, h, 2 * h), along_rows(w_v, d, h, d), {c.dv, d});
    }
    if (unit.normalize_input) by_warps(through_input_norms_kernel<Real>, f, int(d), count, c);
    // To the rows
    if (listed)
      context.launch(order_ends_kernel<Real>, divided_up(2 * count, kGradientWarps), kGradientThreads, 0, count, c);
    context.launch(gather_kernel<Real>, (listed ? 2 * int64_t(count) : part.rows + part.columns) * gather.across(),
                   kGradientThreads, kGatherBytes<Real>, gather, part, c);
    if (listed)
      context.launch(gather_rest_kernel<Real>, (2 * int64_t(count) - 1) / run * gather.across(), kGathered, 0, gather,
                     count, c);
    add = true;
  });

  if (by_rows) {
    context.launch(operands_kernel<A>, divided_up(n * h, kGradientThreads), kGradientThreads, 0, d_a, n * h, d_a);
    multiply<A, true, false>(context, along_inputs(d_a, n, h, h), along_rows(w_v, d, h, d),
                             {d_rows, d, nullptr, false, true});
  }
  context.launch(through_row_norms_kernel<A>, divided_up(n, kGradientWarps), kGradientThreads, 0, n, f, norm, int(d),
                 d_a, int(h), d_rows);
  if (by_rows)
    multiply<A, false, false>(context, along_rows(d_a, h, n, h), along_rows(f, d, n, d), {wanted(gradient.w_v), d});
  int64_t summed_length = 0;
  for (const Total<Real>& each : totals.each) summed_length += each.length;
  context.launch(totals_kernel<Real>, divided_up(summed_length, kGradientThreads), kGradientThreads, 0, totals);
}

}  // namespace pddm::cuda
