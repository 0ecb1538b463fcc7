// What one call computes before its first pair, in device memory: unit rows, a = (W_v f + b_v) / 2 (with
// normalize_input W_v f / 2), and the weights in the order in which the scoring kernel consumes them. O(n · (dim +
// hidden)) and the parameters once more.
#pragma once

#include "../problem.h"
#include "tile.cuh"

namespace pddm::cuda {

// What to divide by in place of a norm; NaN where that is.
template <class Real>
__device__ __forceinline__ Real floored(Real norm) {
  return norm <= Real(kNormFloor) ? Real(kNormFloor) : norm;
}

// How the scoring kernel cuts its work: kPairs pairs of rows by kOutputs outputs, by WarpsM × WarpsN warps, with
// weights kStages tiles deep in shared memory. kBlocks share the registers of a multiprocessor. kWorth is for
// comparison with other shapes.
template <int Pairs, int Outputs, int WarpsM, int WarpsN, int Stages, int Blocks, int Worth = 100>
struct Shape {
  static constexpr int kPairs = Pairs, kOutputs = Outputs, kWarpsM = WarpsM, kWarpsN = WarpsN, kStages = Stages;
  static constexpr int kBlocks = Blocks, kThreads = WarpsM * WarpsN * kWarp, kWorth = Worth;
};

// All counts of tiles are in units of kDepth inputs or kOutputs outputs. Rows of `f` and `a` are filled up with zeros
// to whole tiles, and so are the weights and biases.
template <class Real>
struct Workspace {
  int64_t n;
  int dim, hidden, combined;
  bool normalize_input;
  bool warpgroups;  // for hopper.cuh; otherwise for score.cuh

  int dim_tiles, hidden_tiles;         // as inputs
  int hidden_blocks, combined_blocks;  // as outputs
  int f_stride, a_stride;

  Real *f, *norm, *a;
  Real *b_u, *b_v, *b_c, *w_s;
  const Real* b_s;
  unsigned char* weights;  // see weight_tiles
  unsigned char* u;        // u' of every block, where it does not fit in shared memory; otherwise null

  // The stream of weight tiles: W_u's by output blocks, then by inputs; then W_c's, of every block first those that
  // meet v' and then those that meet u'.
  __host__ __device__ int weight_tiles() const {
    return hidden_blocks * dim_tiles + combined_blocks * 2 * hidden_tiles;
  }
};

}  // namespace pddm::cuda
