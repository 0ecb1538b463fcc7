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

// The small arrays, as the table above has them.
template <class A, class S>
struct Small {
  using Real = typename A::Real;
  Real *row_parts, *u_norm, *over_u, *over_v, *v_norm;
  int2* rows;
  Plan* plan;

  __device__ explicit Small(unsigned char* shared) {
    using L = Layout<A, S>;
    row_parts = reinterpret_cast<Real*>(shared + L::kRealsAt);  // of ‖u'‖², then of S
    u_norm = over_u = row_parts + L::kSums;                     // 1 / ‖u‖ until there is ‖u'‖
    over_v = u_norm + S::kPairs, v_norm = over_v + S::kPairs;
    rows = reinterpret_cast<int2*>(shared + L::kRowsAt);
    plan = reinterpret_cast<Plan*>(rows + S::kPairs);
  }
};

template <class A, class S>
using Block = Sums<A, S::kPairs, S::kOutputs, S::kWarpsM, S::kWarpsN>;

// sums += left tiles by their weights. What `begin` asks for is made into the first tile of the next `made`; u' is
// where the epilogue has put it, in shared memory or at `u`.
template <class A, class S>
class Mainloop {
 public:
  using Real = typename A::Real;
  using L = Layout<A, S>;
  LeftMaker<A, S> maker;
  Block<A, S> sums;

  __device__ Mainloop(const Workspace<Real>& w, unsigned char* shared, const unsigned char* u, const Small<A, S>& small)
      : maker(w, small.rows), weights_(w, shared), shared_(shared), u_(u), over_v_(small.over_v) {}

  template <Left What>
  __device__ __forceinline__ void begin() {
    maker.template load<What>(0);
  }

  template <Left What>
  __device__ __forceinline__ void made(int tiles) {
    maker.template store<What>(0, left(free_), over_v_);
    maker.template load<What>(tiles > 1 ? 1 : 0);
    for (int input = 1; input < tiles; ++input, free_ = 1 - free_) {
      step(
          left(free_), Nothing{}, [&] { maker.template store<What>(input, left(1 - free_), over_v_); },
          [&] { maker.template load<What>(input + 1 < tiles ? input + 1 : input); });
    }
    step(left(free_), Nothing{}, Nothing{}, Nothing{});
    free_ = 1 - free_;
  }

  __device__ __forceinline__ void stored(int tiles) {
    if (!u_) {
      for (int input = 0; input < tiles; ++input)
        step(shared_ + L::kUAt + input * L::kLeft, Nothing{}, Nothing{}, Nothing{});
      return;
    }
    // As many tiles ahead as the weights. The first ones are waited for.
    const auto stage = [&](int input) { return shared_ + L::kUAt + input % S::kStages * L::kLeft; };
    const auto copy = [&](int input) {
      if (input >= tiles) return;
      for (int piece = int(threadIdx.x); piece < S::kPairs * kPieces; piece += S::kThreads)
        copy_async(stage(input) + piece * kPieceBytes, u_ + int64_t(input) * L::kLeft + piece * kPieceBytes);
    };
    __syncthreads();  // the block before may still read them
    for (int input = 0; input < S::kStages - 1; ++input) copy(input);
    commit_copies();
    wait_copies<0>();
    for (int input = 0; input < tiles; ++input) {
      step(stage(input), [&] { copy(input + S::kStages - 1); }, Nothing{}, Nothing{});
    }
  }

 private:
  struct Nothing {
    __device__ void operator()() const {}
  };

  // The first half of the operands is asked for before everything else, the second before the first is multiplied, and
  // what the next step makes a tile of between the two. No stage waits for the one right before it.
  template <class Copy, class Make, class Ask>
  __device__ __forceinline__ void step(const unsigned char* by, const Copy& and_copy, const Make& make,
                                       const Ask& ask) {
    const unsigned char* const right = weights_.begin();
    typename Block<A, S>::Step first, second;
    first.load(by, right, 0);
    weights_.copy(and_copy);
    make();
    second.load(by, right, 1);
    sums.multiply(first);
    ask();
    sums.multiply(second);
  }
  __device__ __forceinline__ unsigned char* left(int which) const { return shared_ + L::kLeftAt + which * L::kLeft; }

  WeightStream<A, S> weights_;
  unsigned char* const shared_;
  const unsigned char* const u_;
  const Real* const over_v_;
  int free_ = 0;  // of the two left tiles, the one that no warp reads any more
};

// What becomes of a block's sums: u' and ‖u'‖, then S. Barriers are the kernel's.
template <class A, class S>
class Epilogue {
 public:
  using Real = typename A::Real;
  using Sums = Block<A, S>;

  __device__ Epilogue(const Workspace<Real>& w, const Small<A, S>& small) : w_(w), small_(small) {}

  // u' of these outputs, into the tiles at `to`, and its part of ‖u'‖².
  __device__ __forceinline__ void hidden(Sums& sums, int block, unsigned char* to) const {
    const int first_output = block * S::kOutputs;
    Real scale[Sums::kSlots], row_sums[Sums::kSlots] = {};
    Sums::each_row([&](int slot, int row) { scale[slot] = w_.normalize_input ? small_.over_u[row] : Real(1); });
    sums.each([&](int slot, int, int column, Real& sum) {
      sum = relu(sum * scale[slot] + __ldg(w_.b_u + first_output + column));
      row_sums[slot] += sum * sum;
    });
    sums.put(to, first_output, w_.hidden_tiles);
    add(row_sums, block == 0);
  }

