// out = left · rightᵀ for operands that are matrices with any strides. A block owns kPairs × kOutputs outputs and walks
// all inputs, or those of its part, in order: 64 bytes of them to a stage, kStages − 1 stages of copies ahead of the
// multiplication. An operand's part of a stage, in shared memory:
//
//     along inputs, a tile:  kDepth inputs of a row | of another row | …      swizzled as in tile.cuh
//     along rows:            input 0 of kPairs rows, 32 bytes, input 1 | …    every line starts 8 banks on
//     along rows, bfloat16:  input 0 of kPairs rows | input 1 | …             8 rows are a piece, at its number xor
//                                                                             input % 8
//
// All ways lanes find what they multiply without a conflict; bfloat16 along rows is transposed as it is loaded. Where a
// lane has several rows, these are neighbours as far as that can be had: its numbers along rows, or its outputs, lie
// side by side.
#pragma once

#include <algorithm>

#include "launch.cuh"
#include "score.cuh"
#include "warpgroup.cuh"

namespace pddm::cuda {

// A bfloat16 in memory.
struct Bfloat16 {
  uint16_t bits;
};

// What numbers that are operands of products are kept as.
template <class A>
struct KeptAs {
  using Number = typename A::Real;
};
template <>
struct KeptAs<ArithmeticBf16> {
  using Number = Bfloat16;
};
template <class A>
using Kept = typename KeptAs<A>::Number;
template <class A>
constexpr bool kNarrow = sizeof(Kept<A>) == 2;  // bfloat16s

__device__ __forceinline__ float number(float x) { return x; }
__device__ __forceinline__ double number(double x) { return x; }
__device__ __forceinline__ float number(Bfloat16 x) { return __uint_as_float(uint32_t(x.bits) << 16); }

// A number as an operand of a product: tensor cores do not look at the digits beyond.
template <class A>
__device__ __forceinline__ Kept<A> as_operand(typename A::Real x) {
  if constexpr (kNarrow<A>)
    return {uint16_t(pack(Bf16{}, x, 0))};
  else if constexpr (A::kTensor)
    return __uint_as_float(round_tf32(x));
  else
    return x;
}

// Numbers side by side, in memory aligned to all of them, or to 16 bytes.
__device__ __forceinline__ void load(const float* from, float (&x)[2]) {
  const float2 two = *reinterpret_cast<const float2*>(from);
  x[0] = two.x, x[1] = two.y;
}
__device__ __forceinline__ void load(const float* from, float (&x)[8]) {
  float low[4], high[4];
  load(from, low), load(from + 4, high);
#pragma unroll
  for (int k = 0; k < 4; ++k) x[k] = low[k], x[k + 4] = high[k];
}
__device__ __forceinline__ void widen_pair(uint32_t pair, float& low, float& high) {
  low = __uint_as_float(pair << 16), high = __uint_as_float(pair & 0xffff0000u);
}
__device__ __forceinline__ void load(const Bfloat16* from, float (&x)[2]) {
  widen_pair(*reinterpret_cast<const uint32_t*>(from), x[0], x[1]);
}
__device__ __forceinline__ void widen(uint4 eight, float (&x)[8]) {
  widen_pair(eight.x, x[0], x[1]), widen_pair(eight.y, x[2], x[3]);
  widen_pair(eight.z, x[4], x[5]), widen_pair(eight.w, x[6], x[7]);
}
__device__ __forceinline__ void load(const Bfloat16* from, float (&x)[8]) {
  widen(*reinterpret_cast<const uint4*>(from), x);
}
template <class Number, class Real>
__device__ __forceinline__ void load(const Number* from, Real (&x)[1]) {
  x[0] = number(*from);
}
__device__ __forceinline__ void store(float* to, const float (&x)[2]) { *reinterpret_cast<float2*>(to) = {x[0], x[1]}; }
__device__ __forceinline__ void store(float* to, const float (&x)[4]) {
  *reinterpret_cast<float4*>(to) = {x[0], x[1], x[2], x[3]};
}
__device__ __forceinline__ void store(double* to, const double (&x)[2]) {
  *reinterpret_cast<double2*>(to) = {x[0], x[1]};
}
__device__ __forceinline__ void store(Bfloat16* to, const float (&x)[2]) {
  *reinterpret_cast<uint32_t*>(to) = pack(Bf16{}, x[0], x[1]);
}
__device__ __forceinline__ void store(Bfloat16* to, const float (&x)[8]) {
  *reinterpret_cast<uint4*>(to) = ArithmeticBf16::piece(x);
}
__device__ __forceinline__ void put(float* to, float x) { *to = x; }
__device__ __forceinline__ void put(double* to, double x) { *to = x; }
__device__ __forceinline__ void put(Bfloat16* to, float x) { *to = as_operand<ArithmeticBf16>(x); }
template <class A, int Count>
__device__ __forceinline__ void store_operands(Kept<A>* to, const typename A::Real (&x)[Count]) {
  if constexpr (Count == 1)
    *to = as_operand<A>(x[0]);
  else
    store(to, x);
}

// Element (row, input) is data[row * row_pitch + input * input_pitch]; one of the pitches is 1. For tensor cores every
// element is one `as_operand`.
template <class Number>
struct Operand {
  const Number* data;
  int64_t rows, inputs, row_pitch, input_pitch;
  int64_t given_rows = rows;  // those from here on are zeros
};

template <class Real, class Number = Real>
struct Output {
  Number* to;
  int64_t pitch;
  const Real* bias = nullptr;  // by column
  bool relu = false, add = false;
  Real scale = 1;
  // The inputs in so many runs of equal length (of whole stages), each of which has an output of its own.
  int64_t parts = 1, part_pitch = 0;
};

// Large blocks read the operands less often; small ones are more where outputs are few. Two on a multiprocessor begin
// and end while the other multiplies: on an H200 that outdoes one of 128 × 256 by 8 %.
template <class A>
using LargeProduct = Shape<128, 128, 2, 2, 4, 2>;
template <class A>
using SmallProduct = Shape<64, 64, 2, 2, 4,
                           A::kTensor                      ? 4
                           : sizeof(typename A::Real) == 8 ? 2
                                                           : 3>;

// A block's rows of one operand. Eight lanes share 8 · Neighbours rows, which they take in turn, Together at a time:
// lanes Together · g on have those from Together · Neighbours · g on.
template <class A, int Rows, int Threads, int Neighbours, int Together, bool AlongInputs>
class Side {
 public:
  using Number = Kept<A>;
  static_assert(sizeof(typename A::Element) == sizeof(Number), "operands are as wide as they are kept");
  static constexpr bool kTransposed = kNarrow<A> && !AlongInputs;
  static constexpr int kLength = kPieceLength<A>, kGroup = 8 * Neighbours, kNumber = int(sizeof(Number));
  static constexpr int kPitch = Rows * kNumber + (kTransposed ? 0 : 32);
  static constexpr int kBytes = AlongInputs ? Rows * kRowBytes : kDepth<A> * kPitch;

