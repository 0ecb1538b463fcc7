// out = left · rightᵀ for operands that are matrices with any strides. A block owns 64 × 64 outputs and walks all
// inputs in order, two tiles of each operand deep.
#pragma once

#include "launch.cuh"
#include "score.cuh"

namespace pddm::cuda {

template <class A>
using MultiplyShape = Shape<64, 64, 2, 2, 2, sizeof(typename A::Real) == 8 ? 2 : 3>;

// Element (row, input) is data[row * row_pitch + input * input_pitch]; one of the pitches is 1.
template <class Real>
struct Operand {
  const Real* data;
  int64_t rows, inputs, row_pitch, input_pitch;
  int64_t given_rows = rows;  // those from here on are zeros

  __host__ __device__ bool along_inputs() const { return input_pitch == 1; }
  // Whether 16 bytes can be had at once wherever they start at a multiple of their number.
  __host__ __device__ bool in_sixteens() const {
    const int64_t pitch = along_inputs() ? row_pitch : input_pitch;
    return pitch * int64_t(sizeof(Real)) % 16 == 0 && reinterpret_cast<uintptr_t>(data) % 16 == 0;
  }

  // 16 bytes of elements from (row, input) on, along inputs or along rows; zeros where there are none.
  template <int Length>
  __device__ __forceinline__ void load(int64_t row, int64_t input, bool sixteens, Real (&x)[Length]) const {
    const bool by_input = along_inputs();
    const Real* const from = data + row * row_pitch + input * input_pitch;
    const int64_t rows_left = given_rows - row, inputs_left = inputs - input;
    const int64_t along = by_input ? inputs_left : rows_left, across = by_input ? rows_left : inputs_left;
    if (sixteens && across > 0 && along >= Length) return cuda::load(from, x);
#pragma unroll
    for (int k = 0; k < Length; ++k) x[k] = across > 0 && k < along ? from[k] : Real(0);
  }
};

template <class Real>
struct Output {
  Real* to;
  int64_t pitch;
  const Real* bias = nullptr;  // by column
  bool relu = false, add = false;
  Real scale = 1;
};

template <class A>
__global__ void __launch_bounds__(MultiplyShape<A>::kThreads, MultiplyShape<A>::kBlocks)
    multiply_kernel(const __grid_constant__ Operand<typename A::Real> left,
                    const __grid_constant__ Operand<typename A::Real> right,
                    const __grid_constant__ Output<typename A::Real> out) {
  using Real = typename A::Real;
  using S = MultiplyShape<A>;
  constexpr int kTile = S::kPairs * kRowBytes, kLength = kPieceLength<A>;
  constexpr int kFills = S::kPairs * kPieces / S::kThreads;
  unsigned char* const shared = shared_memory();
  const int64_t across = (right.rows + S::kOutputs - 1) / S::kOutputs;
  const int64_t first_row = blockIdx.x / across * S::kPairs, first_column = blockIdx.x % across * S::kOutputs;
  const int thread = int(threadIdx.x);
  static_assert(kLength * sizeof(Real) == kPieceBytes && kDepth<A> % 8 == 0, "operands are as wide as numbers");

  // What this thread loads of an operand: pieces of rows, or else pieces of columns, 4 side by side of 8 inputs to a
  // warp (whole sectors, and few conflicts where they are stored).
  struct Place {
    int row, input;
  };
  const auto place = [&](bool along_inputs, int fill) {
    if (along_inputs) return Place{(thread + fill * S::kThreads) / kPieces, thread % kPieces * kLength};
    constexpr int kEights = kDepth<A> / 8;
    const int part = warp_index() * kFills + fill, lane = lane_index();
    return Place{(part / kEights * 4 + lane % 4) * kLength, part % kEights * 8 + lane / 4};
  };
  const bool left_sixteens = left.in_sixteens(), right_sixteens = right.in_sixteens();

  Real x[kFills][kLength], y[kFills][kLength];
  const auto load_both = [&](int64_t tile) {
#pragma unroll
    for (int fill = 0; fill < kFills; ++fill) {
      const Place a = place(left.along_inputs(), fill), b = place(right.along_inputs(), fill);
      left.load(first_row + a.row, tile * kDepth<A> + a.input, left_sixteens, x[fill]);
      right.load(first_column + b.row, tile * kDepth<A> + b.input, right_sixteens, y[fill]);
    }
  };
  const auto store = [&](unsigned char* to, bool along_inputs, const Place& at, const Real(&z)[kLength]) {
    if (along_inputs) return A::store_chunk(to + piece_offset(at.row, at.input / kLength), z);
#pragma unroll
    for (int k = 0; k < kLength; ++k)
      *reinterpret_cast<typename A::Element*>(to + element_offset<A>(at.row + k, at.input)) = A::element(z[k]);
  };
  const auto store_both = [&](unsigned char* to) {
#pragma unroll
    for (int fill = 0; fill < kFills; ++fill) {
      store(to, left.along_inputs(), place(left.along_inputs(), fill), x[fill]);
      store(to + kTile, right.along_inputs(), place(right.along_inputs(), fill), y[fill]);
    }
  };

  using Block = Sums<A, S::kPairs, S::kOutputs, S::kRows, S::kColumns>;
  Block sums;
  sums.clear();
  const int64_t tiles = (left.inputs + kDepth<A> - 1) / kDepth<A>;
  const auto buffer = [&](int64_t tile) { return shared + tile % 2 * 2 * kTile; };
  if (tiles > 0) load_both(0), store_both(buffer(0));
  if (tiles > 1) load_both(1);
  for (int64_t tile = 0; tile < tiles; ++tile) {
    __syncthreads();
    const unsigned char* const now = buffer(tile);
    typename Block::Half first, second;
    first.load(now, now + kTile, 0), second.load(now, now + kTile, 1);
    // What is loaded is on its way while a whole step multiplies.
    if (tile + 1 < tiles) store_both(buffer(tile + 1));
    if (tile + 2 < tiles) load_both(tile + 2);
    sums.multiply(first), sums.multiply(second);
  }
  sums.each([&](int, int row, int column, Real& sum) {
    const int64_t r = first_row + row, c = first_column + column;
    if (r >= left.rows || c >= right.rows) return;
    Real value = sum * out.scale + (out.bias ? out.bias[c] : Real(0));
    if (out.relu) value = relu(value);
    Real& to = out.to[r * out.pitch + c];
    to = out.add ? to + value : value;
  });
}

template <class A>
void multiply(const Context& context, const Operand<typename A::Real>& left, const Operand<typename A::Real>& right,
              const Output<typename A::Real>& out) {
  using S = MultiplyShape<A>;
  context.launch(multiply_kernel<A>, divided_up(left.rows, S::kPairs) * divided_up(right.rows, S::kOutputs),
                 S::kThreads, 4 * S::kPairs * kRowBytes, left, right, out);
}

}  // namespace pddm::cuda
