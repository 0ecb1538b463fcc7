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
//     what           written by               read by                     from; until the barriers of
//     weights        copies of all threads    matrix products             their step's barrier; the next step
//     left tile      all threads, in turn     matrix products             likewise
//     u'             epilogues of its blocks  matrix products             a step's barrier; the next tile's
//     rows           a thread for each pair   LeftMaker                   a barrier; the last steps
//     row parts      lanes, by row and warp   a thread for each pair      a barrier; the next steps
//     1/‖u‖          LeftMaker, at first      epilogues of u'             the first step's barrier; ‖u'‖
//     1/‖v‖          LeftMaker, at first      LeftMaker                   the first step's barrier; the last steps
//     ‖u'‖           a thread for each pair   epilogues                   a step's barrier; the last one
//     ‖v'‖           LeftMaker                the first block's epilogue  a barrier; the next tile's
//     plan           thread 0, once           all                         a barrier
//
// The weights come as one endless stream of tiles that lie in memory in the order of their use, kStages − 1 copies
// ahead of the multiplication. The left tile (|f_i − f_j|, then v' = σ(a_i + a_j)) is made on its way from global
// memory through registers, one step ahead. One barrier per step: it ends the use of what the step before has read.
// Norms are sums of what passes by: ‖u'‖ where u' is stored, ‖v'‖ where the left tile is made. normalize_input asks for
// ‖u‖ and ‖v‖ before the first step, and for v' = σ((a_i + a_j) / ‖v‖ + b_v).
#pragma once

#include <type_traits>
#include <utility>

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
  static constexpr int kSums = S::kWarpsN * S::kPairs;  // per quantity

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

// 16 bytes of numbers, from memory aligned to them.
__device__ __forceinline__ void load(const float* from, float (&x)[4]) {
  const float4 four = *reinterpret_cast<const float4*>(from);
  x[0] = four.x, x[1] = four.y, x[2] = four.z, x[3] = four.w;
}
__device__ __forceinline__ void load(const double* from, double (&x)[2]) {
  const double2 two = *reinterpret_cast<const double2*>(from);
  x[0] = two.x, x[1] = two.y;
}

// What a left tile is made of.
enum class Left { difference, mean, scaled_mean };
template <Left What>
using Is = std::integral_constant<Left, What>;

// Makes left tiles out of the pairs' rows. What `load` asks for is on its way while the step multiplies; `store` comes
// at the next one. kLanes neighbouring lanes share a pair, so that a warp's load takes whole lines; each has 16 bytes
// of either row.
template <class A, class S>
class LeftMaker {
 public:
  using Real = typename A::Real;
  static constexpr int kChunk = 16 / int(sizeof(Real)), kLanes = kDepth<A> / kChunk;
  static constexpr int kFills = S::kPairs * kLanes / S::kThreads;
  static constexpr int kApart = S::kThreads / kLanes;  // a thread's rows
  static_assert(kFills * kApart == S::kPairs, "every thread makes as many chunks");
  static_assert(kApart % 8 == 0, "a thread's rows have their pieces in one order");

  // rows[p] are the rows of pair p.
  __device__ LeftMaker(const Workspace<Real>& w, const int2* rows) : w_(w), rows_(rows) {}

  // Asks for the rows' numbers of tile `input`.
  template <Left What>
  __device__ __forceinline__ void load(int input) {
    const auto* base = reinterpret_cast<const char*>(What == Left::difference ? w_.f : w_.a);
    base += (int64_t(input) * kDepth<A> + chunk() * kChunk) * int(sizeof(Real));
    const auto pitch = unsigned(What == Left::difference ? w_.f_stride : w_.a_stride) * unsigned(sizeof(Real));
    const int2* const rows = rows_ + row(0);
#pragma unroll
    for (int fill = 0; fill < kFills; ++fill) {
      const int2 pair = rows[fill * kApart];
      cuda::load(reinterpret_cast<const Real*>(base + uint64_t(unsigned(pair.x)) * pitch), x_[fill]);
      cuda::load(reinterpret_cast<const Real*>(base + uint64_t(unsigned(pair.y)) * pitch), y_[fill]);
    }
  }

