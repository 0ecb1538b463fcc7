// Vectors of the instruction set this translation unit is compiled for.
//
// PDDM_ISA names the set and the namespace; PDDM_VECTOR_BYTES is its register width. On GCC and Clang a vector is a
// vector-extension type, which both lower to the set's own registers; on any other compiler (or with
// PDDM_PLAIN_VECTORS) it is an array with loops of constant length, left to the compiler's vectoriser.
//
// Only the code of one instruction set may live in such a unit: nothing here, and nothing that includes this, may
// instantiate a template or inline function that another unit could share, or the linker might keep the wrong copy.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#if defined(__GNUC__)
#define PDDM_INLINE inline __attribute__((always_inline))
#else
#define PDDM_INLINE inline
#endif

#if defined(__clang__)
#define PDDM_UNROLL _Pragma("unroll")
#elif defined(__GNUC__)
#define PDDM_UNROLL _Pragma("GCC unroll 32")
#else
#define PDDM_UNROLL
#endif

#if defined(__GNUC__)
#define PDDM_PREFETCH(address) __builtin_prefetch(address)
#define PDDM_PREFETCH_FAR(address) __builtin_prefetch(address, 0, 2)  // into the second-level cache only
#else
#define PDDM_PREFETCH(address) (void)(address)
#define PDDM_PREFETCH_FAR(address) (void)(address)
#endif

// The compiler may assume nothing of this vector's value from here on.
#if defined(__GNUC__) && defined(__x86_64__) && !defined(PDDM_PLAIN_VECTORS)
#define PDDM_OPAQUE(vector) __asm__ volatile("" : "+v"(vector))
#elif defined(__GNUC__) && defined(__aarch64__) && !defined(PDDM_PLAIN_VECTORS)
#define PDDM_OPAQUE(vector) __asm__ volatile("" : "+w"(vector))
#else
#define PDDM_OPAQUE(vector) (void)(vector)
#endif

