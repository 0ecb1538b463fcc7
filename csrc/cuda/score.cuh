// The fused scoring kernel. A block owns tiles of kPairs pairs, one after the other; of each it computes
//
//     u' = σ(|f_i − f_j| W_uᵀ + b_u)                        kPairs × hidden, kept in shared memory
//     c  = σ(v' W_cvᵀ / ‖v'‖ + u' W_cuᵀ / ‖u'‖ + b_c)       kPairs × combined, never stored
//     S  = c · w_s + b_s                                    kPairs, handed to select.cuh
//
// in blocks of kOutputs outputs, 64 bytes of inputs at a time. Shared memory:
//
//     | weights: kStages tiles | left: 2 tiles | sums over outputs, norms, rows | u': hidden_tiles tiles |
//        kOutputs × 64 bytes      kPairs × 64                                      kPairs × 64
//
// The weights come as one endless stream of tiles that lie in memory in the order of their use, kStages − 1 copies
// ahead of the multiplication. The left tile (|f_i − f_j|, then v' = σ((a_i + a_j) / 2 + b_v)) is made on its way from
// global memory through registers, one step ahead. One barrier per step: it ends the use of what the step before has
// read. Norms are sums of what passes by: ‖u'‖ where u' is stored, ‖v'‖ (and ‖u‖, ‖v‖) where the left tile is made.
#pragma once

#include <cstdio>

#include "select.cuh"
#include "workspace.cuh"

namespace pddm::cuda {

// Pairs scored since the last reset, by one arithmetic's kernels.
static __device__ unsigned long long scored_pairs;

// What the threads of a block share about their job, rather than keep in registers.
struct Plan {
  int64_t tiles;
  Pair partner;
};

template <class A, class S>
struct Layout {
  using Real = typename A::Real;
  static constexpr int kLeft = S::kPairs * kRowBytes, kWeights = S::kOutputs * kRowBytes;
  static constexpr int kSums = S::kColumns * S::kPairs;  // per quantity

  // Where everything starts. What has a fixed place comes first.
  static constexpr int kLeftAt = S::kStages * kWeights;
  static constexpr int kRealsAt = kLeftAt + 2 * kLeft;
  static constexpr int kRowsAt = kRealsAt + (kSums + 3 * S::kPairs) * int(sizeof(Real));
  static constexpr int kUAt = (kRowsAt + 2 * S::kPairs * int(sizeof(int)) + int(sizeof(Plan)) + 127) / 128 * 128;