  // Makes of them tile `input`, at `to`.
  template <Left What>
  __device__ __forceinline__ void store(int input, unsigned char* to, const Real* over_v) {
    to += element_offset<A>(row(0), chunk() * kChunk);
#pragma unroll
    for (int fill = 0; fill < kFills; ++fill) {
      Real made[kChunk];
      if constexpr (What == Left::difference) {
#pragma unroll
        for (int k = 0; k < kChunk; ++k) made[k] = absolute(x_[fill][k] - y_[fill][k]);
      } else {
        Real bias[kChunk] = {};
        if constexpr (What == Left::scaled_mean) cuda::load(w_.b_v + input * kDepth<A> + chunk() * kChunk, bias);
        const Real scale = What == Left::scaled_mean ? over_v[row(fill)] : Real(1);
        Real squares[2] = {};
#pragma unroll
        for (int k = 0; k < kChunk; ++k) {
          const Real sum = x_[fill][k] + y_[fill][k];
          made[k] = relu(What == Left::scaled_mean ? sum * scale + bias[k] : sum);
          squares[k % 2] += made[k] * made[k];
        }
        squares_[fill] = (input == 0 ? Real(0) : squares_[fill]) + (squares[0] + squares[1]);
      }
      A::store_chunk(to + fill * kApart * kRowBytes, made);
    }
  }

  // ‖v'‖ of the tiles made since input 0.
  __device__ __forceinline__ void give_norms(Real* v_norm) const {
#pragma unroll
    for (int fill = 0; fill < kFills; ++fill) {
      const Real norm = sqrt(lanes_sum<kLanes>(squares_[fill]));
      if (chunk() == 0) v_norm[row(fill)] = floored(norm);
    }
  }

  // 1 / ‖u‖ and 1 / ‖v‖ of every pair, in a pass over the rows of its own.
  __device__ void give_input_norms(Real* over_u, Real* over_v) {
    Real u[kFills] = {}, v[kFills] = {};
    for (int input = 0; input < w_.dim_tiles; ++input) {
      load<Left::difference>(input);
#pragma unroll
      for (int fill = 0; fill < kFills; ++fill)
#pragma unroll
        for (int k = 0; k < kChunk; ++k) {
          const Real difference = x_[fill][k] - y_[fill][k], total = x_[fill][k] + y_[fill][k];
          u[fill] += difference * difference, v[fill] += total * total;
        }
    }
#pragma unroll
    for (int fill = 0; fill < kFills; ++fill) {
      const Real u_norm = sqrt(lanes_sum<kLanes>(u[fill])), v_norm = sqrt(lanes_sum<kLanes>(v[fill])) / 2;
      if (chunk() == 0) over_u[row(fill)] = 1 / floored(u_norm), over_v[row(fill)] = 1 / floored(v_norm);
    }
  }

 private:
  __device__ __forceinline__ int chunk() const { return int(threadIdx.x) % kLanes; }
  __device__ __forceinline__ int row(int fill) const { return int(threadIdx.x) / kLanes + fill * kApart; }
  const Workspace<Real>& w_;
  const int2* const rows_;
  Real x_[kFills][kChunk], y_[kFills][kChunk], squares_[kFills];
};

// The weights of tile after tile of pairs, kStages − 1 copies ahead of their use.
template <class A, class S>
class WeightStream {
 public:
  using L = Layout<A, S>;

  __device__ WeightStream(const Workspace<typename A::Real>& w, unsigned char* shared)
      : w_(w), shared_(shared), length_(w.weight_tiles()) {
    for (int ahead = 0; ahead < S::kStages - 1; ++ahead) copy([] {});
  }

  // Begins a step: its weights, which are returned, have arrived, and what the step before has read may be overwritten.
  __device__ __forceinline__ const unsigned char* begin() {
    wait_copies<S::kStages - 2>();
    __syncthreads();
    return shared_ + after(stage_) * L::kWeights;
  }
  // Once a step: weights to where the step before has read. With what `and_copy` copies they have arrived when kStages
  // − 1 more steps have begun.
  template <class F>
  __device__ __forceinline__ void copy(const F& and_copy) {
    constexpr int kPerThread = S::kOutputs * kPieces / S::kThreads;
    static_assert(kPerThread * S::kThreads == S::kOutputs * kPieces, "every thread copies as many pieces");
    const unsigned piece = unsigned(copied_) * (L::kWeights / kPieceBytes) + threadIdx.x;
    copy_pieces(shared_ + stage_ * L::kWeights + int(threadIdx.x) * kPieceBytes,
                w_.weights + uint64_t(piece) * kPieceBytes, std::make_integer_sequence<int, kPerThread>{});
    and_copy();
    commit_copies();
    copied_ = copied_ + 1 == length_ ? 0 : copied_ + 1;
    stage_ = after(stage_);
  }