  __device__ Side(const Operand<Number>& x, int64_t first_row, int64_t first_input) {
    constexpr int kPerLine = AlongInputs ? kPieces : Rows / kLength;
    const int thread = int(threadIdx.x), line = thread / kPerLine, piece = thread % kPerLine;
    // The rows of eight lanes stand together.
    across_ = AlongInputs ? line / kGroup * kGroup + line % 8 / Together * (Together * Neighbours) +
                                line / 8 % Neighbours * Together + line % Together
                          : line;
    along_ = piece * kLength;
    to_ = AlongInputs ? piece_offset(line, piece) : line_offset(line, piece);
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
    const Number* from = from_;
    if (sixteens_ && rows_ == Rows && inputs_ >= kDepth<A>) {
#pragma unroll
      for (int fill = 0; fill < kFills; ++fill, from += apart_) copy_async(to + fill * kFillBytes, from);
    } else {
      const int remaining_across = (AlongInputs ? rows_ : inputs_) - across_;
      const int remaining_along = (AlongInputs ? inputs_ : rows_) - along_;
#pragma unroll 1
      for (int fill = 0; fill < kFills; ++fill, from += apart_) {
        const bool there = remaining_across > fill * kApart;
        auto* const x = reinterpret_cast<Number*>(to + fill * kFillBytes);
        if (sixteens_ && there && remaining_along > 0) {
          copy_async(x, from);
        } else {
#pragma unroll
          for (int k = 0; k < kLength; ++k) x[k] = there && remaining_along > k ? from[k] : Number{};
        }
      }
    }
    from_ += deeper_, inputs_ -= kDepth<A>;
  }

