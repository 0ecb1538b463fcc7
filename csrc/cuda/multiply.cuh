// out = left · rightᵀ for operands that are matrices with any strides. A block owns kPairs × kOutputs outputs and walks
// all inputs, or those of its part, in order: 64 bytes of them to a stage, kStages − 1 stages of copies ahead of the
// multiplication. An operand's part of a stage, in shared memory:
//
//     along inputs, a tile:  kDepth inputs of a row | of another row | …      swizzled as in tile.cuh
//     along rows:            input 0 of kPairs rows, 32 bytes, input 1 | …    every line starts 8 banks on
//
// Either way lanes find what they multiply without a conflict, and where a lane has several rows, these are neighbours:
// its numbers along rows, or its outputs, lie side by side.
#pragma once

#include <algorithm>

#include "launch.cuh"
#include "score.cuh"

namespace pddm::cuda {

// A number as an operand of a product: tensor cores do not look at the digits beyond.
template <class A>
__device__ __forceinline__ typename A::Real as_operand(typename A::Real x) {
  if constexpr (A::kTensor)
    return __uint_as_float(round_tf32(x));
  else
    return x;
}

// Numbers side by side, in memory aligned to all of them.
__device__ __forceinline__ void load(const float* from, float (&x)[2]) {
  const float2 two = *reinterpret_cast<const float2*>(from);
  x[0] = two.x, x[1] = two.y;
}
__device__ __forceinline__ void store(float* to, const float (&x)[2]) { *reinterpret_cast<float2*>(to) = {x[0], x[1]}; }
__device__ __forceinline__ void store(float* to, const float (&x)[4]) {
  *reinterpret_cast<float4*>(to) = {x[0], x[1], x[2], x[3]};
}
__device__ __forceinline__ void store(double* to, const double (&x)[2]) {
  *reinterpret_cast<double2*>(to) = {x[0], x[1]};
}

// Element (row, input) is data[row * row_pitch + input * input_pitch]; one of the pitches is 1. For tensor cores every
// element is one `as_operand`.
template <class Real>
struct Operand {
  const Real* data;
  int64_t rows, inputs, row_pitch, input_pitch;
  int64_t given_rows = rows;  // those from here on are zeros
};

template <class Real>
struct Output {
  Real* to;
  int64_t pitch;
  const Real* bias = nullptr;  // by column
  bool relu = false, add = false;
  Real scale = 1;
  // The inputs in so many runs of equal length (of whole stages), each of which has an output of its own.
  int64_t parts = 1, part_pitch = 0;
};

// Large blocks read the operands less often; small ones are more where outputs are few.
template <class A>
using LargeProduct = Shape<128, 128, 2, 2, 4, 2>;
template <class A>
using SmallProduct = Shape<64, 64, 2, 2, 4,
                           A::kTensor                      ? 4
                           : sizeof(typename A::Real) == 8 ? 2
                                                           : 3>;

// A block's rows of one operand. Of 8 · Neighbours rows, lane g of eight has those from Neighbours · g on.
template <class A, int Rows, int Threads, int Neighbours, bool AlongInputs>
class Side {
 public:
  using Real = typename A::Real;
  static_assert(sizeof(typename A::Element) == sizeof(Real), "operands are as wide as numbers");
  static constexpr int kLength = kPieceLength<A>, kGroup = 8 * Neighbours, kNumber = int(sizeof(Real));
  static constexpr int kPitch = Rows * kNumber + 32;
  static constexpr int kBytes = AlongInputs ? Rows * kRowBytes : kDepth<A> * kPitch;

