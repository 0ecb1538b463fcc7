// What csrc/cuda/device.cuh says in PTX, in C++: there the tags Bf16, F16 and Tf32 come from.
#pragma once

#include <cstdint>
#include <cstring>

#include "emulation.h"

namespace pddm::cuda {

inline unsigned char* shared_memory() { return emulation::shared_memory(); }

template <int Offset = 0>
void copy_async(void* shared, const void* global) {
  emulation::copy_async(static_cast<char*>(shared) + Offset, static_cast<const char*>(global) + Offset);
}
inline void commit_copies() { emulation::commit_copies(); }
template <int Pending>
void wait_copies() {
  emulation::wait_copies(Pending);
}

namespace emulated {

inline uint32_t bits_of(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits;
}
inline float float_of(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}

// Four at once.
using Words = uint32_t __attribute__((vector_size(16)));
using Numbers = float __attribute__((vector_size(16)));
inline Numbers float_of(Words bits) { return reinterpret_cast<Numbers>(bits); }

// x / 2^digits, to nearest, ties to even.
inline uint32_t shifted_out(uint32_t x, int digits) {
  return (x + (1u << (digits - 1)) - 1 + (x >> digits & 1)) >> digits;
}

constexpr uint32_t kInfinity = 0x7f800000, kNaN16 = 0x7fff;

inline uint32_t narrow(Bf16, float x) {
  const uint32_t bits = bits_of(x);
  return (bits & 0x7fffffff) > kInfinity ? kNaN16 : shifted_out(bits, 16);
}
// Not inlined: at -O2 GCC 12 then makes vectors of the calls in one kernel (192 outputs) and gets NaN; not at -O1, not
// at -O3, not with -fno-tree-slp-vectorize, and no sanitizer has anything to say.
[[gnu::noinline]] inline uint32_t narrow(F16, float x) {
  const uint32_t sign = bits_of(x) >> 16 & 0x8000, size = bits_of(x) & 0x7fffffff;
  if (size > kInfinity) return kNaN16;
  if (size >= bits_of(65536.0f)) return sign | 0x7c00;
  if (size >= bits_of(0x1p-14f)) return sign | shifted_out(size - (112u << 23), 13);
  const int digits = 126 - int(size >> 23);  // to multiples of 2^-24
  return digits > 24 ? sign : sign | shifted_out((size & 0x7fffff) | 0x800000, digits);
}

// A float16 in the lower half of each of x.
template <class Bits>
auto widen_f16(Bits x) {
  constexpr uint32_t kRebias = 112u << 23, kSmallest = 113u << 23;  // the smallest normal number
  const Bits sign = (x & 0x8000) << 16, size = (x & 0x7fff) << 13;
  const Bits normal = size >= 31u << 23 ? size | kInfinity : size + kRebias;
  const auto subnormal = float_of(size + kSmallest) - float_of(kSmallest);
  Bits subnormal_bits;
  std::memcpy(&subnormal_bits, &subnormal, sizeof x);
  return float_of((size < 1u << 23 ? subnormal_bits : normal) | sign);
}

}  // namespace emulated

inline float widen(Bf16, uint16_t x) { return emulated::float_of(uint32_t(x) << 16); }
inline float widen(F16, uint16_t x) { return emulated::widen_f16(uint32_t(x)); }

inline uint32_t pack(Bf16 type, float low, float high) {
  return emulated::narrow(type, low) | emulated::narrow(type, high) << 16;
}
inline uint32_t pack(F16 type, float low, float high) {
  return emulated::narrow(type, low) | emulated::narrow(type, high) << 16;
}

// Ties away from zero.
inline uint32_t round_tf32(float x) {
  const uint32_t bits = emulated::bits_of(x);
  return (bits & 0x7fffffff) > emulated::kInfinity ? 0x7fffe000 : (bits + 0x1000) & ~0x1fffu;
}

namespace emulated {

template <bool Transposed>
void load_matrices(uint32_t (&r)[4], const void* row) {
  struct Lane {
    uint32_t* r;
    const unsigned char* row;
  } lane{r, static_cast<const unsigned char*>(row)};
  if (reinterpret_cast<uintptr_t>(row) % 16 != 0) emulation::fail("ldmatrix of a row that is not aligned to 16 bytes");
  if (!emulation::is_shared(row, 16)) emulation::fail("ldmatrix of a row outside of shared memory");
  const auto work = [](void* const* lanes, unsigned) {
    for (int l = 0; l < 32; ++l)
      for (int q = 0; q < 4; ++q) {
        uint32_t& to = static_cast<Lane*>(lanes[l])->r[q];
        if constexpr (Transposed) {
          uint16_t both[2];
          for (int e = 0; e < 2; ++e)
            std::memcpy(both + e, static_cast<Lane*>(lanes[8 * q + l % 4 * 2 + e])->row + l / 4 * 2, 2);
          std::memcpy(&to, both, 4);
        } else {
          std::memcpy(&to, static_cast<Lane*>(lanes[8 * q + l / 4])->row + l % 4 * 4, 4);
        }
      }
  };
  emulation::meet(Transposed ? "ldmatrix.trans" : "ldmatrix", ~0u, work, &lane);
}

}  // namespace emulated

inline void load_matrices(uint32_t (&r)[4], const void* row) { emulated::load_matrices<false>(r, row); }
inline void load_matrices_transposed(uint32_t (&r)[4], const void* row) { emulated::load_matrices<true>(r, row); }

namespace emulated {

// What registers hold, one number or two.
inline void unpack(Bf16, Words w, Numbers* x) { x[0] = float_of(w << 16), x[1] = float_of(w & 0xffff0000); }
inline void unpack(F16, Words w, Numbers* x) { x[0] = widen_f16(w), x[1] = widen_f16(w >> 16); }
inline void unpack(Tf32, Words w, Numbers* x) { x[0] = float_of(w & 0xffffe000); }

struct Fragments {
  float* d;
  const uint32_t *a, *b;
};

// d (16 × 8) += a (16 × 8 registers) · b (8 registers × 8), in fours along the registers' columns. Of registers with
// two numbers, k and k + 1, all k come first and then all k + 1, of both operands.
template <class Operand, int Count>
void multiply_warp(void* const* lanes, unsigned) {
  Words a[16][2], b[8][2];
  for (int l = 0; l < 32; ++l) {
    const Fragments& f = *static_cast<const Fragments*>(lanes[l]);
    const int g = l / 4, t = l % 4;
    a[g][0][t] = f.a[0], a[g + 8][0][t] = f.a[1], a[g][1][t] = f.a[2], a[g + 8][1][t] = f.a[3];
    b[t][g / 4][g % 4] = f.b[0], b[t + 4][g / 4][g % 4] = f.b[1];
  }
  Numbers left[2][Count], right[2][8][Count];
  for (int k = 0; k < 8; ++k) unpack(Operand{}, b[k][0], right[0][k]), unpack(Operand{}, b[k][1], right[1][k]);
  for (int m = 0; m < 16; ++m) {
    unpack(Operand{}, a[m][0], left[0]), unpack(Operand{}, a[m][1], left[1]);
    Numbers low = {}, high = {};  // columns 0 to 3, 4 to 7
    for (int k = 0; k < 8; ++k) {
      for (int h = 0; h < Count; ++h) {
        const float x = left[k / 4][h][k % 4];
        low += x * right[0][k][h], high += x * right[1][k][h];
      }
    }
    for (int t = 0; t < 4; ++t) {
      float* const d = static_cast<const Fragments*>(lanes[m % 8 * 4 + t])->d + m / 8 * 2;
      const Numbers& sum = t < 2 ? low : high;
      d[0] += sum[t % 2 * 2], d[1] += sum[t % 2 * 2 + 1];
    }
  }
}

}  // namespace emulated

#define PDDM_MULTIPLY_ADD(type, count)                                                              \
  inline void multiply_add(type, float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) { \
    const uint32_t b[2] = {b0, b1};                                                                 \
    emulated::Fragments fragments{d, a, b};                                                         \
    emulation::meet("mma of " #type, ~0u, emulated::multiply_warp<type, count>, &fragments);        \
  }
PDDM_MULTIPLY_ADD(Bf16, 2)
PDDM_MULTIPLY_ADD(F16, 2)
PDDM_MULTIPLY_ADD(Tf32, 1)
#undef PDDM_MULTIPLY_ADD

}  // namespace pddm::cuda
