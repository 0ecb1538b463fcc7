// Tiles in shared memory, and a block's multiplication of two of them.
//
//   A tile is `rows` rows of 64 bytes: kDepth consecutive inputs k of every row, as 4 pieces of 16 bytes. A piece
//   stands at its number xor (row / 2) % 4, so that 8 neighbouring rows' pieces of one number cover all banks once:
//
//                 bytes 0       16      32      48      64      80      96      112
//     rows 0, 1        0.0     0.1     0.2     0.3     1.0     1.1     1.2     1.3
//     rows 2, 3        2.1     2.0     2.3     2.2     3.1     3.0     3.3     3.2
//     rows 4, 5        4.2     4.3     4.0     4.1     5.2     5.3     5.0     5.1        row.piece
//     rows 6, 7        6.3     6.2     6.1     6.0     7.3     7.2     7.1     7.0
//
//   Block: sums (TM × TN) += A (TM × kDepth) · Bᵀ (TN × kDepth), the sums in the registers of WM × WN warps, each with
//   TM / WM rows and TN / WN columns. A tile is two steps, each loaded before it is multiplied.
#pragma once

#include "device.cuh"

namespace pddm::cuda {

constexpr int kRowBytes = 64, kPieceBytes = 16, kPieces = kRowBytes / kPieceBytes;

// Rows 8 apart have their pieces in the same order: piece_offset(row + 8, piece) is 8 rows after piece_offset(row,
// piece). So have pieces 2 apart but for bit 5: piece_offset(row, piece ^ 2) is piece_offset(row, piece) ^ 32.
__device__ __forceinline__ int piece_offset(int row, int piece) {
  return row * kRowBytes + ((piece ^ ((row >> 1) & 3)) * kPieceBytes);
}

// An arithmetic: what operands are stored as, and what everything else is computed in.
template <class Operand>
struct Half {
  using Element = uint16_t;
  using Real = float;
  static constexpr bool kTensor = true;
  __device__ static uint4 piece(const float (&x)[8]) {
    return {pack(Operand{}, x[0], x[1]), pack(Operand{}, x[2], x[3]), pack(Operand{}, x[4], x[5]),
            pack(Operand{}, x[6], x[7])};
  }
  // Of 16 bytes of Real, as operands.
  __device__ static void store_chunk(unsigned char* to, const float (&x)[4]) {
    *reinterpret_cast<uint2*>(to) = {pack(Operand{}, x[0], x[1]), pack(Operand{}, x[2], x[3])};
  }
};
template <class A>
constexpr int kPieceLength = kPieceBytes / int(sizeof(typename A::Element));
template <class A>
constexpr int kDepth = kRowBytes / int(sizeof(typename A::Element));

struct ArithmeticBf16 : Half<Bf16> {
  using Operand = Bf16;
};
struct ArithmeticF16 : Half<F16> {
  using Operand = F16;
};
struct ArithmeticTf32 {
  using Operand = Tf32;
  using Element = uint32_t;
  using Real = float;
  static constexpr bool kTensor = true;
  __device__ static Element element(float x) { return round_tf32(x); }
  __device__ static uint4 piece(const float (&x)[4]) {
    return {round_tf32(x[0]), round_tf32(x[1]), round_tf32(x[2]), round_tf32(x[3])};
  }
  __device__ static void store_chunk(unsigned char* to, const float (&x)[4]) {
    *reinterpret_cast<uint4*>(to) = piece(x);
  }
};
struct ArithmeticF32 {
  using Element = float;
  using Real = float;
  static constexpr bool kTensor = false;
  __device__ static Element element(float x) { return x; }
  __device__ static uint4 piece(const float (&x)[4]) {
    return {__float_as_uint(x[0]), __float_as_uint(x[1]), __float_as_uint(x[2]), __float_as_uint(x[3])};
  }
  __device__ static void store_chunk(unsigned char* to, const float (&x)[4]) {
    *reinterpret_cast<uint4*>(to) = piece(x);
  }
};
struct ArithmeticF64 {
  using Element = double;
  using Real = double;
  static constexpr bool kTensor = false;
  __device__ static Element element(double x) { return x; }
  __device__ static uint4 piece(const double (&x)[2]) {
    const auto a = static_cast<unsigned long long>(__double_as_longlong(x[0]));
    const auto b = static_cast<unsigned long long>(__double_as_longlong(x[1]));
    return {unsigned(a), unsigned(a >> 32), unsigned(b), unsigned(b >> 32)};
  }
  __device__ static void store_chunk(unsigned char* to, const double (&x)[2]) {
    *reinterpret_cast<uint4*>(to) = piece(x);
  }
};

// Where element k of a row stands in its tile.
template <class A>
__device__ __forceinline__ int element_offset(int row, int k) {
  return piece_offset(row, k / kPieceLength<A>) + k % kPieceLength<A> * int(sizeof(typename A::Element));
}

// The sums of one block. `each(f)` calls f(slot, row, column, sum) for every sum of this thread, column by column;
// `slot` counts the rows it has sums of, each_row(f) calls f(slot, row) for those, and kLanesPerRow neighbouring lanes
// share a row.
template <class A, int TM, int TN, int WM, int WN, bool Tensor = A::kTensor>
class Sums;

template <class A, int TM, int TN, int WM, int WN>
class Sums<A, TM, TN, WM, WN, true> {
  static constexpr int kMmaM = TM / WM / 16, kMmaN = TN / WN / 8;
  static_assert(kMmaM > 0 && kMmaN > 0 && kMmaN % 2 == 0, "a warp has 16 rows and 16 columns at least");
  float sum_[kMmaM][kMmaN][4];