  // Between v's products and those of u': sums in units of 1 / ‖v'‖ to such of 1 / ‖u'‖.
  __device__ __forceinline__ void join(Sums& sums) const {
    Real scale[Sums::kSlots];
    Sums::each_row([&](int slot, int row) { scale[slot] = small_.u_norm[row] / small_.v_norm[row]; });
    sums.each([&](int slot, int, int, Real& sum) { sum *= scale[slot]; });
  }

  // These outputs' part of S.
  __device__ __forceinline__ void combined(Sums& sums, int block) const {
    const int first_output = block * S::kOutputs;
    Real scale[Sums::kSlots], row_sums[Sums::kSlots] = {};
    Sums::each_row([&](int slot, int row) { scale[slot] = 1 / small_.u_norm[row]; });
    sums.each([&](int slot, int, int column, Real& sum) {
      const int output = first_output + column;
      row_sums[slot] += relu(sum * scale[slot] + __ldg(w_.b_c + output)) * __ldg(w_.w_s + output);
    });
    add(row_sums, block == 0);
  }

  // Of all blocks' parts.
  __device__ __forceinline__ Real total(int row) const {
    Real sum = small_.row_parts[row];
#pragma unroll
    for (int part = 1; part < S::kWarpsN; ++part) sum += small_.row_parts[part * S::kPairs + row];
    return sum;
  }

 private:
  // Adds this warp's columns to those of the blocks before; the other warps' are beside them.
  __device__ __forceinline__ void add(const Real (&row_sums)[Sums::kSlots], bool first) const {
    Sums::each_row([&](int slot, int row) {
      const Real sum = lanes_sum<Sums::kLanesPerRow>(row_sums[slot]);
      Real& part = small_.row_parts[warp_index() % S::kWarpsN * S::kPairs + row];
      if (lane_index() % Sums::kLanesPerRow == 0) part = first ? sum : part + sum;
    });
  }

  const Workspace<Real>& w_;
  const Small<A, S>& small_;
};

template <class A, class S>
__global__ void __launch_bounds__(S::kThreads, S::kBlocks)
    score_kernel(const __grid_constant__ Workspace<typename A::Real> w,
                 const __grid_constant__ Job<typename A::Real> job) {
  using L = Layout<A, S>;
  constexpr int kPairs = S::kPairs;
  const int thread = int(threadIdx.x);
  unsigned char* const shared = shared_memory();
  // u' in global memory, where it does not fit in shared memory.
  unsigned char* const u = w.u ? w.u + int64_t(blockIdx.x) * w.hidden_tiles * L::kLeft : nullptr;
  const Small<A, S> small(shared);

  Pair partner{-1, -1};
  static_assert(Hardest::kBytes <= L::kLeftAt, "what finds the hardest pair is there before the weights");
  if (job.walk == Walk::partners) partner = hardest_pair(job.far, job.n, shared);
  if (thread == 0) {
    small.plan->partner = partner;
    small.plan->tiles = count_tiles<kPairs>(job, job.walk == Walk::positives ? job.before[job.n] : 0);
  }

  Mainloop<A, S> loop(w, shared, u, small);
  const Epilogue<A, S> epilogue(w, small);
  __syncthreads();
  for (int64_t tile = blockIdx.x; tile < small.plan->tiles; tile += gridDim.x) {
    if (thread < kPairs) {  // whole warps
      const Pair at = pair_at<kPairs>(job, tile, thread, small.plan->partner);
      const bool there = at.i >= 0;
      small.rows[thread] = there ? int2{at.i, at.j} : int2{0, 0};
      const unsigned scored = __ballot_sync(~0u, there);
      if (lane_index() == 0 && scored) atomicAdd(&scored_pairs, static_cast<unsigned long long>(__popc(scored)));
    }
    __syncthreads();
    if (w.normalize_input) loop.maker.give_input_norms(small.over_u, small.over_v);

    loop.template begin<Left::difference>();
    for (int block = 0; block < w.hidden_blocks; ++block) {
      loop.sums.clear();
      loop.template made<Left::difference>(w.dim_tiles);
      if (block + 1 < w.hidden_blocks)
        loop.template begin<Left::difference>();
      else
        loop.template begin<Left::mean>();
      epilogue.hidden(loop.sums, block, u ? u : shared + L::kUAt);
    }
    __syncthreads();
    if (thread < kPairs) small.u_norm[thread] = floored(sqrt(epilogue.total(thread)));

    for (int block = 0; block < w.combined_blocks; ++block) {
      loop.sums.clear();
      if (w.normalize_input)
        loop.template made<Left::scaled_mean>(w.hidden_tiles);
      else
        loop.template made<Left::mean>(w.hidden_tiles);
      if (block == 0) {
        loop.maker.give_norms(small.v_norm);
        __syncthreads();
      }
      epilogue.join(loop.sums);
      loop.stored(w.hidden_tiles);
      if (block + 1 < w.combined_blocks) loop.template begin<Left::mean>();
      epilogue.combined(loop.sums, block);
    }
    __syncthreads();
    if (thread < kPairs) {
      // Found again rather than kept: `rows` has row 0 for pairs that are not there.
      const Pair at = pair_at<kPairs>(job, tile, thread, small.plan->partner);
      take_score<kPairs>(job, tile, thread, at, epilogue.total(thread) + *w.b_s);
    }
  }
  wait_copies<0>();
}

}  // namespace pddm::cuda