  // With all of u', or with a tile of it for every stage of the weights: then it lies in global memory, and its tiles
  // are copied beside the weights that they meet.
  static constexpr int64_t resident(int64_t tiles) { return kUAt + tiles * kLeft; }
  static constexpr int64_t streamed() { return kUAt + S::kStages * kLeft; }
};

// kLength numbers from 16-byte aligned memory.
template <int Length>
__device__ __forceinline__ void load(const float* from, float (&x)[Length]) {
#pragma unroll
  for (int k = 0; k < Length; k += 4) {
    const float4 four = *reinterpret_cast<const float4*>(from + k);
    x[k] = four.x, x[k + 1] = four.y, x[k + 2] = four.z, x[k + 3] = four.w;
  }
}
template <int Length>
__device__ __forceinline__ void load(const double* from, double (&x)[Length]) {
#pragma unroll
  for (int k = 0; k < Length; k += 2) {
    const double2 two = *reinterpret_cast<const double2*>(from + k);
    x[k] = two.x, x[k + 1] = two.y;
  }
}

template <class A, class S>
__global__ void __launch_bounds__(S::kThreads, S::kBlocks)
    score_kernel(const __grid_constant__ Workspace<typename A::Real> w,
                 const __grid_constant__ Job<typename A::Real> job) {
  using Real = typename A::Real;
  using L = Layout<A, S>;
  using Block = Sums<A, S::kPairs, S::kOutputs, S::kRows, S::kColumns>;
  constexpr int kPairs = S::kPairs, kLength = kPieceLength<A>, kFills = kPairs * kPieces / S::kThreads;
  static_assert(kFills * S::kThreads == kPairs * kPieces && kFills <= 2, "a thread makes one or two pieces of a tile");

  const int thread = int(threadIdx.x), lane = lane_index();
  unsigned char* const shared = shared_memory();
  // u' in global memory, where it does not fit in shared memory.
  unsigned char* const u = w.u ? w.u + int64_t(blockIdx.x) * w.hidden_tiles * L::kLeft : nullptr;
  Real* const row_parts = reinterpret_cast<Real*>(shared + L::kRealsAt);  // of ‖u'‖², then of S
  Real* const u_norm = row_parts + L::kSums;                              // 1 / ‖u‖ with normalize_input, then ‖u'‖
  Real* const over_v = u_norm + kPairs;                                   // 1 / ‖v‖ with normalize_input
  Real* const v_norm = over_v + kPairs;                                   // ‖v'‖
  int* const at_i = reinterpret_cast<int*>(shared + L::kRowsAt);
  int* const at_j = at_i + kPairs;
  Plan* const plan = reinterpret_cast<Plan*>(at_j + kPairs);

  Pair partner{-1, -1};
  if (job.walk == Walk::partners) partner = hardest_pair(job.far, job.n, shared);
  if (thread == 0) {
    plan->partner = partner;
    plan->tiles = count_tiles<kPairs>(job, job.walk == Walk::positives ? job.before[job.n] : 0);
  }

  // The stream of weights.
  const int stream_length = w.weight_tiles();
  int copied = 0, stage = 0;  // the next tile to copy, and where to
  const auto copy_weights = [&] {
    const unsigned char* from = w.weights + int64_t(copied) * L::kWeights;
    unsigned char* to = shared + stage * L::kWeights;
    static_assert(S::kOutputs * kPieces % S::kThreads == 0, "every thread copies as many pieces");
#pragma unroll
    for (int piece = 0; piece < S::kOutputs * kPieces; piece += S::kThreads)
      copy_async(to + (thread + piece) * kPieceBytes, from + (thread + piece) * kPieceBytes);
    if (w.u) {
      // The step that reads these weights may read u' too, which by now lies in global memory.
      const int input = (copied - w.hidden_blocks * w.dim_tiles) % (2 * w.hidden_tiles) - w.hidden_tiles;
      if (copied >= w.hidden_blocks * w.dim_tiles && input >= 0)
        for (int piece = thread; piece < kPairs * kPieces; piece += S::kThreads)
          copy_async(shared + L::kUAt + stage * L::kLeft + piece * kPieceBytes,
                     u + input * L::kLeft + piece * kPieceBytes);
    }
    commit_copies();
    copied = copied + 1 == stream_length ? 0 : copied + 1;
    stage = stage + 1 == S::kStages ? 0 : stage + 1;
  };
  for (int ahead = 0; ahead < S::kStages - 1; ++ahead) copy_weights();

  // This thread's pieces of the left tile: of row `fill_row(fill)`, kLength inputs from `fill_input`.
  const auto fill_row = [&](int fill) { return (thread + fill * S::kThreads) / kPieces; };
  const int fill_piece = thread % kPieces, fill_input = fill_piece * kLength;
  Real x[kLength], y[kLength], x_squares[kFills], y_squares[kFills];

  Block sums;

  __syncthreads();
  for (int64_t tile = blockIdx.x; tile < plan->tiles; tile += gridDim.x) {
    __syncthreads();
    if (thread < kPairs) {  // whole warps
      const Pair at = pair_at<kPairs>(job, tile, thread, plan->partner);
      const bool there = at.i >= 0;
      at_i[thread] = there ? at.i : 0, at_j[thread] = there ? at.j : 0;
      const unsigned scored = __ballot_sync(~0u, there);
      if (lane == 0 && scored) atomicAdd(&scored_pairs, static_cast<unsigned long long>(__popc(scored)));
    }
    __syncthreads();

    // What a step multiplies: |f_i − f_j| for every block of outputs, then v' and u' for every block of outputs.
    struct Step {
      enum { difference, v, u, done } left = difference;
      int block = 0, input = 0;

      __device__ void advance(const Workspace<Real>& w) {
        if (++input < (left == difference ? w.dim_tiles : w.hidden_tiles)) return;
        input = 0;
        if (left == v) {
          left = u;
        } else if (left == u) {
          left = ++block == w.combined_blocks ? done : v;
        } else if (++block == w.hidden_blocks) {
          left = v, block = 0;
        }
      }
    };
    const auto load_left = [&](const Step& step, int fill) {
      const bool first = step.left == Step::difference;
      const Real* rows = first ? w.f : w.a;
      const int64_t pitch = first ? w.f_stride : w.a_stride;
      const int input = step.input * kDepth<A> + fill_input;
      const int row = fill_row(fill);
      load(rows + at_i[row] * pitch + input, x);
      load(rows + at_j[row] * pitch + input, y);
    };
    // Norms are summed over the inputs of the first block of outputs, and left where every thread finds them.
    const auto store_left = [&](const Step& step, int fill, unsigned char* to) {
      const bool first = step.left == Step::difference;
      const bool sum = step.block == 0 && step.input + 1 == (first ? w.dim_tiles : w.hidden_tiles);
      const int row = fill_row(fill);
      Real made[kLength];
      if (step.input == 0) x_squares[fill] = y_squares[fill] = 0;
      if (first) {
#pragma unroll
        for (int k = 0; k < kLength; ++k) {
          const Real difference = x[k] - y[k], total = x[k] + y[k];
          made[k] = difference < 0 ? -difference : difference;
          x_squares[fill] += difference * difference, y_squares[fill] += total * total;
        }
      } else {
        const Real scale = w.normalize_input ? over_v[row] : Real(1);
        Real bias[kLength];
        load(w.b_v + step.input * kDepth<A> + fill_input, bias);
#pragma unroll
        for (int k = 0; k < kLength; ++k) {
          made[k] = relu((x[k] + y[k]) / 2 * scale + bias[k]);
          x_squares[fill] += made[k] * made[k];
        }
      }
      *reinterpret_cast<uint4*>(to + piece_offset(row, fill_piece)) = A::piece(made);
      if (sum) {
        const Real x_sum = lanes_sum<kPieces>(x_squares[fill]), y_sum = lanes_sum<kPieces>(y_squares[fill]);
        if (fill_piece == 0) {
          const Real x_norm = sqrt(x_sum), y_norm = sqrt(y_sum) / 2;
          if (first) {
            u_norm[row] = 1 / floored(x_norm);
            over_v[row] = 1 / floored(y_norm);
          } else {
            v_norm[row] = floored(x_norm);
          }
        }
      }
    };
    // Adds this warp's columns to those of the blocks before; the other warps' are beside them.
    const auto add_row_sums = [&](const Real(&row_sums)[Block::kSlots], bool first) {
      Block::each_row([&](int slot, int row) {
        const Real sum = lanes_sum<Block::kLanesPerRow>(row_sums[slot]);
        Real& part = row_parts[warp_index() % S::kColumns * kPairs + row];
        if (lane % Block::kLanesPerRow == 0) part = first ? sum : part + sum;
      });
    };
    const auto add_up = [&](int row) {
      Real sum = row_parts[row];
#pragma unroll
      for (int part = 1; part < S::kColumns; ++part) sum += row_parts[part * kPairs + row];
      return sum;
    };

    unsigned char *left = shared + L::kLeftAt, *next_left = left + L::kLeft;
    Step now, next;
#pragma unroll
    for (int fill = 0; fill < kFills; ++fill) load_left(now, fill), store_left(now, fill, left);
    sums.clear();
    for (; now.left != Step::done; now = next) {
      wait_copies<S::kStages - 2>();
      __syncthreads();
      copy_weights();  // to where the step before has read; the stage after it is this step's
      const unsigned char* const weights = shared + stage * L::kWeights;

      next.advance(w);
      const bool make = next.left == Step::difference || next.left == Step::v;
      const unsigned char* const now_left =
          now.left == Step::u ? shared + L::kUAt + (w.u ? stage : now.input) * L::kLeft : left;
      if (make) load_left(next, 0);
      sums.multiply(now_left, weights, 0);
      if (kFills == 2 && make) store_left(next, 0, next_left), load_left(next, 1);
      sums.multiply(now_left, weights, 1);
      if (make) store_left(next, kFills - 1, next_left);
      unsigned char* const read = left;
      left = next_left, next_left = read;
      if (next.left == now.left && next.block == now.block) continue;

      // The end of a block of outputs, or of its half that meets v'.
      const int first_output = now.block * S::kOutputs;
      Real scale[Block::kSlots], row_sums[Block::kSlots] = {};
      if (now.left == Step::difference) {
        Block::each_row([&](int slot, int row) { scale[slot] = w.normalize_input ? u_norm[row] : Real(1); });
        sums.each([&](int slot, int, int column, Real& sum) {
          sum = relu(sum * scale[slot] + __ldg(w.b_u + first_output + column));
          row_sums[slot] += sum * sum;
        });
        if (w.u)
          sums.put(u, first_output, w.hidden_tiles);
        else
          sums.put(shared + L::kUAt, first_output, w.hidden_tiles);
        add_row_sums(row_sums, now.block == 0);
        if (next.left == Step::v) {
          __syncthreads();
          if (thread < kPairs) u_norm[thread] = floored(sqrt(add_up(thread)));
        }
        sums.clear();
      } else if (now.left == Step::v) {
        // From here on in units of 1 / ‖u'‖.
        Block::each_row([&](int slot, int row) { scale[slot] = u_norm[row] / v_norm[row]; });
        sums.each([&](int slot, int, int, Real& sum) { sum *= scale[slot]; });
      } else {
        Block::each_row([&](int slot, int row) { scale[slot] = 1 / u_norm[row]; });
        sums.each([&](int slot, int, int column, Real& sum) {
          const int output = first_output + column;
          row_sums[slot] += relu(sum * scale[slot] + __ldg(w.b_c + output)) * __ldg(w.w_s + output);
        });
        add_row_sums(row_sums, now.block == 0);
        sums.clear();
      }
    }
    __syncthreads();
    if (thread < kPairs) {
      // Found again rather than kept: at_i and at_j name row 0 for pairs that are not there.
      const Pair at = pair_at<kPairs>(job, tile, thread, plan->partner);
      take_score<kPairs>(job, tile, thread, at, add_up(thread) + *w.b_s);
    }
  }
  wait_copies<0>();
}

}  // namespace pddm::cuda
