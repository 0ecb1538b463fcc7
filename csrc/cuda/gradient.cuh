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
// What is an operand of a product is kept as one, the weights too. In bfloat16 so is what else a pair has, for half the
// bytes, and where all rows are whole sixteens of bytes, the kernels between the products take these at a time.
#pragma once

#include "multiply.cuh"
#include "prepare.cuh"

namespace pddm::cuda {

// Bytes of a chunk's buffers and pairs in it, at most: of a list; and of a matrix, beside whose scores more memory is
// little, and whose chunks give every product as many blocks as fill a device.
constexpr int64_t kListBytes = 20 << 20, kListPairs = 2048, kMatrixBytes = 96 << 20, kMatrixPairs = 16384;
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

template <class A>
struct Chunk {
  using Real = typename A::Real;
  using Number = Kept<A>;
  int *i, *j;                      // −1: no gradient, not recomputed
  int* order;                      // of a list, the ends of its pairs (2 pair, 2 pair + 1) by the rows that they name
  Real *weight, *over_u, *over_v;  // over_u = 1 / ‖u‖ and over_v with normalize_input, else null
  Real *norm_u, *norm_v;
  Number *x, *c, *dx;
  Number *du, *dv;  // first u and v; dv is null where v goes by rows
};

template <class A>
__global__ void __launch_bounds__(kGradientThreads)
    list_kernel(const __grid_constant__ Source<typename A::Real> source, const __grid_constant__ Part part,
                const __grid_constant__ Chunk<A> chunk) {
  const int t = int(blockIdx.x) * kGradientThreads + int(threadIdx.x);
  int64_t i = -1, j = -1;
  typename A::Real weight = 0;
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
template <class A>
__device__ __forceinline__ int row_of_end(const Chunk<A>& chunk, int end) {
  const int* const rows = end % 2 ? chunk.j : chunk.i;  // apart: GCC's sanitizer would index by nothing
  const int row = rows[end / 2];
  return row < 0 ? kNoRow : row;
}

// By one warp for each end: its rank is the number of ends before it, counted.
template <class A>
__global__ void __launch_bounds__(kGradientThreads)
    order_ends_kernel(int count, const __grid_constant__ Chunk<A> chunk) {
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

// Of a row that a warp has, each lane has Beside numbers side by side and then others further on: 16 bytes as they are
// kept, where all rows are whole sixteens. Wider numbers than bfloat16 come one by one, as do those of other rows.
template <class A>
constexpr int kMostBeside = kNarrow<A> ? 8 : 1;

// Of a matrix with so many columns, with rows and columns exchanged if `turned`.
template <class A>
__global__ void __launch_bounds__(kGradientThreads)
    operands_kernel(const typename A::Real* from, int64_t length, int64_t columns, bool turned, Kept<A>* to) {
  const int64_t at = int64_t(blockIdx.x) * kGradientThreads + threadIdx.x;
  if (at >= length) return;
  int64_t source = at;
  if (turned) {
    const int64_t rows = length / columns;
    source = at % rows * columns + at / rows;
  }
  to[at] = as_operand<A>(from[source]);
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
template <class A, int Beside>
__global__ void __launch_bounds__(kGradientThreads)
    pair_rows_kernel(const typename A::Real* __restrict__ f, const typename A::Real* __restrict__ a, int dim,
                     int hidden, int count, const __grid_constant__ Chunk<A> chunk) {
  using Real = typename A::Real;
  using Number = Kept<A>;
  [[maybe_unused]] constexpr int kUnrolled = Beside == 1 ? 4 : 2;
  PDDM_PAIR_OF_WARP(count)
  const int64_t i = chunk.i[pair], j = chunk.j[pair];
  const bool there = i >= 0;
  const Real *f_i = f + (there ? i : 0) * dim, *f_j = f + (there ? j : 0) * dim;
  Number *u = chunk.du + int64_t(pair) * dim, *v = chunk.dv ? chunk.dv + int64_t(pair) * dim : nullptr;
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
#pragma unroll kUnrolled
  for (int k = lane * Beside; k < dim; k += kWarp * Beside) {
    Real x[Beside] = {}, y[Beside] = {}, differences[Beside], means[Beside];
    if (there) load(f_i + k, x), load(f_j + k, y);
#pragma unroll
    for (int q = 0; q < Beside; ++q)
      differences[q] = difference_of(x[q], y[q]) * over_u, means[q] = mean_of(x[q], y[q]) * over_v;
    store_operands<A>(u + k, differences);
    if (v) store_operands<A>(v + k, means);
  }
  if (v) return;
  const Real *a_i = a + (there ? i : 0) * hidden, *a_j = a + (there ? j : 0) * hidden;
  const auto make = [&](int k, Real(&made)[Beside]) {
    Real x[Beside] = {}, y[Beside] = {};
    if (there) load(a_i + k, x), load(a_j + k, y);
#pragma unroll
    for (int q = 0; q < Beside; ++q) made[q] = relu(mean_of(x[q], y[q]));
  };
  Number* const x = chunk.x + (int64_t(pair) * 2 + 1) * hidden;
  Real squares = 0;
#pragma unroll kUnrolled
  for (int k = lane * Beside; k < hidden; k += kWarp * Beside) {
    Real made[Beside];
    make(k, made);
#pragma unroll
    for (int q = 0; q < Beside; ++q) squares += made[q] * made[q];
  }
  const Real norm = sqrt(lanes_sum(squares)), over = 1 / floored(norm);
#pragma unroll kUnrolled
  for (int k = lane * Beside; k < hidden; k += kWarp * Beside) {
    Real made[Beside];
    make(k, made);
#pragma unroll
    for (int q = 0; q < Beside; ++q) made[q] *= over;
    store_operands<A>(x + k, made);
  }
  if (lane == 0) chunk.norm_v[pair] = norm;
}

// u' and, if there are two branches, v' to unit norm.
template <class A, int Beside>
__global__ void __launch_bounds__(kGradientThreads)
    unit_norms_kernel(int hidden, int branches, int count, const __grid_constant__ Chunk<A> chunk) {
  using Real = typename A::Real;
  [[maybe_unused]] constexpr int kUnrolled = Beside == 1 ? 4 : 2;
  PDDM_PAIR_OF_WARP(count)
  for (int branch = 0; branch < branches; ++branch) {
    Kept<A>* const x = chunk.x + (int64_t(pair) * 2 + branch) * hidden;
    Real squares = 0;
#pragma unroll kUnrolled
    for (int k = lane * Beside; k < hidden; k += kWarp * Beside) {
      Real own[Beside];
      load(x + k, own);
#pragma unroll
      for (int q = 0; q < Beside; ++q) squares += own[q] * own[q];
    }
    const Real norm = sqrt(lanes_sum(squares)), over = 1 / floored(norm);
#pragma unroll kUnrolled
    for (int k = lane * Beside; k < hidden; k += kWarp * Beside) {
      Real own[Beside];
      load(x + k, own);
#pragma unroll
      for (int q = 0; q < Beside; ++q) own[q] *= over;
      store_operands<A>(x + k, own);
    }
    if (lane == 0) (branch ? chunk.norm_v : chunk.norm_u)[pair] = norm;
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
template <class A, int Beside>
__global__ void __launch_bounds__(kGradientThreads)
    through_score_kernel(int combined, int count, bool add, const typename A::Real* w_s,
                         const __grid_constant__ Chunk<A> chunk,
                         const __grid_constant__ Slabs<typename A::Real> slabs) {
  using Real = typename A::Real;
  constexpr int kAtOnce = 8;
  const int across = combined / (kGradientThreads * Beside) + 1, slab = int(blockIdx.x) / across;
  const int column = (int(blockIdx.x) % across * kGradientThreads + int(threadIdx.x)) * Beside;
  const int first = slab * kSlab, end = first + kSlab < count ? first + kSlab : count;
  const auto give = [&](Real* to, Real sum) { *to = add ? *to + sum : sum; };
  if (column > combined) return;
  if (column == combined) {
    Real sum = 0;
    for (int pair = first; pair < end; ++pair) sum += __ldg(chunk.weight + pair);
    return give(slabs.b_s + slab, sum);
  }
  Real own[Beside], d_w_s[Beside] = {}, d_b_c[Beside] = {};
#pragma unroll
  for (int q = 0; q < Beside; ++q) own[q] = __ldg(w_s + column + q);
  for (int pair = first; pair < end; pair += kAtOnce) {
    Real c[kAtOnce][Beside] = {};
    Kept<A>* const at = chunk.c + int64_t(pair) * combined + column;
#pragma unroll
    for (int p = 0; p < kAtOnce; ++p)
      if (pair + p < end) load(at + int64_t(p) * combined, c[p]);
#pragma unroll
    for (int p = 0; p < kAtOnce; ++p) {
      if (pair + p >= end) break;
      const Real weight = __ldg(chunk.weight + pair + p);
      Real d_c[Beside];
#pragma unroll
      for (int q = 0; q < Beside; ++q) {
        // 0 for a pair without a gradient, whatever it holds.
        if (weight != 0) d_w_s[q] += weight * c[p][q];
        d_c[q] = weight == 0 || c[p][q] <= 0 ? Real(0) : weight * own[q];
        d_b_c[q] += d_c[q];
      }
      store_operands<A>(at + int64_t(p) * combined, d_c);
    }
  }
#pragma unroll
  for (int q = 0; q < Beside; ++q) {
    const int64_t to = int64_t(slab) * combined + column + q;
    give(slabs.w_s + to, d_w_s[q]), give(slabs.b_c + to, d_b_c[q]);
  }
}

// From the unit vectors back through their norms and relus, in place, and the gradients of b_u and b_v. A block has a
// slab: of kNormWarps pairs at a time the warps find x · dx, and then threads go down the columns.
constexpr int kNormThreads = 512, kNormWarps = kNormThreads / kWarp;
template <class Real>
constexpr int64_t kNormBytes = 4 * kNormWarps * int64_t(sizeof(Real));
template <class A>
__global__ void __launch_bounds__(kNormThreads)
    through_norms_kernel(int hidden, int count, bool add, const __grid_constant__ Chunk<A> chunk,
                         const __grid_constant__ Slabs<typename A::Real> slabs) {
  using Real = typename A::Real;
  Real* const dots = reinterpret_cast<Real*>(shared_memory());  // by branch and warp
  Real* const over = dots + 2 * kNormWarps;                     // 1 / norm, 0 for a pair without a gradient
  const int warp = warp_index(), lane = lane_index(), first = int(blockIdx.x) * kSlab;
  for (int step = 0; step < kSlab && first + step < count; step += kNormWarps) {
    const int own = first + step + warp;
    for (int branch = 0; branch < 2 && own < count; ++branch) {
      const int64_t at = (int64_t(own) * 2 + branch) * hidden;
      Real dot = 0;
#pragma unroll 8
      for (int k = lane; k < hidden; k += kWarp) dot += number(chunk.x[at + k]) * number(chunk.dx[at + k]);
      dot = lanes_sum(dot);
      const Real norm = (branch ? chunk.norm_v : chunk.norm_u)[own];
      if (norm < Real(kNormFloor)) dot = 0;  // divided by a constant
      if (lane == 0) {
        dots[branch * kNormWarps + warp] = dot;
        over[branch * kNormWarps + warp] = chunk.i[own] < 0 ? Real(0) : 1 / floored(norm);
      }
    }
    __syncthreads();
    const int remaining = count - first - step, pairs = remaining < kNormWarps ? remaining : kNormWarps;
    for (int column = int(threadIdx.x); column < 2 * hidden; column += kNormThreads) {
      const int branch = column >= hidden;
      Real sum = 0;
#pragma unroll 4
      for (int p = 0; p < pairs; ++p) {
        const int64_t at = int64_t(first + step + p) * 2 * hidden + column;
        const Real x = number(chunk.x[at]), d = number(chunk.dx[at]), scale = over[branch * kNormWarps + p];
        const Real dz = scale == 0 || x <= 0 ? Real(0) : (d - x * dots[branch * kNormWarps + p]) * scale;
        sum += dz;
        chunk.dx[at] = as_operand<A>(dz);
      }
      Real& to = (branch ? slabs.b_v : slabs.b_u)[int64_t(blockIdx.x) * hidden + column - branch * hidden];
      to = add || step > 0 ? to + sum : sum;
    }
    __syncthreads();
  }
}

// The same for bfloat16, in rows of whole sixteens and at most Held · 256 numbers, which are read once: a block has one
// branch of a slab, and of a warp's pairs, one after the other, the numbers stay in registers from x · dx to where they
// are written, and the sums of the columns from pair to pair. In the end the warps' sums are added in order.
template <int Held>
constexpr int kHeldThreads = Held > 4 ? 256 : 512;
template <int Held>
constexpr int64_t kHeldBytes = int64_t(kHeldThreads<Held>) * 8 * sizeof(float);
template <class A, int Held>
__global__ void __launch_bounds__(kHeldThreads<Held>, Held == 2 ? 2 : 1)
    through_held_norms_kernel(int hidden, int count, bool add, const __grid_constant__ Chunk<A> chunk,
                              const __grid_constant__ Slabs<float> slabs) {
  constexpr int kWarps = kHeldThreads<Held> / kWarp, kBeside = kMostBeside<A>, kAcross = kWarp * kBeside;
  const int slab = int(blockIdx.x) / 2, branch = int(blockIdx.x) % 2, first = slab * kSlab;
  const int end = first + kSlab < count ? first + kSlab : count, from = lane_index() * kBeside;
  float sums[Held][kBeside] = {};
  for (int pair = first + warp_index(); pair < end; pair += kWarps) {
    const int64_t at = (int64_t(pair) * 2 + branch) * hidden + from;
    uint4 x[Held] = {}, dx[Held] = {};
#pragma unroll
    for (int held = 0; held < Held; ++held) {
      if (from + held * kAcross >= hidden) break;
      x[held] = *reinterpret_cast<const uint4*>(chunk.x + at + held * kAcross);
      dx[held] = *reinterpret_cast<const uint4*>(chunk.dx + at + held * kAcross);
    }
    const float norm = (branch ? chunk.norm_v : chunk.norm_u)[pair];
    const bool there = chunk.i[pair] >= 0;
    float dot = 0;
#pragma unroll
    for (int held = 0; held < Held; ++held) {
      float own[kBeside], d[kBeside];
      widen(x[held], own), widen(dx[held], d);
#pragma unroll
      for (int q = 0; q < kBeside; ++q) dot += own[q] * d[q];
    }
    dot = lanes_sum(dot);
    if (norm < float(kNormFloor)) dot = 0;  // divided by a constant
    const float over = there ? 1 / floored(norm) : 0;
#pragma unroll
    for (int held = 0; held < Held; ++held) {
      if (from + held * kAcross >= hidden) break;
      float own[kBeside], d[kBeside];
      widen(x[held], own), widen(dx[held], d);
#pragma unroll
      for (int q = 0; q < kBeside; ++q) {
        d[q] = !there || own[q] <= 0 ? 0 : (d[q] - own[q] * dot) * over;
        sums[held][q] += d[q];
      }
      store(chunk.dx + at + held * kAcross, d);
    }
  }
  auto* const by_warp = reinterpret_cast<float*>(shared_memory());
  float* const to = (branch ? slabs.b_v : slabs.b_u) + int64_t(slab) * hidden;
#pragma unroll
  for (int held = 0; held < Held; ++held) {
    if (held * kAcross >= hidden) break;
#pragma unroll
    for (int q = 0; q < kBeside; ++q) by_warp[warp_index() * kAcross + q * kWarp + lane_index()] = sums[held][q];
    __syncthreads();
    const int within = int(threadIdx.x), column = held * kAcross + within;
    if (within < kAcross && column < hidden) {
      float sum = 0;
      for (int warp = 0; warp < kWarps; ++warp)
        sum += by_warp[warp * kAcross + within % kBeside * kWarp + within / kBeside];
      to[column] = add ? to[column] + sum : sum;
    }
    __syncthreads();
  }
}

// From u/‖u‖ and v/‖v‖ back to u and v, in place.
template <class A>
__global__ void __launch_bounds__(kGradientThreads)
    through_input_norms_kernel(const typename A::Real* f, int dim, int count, const __grid_constant__ Chunk<A> chunk) {
  using Real = typename A::Real;
  PDDM_PAIR_OF_WARP(count)
  const int64_t i = chunk.i[pair], j = chunk.j[pair];
  if (i < 0) return;
  for (int branch = 0; branch < 2; ++branch) {
    const auto made = [&](int k) {
      const Real a = f[i * dim + k], b = f[j * dim + k];
      return branch ? mean_of(a, b) : difference_of(a, b);
    };
    const Real over = (branch ? chunk.over_v : chunk.over_u)[pair];
    Kept<A>* const d = (branch ? chunk.dv : chunk.du) + int64_t(pair) * dim;
    Real dot = 0;
    for (int k = lane; k < dim; k += kWarp) dot += made(k) * over * number(d[k]);
    dot = lanes_sum(dot);
    if (over >= Real(1 / kNormFloor)) dot = 0;  // divided by a constant
    for (int k = lane; k < dim; k += kWarp) put(d + k, (number(d[k]) - made(k) * over * dot) * over);
  }
}

// The gradients of a row's pairs, added to it. A block has a row of a matrix's chunk, or at most `run` of a list's ends
// that name one, and kGathered columns: of the row of f, or of that of A after these. The warps take turns at the ends,
// and their parts are added in order. What a list's run of ends has beyond its first block waits in `rest` for
// gather_rest_kernel.
template <class A>
constexpr int kGatheredPerLane = kNarrow<A> ? 8 : 4;
template <class A>
constexpr int kGathered = kGatheredPerLane<A> * kWarp;
constexpr int kRun = 64;
template <class A>
constexpr int64_t kGatherBytes = int64_t(kGradientWarps) * kGathered<A> * sizeof(typename A::Real);
template <class A>
struct Gather {
  using Real = typename A::Real;
  const Real* f;
  int dim, hidden;  // hidden is 0 where there is no A
  int run;
  Real *d_f, *d_a;
  Real* rest;  // dim + hidden for every `run` ends

  __host__ __device__ static int blocks(int columns) { return (columns + kGathered<A> - 1) / kGathered<A>; }
  __host__ __device__ int across() const { return blocks(dim) + blocks(hidden); }
};
// What a block has of the columns.
template <class A>
struct Gathered {
  using Real = typename A::Real;
  int own, first_column, width;
  bool of_a;

  __device__ explicit Gathered(const Gather<A>& g) {
    const int across = g.across(), group = int(blockIdx.x) % across;
    own = int(blockIdx.x) / across, of_a = group >= g.blocks(g.dim);
    first_column = (group - (of_a ? g.blocks(g.dim) : 0)) * kGathered<A>, width = of_a ? g.hidden : g.dim;
  }
  __device__ Real* gradient(const Gather<A>& g, int row) const {
    return (of_a ? g.d_a : g.d_f) + int64_t(row) * width + first_column;
  }
  __device__ Real* rest(const Gather<A>& g, int which) const {
    return g.rest + int64_t(which - 1) * (g.dim + g.hidden) + (of_a ? g.dim : 0) + first_column;
  }
};

template <class A, int Beside>
__global__ void __launch_bounds__(kGradientThreads, 4)
    gather_kernel(const __grid_constant__ Gather<A> g, const __grid_constant__ Part part,
                  const __grid_constant__ Chunk<A> chunk) {
  using Real = typename A::Real;
  Real* const parts = reinterpret_cast<Real*>(shared_memory());
  const Gathered<A> at(g);
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

  // A lane's columns: runs of Beside.
  constexpr int kRuns = kGatheredPerLane<A> / Beside;
  const auto column_of = [&](int run) { return (lane + run * kWarp) * Beside; };
  const auto has = [&](int run) { return at.first_column + column_of(run) < at.width; };
  const Real* const own_f = g.f + int64_t(row) * g.dim + at.first_column;
  Real mine[kRuns][Beside] = {}, sums[kRuns][Beside] = {};
#pragma unroll
  for (int run = 0; run < kRuns; ++run)
    if (!at.of_a && has(run)) load(own_f + column_of(run), mine[run]);
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
    const Kept<A>* const u = at.of_a ? nullptr : chunk.du + int64_t(pair) * g.dim + at.first_column;
    const Kept<A>* const v = at.of_a    ? chunk.dx + (int64_t(pair) * 2 + 1) * g.hidden + at.first_column
                             : chunk.dv ? chunk.dv + int64_t(pair) * g.dim + at.first_column
                                        : nullptr;
#pragma unroll
    for (int run = 0; run < kRuns; ++run) {
      if (!has(run)) break;
      const int k = column_of(run);
      if (u) {
        Real theirs[Beside], d[Beside];
        load(f + k, theirs), load(u + k, d);
#pragma unroll
        for (int q = 0; q < Beside; ++q) {
          const Real up = mine[run][q] > theirs[q] ? d[q] : Real(0), down = mine[run][q] < theirs[q] ? d[q] : Real(0);
          sums[run][q] += up - down;
        }
      }
      if (v) {
        Real d[Beside];
        load(v + k, d);
#pragma unroll
        for (int q = 0; q < Beside; ++q) sums[run][q] += d[q] / 2;
      }
    }
  }
#pragma unroll
  for (int run = 0; run < kRuns; ++run)
#pragma unroll
    for (int q = 0; q < Beside; ++q)
      parts[warp_index() * kGathered<A> + (run * Beside + q) * kWarp + lane] = sums[run][q];
  __syncthreads();
  const int k = int(threadIdx.x);
  if (k >= kGathered<A> || at.first_column + k >= at.width) return;
  const int place = (k / (kWarp * Beside) * Beside + k % Beside) * kWarp + k / Beside % kWarp;
  Real sum = 0;
  for (int warp = 0; warp < kGradientWarps; ++warp) sum += parts[warp * kGathered<A> + place];
  if (goes_on)
    at.rest(g, own / g.run)[k] = sum;
  else
    at.gradient(g, row)[k] += sum;
}

template <class A>
__global__ void __launch_bounds__(kGathered<A>)
    gather_rest_kernel(const __grid_constant__ Gather<A> g, int count, const __grid_constant__ Chunk<A> chunk) {
  const Gathered<A> at(g);
  const int k = int(threadIdx.x), first = at.own + 1;
  const auto row_at = [&](int place) { return row_of_end(chunk, chunk.order[place]); };
  const int row = row_at(first * g.run);
  // The first block beyond a run's first one adds up all.
  if (row == kNoRow || row_at(first * g.run - 1) != row) return;
  if (first > 1 && row_at((first - 1) * g.run - 1) == row) return;
  if (at.first_column + k >= at.width) return;
  typename A::Real sum = at.gradient(g, row)[k];
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

// From the unit rows back to the rows as given, in place. Then f as an operand (which may take its place), where it has
// a part in d_a: a row without a gradient has none, whatever it holds.
template <class A>
__global__ void __launch_bounds__(kGradientThreads)
    through_row_norms_kernel(int64_t n, const typename A::Real* f, const typename A::Real* norms, int dim,
                             const Kept<A>* d_a, int hidden, typename A::Real* d_f, Kept<A>* operand) {
  using Real = typename A::Real;
  const int64_t row = int64_t(blockIdx.x) * kGradientWarps + warp_index();
  if (row >= n) return;
  const Real* const unit = f + row * dim;
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
  for (int k = lane_index(); k < hidden; k += kWarp) any |= number(d_a[row * hidden + k]) != 0;
  any = __ballot_sync(~0u, any) != 0;
  for (int k = lane_index(); k < dim; k += kWarp) operand[row * dim + k] = as_operand<A>(any ? unit[k] : Real(0));
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

// Arrays with an operand's rows, or its inputs, `pitch` apart.
template <class Number>
Operand<Number> along_inputs(const Number* data, int64_t rows, int64_t inputs, int64_t pitch) {
  return {data, rows, inputs, pitch, 1};
}
template <class Number>
Operand<Number> along_rows(const Number* data, int64_t rows, int64_t inputs, int64_t pitch) {
  return {data, rows, inputs, 1, pitch};
}

// A layer's weights as the right operands of its product and of the way back. bfloat16s are copied for both, so that
// they lie along the inputs either way.
template <class A>
struct Weights {
  Operand<Kept<A>> forward, back;
};

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
  const int64_t per_pair = (4 * h + m + (by_rows ? 1 : 2) * d) * int64_t(sizeof(Kept<A>));
  const int64_t fit = std::max<int64_t>((listed ? kListBytes : kMatrixBytes) / per_pair, 1);
  const int64_t at_most = std::min(listed ? kListPairs : kMatrixPairs, fit);
  int64_t most = 0;
  each_part(source, at_most, [&](const Part& part) { most = std::max<int64_t>(most, part.count); });

  // Numbers as operands: those given where they are, and otherwise a copy, in `to` if that is there.
  const auto operands = [&](const Real* from, int64_t length, int64_t columns, bool turned, Kept<A>* to) {
    if constexpr (!A::kTensor) {
      return from;
    } else {
      if (!to) to = context.take<Kept<A>>(length);
      context.launch(operands_kernel<A>, divided_up(length, kGradientThreads), kGradientThreads, 0, from, length,
                     columns, turned, to);
      return static_cast<const Kept<A>*>(to);
    }
  };
  const auto weights = [&](const void* from, int64_t outputs, int64_t inputs) {
    const auto* const w = operands(given(from), outputs * inputs, inputs, false, nullptr);
    Weights<A> both{along_inputs(w, outputs, inputs, inputs), along_rows(w, inputs, outputs, inputs)};
    if constexpr (kNarrow<A>)
      both.back =
          along_inputs(operands(given(from), outputs * inputs, inputs, true, nullptr), inputs, outputs, outputs);
    return both;
  };
  const Weights<A> w_u = weights(unit.w_u, h, d), w_v = weights(unit.w_v, h, d), w_c = weights(unit.w_c, m, 2 * h);

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

  Chunk<A> c{};
  c.i = context.take<int>(most), c.j = context.take<int>(most), c.weight = context.take<Real>(most);
  if (listed) c.order = context.take<int>(2 * most);
  if (unit.normalize_input) c.over_u = context.take<Real>(most), c.over_v = context.take<Real>(most);
  c.norm_u = context.take<Real>(most), c.norm_v = context.take<Real>(most);
  const auto take = [&](int64_t width) { return context.take<Kept<A>>(most * width); };
  c.x = take(2 * h), c.c = take(m), c.dx = take(2 * h), c.du = take(d);
  if (!by_rows) c.dv = take(d);
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
    using L = LargeProduct<A>;
    const int64_t blocks = divided_up(outputs, L::kPairs) * divided_up(inputs, L::kOutputs);
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
  // A run of so many ends that x has room for the rest.
  const int run = int(std::max<int64_t>(kRun, divided_up((d + a_columns) * sizeof(Real) / sizeof(Kept<A>), h)));
  const Gather<A> gather{f, int(d), a_columns, run, d_rows, d_a, reinterpret_cast<Real*>(c.x)};

  const auto forward = [&](const Operand<Kept<A>>& left, const Weights<A>& w, const void* bias, Kept<A>* to,
                           int64_t pitch) {
    multiply<A, true, true, Kept<A>>(context, left, w.forward, {to, pitch, given(bias), true});
  };
  const auto back = [&](const Operand<Kept<A>>& left, const Weights<A>& w, Kept<A>* to, int64_t pitch) {
    multiply<A, true, kNarrow<A>, Kept<A>>(context, left, w.back, {to, pitch});
  };
  const bool sixteens = d % kMostBeside<A> == 0 && h % kMostBeside<A> == 0;
  const auto pair_rows = sixteens ? pair_rows_kernel<A, kMostBeside<A>> : pair_rows_kernel<A, 1>;
  const auto unit_norms = sixteens ? unit_norms_kernel<A, kMostBeside<A>> : unit_norms_kernel<A, 1>;
  const auto gather_ends = sixteens ? gather_kernel<A, kMostBeside<A>> : gather_kernel<A, 1>;
  constexpr int kScoreColumns = kNarrow<A> ? 2 : 1;  // of a thread
  const int score_columns = m % kScoreColumns == 0 ? kScoreColumns : 1;
  const auto through_score =
      score_columns == kScoreColumns ? through_score_kernel<A, kScoreColumns> : through_score_kernel<A, 1>;
  bool add = false;
  const auto through_norms = [&](int count) {
    const int64_t slabs_of_chunk = divided_up(count, kSlab);
    if constexpr (kNarrow<A>) {
      const auto held = [&](auto kernel, int threads, int64_t bytes) {
        context.launch(kernel, 2 * slabs_of_chunk, threads, bytes, int(h), count, add, c, slabs);
      };
      if (sixteens && h <= 512) return held(through_held_norms_kernel<A, 2>, kHeldThreads<2>, kHeldBytes<2>);
      if (sixteens && h <= 1024) return held(through_held_norms_kernel<A, 4>, kHeldThreads<4>, kHeldBytes<4>);
      if (sixteens && h <= 2048) return held(through_held_norms_kernel<A, 8>, kHeldThreads<8>, kHeldBytes<8>);
    }
    context.launch(through_norms_kernel<A>, slabs_of_chunk, kNormThreads, kNormBytes<Real>, int(h), count, add, c,
                   slabs);
  };
  each_part(source, at_most, [&](const Part& part) {
    const int count = part.count;
    const auto by_warps = [&](auto kernel, const auto&... arguments) {
      context.launch(kernel, divided_up(count, kGradientWarps), kGradientThreads, 0, arguments...);
    };
    context.launch(list_kernel<A>, divided_up(count, kGradientThreads), kGradientThreads, 0, source, part, c);
    by_warps(pair_rows, f, a, int(d), int(h), count, c);
    // X, C
    forward(along_inputs(c.du, count, d, d), w_u, unit.b_u, c.x, 2 * h);
    if (!by_rows) forward(along_inputs(c.dv, count, d, d), w_v, unit.b_v, c.x + h, 2 * h);
    by_warps(unit_norms, int(h), by_rows ? 1 : 2, count, c);
    forward(along_inputs(c.x, count, 2 * h, 2 * h), w_c, unit.b_c, c.c, m);
    // dC, dX, dZ
    context.launch(through_score,
                   divided_up(count, kSlab) * divided_up(m + 1, int64_t(kGradientThreads) * score_columns),
                   kGradientThreads, 0, int(m), count, add, given(unit.w_s), c, slabs);
    back(along_inputs(c.c, count, m, m), w_c, c.dx, 2 * h);
    through_norms(count);
    // dW_c, dW_u, du, and those of v
    d_w_u.add = d_w_c.add = d_w_v.add = add;
    multiply<A, false, false>(context, along_rows(c.c, m, count, m), along_rows(c.x, 2 * h, count, 2 * h), d_w_c);
    multiply<A, false, false>(context, along_rows(c.dx, h, count, 2 * h), along_rows(c.du, d, count, d), d_w_u);
    back(along_inputs(c.dx, count, h, 2 * h), w_u, c.du, d);
    if (!by_rows) {
      multiply<A, false, false>(context, along_rows(c.dx + h, h, count, 2 * h), along_rows(c.dv, d, count, d), d_w_v);
      back(along_inputs(c.dx + h, count, h, 2 * h), w_v, c.dv, d);
    }
    if (unit.normalize_input) by_warps(through_input_norms_kernel<A>, f, int(d), count, c);
    // To the rows
    if (listed)
      context.launch(order_ends_kernel<A>, divided_up(2 * count, kGradientWarps), kGradientThreads, 0, count, c);
    context.launch(gather_ends, (listed ? 2 * int64_t(count) : part.rows + part.columns) * gather.across(),
                   kGradientThreads, kGatherBytes<A>, gather, part, c);
    if (listed)
      context.launch(gather_rest_kernel<A>, (2 * int64_t(count) - 1) / run * gather.across(), kGathered<A>, 0, gather,
                     count, c);
    add = true;
  });

  const Kept<A>* d_a_operand = nullptr;
  Kept<A>* f_operand = nullptr;
  if (by_rows) {
    d_a_operand = operands(d_a, n * h, h, false, reinterpret_cast<Kept<A>*>(a));  // A has been used
    if constexpr (kNarrow<A>)
      f_operand = context.take<Kept<A>>(n * d);
    else
      f_operand = f;
    multiply<A, true, kNarrow<A>>(context, along_inputs(d_a_operand, n, h, h), w_v.back,
                                  {d_rows, d, nullptr, false, true});
  }
  context.launch(through_row_norms_kernel<A>, divided_up(n, kGradientWarps), kGradientThreads, 0, n, f, norm, int(d),
                 d_a_operand, int(h), d_rows, f_operand);
  if (by_rows)
    multiply<A, false, false>(context, along_rows(d_a_operand, h, n, h), along_rows(f_operand, d, n, d),
                              {wanted(gradient.w_v), d});
  int64_t summed_length = 0;
  for (const Total<Real>& each : totals.each) summed_length += each.length;
  context.launch(totals_kernel<Real>, divided_up(summed_length, kGradientThreads), kGradientThreads, 0, totals);
}

}  // namespace pddm::cuda
