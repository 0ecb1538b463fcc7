// Whom a row's pairs are scored with, chosen by products of rows that somebody else makes: of other classes those with
// the largest, of its own those with the least.
#pragma once

#include "largest.cuh"
#include "prepare.cuh"

namespace pddm::cuda {

// A number of a matrix that is multiplied, from its float.
template <class Stored>
struct Storage {
  using Bits = Stored;
  static constexpr bool kScaled = false;
  __device__ static Bits bits(Stored x) { return x; }
};
template <class Half>
struct HalfStorage {
  using Bits = uint16_t;
  static constexpr bool kScaled = true;
  __device__ static Bits bits(float x) { return Bits(pack(Half{}, x, 0.0f)); }
};
// kNorm is the power of two that a scaled row's norm reaches. Float16 has few numbers below 1, and products up to 65504
// if sums are of its own.
template <>
struct Storage<Bf16> : HalfStorage<Bf16> {
  static constexpr int kNorm = 0;
};
template <>
struct Storage<F16> : HalfStorage<F16> {
  static constexpr int kNorm = 6;
};

// Unit rows, which half precisions would round: there it is rows times a power of two, which leaves their numbers as
// they are (of float16 all but those 2^-20 of the norm and less), and `weights` what remains. A row that is not finite
// is of class −1. A warp for each row.
template <class Real, class Stored>
__global__ void __launch_bounds__(kPrepareThreads)
    candidate_rows_kernel(const Real* rows, int64_t n, int dim, const int64_t* labels,
                          typename Storage<Stored>::Bits* to, Real* weights, const __grid_constant__ Classes classes) {
  const int64_t row = int64_t(blockIdx.x) * kPrepareWarps + warp_index();
  if (row >= n) return;
  const Real* const x = rows + row * dim;
  Real squares = 0;
  bool finite = true;
  for (int k = lane_index(); k < dim; k += kWarp) squares += x[k] * x[k], finite = finite && x[k] - x[k] == 0;
  const Real norm = sqrt(lanes_sum(squares)), divisor = floored(norm);
  finite = __ballot_sync(~0u, !finite) == 0;
  Real weight = 1;
  if constexpr (Storage<Stored>::kScaled) {
    const uint32_t exponent = __float_as_uint(norm) >> 23;  // of 2^(exponent − 127)
    constexpr uint32_t kNorm = Storage<Stored>::kNorm;
    const bool usual = exponent > kNorm && exponent < 254;
    const float scale = usual ? __uint_as_float((254 - exponent + kNorm) << 23) : norm < 1 ? 1.0f : 0.0f;
    weight = (usual ? __uint_as_float((exponent - kNorm) << 23) : 1.0f) / divisor;
    for (int k = lane_index(); k < dim; k += kWarp) to[row * dim + k] = Storage<Stored>::bits(x[k] * scale);
  } else {
    for (int k = lane_index(); k < dim; k += kWarp) to[row * dim + k] = Storage<Stored>::bits(x[k] / divisor);
  }

  const int64_t label = labels[row];
  int lower = 0, before = 0, all = 0;
#pragma unroll 8
  for (int64_t j = lane_index(); j < n; j += kWarp) {
    const int64_t other = labels[j];
    lower += other < label, before += other == label && j < row, all += other == label;
  }
  lower = lanes_sum(lower), before = lanes_sum(before), all = lanes_sum(all);
  if (lane_index() != 0) return;
  weights[row] = weight;
  classes.of[row] = finite ? lower : -1;
  classes.begins[row] = lower, classes.sizes[row] = all, classes.order[lower + before] = int(row);
}

__device__ inline void refuse_class(int64_t row, int64_t rows) {
  printf("pddm: the class of row %lld names what is not there, of %lld rows\n", static_cast<long long>(row),
         static_cast<long long>(rows));
  __trap();
}

// Of products with rows of other classes, and with those of its own, of which the least have the largest words.
template <class Real>
struct OtherWords {
  const Real *products, *weights;
  const int* classes;
  int own;

  struct Column {
    Real product, weight;
    int its;
  };
  __device__ Column read(int64_t c) const { return {products[c], weights[c], classes[c]}; }
  __device__ PartWord<Real> word(const Column& column) const {
    const PartWord<Real> word = part_word(column.product * column.weight);
    return own >= 0 && column.its >= 0 && column.its != own ? word : 0;
  }
};
template <class Real>
struct OwnWords {
  const Real *products, *weights;
  const int* rows;
  int64_t own, all;

  struct Column {
    Real product, weight;
    int row;
  };
  __device__ Column read(int64_t at) const {
    const int row = rows[at];
    if (row < 0 || row >= all) refuse_class(own, all);
    return {products[row], weights[row], row};
  }
  __device__ PartWord<Real> word(const Column& column) const {
    const PartWord<Real> word = part_word(-(column.product * column.weight));
    return column.row == own ? 0 : word;
  }
};

// Of rows `first` and following, whose products with all are given: the largest of other classes, then those of its own
// or, of more than `count`, the least. A block for each row.
template <class Real>
__global__ void __launch_bounds__(kLargestThreads)
    candidates_kernel(const Real* products, int64_t n, int64_t first, const Real* weights,
                      const __grid_constant__ Classes classes, int64_t count, int64_t* lists) {
  auto& shared = *reinterpret_cast<LargestShared<Real>*>(shared_memory());
  const int64_t row = first + blockIdx.x;
  const Real* const from = products + int64_t(blockIdx.x) * n;
  int64_t *const near = lists + int64_t(blockIdx.x) * 2 * count, *const far = near + count;
  const OtherWords<Real> others{from, weights, classes.of, classes.of[row]};
  put_largest<Real>(shared, others, n, count, [&](int64_t place, int64_t column) { near[place] = column; });

  const int64_t begin = classes.begins[row], all = classes.sizes[row];
  if (begin < 0 || all < 1 || all > n - begin) refuse_class(row, n);
  const int* const own = classes.order + begin;
  if (all <= count + 1) {  // itself skipped
    for (int64_t at = threadIdx.x; at < count; at += kLargestThreads) {
      const int64_t next = at + 1;
      far[at] = at >= all - 1 ? -1 : own[at] < row ? own[at] : own[next];
    }
    return;
  }
  __syncthreads();
  const OwnWords<Real> positives{from, weights, own, row, n};
  put_largest<Real>(shared, positives, all, count,
                    [&](int64_t place, int64_t at) { far[place] = at < 0 ? -1 : own[at]; });
}

template <class Real, class Stored>
void candidate_rows(const Context& context, const Rows& rows, int64_t dim, const int64_t* labels, void* to,
                    Real* weights, const Classes& classes) {
  context.launch(candidate_rows_kernel<Real, Stored>, divided_up(rows.count, kPrepareWarps), kPrepareThreads, 0,
                 static_cast<const Real*>(rows.data), rows.count, dim, labels,
                 static_cast<typename Storage<Stored>::Bits*>(to), weights, classes);
}

template <class Real>
void candidates(const Context& context, const Real* products, int64_t rows, int64_t n, int64_t first,
                const Real* weights, const Classes& classes, int64_t count, int64_t* lists) {
  context.launch(candidates_kernel<Real>, rows, kLargestThreads, sizeof(LargestShared<Real>), products, n, first,
                 weights, classes, count, lists);
}

}  // namespace pddm::cuda