  // Operands of the matrix instruction, 32 bytes of inputs of 16 rows from `row` on: as left ones,
  __device__ static __forceinline__ void load_left(const unsigned char* stage, int row, int step, uint32_t (&x)[4]) {
    static_assert(Neighbours == (kNarrow<A> ? 1 : 2), "a lane has two rows of 16");
    const int lane = lane_index();
    if constexpr (AlongInputs) {
      load_matrices(x, stage + row * kRowBytes + (piece_offset(lane % 16, lane / 16) ^ (32 * step)));
    } else if constexpr (kTransposed) {
      const int line = 16 * step + lane / 16 * 8 + lane % 8;
      load_matrices_transposed(x, stage + line_offset(line, row / kLength + lane / 8 % 2));
    } else {
      const unsigned char* const from = stage + (8 * step + lane % 4) * kPitch + (row + lane / 4 * 2) * kNumber;
      const auto near = *reinterpret_cast<const uint2*>(from), far = *reinterpret_cast<const uint2*>(from + 4 * kPitch);
      x[0] = near.x, x[1] = near.y, x[2] = far.x, x[3] = far.y;
    }
  }
  // and as right ones, of 8 rows and of the 8 after these.
  __device__ static __forceinline__ void load_right(const unsigned char* stage, int row, int step, uint32_t (&x)[4]) {
    static_assert(Neighbours == 1 || AlongInputs, "a lane has one row of 8");
    const int lane = lane_index();
    if constexpr (AlongInputs) {
      load_matrices(x, stage + row * kRowBytes + (piece_offset(lane % 8 + lane / 16 * 8, lane / 8 % 2) ^ (32 * step)));
    } else if constexpr (kTransposed) {
      const int line = 16 * step + lane % 16;
      load_matrices_transposed(x, stage + line_offset(line, row / kLength + lane / 16));
    } else {
      const unsigned char* const from = stage + (8 * step + lane % 4) * kPitch + (row + lane / 4) * kNumber;
#pragma unroll
      for (int q = 0; q < 4; ++q)
        x[q] = *reinterpret_cast<const uint32_t*>(from + q % 2 * 4 * kPitch + q / 2 * 8 * kNumber);
    }
  }