  __device__ Side(const Operand<Real>& x, int64_t first_row, int64_t first_input) {
    constexpr int kPerLine = AlongInputs ? kPieces : Rows / kLength;
    const int thread = int(threadIdx.x), line = thread / kPerLine, piece = thread % kPerLine;
    // The rows of eight lanes stand together.
    across_ = AlongInputs ? line / kGroup * kGroup + line % 8 * Neighbours + line / 8 % Neighbours : line;
    along_ = piece * kLength;
    to_ = AlongInputs ? piece_offset(line, piece) : line * kPitch + piece * kPieceBytes;
    const int64_t row = first_row + (AlongInputs ? across_ : along_);
    const int64_t input = first_input + (AlongInputs ? along_ : across_);
    from_ = x.data + row * x.row_pitch + input * x.input_pitch;
    const int64_t pitch = AlongInputs ? x.row_pitch : x.input_pitch, rows = x.given_rows - first_row;
    apart_ = pitch * kApart, deeper_ = AlongInputs ? kDepth<A> : pitch * kDepth<A>;
    rows_ = int(rows < Rows ? rows : Rows), inputs_ = int(x.inputs - first_input);
    const auto in_sixteens = [](int64_t count) { return count % kLength == 0; };
    sixteens_ = in_sixteens(pitch) && in_sixteens(AlongInputs ? x.inputs : x.given_rows) &&
                reinterpret_cast<uintptr_t>(x.data) % 16 == 0;
  }

  // The next stage, zeros where there is nothing.
  __device__ __forceinline__ void copy(unsigned char* stage) {
    unsigned char* const to = stage + to_;
    const Real* from = from_;
    if (sixteens_ && rows_ == Rows && inputs_ >= kDepth<A>) {
#pragma unroll
      for (int fill = 0; fill < kFills; ++fill, from += apart_) copy_async(to + fill * kFillBytes, from);
    } else {
      const int across_left = (AlongInputs ? rows_ : inputs_) - across_;
      const int along_left = (AlongInputs ? inputs_ : rows_) - along_;
#pragma unroll 1
      for (int fill = 0; fill < kFills; ++fill, from += apart_) {
        const bool there = across_left > fill * kApart;
        auto* const x = reinterpret_cast<Real*>(to + fill * kFillBytes);
        if (sixteens_ && there && along_left > 0) {
          copy_async(x, from);
        } else {
#pragma unroll
          for (int k = 0; k < kLength; ++k) x[k] = there && along_left > k ? from[k] : Real(0);
        }
      }
    }
    from_ += deeper_, inputs_ -= kDepth<A>;
  }

  // Operands of the matrix instruction, 8 inputs of 16 rows from `row` on: as left ones, with two neighbours,
  __device__ static __forceinline__ void load_left(const unsigned char* stage, int row, int step, uint32_t (&x)[4]) {
    static_assert(Neighbours == 2, "a lane has two rows of 16");
    const int lane = lane_index();
    if constexpr (AlongInputs) {
      load_matrices(x, stage + row * kRowBytes + (piece_offset(lane % 16, lane / 16) ^ (32 * step)));
    } else {
      const unsigned char* const from = stage + (8 * step + lane % 4) * kPitch + (row + lane / 4 * 2) * kNumber;
      const auto near = *reinterpret_cast<const uint2*>(from), far = *reinterpret_cast<const uint2*>(from + 4 * kPitch);
      x[0] = near.x, x[1] = near.y, x[2] = far.x, x[3] = far.y;
    }
  }
  // and as right ones, of 8 rows and of the 8 after these.
  __device__ static __forceinline__ void load_right(const unsigned char* stage, int row, int step, uint32_t (&x)[4]) {
    static_assert(Neighbours == 1, "a lane has one row of 8");
    const int lane = lane_index();
    if constexpr (AlongInputs) {
      load_matrices(x, stage + row * kRowBytes + (piece_offset(lane % 8 + lane / 16 * 8, lane / 8 % 2) ^ (32 * step)));
    } else {
      const unsigned char* const from = stage + (8 * step + lane % 4) * kPitch + (row + lane / 4) * kNumber;
#pragma unroll
      for (int q = 0; q < 4; ++q)
        x[q] = *reinterpret_cast<const uint32_t*>(from + q % 2 * 4 * kPitch + q / 2 * 8 * kNumber);
    }
  }

