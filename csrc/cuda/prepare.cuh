// Before the first pair: unit rows, their ranks by label, weights as a stream of tiles, biases filled up with zeros.
#pragma once

#include "launch.cuh"
#include "select.cuh"
#include "warpgroup.cuh"
#include "workspace.cuh"

namespace pddm::cuda {

constexpr int kPrepareThreads = 256, kPrepareWarps = kPrepareThreads / kWarp;

// Rows sorted by label, then by index. later[i] rows of i's class come after it.
struct Ranks {
  const int64_t* labels = nullptr;
  int *rank = nullptr, *order = nullptr, *later = nullptr, *later_by_rank = nullptr;
};

// By one warp for row i: its rank is the number of rows before it, counted.
__device__ __forceinline__ void rank_row(const Ranks& ranks, int64_t n, int64_t i) {
  const int64_t label = ranks.labels[i];
  int before = 0, later = 0;
  for (int64_t j = lane_index(); j < n; j += kWarp) {
    const int64_t other = ranks.labels[j];
    before += other < label || (other == label && j < i);
    later += other == label && j > i;
  }
  before = lanes_sum(before), later = lanes_sum(later);
  if (lane_index() == 0) {
    ranks.rank[i] = before, ranks.order[before] = int(i);
    ranks.later[i] = later, ranks.later_by_rank[before] = later;
  }
}

template <class Real>
__device__ __forceinline__ void normalise_row(const Real* x, int dim, int stride, Real* f, Real* norm) {
  Real squares = 0;
  for (int k = lane_index(); k < dim; k += kWarp) squares += x[k] * x[k];
  const Real length = sqrt(lanes_sum(squares)), divisor = floored(length);
  for (int k = lane_index(); k < stride; k += kWarp) f[k] = k < dim ? x[k] / divisor : 0;
  if (lane_index() == 0) *norm = length;
}

// The unit as it was given.
template <class Real>
struct Given {
  const Real *rows, *w_u, *b_u, *b_v, *w_c, *b_c, *w_s;
};

// Blocks of 8 rows, one to a warp, then blocks of 256 pieces of weights, then blocks of 256 of everything small. Listed
// pairs that name rows which are not there are refused.
template <class A>
__global__ void __launch_bounds__(kPrepareThreads)
    prepare_kernel(const __grid_constant__ Workspace<typename A::Real> w,
                   const __grid_constant__ Given<typename A::Real> given, const __grid_constant__ Ranks ranks,
                   int outputs, Word* words, int64_t word_count, const __grid_constant__ Pairs listed) {
  using Real = typename A::Real;
  constexpr int kLength = kPieceLength<A>;
  const int64_t row_blocks = (w.n + kPrepareWarps - 1) / kPrepareWarps;
  if (int64_t(blockIdx.x) < row_blocks) {
    const int64_t row = int64_t(blockIdx.x) * kPrepareWarps + warp_index();
    if (row >= w.n) return;
    normalise_row(given.rows + row * w.dim, w.dim, w.f_stride, w.f + row * w.f_stride, w.norm + row);
    if (ranks.rank) rank_row(ranks, w.n, row);
    return;
  }
  int64_t at = (int64_t(blockIdx.x) - row_blocks) * kPrepareThreads + threadIdx.x;

  const int64_t pieces_per_tile = int64_t(outputs) * kPieces, pieces = w.weight_tiles() * pieces_per_tile;
  if (at < pieces) {
    int tile = int(at / pieces_per_tile);
    const int within = int(at % pieces_per_tile), row = within / kPieces, piece = within % kPieces;
    const bool first = tile < w.hidden_blocks * w.dim_tiles;
    if (!first) tile -= w.hidden_blocks * w.dim_tiles;
    const int per_block = first ? w.dim_tiles : 2 * w.hidden_tiles;
    const int output = tile / per_block * outputs + row;
    int input = tile % per_block, limit = first ? w.dim : w.hidden;
    // W_c's columns for u' come first where it is given, and second here.
    const bool meets_u = !first && input >= w.hidden_tiles;
    if (meets_u) input -= w.hidden_tiles;
    const Real* from = first ? given.w_u + int64_t(output) * w.dim
                             : given.w_c + int64_t(output) * 2 * w.hidden + (meets_u ? 0 : w.hidden);
    Real x[kLength];
#pragma unroll
    for (int k = 0; k < kLength; ++k) {
      // What meets fragments that are made in registers has its inputs in their order.
      const int place = piece * kLength + k, within_tile = w.warpgroups && !meets_u ? input_at(place) : place;
      const int column = input * kDepth<A> + within_tile;
      x[k] = output < (first ? w.hidden : w.combined) && column < limit ? from[column] : 0;
    }
    const int64_t tile_number = at / pieces_per_tile;
    *reinterpret_cast<uint4*>(w.weights + tile_number * outputs * kRowBytes + piece_offset(row, piece)) = A::piece(x);
    return;
  }
  at -= pieces;

  struct Padded {
    Real* to;
    const Real* from;
    int64_t length, given;
    Real scale = 1;
  };
  const Padded vectors[] = {{w.b_u, given.b_u, int64_t(w.hidden_blocks) * outputs, w.hidden},
                            {w.b_v, given.b_v, w.a_stride, w.hidden, w.normalize_input ? Real(1) : Real(0.5)},
                            {w.b_c, given.b_c, int64_t(w.combined_blocks) * outputs, w.combined},
                            {w.w_s, given.w_s, int64_t(w.combined_blocks) * outputs, w.combined}};
#pragma unroll
  for (const Padded& vector : vectors) {
    if (at >= 0 && at < vector.length) vector.to[at] = at < vector.given ? vector.from[at] * vector.scale : 0;
    at -= vector.length;
  }
  if (at >= 0 && at < word_count) words[at] = 0;
  at -= word_count;
  if (at >= 0 && at < listed.count) {
    const int64_t i = listed.i[at], j = listed.j[at];
    if (i < 0 || j < 0 || i >= w.n || j >= w.n) refuse_pair(at, i, j, w.n);
  }
}

// Ranks alone.
static __global__ void __launch_bounds__(kPrepareThreads) rank_kernel(const __grid_constant__ Ranks ranks, int64_t n) {
  const int64_t row = int64_t(blockIdx.x) * kPrepareWarps + warp_index();
  if (row < n) rank_row(ranks, n, row);
}

// sums[t] = counts[0] + … + counts[t − 1] for t = 0..n: the first list by block 0, the second by block 1.
constexpr int kScanThreads = 1024;
struct Scan {
  const int* counts;
  int64_t* sums;
};
static __global__ void __launch_bounds__(kScanThreads)
    prefix_kernel(const __grid_constant__ Scan first, const __grid_constant__ Scan second, int64_t n) {
  const Scan& scan = blockIdx.x == 0 ? first : second;
  auto* const by_warp = reinterpret_cast<long long*>(shared_memory());
  const int lane = lane_index(), warp = warp_index();
  long long before = 0;  // of this round
  for (int64_t start = 0; start < n; start += kScanThreads) {
    const int64_t at = start + threadIdx.x;
    const long long own = at < n ? scan.counts[at] : 0;
    long long sum = lanes_prefix(own);
    if (lane == kWarp - 1) by_warp[warp] = sum;
    __syncthreads();
    long long round = 0;
    for (int w = 0; w < kScanThreads / kWarp; ++w) {
      if (w < warp) sum += by_warp[w];
      round += by_warp[w];
    }
    if (at < n) scan.sums[at] = before + sum - own;
    before += round;
    __syncthreads();
  }
  if (threadIdx.x == 0) scan.sums[n] = before;
}
constexpr int64_t kScanBytes = kScanThreads / kWarp * int64_t(sizeof(long long));

}  // namespace pddm::cuda
