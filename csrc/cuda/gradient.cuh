// The way back. Pairs with a gradient are recomputed, kChunk at a time, as plain matrix products; every sum has one
// order.
//
//     u = |f_i − f_j|, v = (f_i + f_j) / 2   pairs × dim each   recomputed (to unit norm with normalize_input)
//     X  = [u'/‖u'‖ ; v'/‖v'‖]          pairs × 2 hidden        recomputed
//     C  = σ(X W_cᵀ + b_c)              pairs × combined        recomputed, then dC in its place
//     dX = dC W_c                       pairs × 2 hidden        then the gradients before the relus, dZ
//     dW_c += dCᵀ X    dW_u += dZ_uᵀ u    dW_v += dZ_vᵀ v
//     du = dZ_u W_u    dv = dZ_v W_v    pairs × dim each, in place of u and v; then added to their rows
#pragma once

#include "multiply.cuh"
#include "prepare.cuh"

namespace pddm::cuda {

// Bytes of a chunk's buffers, and pairs in it.
constexpr int64_t kChunkBytes = 24 << 20, kMaxChunk = 2048;
constexpr int kGradientThreads = 256, kGradientWarps = kGradientThreads / kWarp;

// Where a chunk's pairs come from: a list, or the entries of a matrix (of all rows with themselves, i <= j, where both
// entries' weights add up; or of the first `split` rows with the others).
template <class Real>
struct Source {
  const int64_t *i = nullptr, *j = nullptr;
  const Real* weight;
  int64_t n, split = -1, count;
};

template <class Real>
struct Chunk {
  int *i, *j;                      // −1: no gradient, not recomputed
  Real *weight, *over_u, *over_v;  // over_u = 1 / ‖u‖ and over_v with normalize_input, else null
  Real *norm_u, *norm_v, *x, *c, *dx;
  Real *du, *dv;  // first u and v
};

template <class Real>
__global__ void __launch_bounds__(kGradientThreads)
    list_kernel(const __grid_constant__ Source<Real> source, int64_t first, int count,
                const __grid_constant__ Chunk<Real> chunk) {
  const int t = int(blockIdx.x) * kGradientThreads + int(threadIdx.x);
  const int64_t at = first + t;
  int64_t i = -1, j = -1;
  Real weight = 0;
  if (t < count) {
    if (source.i) {
      i = source.i[at], j = source.j[at], weight = source.weight[at];
      if (i >= source.n || j >= source.n) refuse_pair(at, i, j, source.n);
    } else if (source.split >= 0) {
      const int64_t columns = source.n - source.split;
      i = at / columns, j = source.split + at % columns, weight = source.weight[at];
    } else {
      j = triangle_column(at), i = at - j * (j + 1) / 2;
      weight = source.weight[i * source.n + j];
      if (i != j) weight += source.weight[j * source.n + i];
    }
    if (i < 0 || j < 0 || weight == 0) i = j = -1, weight = 0;
    chunk.i[t] = int(i), chunk.j[t] = int(j), chunk.weight[t] = weight;
  }
  const unsigned there = __ballot_sync(~0u, i >= 0);
  if (lane_index() == 0 && there) atomicAdd(&scored_pairs, static_cast<unsigned long long>(__popc(there)));
}

// A warp has pair `warp of the grid`; body(pair, i, j) is not called for pairs without a gradient.
#define PDDM_PAIR_OF_WARP(count)                                    \
  const int pair = int(blockIdx.x) * kGradientWarps + warp_index(); \
  if (pair >= (count)) return;                                      \
  const int lane = lane_index();

template <class Real>
__device__ __forceinline__ Real difference_of(Real a, Real b) {
  return absolute(a - b);
}
template <class Real>
__device__ __forceinline__ Real mean_of(Real a, Real b) {
  return (a + b) / 2;
}

// u and v; zeros for a pair without a gradient.
template <class Real>
__global__ void __launch_bounds__(kGradientThreads)
    pair_rows_kernel(const Real* f, int64_t f_stride, int dim, int count, const __grid_constant__ Chunk<Real> chunk) {
  PDDM_PAIR_OF_WARP(count)
  const int i = chunk.i[pair], j = chunk.j[pair];
  const bool there = i >= 0;
  const Real *a = f + (there ? i : 0) * f_stride, *b = f + (there ? j : 0) * f_stride;
  Real *u = chunk.du + int64_t(pair) * dim, *v = chunk.dv + int64_t(pair) * dim;
  Real over_u = there, over_v = there;
  if (chunk.over_u) {
    Real u_squares = 0, v_squares = 0;
    for (int k = lane; k < dim && there; k += kWarp) {
      const Real difference = difference_of(a[k], b[k]), mean = mean_of(a[k], b[k]);
      u_squares += difference * difference, v_squares += mean * mean;
    }
    over_u = 1 / floored(sqrt(lanes_sum(u_squares))), over_v = 1 / floored(sqrt(lanes_sum(v_squares)));
    if (lane == 0) chunk.over_u[pair] = over_u, chunk.over_v[pair] = over_v;
  }
  for (int k = lane; k < dim; k += kWarp) {
    u[k] = there ? difference_of(a[k], b[k]) * over_u : Real(0);
    v[k] = there ? mean_of(a[k], b[k]) * over_v : Real(0);
  }
}

// u' and v' to unit norm.
template <class Real>
__global__ void __launch_bounds__(kGradientThreads)
    unit_norms_kernel(int hidden, int count, const __grid_constant__ Chunk<Real> chunk) {
  PDDM_PAIR_OF_WARP(count)
  for (int half = 0; half < 2; ++half) {
    Real* x = chunk.x + (int64_t(pair) * 2 + half) * hidden;
    Real squares = 0;
    for (int k = lane; k < hidden; k += kWarp) squares += x[k] * x[k];
    const Real norm = sqrt(lanes_sum(squares));
    for (int k = lane; k < hidden; k += kWarp) x[k] /= floored(norm);
    if (lane == 0) (half ? chunk.norm_v : chunk.norm_u)[pair] = norm;
  }
}

// Sums over the pairs of a chunk, a lane to each column: the warps of a block take turns at the pairs, and their parts
// are added in order. take(pair, column, sums) adds to sums[0..Count).
constexpr int kSumThreads = 1024, kSumWarps = kSumThreads / kWarp;
template <int Count, class Real, class Take, class Give>
__device__ __forceinline__ void sum_columns(int64_t columns, int count, const Take& take, const Give& give) {
  Real* const parts = reinterpret_cast<Real*>(shared_memory());
  const int64_t column = int64_t(blockIdx.x) * kWarp + lane_index();
  Real sums[Count] = {};
  for (int pair = warp_index(); pair < count && column < columns; pair += kSumWarps) take(pair, column, sums);
#pragma unroll
  for (int which = 0; which < Count; ++which)
    parts[(which * kSumWarps + warp_index()) * kWarp + lane_index()] = sums[which];
  __syncthreads();
  if (warp_index() > 0 || column >= columns) return;
#pragma unroll
  for (int which = 0; which < Count; ++which) {
    Real sum = 0;
    for (int warp = 0; warp < kSumWarps; ++warp) sum += parts[(which * kSumWarps + warp) * kWarp + lane_index()];
    give(which, column, sum);
  }
}
template <int Count, class Real>
constexpr int64_t kSumBytes = int64_t(Count) * kSumThreads * sizeof(Real);

// c to dC, and the gradients of w_s, b_c and (in one column more) b_s.
template <class Real>
__global__ void __launch_bounds__(kSumThreads)
    through_score_kernel(int combined, int count, bool add, const Real* w_s, const __grid_constant__ Chunk<Real> chunk,
                         Real* d_w_s, Real* d_b_c, Real* d_b_s) {
  sum_columns<2, Real>(
      combined + 1, count,
      [&](int pair, int64_t column, Real(&sums)[2]) {
        const Real weight = __ldg(chunk.weight + pair);
        if (column == combined) {
          sums[0] += weight;
          return;
        }
        Real& c = chunk.c[int64_t(pair) * combined + column];
        const Real before = c;
        // 0 for a pair without a gradient, whatever it holds.
        if (weight != 0) sums[0] += weight * before;
        c = weight == 0 || before <= 0 ? Real(0) : weight * __ldg(w_s + column);
        sums[1] += c;
      },
      [&](int which, int64_t column, Real sum) {
        Real* to = column == combined ? (which == 0 ? d_b_s : nullptr) : (which == 0 ? d_w_s : d_b_c) + column;
        if (to) *to = add ? *to + sum : sum;
      });
}

// From the unit vectors back through their norms and relus, in place.
template <class Real>
__global__ void __launch_bounds__(kGradientThreads)
    through_norms_kernel(int hidden, int count, const __grid_constant__ Chunk<Real> chunk) {
  PDDM_PAIR_OF_WARP(count)
  const bool there = chunk.i[pair] >= 0;
  for (int half = 0; half < 2; ++half) {
    const int64_t at = (int64_t(pair) * 2 + half) * hidden;
    const Real *x = chunk.x + at, norm = (half ? chunk.norm_v : chunk.norm_u)[pair];
    Real* dx = chunk.dx + at;
    Real dot = 0;
    for (int k = lane; k < hidden; k += kWarp) dot += x[k] * dx[k];
    dot = lanes_sum(dot);
    if (norm < Real(kNormFloor)) dot = 0;  // divided by a constant
    for (int k = lane; k < hidden; k += kWarp)
      dx[k] = !there || x[k] <= 0 ? Real(0) : (dx[k] - x[k] * dot) / floored(norm);
  }
}

template <class Real>
__global__ void __launch_bounds__(kSumThreads)
    sum_biases_kernel(int hidden, int count, bool add, const Real* dz, Real* d_b_u, Real* d_b_v) {
  sum_columns<1, Real>(
      2 * hidden, count,
      [&](int pair, int64_t column, Real(&sums)[1]) { sums[0] += dz[int64_t(pair) * 2 * hidden + column]; },
      [&](int, int64_t column, Real sum) {
        Real& to = column < hidden ? d_b_u[column] : d_b_v[column - hidden];
        to = add ? to + sum : sum;
      });
}

// From u/‖u‖ and v/‖v‖ back to u and v, in place.
template <class Real>
__global__ void __launch_bounds__(kGradientThreads)
    through_input_norms_kernel(const Real* f, int64_t f_stride, int dim, int count,
                               const __grid_constant__ Chunk<Real> chunk) {
  PDDM_PAIR_OF_WARP(count)
  const int i = chunk.i[pair], j = chunk.j[pair];
  if (i < 0) return;
  for (int half = 0; half < 2; ++half) {
    const auto made = [&](int k) {
      const Real a = f[i * f_stride + k], b = f[j * f_stride + k];
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

// A block to a row and kGathered of its columns: the gradients of the chunk's pairs that name the row, the warps taking
// turns at the pairs, and their parts added in order.
constexpr int kGatheredPerLane = 4, kGathered = kGatheredPerLane * kWarp;
template <class Real>
constexpr int64_t kGatherBytes = int64_t(kGradientWarps) * kGathered * sizeof(Real);
template <class Real>
__global__ void __launch_bounds__(kGradientThreads)
    gather_kernel(const Real* f, int64_t f_stride, int dim, int count, bool add,
                  const __grid_constant__ Chunk<Real> chunk, Real* d_f) {
  Real* const parts = reinterpret_cast<Real*>(shared_memory());
  const int across = (dim + kGathered - 1) / kGathered;
  const int64_t row = blockIdx.x / across;
  const int first_column = int(blockIdx.x % across) * kGathered, lane = lane_index(), column = first_column + lane;
  Real sums[kGatheredPerLane] = {};
  for (int first = warp_index() * kWarp; first < count; first += kGradientThreads) {
    const int t = first + lane, own_i = t < count ? chunk.i[t] : -1, own_j = t < count ? chunk.j[t] : -1;
    for (unsigned left = __ballot_sync(~0u, own_i == row || own_j == row); left; left &= left - 1) {
      const int bit = __ffs(int(left)) - 1;
      const int i = __shfl_sync(~0u, own_i, bit), j = __shfl_sync(~0u, own_j, bit);
      const Real sign = i == j ? Real(0) : i == row ? Real(1) : Real(-1), twice = i == j ? Real(1) : Real(0.5);
#pragma unroll
      for (int q = 0; q < kGatheredPerLane; ++q) {
        const int k = column + q * kWarp;
        if (k >= dim) break;
        const Real a = f[i * f_stride + k], b = f[j * f_stride + k];
        const Real slope = a > b ? sign : a < b ? -sign : Real(0);
        const int64_t at = int64_t(first + bit) * dim + k;
        sums[q] += slope * chunk.du[at] + twice * chunk.dv[at];
      }
    }
  }
#pragma unroll
  for (int q = 0; q < kGatheredPerLane; ++q) parts[warp_index() * kGathered + q * kWarp + lane] = sums[q];
  __syncthreads();
  const int own = int(threadIdx.x);
  if (own >= kGathered || first_column + own >= dim) return;
  Real& to = d_f[row * dim + first_column + own];
  Real sum = add ? to : Real(0);
  for (int warp = 0; warp < kGradientWarps; ++warp) sum += parts[warp * kGathered + own];
  to = sum;
}

// From the unit rows back to the rows as given, in place.
template <class Real>
__global__ void __launch_bounds__(kGradientThreads)
    through_row_norms_kernel(int64_t n, const Real* f, int64_t f_stride, const Real* norms, int dim, Real* d_f) {
  const int64_t row = int64_t(blockIdx.x) * kGradientWarps + warp_index();
  if (row >= n) return;
  const Real *unit = f + row * f_stride, norm = norms[row];
  Real* d = d_f + row * dim;
  Real dot = 0;
  bool any = false;
  for (int k = lane_index(); k < dim; k += kWarp) dot += unit[k] * d[k], any |= d[k] != 0;
  dot = lanes_sum(dot);
  // A row without a gradient has none, whatever it holds.
  if (!__ballot_sync(~0u, any)) return;
  if (norm < Real(kNormFloor)) dot = 0;
  for (int k = lane_index(); k < dim; k += kWarp) d[k] = (d[k] - unit[k] * dot) / floored(norm);
}

template <class Real>
__global__ void __launch_bounds__(kGradientThreads)
    unit_rows_kernel(const Real* rows, int64_t n, int dim, int64_t f_stride, Real* f, Real* norm) {
  const int64_t row = int64_t(blockIdx.x) * kGradientWarps + warp_index();
  if (row < n) normalise_row(rows + row * dim, dim, int(f_stride), f + row * f_stride, norm + row);
}

template <class A>
void backward(const Context& context, const Rows& rows, Source<typename A::Real> source, const Unit& unit,
              typename A::Real* d_rows, const UnitGradient& gradient) {
  using Real = typename A::Real;
  const int64_t n = rows.count, d = unit.dim, h = unit.hidden, m = unit.combined, stride = d;
  const auto given = [](const void* p) { return static_cast<const Real*>(p); };
  const auto wanted = [](void* p) { return static_cast<Real*>(p); };
  if (n > 0x7fffffff) throw std::runtime_error("pddm: more than 2^31 rows");
  if (source.count == 0) {
    const std::pair<void*, int64_t> all[] = {{gradient.w_u, h * d}, {gradient.b_u, h},         {gradient.w_v, h * d},
                                             {gradient.b_v, h},     {gradient.w_c, m * 2 * h}, {gradient.b_c, m},
                                             {gradient.w_s, m},     {gradient.b_s, 1},         {d_rows, n * d}};
    for (const auto& [to, length] : all)
      check(cudaMemsetAsync(to, 0, size_t(length) * sizeof(Real), context.stream()), "memory could not be cleared");
    return;
  }

  Real *f = context.take<Real>(n * stride), *norm = context.take<Real>(n);
  context.launch(unit_rows_kernel<Real>, divided_up(n, kGradientWarps), kGradientThreads, 0, given(rows.data), n,
                 int(d), stride, f, norm);
  const int64_t per_pair = (4 * h + m + 2 * d) * int64_t(sizeof(Real));
  const int64_t most = std::min({kMaxChunk, std::max<int64_t>(kChunkBytes / per_pair, 1), source.count});
  Chunk<Real> c{};
  c.i = context.take<int>(most), c.j = context.take<int>(most), c.weight = context.take<Real>(most);
  if (unit.normalize_input) c.over_u = context.take<Real>(most), c.over_v = context.take<Real>(most);
  c.norm_u = context.take<Real>(most), c.norm_v = context.take<Real>(most);
  c.x = context.take<Real>(most * 2 * h), c.c = context.take<Real>(most * m), c.dx = context.take<Real>(most * 2 * h);
  c.du = context.take<Real>(most * d), c.dv = context.take<Real>(most * d);

  for (int64_t first = 0; first < source.count; first += most) {
    const int64_t pairs = std::min(most, source.count - first);
    const int count = int(pairs);
    const bool add = first > 0;
    const int64_t warps = divided_up(pairs, kGradientWarps);
    const auto by_warps = [&](auto kernel, const auto&... arguments) {
      context.launch(kernel, warps, kGradientThreads, 0, arguments...);
    };
    context.launch(list_kernel<Real>, divided_up(pairs, kGradientThreads), kGradientThreads, 0, source, first, count,
                   c);
    by_warps(pair_rows_kernel<Real>, f, stride, int(d), count, c);

    const auto plain = [](const Real* data, int64_t rows, int64_t inputs, int64_t row_pitch, int64_t input_pitch) {
      return Operand<Real>{data, rows, inputs, row_pitch, input_pitch};
    };
    // X, C
    multiply<A>(context, plain(c.du, pairs, d, d, 1), plain(given(unit.w_u), h, d, d, 1),
                {c.x, 2 * h, given(unit.b_u), true, false});
    multiply<A>(context, plain(c.dv, pairs, d, d, 1), plain(given(unit.w_v), h, d, d, 1),
                {c.x + h, 2 * h, given(unit.b_v), true, false});
    by_warps(unit_norms_kernel<Real>, int(h), count, c);
    multiply<A>(context, plain(c.x, pairs, 2 * h, 2 * h, 1), plain(given(unit.w_c), m, 2 * h, 2 * h, 1),
                {c.c, m, given(unit.b_c), true, false});
    // dC, dX, dZ
    context.launch(through_score_kernel<Real>, divided_up(m + 1, kWarp), kSumThreads, kSumBytes<2, Real>, int(m), count,
                   add, given(unit.w_s), c, wanted(gradient.w_s), wanted(gradient.b_c), wanted(gradient.b_s));
    multiply<A>(context, plain(c.c, pairs, m, m, 1), plain(given(unit.w_c), 2 * h, m, 1, 2 * h), {c.dx, 2 * h});
    multiply<A>(context, plain(c.c, m, pairs, 1, m), plain(c.x, 2 * h, pairs, 1, 2 * h),
                {wanted(gradient.w_c), 2 * h, nullptr, false, add});
    by_warps(through_norms_kernel<Real>, int(h), count, c);
    context.launch(sum_biases_kernel<Real>, divided_up(2 * h, kWarp), kSumThreads, kSumBytes<1, Real>, int(h), count,
                   add, c.dx, wanted(gradient.b_u), wanted(gradient.b_v));
    // dW_u, dW_v
    multiply<A>(context, plain(c.dx, h, pairs, 1, 2 * h), plain(c.du, d, pairs, 1, d),
                {wanted(gradient.w_u), d, nullptr, false, add});
    multiply<A>(context, plain(c.dx + h, h, pairs, 1, 2 * h), plain(c.dv, d, pairs, 1, d),
                {wanted(gradient.w_v), d, nullptr, false, add});
    // du, dv, and the rows
    multiply<A>(context, plain(c.dx, pairs, h, 2 * h, 1), plain(given(unit.w_u), d, h, 1, d), {c.du, d});
    multiply<A>(context, plain(c.dx + h, pairs, h, 2 * h, 1), plain(given(unit.w_v), d, h, 1, d), {c.dv, d});
    if (unit.normalize_input) by_warps(through_input_norms_kernel<Real>, f, stride, int(d), count, c);
    context.launch(gather_kernel<Real>, n * divided_up(d, kGathered), kGradientThreads, kGatherBytes<Real>, f, stride,
                   int(d), count, add, c, d_rows);
  }
  context.launch(through_row_norms_kernel<Real>, divided_up(n, kGradientWarps), kGradientThreads, 0, n, f, stride, norm,
                 int(d), d_rows);
}

}  // namespace pddm::cuda