 public:
  static constexpr int kSlots = 2 * kMmaM, kLanesPerRow = 4;

  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int r = 0; r < kMmaM; ++r)
#pragma unroll
      for (int c = 0; c < kMmaN; ++c)
#pragma unroll
        for (int e = 0; e < 4; ++e) sum_[r][c][e] = 0;
  }

  // The operands of one step: 32 of a tile's 64 bytes, in registers.
  struct Step {
    uint32_t left[kMmaM][4], right[kMmaN / 2][4];

    __device__ __forceinline__ void load(const unsigned char* a, const unsigned char* b, int step) {
      const int lane = lane_index(), warp = warp_index();
      // Of four matrices, rows first for A (rows 0-7, 8-15, then the next 16 bytes) and bytes first for B.
      const int a_row = warp / WN * (TM / WM) + lane % 16, a_piece = lane / 16;
      const int b_row = warp % WN * (TN / WN) + lane % 8 + lane / 16 * 8, b_piece = lane / 8 % 2;
      a += piece_offset(a_row, a_piece) ^ (32 * step), b += piece_offset(b_row, b_piece) ^ (32 * step);
#pragma unroll
      for (int r = 0; r < kMmaM; ++r) load_matrices(left[r], a + 16 * r * kRowBytes);
#pragma unroll
      for (int c = 0; c < kMmaN / 2; ++c) load_matrices(right[c], b + 16 * c * kRowBytes);
    }
  };
  __device__ __forceinline__ void multiply(const Step& step) {
#pragma unroll
    for (int c = 0; c < kMmaN / 2; ++c) {
#pragma unroll
      for (int r = 0; r < kMmaM; ++r) {
        const uint32_t (&right)[4] = step.right[c];
        multiply_add(typename A::Operand{}, sum_[r][2 * c], step.left[r], right[0], right[1]);
        multiply_add(typename A::Operand{}, sum_[r][2 * c + 1], step.left[r], right[2], right[3]);
      }
    }
  }

  template <class F>
  __device__ __forceinline__ void each(const F& f) {
    const int thread = fresh_thread_index(), lane = thread % kWarp, warp = thread / kWarp;
    const int row = warp / WN * (TM / WM) + lane / 4, column = warp % WN * (TN / WN) + 2 * (lane % 4);
#pragma unroll
    for (int c = 0; c < 2 * kMmaN; ++c)
#pragma unroll
      for (int r = 0; r < 2 * kMmaM; ++r)
        f(r, row + 8 * r, column + c / 2 * 8 + c % 2, sum_[r / 2][c / 2][r % 2 * 2 + c % 2]);
  }
  // Stores the sums as operands: column k goes to tile (first + k) / kDepth of those that start at `to`, up to `tiles`.
  __device__ __forceinline__ void put(unsigned char* to, int first, int tiles) const {
    constexpr int kPerTile = kDepth<A> / 8, kElement = int(sizeof(typename A::Element));
    static_assert(TN / WN % kDepth<A> == 0, "a warp's columns are whole tiles");
    const int thread = fresh_thread_index(), lane = thread % kWarp, warp = thread / kWarp;
    const int row = warp / WN * (TM / WM) + lane / 4, tile = (first + warp % WN * (TN / WN)) / kDepth<A>;
#pragma unroll
    for (int c = 0; c < kMmaN; ++c) {
      if (tile + c / kPerTile >= tiles) break;
      // Rows of this thread are 8 apart, which leaves a piece's place in its row the same.
      unsigned char* const at =
          to + (tile + c / kPerTile) * TM * kRowBytes + element_offset<A>(row, c % kPerTile * 8 + 2 * (lane % 4));
#pragma unroll
      for (int r = 0; r < 2 * kMmaM; ++r) {
        const float low = sum_[r / 2][c][r % 2 * 2], high = sum_[r / 2][c][r % 2 * 2 + 1];
        if constexpr (kElement == 2)
          *reinterpret_cast<uint32_t*>(at + r * 8 * kRowBytes) = pack(typename A::Operand{}, low, high);
        else
          *reinterpret_cast<uint2*>(at + r * 8 * kRowBytes) = {round_tf32(low), round_tf32(high)};
      }
    }
  }
  template <class F>
  __device__ static __forceinline__ void each_row(const F& f) {
    const int thread = fresh_thread_index(), row = thread / kWarp / WN * (TM / WM) + thread % kWarp / 4;
#pragma unroll
    for (int r = 0; r < 2 * kMmaM; ++r) f(r, row + 8 * r);
  }
};