  // Otherwise: kLength neighbours from `row` on, by as many inputs.
  __device__ static __forceinline__ void load(const unsigned char* stage, int row, int piece,
                                              Real (&x)[kLength][kLength]) {
    static_assert(Neighbours == kLength || A::kTensor, "a lane has 16 bytes of rows");
#pragma unroll
    for (int q = 0; q < kLength; ++q) {
      if constexpr (AlongInputs) {
        const int place = row / kGroup * kGroup + row % kGroup / Neighbours + 8 * q;
        cuda::load(reinterpret_cast<const Real*>(stage + piece_offset(place, piece)), x[q]);
      } else {
        Real line[kLength];
        cuda::load(reinterpret_cast<const Real*>(stage + (piece * kLength + q) * kPitch) + row, line);
#pragma unroll
        for (int r = 0; r < kLength; ++r) x[r][q] = line[r];
      }
    }
  }

 private:
  static constexpr int kFills = Rows * kPieces / Threads;
  // Between a thread's pieces: rows or inputs, and bytes.
  static constexpr int kApart = AlongInputs ? Threads / kPieces : Threads * kLength / Rows;
  static constexpr int kFillBytes = kApart * (AlongInputs ? kRowBytes : kPitch);
  static_assert(kFills * Threads == Rows * kPieces && Rows % kGroup == 0 && kApart % (AlongInputs ? kGroup : 1) == 0,
                "every thread copies as many pieces");

  const Real* from_;
  int64_t apart_, deeper_;
  int across_, along_, to_, rows_, inputs_;
  bool sixteens_;
};

// The sums of a block. `each(f)` calls f(row, column, sums) for kBeside sums side by side.
template <class A, class S, bool LeftAlongInputs, bool RightAlongInputs, bool Tensor = A::kTensor>
class ProductSums;

template <class A, class S, bool LeftAlongInputs, bool RightAlongInputs>
class ProductSums<A, S, LeftAlongInputs, RightAlongInputs, true> {
  static constexpr int kRows = S::kPairs / S::kRows, kColumns = S::kOutputs / S::kColumns;  // of a warp
  static_assert(kRows % 16 == 0 && kColumns % 16 == 0, "a warp has 16 rows and 16 columns at least");

 public:
  static constexpr int kBeside = 2;
  using Left = Side<A, S::kPairs, S::kThreads, 2, LeftAlongInputs>;
  using Right = Side<A, S::kOutputs, S::kThreads, 1, RightAlongInputs>;

  // A stage, in two steps. The second one's products wait for the next stage, where there is work then while its first
  // operands are loaded; after the last one `finish` has them.
  __device__ __forceinline__ void multiply(const unsigned char* left, const unsigned char* right) {
    static_assert(kDepth<A> == 16, "a stage has two steps");
    Step first;
    load(left, right, 0, first);
    multiply(second_);
    load(left, right, 1, second_);
    multiply(first);
  }
  __device__ __forceinline__ void finish() { multiply(second_); }

  template <class F>
  __device__ __forceinline__ void each(const F& f) {
    const int thread = fresh_thread_index(), lane = thread % kWarp, warp = thread / kWarp;
    const int row = warp / S::kColumns * kRows + lane / 4 * 2, column = warp % S::kColumns * kColumns + lane % 4 * 2;
#pragma unroll
    for (int r = 0; r < kRows / 8; ++r)
#pragma unroll
      for (int c = 0; c < kColumns / 8; ++c) {
        float (&four)[4] = sum_[r / 2][c];
        float two[kBeside] = {four[r % 2 * 2], four[r % 2 * 2 + 1]};
        f(row + r / 2 * 16 + r % 2, column + 8 * c, two);
      }
  }

 private:
  struct Step {
    uint32_t left[kRows / 16][4], right[kColumns / 16][4];
  };
  __device__ static __forceinline__ void load(const unsigned char* left, const unsigned char* right, int step,
                                              Step& to) {
    const int row = warp_index() / S::kColumns * kRows, column = warp_index() % S::kColumns * kColumns;
#pragma unroll
    for (int r = 0; r < kRows / 16; ++r) Left::load_left(left, row + 16 * r, step, to.left[r]);
#pragma unroll
    for (int c = 0; c < kColumns / 16; ++c) Right::load_right(right, column + 16 * c, step, to.right[c]);
  }
  __device__ __forceinline__ void multiply(const Step& step) {
#pragma unroll
    for (int r = 0; r < kRows / 16; ++r)
#pragma unroll
      for (int c = 0; c < kColumns / 16; ++c) {
        const uint32_t (&y)[4] = step.right[c];
        multiply_add(typename A::Operand{}, sum_[r][2 * c], step.left[r], y[0], y[1]);
        multiply_add(typename A::Operand{}, sum_[r][2 * c + 1], step.left[r], y[2], y[3]);
      }
  }