namespace pddm::PDDM_ISA {

template <class T>
constexpr int kWidth = PDDM_VECTOR_BYTES / int(sizeof(T));

template <class T>
struct BitsOf;
template <>
struct BitsOf<float> {
  using type = uint32_t;
};
template <>
struct BitsOf<double> {
  using type = uint64_t;
};
template <>
struct BitsOf<int32_t> {
  using type = uint32_t;
};

#if defined(__GNUC__) && !defined(PDDM_PLAIN_VECTORS)

template <class T>
struct VectorOf {
  typedef T type __attribute__((vector_size(PDDM_VECTOR_BYTES)));
};
template <class T>
using Vec = typename VectorOf<T>::type;

template <class T>
PDDM_INLINE Vec<T> broadcast(T x) {
  return x - Vec<T>{};
}

template <class T>
PDDM_INLINE Vec<T> absolute(Vec<T> x) {
  using Bits = Vec<typename BitsOf<T>::type>;
  const auto sign = typename BitsOf<T>::type(1) << (8 * sizeof(T) - 1);
  return Vec<T>(Bits(x) & ~broadcast(sign));
}

// NaN passes, as in torch.
template <class T>
PDDM_INLINE Vec<T> relu(Vec<T> x) {
  return x < Vec<T>{} ? Vec<T>{} : x;
}

// x where gate > 0 (or is NaN), 0 elsewhere: the gradient of relu.
template <class T>
PDDM_INLINE Vec<T> where_alive(Vec<T> gate, Vec<T> x) {
  return gate <= Vec<T>{} ? Vec<T>{} : x;
}

template <class T, int High, size_t... I>
PDDM_INLINE Vec<T> interleave(Vec<T> a, Vec<T> b, std::index_sequence<I...>) {
  constexpr int n = kWidth<T>;
#if defined(__clang__) || __GNUC__ >= 12
  return __builtin_shufflevector(a, b, (int(I % 2) * n + int(I / 2) + High * n / 2)...);
#else
  using Index = Vec<typename BitsOf<T>::type>;
  return __builtin_shuffle(a, b, Index{(I % 2) * n + I / 2 + High * n / 2 ...});
#endif
}

#else

template <class T>
struct Vec {
  T lane[kWidth<T>];
  PDDM_INLINE T& operator[](int i) { return lane[i]; }
  PDDM_INLINE T operator[](int i) const { return lane[i]; }
};

#define PDDM_LANEWISE(name, expression)                         \
  template <class T>                                            \
  PDDM_INLINE Vec<T> name(const Vec<T>& a, const Vec<T>& b) {   \
    Vec<T> r;                                                   \
    for (int i = 0; i < kWidth<T>; ++i) r.lane[i] = expression; \
    return r;                                                   \
  }
PDDM_LANEWISE(operator+, a.lane[i] + b.lane[i])
PDDM_LANEWISE(operator-, a.lane[i] - b.lane[i])
PDDM_LANEWISE(operator*, a.lane[i] * b.lane[i])
PDDM_LANEWISE(where_alive_lanes, a.lane[i] <= T(0) ? T(0) : b.lane[i])
#undef PDDM_LANEWISE

template <class T>
PDDM_INLINE Vec<T>& operator+=(Vec<T>& a, const Vec<T>& b) {
  return a = a + b;
}
template <class T>
PDDM_INLINE Vec<T>& operator*=(Vec<T>& a, const Vec<T>& b) {
  return a = a * b;
}
template <class T>
PDDM_INLINE Vec<T> broadcast(T x) {
  Vec<T> r;
  for (int i = 0; i < kWidth<T>; ++i) r.lane[i] = x;
  return r;
}
template <class T>
PDDM_INLINE Vec<T> absolute(Vec<T> x) {
  for (int i = 0; i < kWidth<T>; ++i) x.lane[i] = x.lane[i] < T(0) ? -x.lane[i] : x.lane[i];
  return x;
}
template <class T>
PDDM_INLINE Vec<T> relu(Vec<T> x) {
  for (int i = 0; i < kWidth<T>; ++i) x.lane[i] = x.lane[i] < T(0) ? T(0) : x.lane[i];
  return x;
}
template <class T>
PDDM_INLINE Vec<T> where_alive(Vec<T> gate, Vec<T> x) {
  return where_alive_lanes(gate, x);
}
template <class T, int High, size_t... I>
PDDM_INLINE Vec<T> interleave(Vec<T> a, Vec<T> b, std::index_sequence<I...>) {
  constexpr int n = kWidth<T>;
  return Vec<T>{{(I % 2 ? b : a).lane[I / 2 + High * n / 2]...}};
}

#endif

template <class T>
PDDM_INLINE Vec<T> load(const T* p) {
  Vec<T> v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

template <class T>
PDDM_INLINE void store(T* p, Vec<T> v) {
  std::memcpy(p, &v, sizeof v);
}

// Bit by bit the lanes where x > floor, of which NaN is not one.
template <class T>
PDDM_INLINE uint32_t lanes_above(Vec<T> x, Vec<T> floor) {
#if defined(__AVX512F__) && !defined(PDDM_PLAIN_VECTORS)
  if constexpr (std::is_integral_v<T>)
    return _mm512_cmpgt_epi32_mask(__m512i(x), __m512i(floor));
  else if constexpr (sizeof(T) == 4)
    return _mm512_cmp_ps_mask(__m512(x), __m512(floor), _CMP_GT_OQ);
  else
    return _mm512_cmp_pd_mask(__m512d(x), __m512d(floor), _CMP_GT_OQ);
#elif defined(__AVX2__) && !defined(PDDM_PLAIN_VECTORS)
  if constexpr (sizeof(T) == 4)
    return uint32_t(_mm256_movemask_ps(__m256(x > floor)));
  else
    return uint32_t(_mm256_movemask_pd(__m256d(x > floor)));
#else
  uint32_t lanes = 0;
  for (int i = 0; i < kWidth<T>; ++i) lanes |= uint32_t(x[i] > floor[i]) << i;
  return lanes;
#endif
}

// The lanes that are named, next to each other; what follows them may be overwritten up to a whole vector.
template <class T>
PDDM_INLINE void store_lanes(T* to, Vec<T> x, uint32_t lanes) {
#if defined(__AVX512F__) && !defined(PDDM_PLAIN_VECTORS)
  if constexpr (sizeof(T) == 4)
    store(to, Vec<T>(_mm512_maskz_compress_ps(__mmask16(lanes), __m512(x))));
  else
    store(to, Vec<T>(_mm512_maskz_compress_pd(__mmask8(lanes), __m512d(x))));
#else
  T lane[kWidth<T>];
  store(lane, x);
  for (; lanes; lanes &= lanes - 1) *to++ = lane[__builtin_ctz(lanes)];
#endif
}

// Rows become columns; the width's log2 rounds of a perfect shuffle.
template <class T>
PDDM_INLINE void transpose(Vec<T>* v) {
  constexpr int n = kWidth<T>;
  using Lanes = std::make_index_sequence<n>;
  PDDM_UNROLL
  for (int round = 1; round < n; round *= 2) {
    Vec<T> w[n];
    PDDM_UNROLL
    for (int r = 0; r < n / 2; ++r) {
      w[2 * r] = interleave<T, 0>(v[r], v[r + n / 2], Lanes{});
      w[2 * r + 1] = interleave<T, 1>(v[r], v[r + n / 2], Lanes{});
    }
    PDDM_UNROLL
    for (int r = 0; r < n; ++r) v[r] = w[r];
  }
}

#if defined(PDDM_HAS_BF16)

// Two floats, rounded to the nearest even bfloat16, in one 32-bit lane: the even index of the product in the low half.
PDDM_INLINE Vec<uint32_t> pack_bf16(Vec<float> even, Vec<float> odd) {
#if defined(PDDM_EMULATE_BF16)
  const auto round = [](Vec<float> x) {
    const auto bits = Vec<uint32_t>(x);
    const auto rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    return x == x ? rounded : (bits >> 16) | 0x40u;
  };
  return round(even) | (round(odd) << 16);
#else
  const __m512bh both = _mm512_cvtne2ps_pbh(__m512(odd), __m512(even));
  const auto words = (__m512i)both;  // low half: the sixteen even ones, high half: the odd ones
  const __m512i lanes = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6, 21,
                                         5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
  return Vec<uint32_t>(_mm512_permutexvar_epi16(lanes, words));
#endif
}

// The same of neighbours, of 32 floats in turn.
PDDM_INLINE Vec<uint32_t> pack_bf16_pairs(Vec<float> first, Vec<float> second) {
#if defined(PDDM_EMULATE_BF16)
  const Vec<float> both[2] = {first, second};
  Vec<float> even, odd;
  for (int lane = 0; lane < 16; ++lane)
    even[lane] = both[lane / 8][lane % 8 * 2], odd[lane] = both[lane / 8][lane % 8 * 2 + 1];
  return pack_bf16(even, odd);
#else
  return Vec<uint32_t>((__m512i)_mm512_cvtne2ps_pbh(__m512(second), __m512(first)));
#endif
}

PDDM_INLINE Vec<float> dot_bf16(Vec<float> sum, Vec<uint32_t> a, Vec<uint32_t> b) {
#if defined(PDDM_EMULATE_BF16)
  const auto low = [](Vec<uint32_t> x) { return Vec<float>(x << 16); };
  const auto high = [](Vec<uint32_t> x) { return Vec<float>(x & 0xffff0000u); };
  return sum + high(a) * high(b) + low(a) * low(b);
#else
  return Vec<float>(_mm512_dpbf16_ps(__m512(sum), (__m512bh)__m512i(a), (__m512bh)__m512i(b)));
#endif
}

#endif

#if defined(PDDM_HAS_INT16)

// To the nearest, of two equally near the even one, of |x| < 2²².
PDDM_INLINE Vec<int32_t> round_to_int(Vec<float> x) {
  constexpr float kNoFraction = 3 << 22;
  Vec<float> shifted = x + kNoFraction;
  PDDM_OPAQUE(shifted);
  return __builtin_convertvector(shifted - kNoFraction, Vec<int32_t>);
}

// The same, of two equally near one of them, of |x| < 2³¹.
PDDM_INLINE Vec<int32_t> nearest_int(Vec<float> x) { return Vec<int32_t>(_mm512_maskz_cvtps_epi32(0xffff, __m512(x))); }

PDDM_INLINE Vec<float> to_float(Vec<int32_t> x) { return __builtin_convertvector(x, Vec<float>); }

// sum + the products of the halves of each lane.
PDDM_INLINE Vec<int32_t> dot_int16(Vec<int32_t> sum, Vec<int32_t> a, Vec<int32_t> b) {
#if defined(PDDM_EMULATE_INT16)
  return sum + (a >> 16) * (b >> 16) + ((a << 16) >> 16) * ((b << 16) >> 16);
#else
  return Vec<int32_t>(_mm512_dpwssd_epi32(__m512i(sum), __m512i(a), __m512i(b)));
#endif
}

#endif

}  // namespace pddm::PDDM_ISA