template <class A, int TM, int TN, int WM, int WN>
class Sums<A, TM, TN, WM, WN, false> {
  using Real = typename A::Real;
  static constexpr int kDown = TM / WM / 4, kAcross = TN / WN / 8, kLength = kPieceLength<A>;
  static_assert(kDown > 0 && kAcross > 0, "a warp has 4 rows and 8 columns at least");
  Real sum_[kDown][kAcross];

 public:
  static constexpr int kSlots = kDown, kLanesPerRow = 8;

  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int r = 0; r < kDown; ++r)
#pragma unroll
      for (int c = 0; c < kAcross; ++c) sum_[r][c] = 0;
  }

  // The operands of one step, left where they are.
  struct Step {
    const unsigned char *a, *b;
    int step;

    __device__ __forceinline__ void load(const unsigned char* from_a, const unsigned char* from_b, int which) {
      a = from_a, b = from_b, step = which;
    }
  };
  __device__ __forceinline__ void multiply(const Step& from) {
    const int lane = lane_index(), warp = warp_index();
    const int row = warp / WN * (TM / WM) + lane / 8, column = warp % WN * (TN / WN) + lane % 8;
    struct alignas(kPieceBytes) Piece {
      Real x[kLength];
    };
#pragma unroll
    for (int piece = 2 * from.step; piece < 2 * from.step + 2; ++piece) {
      Piece right[kAcross];
#pragma unroll
      for (int c = 0; c < kAcross; ++c)
        right[c] = *reinterpret_cast<const Piece*>(from.b + piece_offset(column, piece) + 8 * c * kRowBytes);
#pragma unroll
      for (int r = 0; r < kDown; ++r) {
        const Piece left = *reinterpret_cast<const Piece*>(from.a + piece_offset(row + 4 * r, piece));
#pragma unroll
        for (int k = 0; k < kLength; ++k)
#pragma unroll
          for (int c = 0; c < kAcross; ++c) sum_[r][c] += left.x[k] * right[c].x[k];
      }
    }
  }

  template <class F>
  __device__ __forceinline__ void each(const F& f) {
    const int thread = fresh_thread_index(), lane = thread % kWarp, warp = thread / kWarp;
    const int row = warp / WN * (TM / WM) + lane / 8, column = warp % WN * (TN / WN) + lane % 8;
#pragma unroll
    for (int c = 0; c < kAcross; ++c)
#pragma unroll
      for (int r = 0; r < kDown; ++r) f(r, row + 4 * r, column + 8 * c, sum_[r][c]);
  }
  __device__ __forceinline__ void put(unsigned char* to, int first, int tiles) {
    each([&](int, int row, int column, Real& sum) {
      const int tile = (first + column) / kDepth<A>;
      if (tile < tiles)
        *reinterpret_cast<Real*>(to + tile * TM * kRowBytes + element_offset<A>(row, (first + column) % kDepth<A>)) =
            sum;
    });
  }
  template <class F>
  __device__ static __forceinline__ void each_row(const F& f) {
    const int thread = fresh_thread_index(), row = thread / kWarp / WN * (TM / WM) + thread % kWarp / 8;
#pragma unroll
    for (int r = 0; r < kDown; ++r) f(r, row + 4 * r);
  }
};

}  // namespace pddm::cuda