  float sum_[kRows / 16][kColumns / 8][4] = {};
  Step second_ = {};
};

template <class A, class S, bool LeftAlongInputs, bool RightAlongInputs>
class ProductSums<A, S, LeftAlongInputs, RightAlongInputs, false> {
  using Real = typename A::Real;
  static constexpr int kLength = kPieceLength<A>;
  static constexpr int kRows = S::kPairs / S::kRows, kColumns = S::kOutputs / S::kColumns;  // of a warp
  // A warp's 4 × 8 lanes have squares of kLength × kLength.
  static constexpr int kDown = kRows / (4 * kLength), kAcross = kColumns / (8 * kLength);
  Real sum_[kDown][kAcross][kLength][kLength] = {};

  __device__ static int row(int thread) { return thread / kWarp / S::kColumns * kRows + thread % kWarp / 8 * kLength; }
  __device__ static int column(int thread) { return thread / kWarp % S::kColumns * kColumns + thread % 8 * kLength; }

 public:
  static constexpr int kBeside = kLength;
  using Left = Side<A, S::kPairs, S::kThreads, kLength, LeftAlongInputs>;
  using Right = Side<A, S::kOutputs, S::kThreads, kLength, RightAlongInputs>;

  __device__ __forceinline__ void multiply(const unsigned char* left, const unsigned char* right) {
    const int first_row = row(int(threadIdx.x)), first_column = column(int(threadIdx.x));
#pragma unroll
    for (int piece = 0; piece < kPieces; ++piece) {
      Real y[kAcross][kLength][kLength];
#pragma unroll
      for (int c = 0; c < kAcross; ++c) Right::load(right, first_column + c * 8 * kLength, piece, y[c]);
#pragma unroll
      for (int r = 0; r < kDown; ++r) {
        Real x[kLength][kLength];
        Left::load(left, first_row + r * 4 * kLength, piece, x);
#pragma unroll
        for (int k = 0; k < kLength; ++k)
#pragma unroll
          for (int c = 0; c < kAcross; ++c)
#pragma unroll
            for (int p = 0; p < kLength; ++p)
#pragma unroll
              for (int q = 0; q < kLength; ++q) sum_[r][c][p][q] += x[p][k] * y[c][q][k];
      }
    }
  }

  __device__ __forceinline__ void finish() {}