  // Otherwise: kLength neighbours from `row` on, by as many inputs.
  __device__ static __forceinline__ void load(const unsigned char* stage, int row, int piece,
                                              Number (&x)[kLength][kLength]) {
    static_assert(Neighbours == kLength && Together == 1, "a lane has 16 bytes of rows");
#pragma unroll
    for (int q = 0; q < kLength; ++q) {
      if constexpr (AlongInputs) {
        const int place = row / kGroup * kGroup + row % kGroup / Neighbours + 8 * q;
        cuda::load(reinterpret_cast<const Number*>(stage + piece_offset(place, piece)), x[q]);
      } else {
        Number line[kLength];
        cuda::load(reinterpret_cast<const Number*>(stage + (piece * kLength + q) * kPitch) + row, line);
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
  static constexpr int kPeriod = AlongInputs ? kGroup : kTransposed ? 8 : 1;  // of lines, in where their pieces stand
  static_assert(kFills * Threads == Rows * kPieces && Rows % kGroup == 0 && kApart % kPeriod == 0,
                "every thread copies as many pieces");

  __device__ static __forceinline__ int line_offset(int line, int piece) {
    return line * kPitch + (kTransposed ? piece ^ line % 8 : piece) * kPieceBytes;
  }

  const Number* from_;
  int64_t apart_, deeper_;
  int across_, along_, to_, rows_, inputs_;
  bool sixteens_;
};

// The sums of a block. `each(f)` calls f(row, column, sums) for kBeside sums side by side from `column` on, and as many
// again every kAcross columns, kRuns in all.
template <class A, class S, bool LeftAlongInputs, bool RightAlongInputs, class Number, bool Tensor = A::kTensor>
class ProductSums;

template <class A, class S, bool LeftAlongInputs, bool RightAlongInputs, class Number>
class ProductSums<A, S, LeftAlongInputs, RightAlongInputs, Number, true> {
  static constexpr int kWarpRows = S::kPairs / S::kWarpsM, kWarpColumns = S::kOutputs / S::kWarpsN;
  static_assert(kWarpRows % 16 == 0 && kWarpColumns % 16 == 0, "a warp has 16 rows and 16 columns at least");
  // Of two bytes, rows of left operands that are transposed cannot be chosen; those of right ones that are not fill 16
  // bytes of the output.
  static constexpr int kLeftNeighbours = kNarrow<A> ? 1 : 2;
  static constexpr int kRightNeighbours = kNarrow<A> && RightAlongInputs ? 8 / int(sizeof(Number)) : 1;

 public:
  static constexpr int kBeside = 2 * kRightNeighbours, kAcross = 4 * kBeside, kRuns = kWarpColumns / kAcross;
  using Left = Side<A, S::kPairs, S::kThreads, kLeftNeighbours, 1, LeftAlongInputs>;
  using Right = Side<A, S::kOutputs, S::kThreads, kRightNeighbours, 2, RightAlongInputs>;

  // A stage, in two steps. The second one's products wait for the next stage, where there is work then while its first
  // operands are loaded; after the last one `finish` has them.
  __device__ __forceinline__ void multiply(const unsigned char* left, const unsigned char* right) {
    static_assert(kRowBytes == 64, "a stage has two steps");
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
    const int row = warp / S::kWarpsN * kWarpRows + lane / 4 * kLeftNeighbours;
    const int column = warp % S::kWarpsN * kWarpColumns + lane % 4 * kBeside;
    constexpr int kApart = kLeftNeighbours == 2 ? 1 : 8;  // a lane's rows of 16
#pragma unroll
    for (int r = 0; r < kWarpRows / 8; ++r) {
      float runs[kRuns][kBeside];
#pragma unroll
      for (int c = 0; c < kWarpColumns / 4; ++c) runs[c / kBeside][c % kBeside] = sum_[r / 2][c / 2][r % 2 * 2 + c % 2];
      f(row + r / 2 * 16 + r % 2 * kApart, column, runs);
    }
  }

 private:
  struct Step {
    uint32_t left[kWarpRows / 16][4], right[kWarpColumns / 16][4];
  };
  __device__ static __forceinline__ void load(const unsigned char* left, const unsigned char* right, int step,
                                              Step& to) {
    const int row = warp_index() / S::kWarpsN * kWarpRows, column = warp_index() % S::kWarpsN * kWarpColumns;
#pragma unroll
    for (int r = 0; r < kWarpRows / 16; ++r) Left::load_left(left, row + 16 * r, step, to.left[r]);
#pragma unroll
    for (int c = 0; c < kWarpColumns / 16; ++c) Right::load_right(right, column + 16 * c, step, to.right[c]);
  }
  __device__ __forceinline__ void multiply(const Step& step) {
#pragma unroll
    for (int r = 0; r < kWarpRows / 16; ++r)
#pragma unroll
      for (int c = 0; c < kWarpColumns / 16; ++c) {
        const uint32_t (&y)[4] = step.right[c];
        multiply_add(typename A::Operand{}, sum_[r][2 * c], step.left[r], y[0], y[1]);
        multiply_add(typename A::Operand{}, sum_[r][2 * c + 1], step.left[r], y[2], y[3]);
      }
  }

  float sum_[kWarpRows / 16][kWarpColumns / 8][4] = {};
  Step second_ = {};
};

template <class A, class S, bool LeftAlongInputs, bool RightAlongInputs, class Number>
class ProductSums<A, S, LeftAlongInputs, RightAlongInputs, Number, false> {
  using Real = typename A::Real;
  static constexpr int kLength = kPieceLength<A>;
  static constexpr int kWarpRows = S::kPairs / S::kWarpsM, kWarpColumns = S::kOutputs / S::kWarpsN;
  // A warp's 4 × 8 lanes have squares of kLength × kLength.
  static constexpr int kSquaresM = kWarpRows / (4 * kLength), kSquaresN = kWarpColumns / (8 * kLength);
  Real sum_[kSquaresM][kSquaresN][kLength][kLength] = {};

  __device__ static int row(int thread) {
    return thread / kWarp / S::kWarpsN * kWarpRows + thread % kWarp / 8 * kLength;
  }
  __device__ static int column(int thread) { return thread / kWarp % S::kWarpsN * kWarpColumns + thread % 8 * kLength; }

 public:
  static constexpr int kBeside = kLength, kAcross = 8 * kLength, kRuns = kSquaresN;
  using Left = Side<A, S::kPairs, S::kThreads, kLength, 1, LeftAlongInputs>;
  using Right = Side<A, S::kOutputs, S::kThreads, kLength, 1, RightAlongInputs>;

  __device__ __forceinline__ void multiply(const unsigned char* left, const unsigned char* right) {
    const int first_row = row(int(threadIdx.x)), first_column = column(int(threadIdx.x));
#pragma unroll
    for (int piece = 0; piece < kPieces; ++piece) {
      Real y[kSquaresN][kLength][kLength];
#pragma unroll
      for (int c = 0; c < kSquaresN; ++c) Right::load(right, first_column + c * kAcross, piece, y[c]);
#pragma unroll
      for (int r = 0; r < kSquaresM; ++r) {
        Real x[kLength][kLength];
        Left::load(left, first_row + r * 4 * kLength, piece, x);
#pragma unroll
        for (int k = 0; k < kLength; ++k)
#pragma unroll
          for (int c = 0; c < kSquaresN; ++c)
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
    for (int r = 0; r < kSquaresM; ++r)
#pragma unroll
      for (int p = 0; p < kLength; ++p) {
        Real runs[kRuns][kBeside];
#pragma unroll
        for (int c = 0; c < kSquaresN; ++c)
#pragma unroll
          for (int q = 0; q < kLength; ++q) runs[c][q] = sum_[r][c][p][q];
        f(row(thread) + r * 4 * kLength + p, column(thread), runs);
      }
  }
};

template <class Sums>
constexpr int kStageBytes = Sums::Left::kBytes + Sums::Right::kBytes;

// What a block multiplies: from which output and which input on, and how many stages of these.
struct Cut {
  int64_t part, first_row, first_column, first_input;
  int tiles;
};
template <class A, class S, class Number>
__device__ __forceinline__ Cut cut_of_block(const Operand<Kept<A>>& left, const Operand<Kept<A>>& right,
                                            const Output<typename A::Real, Number>& out) {
  const int64_t across = (right.rows + S::kOutputs - 1) / S::kOutputs, down = (left.rows + S::kPairs - 1) / S::kPairs;
  const int64_t part = blockIdx.x / (across * down), block = blockIdx.x % (across * down);
  const int64_t all = (left.inputs + kDepth<A> - 1) / kDepth<A>, most = (all + out.parts - 1) / out.parts;
  const int64_t first = part * most, remaining = all - first;
  return {part, block / across * S::kPairs, block % across * S::kOutputs, first * kDepth<A>,
          int(remaining < 0      ? 0
              : remaining < most ? remaining
                                 : most)};
}

// Copies of stages, in turn, ahead of their multiplication.
template <class Sums, int Stages>
class Copies {
 public:
  template <class Number>
  __device__ __forceinline__ Copies(unsigned char* shared, const Operand<Number>& left, const Operand<Number>& right,
                                    const Cut& cut)
      : shared_(shared),
        left_(left, cut.first_row, cut.first_input),
        right_(right, cut.first_column, cut.first_input),
        remaining_(cut.tiles) {}

  __device__ __forceinline__ void next() {
    if (remaining_ > 0) {
      unsigned char* const to = shared_ + stage_ * kStageBytes<Sums>;
      left_.copy(to), right_.copy(to + Sums::Left::kBytes);
    }
    commit_copies();
    --remaining_, stage_ = stage_ + 1 == Stages ? 0 : stage_ + 1;
  }
  // The stage `Ahead` before the last that was asked for.
  template <int Ahead>
  __device__ __forceinline__ const unsigned char* now() const {
    const int stage = stage_ - 1 - Ahead;
    return shared_ + (stage < 0 ? stage + Stages : stage) * kStageBytes<Sums>;
  }

 private:
  unsigned char* const shared_;
  typename Sums::Left left_;
  typename Sums::Right right_;
  int remaining_, stage_ = 0;
};

template <class Sums, class A, class S, class Number>
__device__ __forceinline__ void put_sums(Sums& sums, const Operand<Kept<A>>& left, const Operand<Kept<A>>& right,
                                         const Output<typename A::Real, Number>& out, const Cut& cut) {
  using Real = typename A::Real;
  const int64_t first_row = cut.first_row, first_column = cut.first_column;
  Number* const to = out.to + cut.part * out.part_pitch;
  constexpr int kBeside = Sums::kBeside, kAcross = Sums::kAcross, kRuns = Sums::kRuns;
  const bool aligned = out.pitch % kBeside == 0 && reinterpret_cast<uintptr_t>(to) % (kBeside * sizeof(Number)) == 0;
  const auto write = [&](auto full) {
    sums.each([&](int row, int column, Real(&sums_of_row)[kRuns][kBeside]) {
      const int64_t r = first_row + row, c = first_column + column;
      if (r >= left.rows) return;
      Number* const at = to + r * out.pitch + c;
      const Real* const bias = out.bias ? out.bias + c : nullptr;
      const auto has = [&](int run, int k) { return full.value || c + run * kAcross + k < right.rows; };
      const auto whole = [&](int run) { return full.value || (aligned && has(run, kBeside - 1)); };
      // All are asked for before the first is waited for.
      Real before[kRuns][kBeside] = {};
      if (out.add) {
#pragma unroll
        for (int run = 0; run < kRuns; ++run) {
          if (whole(run)) {
            load(at + run * kAcross, before[run]);
          } else {
#pragma unroll
            for (int k = 0; k < kBeside; ++k)
              if (has(run, k)) before[run][k] = number(at[run * kAcross + k]);
          }
        }
      }
#pragma unroll
      for (int run = 0; run < kRuns; ++run) {
        Real(&sum)[kBeside] = sums_of_row[run];
#pragma unroll
        for (int k = 0; k < kBeside; ++k) {
          if (!has(run, k)) break;
          sum[k] = sum[k] * out.scale + (bias ? __ldg(bias + run * kAcross + k) : Real(0));
          if (out.relu) sum[k] = relu(sum[k]);
          if (out.add) sum[k] += before[run][k];
          if (!whole(run)) put(at + run * kAcross + k, sum[k]);
        }
        if (whole(run)) store(at + run * kAcross, sum);
      }
    });
  };
  if (aligned && first_column + S::kOutputs <= right.rows)
    write(std::true_type{});
  else
    write(std::false_type{});
}

template <class A, class S, bool LeftAlongInputs, bool RightAlongInputs, class Number>
__global__ void __launch_bounds__(S::kThreads, S::kBlocks)
    multiply_kernel(const __grid_constant__ Operand<Kept<A>> left, const __grid_constant__ Operand<Kept<A>> right,
                    const __grid_constant__ Output<typename A::Real, Number> out) {
  using Sums = ProductSums<A, S, LeftAlongInputs, RightAlongInputs, Number>;
  constexpr int kAhead = S::kStages - 1;
  const Cut cut = cut_of_block<A, S>(left, right, out);
  Copies<Sums, S::kStages> copies(shared_memory(), left, right, cut);
  Sums sums;
  for (int ahead = 0; ahead < kAhead; ++ahead) copies.next();
  for (int tile = 0; tile < cut.tiles; ++tile) {
    wait_copies<kAhead - 1>();
    __syncthreads();
    copies.next();
    const unsigned char* const now = copies.template now<kAhead>();
    sums.multiply(now, now + Sums::Left::kBytes);
  }
  sums.finish();
  put_sums<Sums, A, S>(sums, left, right, out, cut);
}

// --- By the instructions of four warps, which have both operands in shared memory, of bfloat16 along inputs ----------

// Each warpgroup has 64 rows and all of the columns.
template <class A, class S, class Number>
class WarpgroupSums {
  static_assert(S::kThreads == S::kPairs / 64 * kWarpgroup, "a warpgroup has 64 rows");
  static constexpr int kRightNeighbours = 8 / int(sizeof(Number));  // outputs fill 16 bytes

 public:
  static constexpr int kBeside = 2 * kRightNeighbours, kAcross = 4 * kBeside, kRuns = S::kOutputs / kAcross;
  using Left = Side<A, S::kPairs, S::kThreads, 1, 1, true>;
  using Right = Side<A, S::kOutputs, S::kThreads, kRightNeighbours, 2, true>;

  // Begins with a stage's products.
  __device__ __forceinline__ void begin(const unsigned char* left, const unsigned char* right) {
    const int warpgroup = fresh_thread_index() / kWarpgroup;
    const Descriptor a = descriptor(left + warpgroup * 64 * kRowBytes), b = descriptor(right);
    begin_products();
    multiply_add(typename A::Operand{}, sum_, a, b, true);
    multiply_add(typename A::Operand{}, sum_, a + 2, b + 2, true);
    commit_products();
  }

  template <class F>
  __device__ __forceinline__ void each(const F& f) {
    const int thread = fresh_thread_index(), lane = thread % kWarp;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      float runs[kRuns][kBeside];
#pragma unroll
      for (int c = 0; c < S::kOutputs / 4; ++c) runs[c / kBeside][c % kBeside] = sum_[c / 2 * 4 + r * 2 + c % 2];
      f(thread / kWarp * 16 + r * 8 + lane / 4, lane % 4 * kBeside, runs);
    }
  }

 private:
  float sum_[S::kOutputs / 2] = {};
};

// A stage's products are under way while the next one's begin, and a stage is filled anew when those after the next
// begin.
template <class A, class S, class Number>
__global__ void __launch_bounds__(S::kThreads, S::kBlocks)
    hopper_multiply_kernel(const __grid_constant__ Operand<Kept<A>> left,
                           const __grid_constant__ Operand<Kept<A>> right,
                           const __grid_constant__ Output<typename A::Real, Number> out) {
#if defined(PDDM_WARPGROUPS_HERE)
  using Sums = WarpgroupSums<A, S, Number>;
  constexpr int kAhead = S::kStages - 2;
  const Cut cut = cut_of_block<A, S>(left, right, out);
  Copies<Sums, S::kStages> copies(aligned_shared_memory(), left, right, cut);
  Sums sums;
  for (int ahead = 0; ahead < kAhead; ++ahead) copies.next();
  for (int tile = 0; tile < cut.tiles; ++tile) {
    wait_copies<kAhead - 1>();
    show_to_matrix_unit();
    __syncthreads();
    const unsigned char* const now = copies.template now<kAhead - 1>();
    sums.begin(now, now + Sums::Left::kBytes);
    copies.next();
    wait_products<1>();
  }
  wait_products<0>();
  put_sums<Sums, A, S>(sums, left, right, out, cut);
#endif
}

template <class Sums, class S, class Kernel, class Left, class Out>
void launch_product(const Context& context, Kernel kernel, const Left& left, const Left& right, const Out& out) {
  constexpr int kBytes = S::kStages * kStageBytes<Sums>;
  if (kBytes > 48 << 10)
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes),
          "shared memory was refused");
  context.launch(kernel, out.parts * divided_up(left.rows, S::kPairs) * divided_up(right.rows, S::kOutputs),
                 S::kThreads, kBytes, left, right, out);
}

#if defined(PDDM_WARPGROUPS)
// The wide one reads left operands half as often.
using WideWarpgroupProduct = Shape<128, 256, 8, 1, 6, 1>;
using WarpgroupProduct = Shape<128, 128, 8, 1, 4, 2>;
#endif

// In one order of sums whatever the blocks, but for those that are multiplied by warpgroups.
template <class A, bool LeftAlongInputs = true, bool RightAlongInputs = true, class Number = typename A::Real>
void multiply(const Context& context, const Operand<Kept<A>>& left, const Operand<Kept<A>>& right,
              const Output<typename A::Real, Number>& out) {
  const auto by = [&](auto shape) {
    using S = decltype(shape);
    launch_product<ProductSums<A, S, LeftAlongInputs, RightAlongInputs, Number>, S>(
        context, multiply_kernel<A, S, LeftAlongInputs, RightAlongInputs, Number>, left, right, out);
  };
  if constexpr (A::kTensor) {
    using L = LargeProduct<A>;
    const int64_t large = out.parts * divided_up(left.rows, L::kPairs) * divided_up(right.rows, L::kOutputs);
    if (std::min(left.rows, right.rows) > 64 && 2 * large > context.attribute(cudaDevAttrMultiProcessorCount)) {
#if defined(PDDM_WARPGROUPS)
      if constexpr (kNarrow<A> && LeftAlongInputs && RightAlongInputs && sizeof(Number) == 2) {
        const auto by_warpgroups = [&](auto shape) {
          using S = decltype(shape);
          launch_product<WarpgroupSums<A, S, Number>, S>(context, hopper_multiply_kernel<A, S, Number>, left, right,
                                                         out);
        };
        if (has_warpgroups(context.device())) {
          const bool wide =
              divided_up(right.rows, 128) % 2 == 0 && large >= 2 * context.attribute(cudaDevAttrMultiProcessorCount);
          return wide ? by_warpgroups(WideWarpgroupProduct{}) : by_warpgroups(WarpgroupProduct{});
        }
      }
#endif
      return by(L{});
    }
  }
  by(SmallProduct<A>{});
}

}  // namespace pddm::cuda