 private:
  template <int... Piece>
  __device__ static __forceinline__ void copy_pieces(unsigned char* to, const unsigned char* from,
                                                     std::integer_sequence<int, Piece...>) {
    (copy_async<Piece * S::kThreads * kPieceBytes>(to, from), ...);
  }
  __device__ static int after(int stage) { return stage + 1 == S::kStages ? 0 : stage + 1; }

  const Workspace<typename A::Real>& w_;
  unsigned char* const shared_;
  const int length_;
  int copied_ = 0, stage_ = 0;
};

template <class A, class S>
__global__ void __launch_bounds__(S::kThreads, S::kBlocks)
    score_kernel(const __grid_constant__ Workspace<typename A::Real> w,
                 const __grid_constant__ Job<typename A::Real> job) {
  using Real = typename A::Real;
  using L = Layout<A, S>;
  using Block = Sums<A, S::kPairs, S::kOutputs, S::kWarpsM, S::kWarpsN>;
  constexpr int kPairs = S::kPairs;

  const int thread = int(threadIdx.x), lane = lane_index();
  unsigned char* const shared = shared_memory();
  // u' in global memory, where it does not fit in shared memory.
  unsigned char* const u = w.u ? w.u + int64_t(blockIdx.x) * w.hidden_tiles * L::kLeft : nullptr;
  Real* const row_parts = reinterpret_cast<Real*>(shared + L::kRealsAt);  // of ‖u'‖², then of S
  Real* const u_norm = row_parts + L::kSums;                              // ‖u'‖; before that
  Real* const over_u = u_norm;                                            // 1 / ‖u‖ with normalize_input
  Real* const over_v = u_norm + kPairs;                                   // 1 / ‖v‖ with normalize_input
  Real* const v_norm = over_v + kPairs;                                   // ‖v'‖
  int2* const rows = reinterpret_cast<int2*>(shared + L::kRowsAt);
  Plan* const plan = reinterpret_cast<Plan*>(rows + kPairs);

  Pair partner{-1, -1};
  static_assert(Hardest::kBytes <= L::kLeftAt, "what finds the hardest pair is there before the weights");
  if (job.walk == Walk::partners) partner = hardest_pair(job.far, job.n, shared);
  if (thread == 0) {
    plan->partner = partner;
    plan->tiles = count_tiles<kPairs>(job, job.walk == Walk::positives ? job.before[job.n] : 0);
  }

  WeightStream<A, S> weights(w, shared);
  using Maker = LeftMaker<A, S>;
  Maker maker(w, rows);
  Block sums;

  __syncthreads();
  for (int64_t tile = blockIdx.x; tile < plan->tiles; tile += gridDim.x) {
    if (thread < kPairs) {  // whole warps
      const Pair at = pair_at<kPairs>(job, tile, thread, plan->partner);
      const bool there = at.i >= 0;
      rows[thread] = there ? int2{at.i, at.j} : int2{0, 0};
      const unsigned scored = __ballot_sync(~0u, there);
      if (lane == 0 && scored) atomicAdd(&scored_pairs, static_cast<unsigned long long>(__popc(scored)));
    }
    __syncthreads();

    // Adds this warp's columns to those of the blocks before; the other warps' are beside them.
    const auto add_row_sums = [&](const Real(&row_sums)[Block::kSlots], bool first) {
      Block::each_row([&](int slot, int row) {
        const Real sum = lanes_sum<Block::kLanesPerRow>(row_sums[slot]);
        Real& part = row_parts[warp_index() % S::kWarpsN * kPairs + row];
        if (lane % Block::kLanesPerRow == 0) part = first ? sum : part + sum;
      });
    };
    const auto add_up = [&](int row) {
      Real sum = row_parts[row];
#pragma unroll
      for (int part = 1; part < S::kWarpsN; ++part) sum += row_parts[part * kPairs + row];
      return sum;
    };

    if (w.normalize_input) maker.give_input_norms(over_u, over_v);
    // Two buffers of left tiles take turns; `free` is the one that no warp reads any more.
    int free = 0;
    const auto left = [&](int which) { return shared + L::kLeftAt + which * L::kLeft; };
    // A step: the first half of the operands is asked for before everything else, the second before the first is
    // multiplied, and what the next step makes a tile of between the two. No stage waits for the one right before it.
    const auto step = [&](const unsigned char* by, const auto& and_copy, const auto& make, const auto& ask) {
      const unsigned char* const right = weights.begin();
      typename Block::Step first, second;
      first.load(by, right, 0);
      weights.copy(and_copy);
      make();
      second.load(by, right, 1);
      sums.multiply(first);
      ask();
      sums.multiply(second);
    };
    const auto nothing = [] {};
    // Made tiles 0 .. tiles by their weights. The first has been asked for.
    const auto multiply_made = [&](auto what, int tiles) {
      constexpr Left kWhat = decltype(what)::value;
      maker.template store<kWhat>(0, left(free), over_v);
      maker.template load<kWhat>(tiles > 1 ? 1 : 0);
      for (int input = 1; input < tiles; ++input, free = 1 - free) {
        step(
            left(free), nothing, [&] { maker.template store<kWhat>(input, left(1 - free), over_v); },
            [&] { maker.template load<kWhat>(input + 1 < tiles ? input + 1 : input); });
      }
      step(left(free), nothing, nothing, nothing);
      free = 1 - free;
    };

    maker.template load<Left::difference>(0);
    for (int block = 0; block < w.hidden_blocks; ++block) {
      sums.clear();
      multiply_made(Is<Left::difference>{}, w.dim_tiles);
      if (block + 1 < w.hidden_blocks)
        maker.template load<Left::difference>(0);
      else
        maker.template load<Left::mean>(0);
      const int first_output = block * S::kOutputs;
      Real scale[Block::kSlots], row_sums[Block::kSlots] = {};
      Block::each_row([&](int slot, int row) { scale[slot] = w.normalize_input ? over_u[row] : Real(1); });
      sums.each([&](int slot, int, int column, Real& sum) {
        sum = relu(sum * scale[slot] + __ldg(w.b_u + first_output + column));
        row_sums[slot] += sum * sum;
      });
      sums.put(u ? u : shared + L::kUAt, first_output, w.hidden_tiles);
      add_row_sums(row_sums, block == 0);
    }
    __syncthreads();
    if (thread < kPairs) u_norm[thread] = floored(sqrt(add_up(thread)));

    for (int block = 0; block < w.combined_blocks; ++block) {
      sums.clear();
      if (w.normalize_input)
        multiply_made(Is<Left::scaled_mean>{}, w.hidden_tiles);
      else
        multiply_made(Is<Left::mean>{}, w.hidden_tiles);
      if (block == 0) {
        maker.give_norms(v_norm);
        __syncthreads();
      }
      Real scale[Block::kSlots], row_sums[Block::kSlots] = {};
      // From here on in units of 1 / ‖u'‖.
      Block::each_row([&](int slot, int row) { scale[slot] = u_norm[row] / v_norm[row]; });
      sums.each([&](int slot, int, int, Real& sum) { sum *= scale[slot]; });
      if (u) {
        // As many tiles ahead as the weights. The first ones are waited for.
        const auto stage = [&](int input) { return shared + L::kUAt + input % S::kStages * L::kLeft; };
        const auto copy_u = [&](int input) {
          if (input >= w.hidden_tiles) return;
          for (int piece = thread; piece < kPairs * kPieces; piece += S::kThreads)
            copy_async(stage(input) + piece * kPieceBytes, u + int64_t(input) * L::kLeft + piece * kPieceBytes);
        };
        __syncthreads();  // the block before may still read them
        for (int input = 0; input < S::kStages - 1; ++input) copy_u(input);
        commit_copies();
        wait_copies<0>();
        for (int input = 0; input < w.hidden_tiles; ++input) {
          step(stage(input), [&] { copy_u(input + S::kStages - 1); }, nothing, nothing);
        }
      } else {
        for (int input = 0; input < w.hidden_tiles; ++input)
          step(shared + L::kUAt + input * L::kLeft, nothing, nothing, nothing);
      }
      if (block + 1 < w.combined_blocks) maker.template load<Left::mean>(0);
      const int first_output = block * S::kOutputs;
      Block::each_row([&](int slot, int row) { scale[slot] = 1 / u_norm[row]; });
      sums.each([&](int slot, int, int column, Real& sum) {
        const int output = first_output + column;
        row_sums[slot] += relu(sum * scale[slot] + __ldg(w.b_c + output)) * __ldg(w.w_s + output);
      });
      add_row_sums(row_sums, block == 0);
    }
    __syncthreads();
    if (thread < kPairs) {
      // Found again rather than kept: `rows` has row 0 for pairs that are not there.
      const Pair at = pair_at<kPairs>(job, tile, thread, plan->partner);
      take_score<kPairs>(job, tile, thread, at, add_up(thread) + *w.b_s);
    }
  }
  wait_copies<0>();
}

}  // namespace pddm::cuda