  template <class F>
  __device__ __forceinline__ void each(const F& f) {
    const int thread = fresh_thread_index();
#pragma unroll
    for (int r = 0; r < kDown; ++r)
#pragma unroll
      for (int p = 0; p < kLength; ++p)
#pragma unroll
        for (int c = 0; c < kAcross; ++c)
          f(row(thread) + r * 4 * kLength + p, column(thread) + c * 8 * kLength, sum_[r][c][p]);
  }
};

template <class Sums>
constexpr int kStageBytes = Sums::Left::kBytes + Sums::Right::kBytes;

template <class A, class S, bool LeftAlongInputs, bool RightAlongInputs>
__global__ void __launch_bounds__(S::kThreads, S::kBlocks)
    multiply_kernel(const __grid_constant__ Operand<typename A::Real> left,
                    const __grid_constant__ Operand<typename A::Real> right,
                    const __grid_constant__ Output<typename A::Real> out) {
  using Real = typename A::Real;
  using Sums = ProductSums<A, S, LeftAlongInputs, RightAlongInputs>;
  unsigned char* const shared = shared_memory();
  const int64_t across = (right.rows + S::kOutputs - 1) / S::kOutputs, down = (left.rows + S::kPairs - 1) / S::kPairs;
  const int64_t part = blockIdx.x / (across * down), block = blockIdx.x % (across * down);
  const int64_t first_row = block / across * S::kPairs, first_column = block % across * S::kOutputs;
  const int64_t all = (left.inputs + kDepth<A> - 1) / kDepth<A>, most = (all + out.parts - 1) / out.parts;
  const int64_t first = part * most, left_over = all - first;
  const int tiles = int(left_over < 0 ? 0 : left_over < most ? left_over : most);

  typename Sums::Left from_left(left, first_row, first * kDepth<A>);
  typename Sums::Right from_right(right, first_column, first * kDepth<A>);
  int copied = 0, stage = 0;  // tiles asked for; the stage after the last of them
  const auto after = [](int s) { return s + 1 == S::kStages ? 0 : s + 1; };
  const auto copy = [&] {
    if (copied < tiles) {
      unsigned char* const to = shared + stage * kStageBytes<Sums>;
      from_left.copy(to), from_right.copy(to + Sums::Left::kBytes);
    }
    commit_copies();
    ++copied, stage = after(stage);
  };
  Sums sums;
  for (int ahead = 0; ahead < S::kStages - 1; ++ahead) copy();
  for (int tile = 0; tile < tiles; ++tile) {
    wait_copies<S::kStages - 2>();
    __syncthreads();
    const unsigned char* const now = shared + after(stage) * kStageBytes<Sums>;
    copy();
    sums.multiply(now, now + Sums::Left::kBytes);
  }
  sums.finish();

  Real* const to = out.to + part * out.part_pitch;
  constexpr int kLength = Sums::kBeside;
  const bool aligned = out.pitch % kLength == 0 && reinterpret_cast<uintptr_t>(to) % (kLength * sizeof(Real)) == 0;
  sums.each([&](int row, int column, Real(&sum)[kLength]) {
    const int64_t r = first_row + row, c = first_column + column;
    if (r >= left.rows || c >= right.rows) return;
    Real* const at = to + r * out.pitch + c;
    const bool whole = aligned && c + kLength <= right.rows;
    Real before[kLength] = {};
    if (out.add && whole) load(at, before);
#pragma unroll
    for (int k = 0; k < kLength; ++k) {
      if (c + k >= right.rows) break;
      sum[k] = sum[k] * out.scale + (out.bias ? __ldg(out.bias + c + k) : Real(0));
      if (out.relu) sum[k] = relu(sum[k]);
      if (out.add) sum[k] += whole ? before[k] : at[k];
      if (!whole) at[k] = sum[k];
    }
    if (whole) store(at, sum);
  });
}

template <class A, class S, bool LeftAlongInputs, bool RightAlongInputs>
void multiply_by(const Context& context, const Operand<typename A::Real>& left, const Operand<typename A::Real>& right,
                 const Output<typename A::Real>& out) {
  constexpr int kBytes = S::kStages * kStageBytes<ProductSums<A, S, LeftAlongInputs, RightAlongInputs>>;
  const auto kernel = multiply_kernel<A, S, LeftAlongInputs, RightAlongInputs>;
  if (kBytes > 48 << 10)
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes),
          "shared memory was refused");
  context.launch(kernel, out.parts * divided_up(left.rows, S::kPairs) * divided_up(right.rows, S::kOutputs),
                 S::kThreads, kBytes, left, right, out);
}

// In one order of sums whatever the blocks.
template <class A, bool LeftAlongInputs = true, bool RightAlongInputs = true>
void multiply(const Context& context, const Operand<typename A::Real>& left, const Operand<typename A::Real>& right,
              const Output<typename A::Real>& out) {
  if constexpr (A::kTensor) {
    using L = LargeProduct<A>;
    const int64_t large = out.parts * divided_up(left.rows, L::kPairs) * divided_up(right.rows, L::kOutputs);
    if (std::min(left.rows, right.rows) > 64 && 2 * large > context.attribute(cudaDevAttrMultiProcessorCount))
      return multiply_by<A, L, LeftAlongInputs, RightAlongInputs>(context, left, right, out);
  }
  multiply_by<A, SmallProduct<A>, LeftAlongInputs, RightAlongInputs>(context, left, right, out);
}

}  // namespace pddm::cuda
