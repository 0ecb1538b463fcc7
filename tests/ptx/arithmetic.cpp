// What instructions make of registers alone, as the PTX manual has it. Only what nvcc emits for the kernels is known,
// and its like of other sizes.
#include <cmath>
#include <limits>
#include <type_traits>
#include <utility>

#include "module.h"

namespace pddm::ptx {
namespace {

// --- A function of values as the handler of an instruction -----------------------------------------------------------

template <class T>
constexpr char kLetter = std::is_same_v<T, bool>     ? 'p'
                         : std::is_same_v<T, float>  ? 'f'
                         : std::is_same_v<T, double> ? 'd'
                         : sizeof(T) == 2            ? 'h'
                         : sizeof(T) == 4            ? 'w'
                                                     : 'l';

template <auto F, class R, class... A, size_t... I>
void apply(Thread& thread, const Instruction& i, R (*)(A...), std::index_sequence<I...>) {
  thread.put<R>(i.operands[0], F(thread.get<A>(i.operands[I + 1])...));
}
template <auto F, class R, class... A>
Form form(R (*)(A...)) {
  const Handler run = [](Thread& thread, const Instruction& first) {
    for (const Instruction* i = &first; i < &first + first.alike; ++i)
      thread.here = i, apply<F>(thread, *i, F, std::index_sequence_for<A...>{});
  };
  return {run, {kLetter<R>, kLetter<A>...}, 0, Flow::on, true};
}
template <auto F>
Form form() {
  return form<F>(F);
}

// --- Integers --------------------------------------------------------------------------------------------------------

template <class T>
using Bits = std::make_unsigned_t<T>;

template <class T>
T add(T a, T b) {
  if constexpr (std::is_integral_v<T>) return T(Bits<T>(a) + Bits<T>(b));
  return T(a + b);
}
template <class T>
T subtract(T a, T b) {
  return T(Bits<T>(a) - Bits<T>(b));
}
template <class T>
T multiply_low(T a, T b) {
  return T(uint64_t(a) * uint64_t(b));
}
int64_t multiply_high(int64_t a, int64_t b) { return int64_t(__int128(a) * b >> 64); }
template <class Wide, class T>
Wide multiply_wide(T a, T b) {
  return Wide(a) * Wide(b);
}
template <class T>
T multiply_add(T a, T b, T c) {
  return T(uint64_t(a) * uint64_t(b) + uint64_t(c));
}
// Of a division by zero the manual says that it is unspecified, and of the smallest number's by −1 nothing.
template <class T>
void check_division(T a, T b) {
  if (b == 0) throw Fault("a division by zero");
  if (std::is_signed_v<T> && a == std::numeric_limits<T>::min() && b == T(-1)) throw Fault("a division that overflows");
}
template <class T>
T divide(T a, T b) {
  return check_division(a, b), T(a / b);
}
template <class T>
T remainder(T a, T b) {
  return check_division(a, b), T(a % b);
}
template <class T>
T smaller(T a, T b) {
  return b < a ? b : a;
}
template <class T>
T larger(T a, T b) {
  return a < b ? b : a;
}
template <class T>
T negative(T a) {
  return T(Bits<T>(0) - Bits<T>(a));
}
template <class T>
T bits_and(T a, T b) {
  return T(a & b);
}
template <class T>
T bits_or(T a, T b) {
  return T(a | b);
}
template <class T>
T bits_xor(T a, T b) {
  return T(a ^ b);
}
template <class T>
T bits_not(T a) {
  if constexpr (std::is_same_v<T, bool>)
    return !a;
  else
    return T(~a);
}

// By more than the width is by the width.
template <class T>
T shift_left(T a, uint32_t by) {
  return by < sizeof(T) * 8 ? T(a << by) : T(0);
}
template <class T>
T shift_right(T a, uint32_t by) {
  constexpr uint32_t kLast = sizeof(T) * 8 - 1;
  if (by <= kLast) return T(a >> by);
  return std::is_signed_v<T> ? T(a >> kLast) : T(0);
}

// b with the lowest `length` bits of a from bit `first` on; of both numbers the lowest 8 bits count.
template <class T>
T insert_field(T a, T b, uint32_t first, uint32_t length) {
  const uint32_t width = sizeof(T) * 8, at = first & 0xff, count = length & 0xff;
  for (uint32_t k = 0; k < count && at + k < width; ++k) {
    const T bit = T(1) << (at + k);
    b = (a >> k & 1) ? b | bit : b & ~bit;
  }
  return b;
}
// How far the highest one is from bit 31.
uint32_t find_shift(uint32_t a) {
  for (uint32_t by = 0; by < 32; ++by)
    if (a << by >> 31) return by;
  return 0xffffffff;
}
uint32_t reverse(uint32_t a) {
  uint32_t reversed = 0;
  for (int k = 0; k < 32; ++k) reversed |= (a >> k & 1) << (31 - k);
  return reversed;
}
uint32_t count_ones(uint32_t a) {
  uint32_t count = 0;
  for (int k = 0; k < 32; ++k) count += a >> k & 1;
  return count;
}

template <class T>
T move(T a) {
  return a;
}
template <class T>
T select(T a, T b, bool which) {
  return which ? a : b;
}
template <class To, class From>
To convert(From a) {
  return To(a);
}

// The first of two is the lower half.
void unpack(Thread& thread, const Instruction& i) {
  const auto both = thread.get<uint64_t>(i.operands[2]);
  thread.put(i.operands[0], uint32_t(both)), thread.put(i.operands[1], uint32_t(both >> 32));
}
void pack(Thread& thread, const Instruction& i) {
  thread.put(i.operands[0], thread.get<uint32_t>(i.operands[1]) | uint64_t(thread.get<uint32_t>(i.operands[2])) << 32);
}

// --- Floating point -------------------------------------------------------------------------------------------------

// To nearest, subnormal numbers kept; every NaN of 4 bytes that is computed is one and the same.

float one_nan(float x) {
  constexpr uint32_t kNaN = 0x7fffffff;
  if (x == x) return x;
  std::memcpy(&x, &kNaN, sizeof x);
  return x;
}
double one_nan(double x) { return x; }

template <class T>
T plus(T a, T b) {
  return one_nan(a + b);
}
template <class T>
T minus(T a, T b) {
  return one_nan(a - b);
}
template <class T>
T times(T a, T b) {
  return one_nan(a * b);
}
template <class T>
T fused(T a, T b, T c) {
  return one_nan(std::fma(a, b, c));
}
template <class T>
T quotient(T a, T b) {
  return one_nan(a / b);
}
template <class T>
T reciprocal(T a) {
  return one_nan(1 / a);
}
template <class T>
T root(T a) {
  return one_nan(std::sqrt(a));
}
// As exact as can be, where the manual allows 2^-22.9 of it.
float reciprocal_root(float a) { return one_nan(float(1 / std::sqrt(double(a)))); }
// Of the sign alone.
template <class T>
T opposite(T a) {
  return std::copysign(a, std::signbit(a) ? T(1) : T(-1));
}
template <class T>
T magnitude(T a) {
  return std::copysign(a, T(1));
}
// The number, if only one is; −0 is less than +0.
template <class T>
T maximum(T a, T b) {
  if (a != a) return one_nan(b);
  if (b != b || a > b) return a;
  return a == b && std::signbit(b) ? a : b;
}
// A NaN, if either is.
float maximum_or_nan(float a, float b) { return a != a || b != b ? one_nan(a + b) : maximum(a, b); }

template <class T>
bool both_numbers(T a, T b) {
  return a == a && b == b;
}
template <class T>
bool any_nan(T a, T b) {
  return a != a || b != b;
}
template <class T>
bool equal(T a, T b) {
  return a == b;
}
template <class T>
bool less(T a, T b) {
  return a < b;
}
template <class T>
bool less_equal(T a, T b) {
  return a <= b;
}
template <class T>
bool greater(T a, T b) {
  return a > b;
}
template <class T>
bool greater_equal(T a, T b) {
  return a >= b;
}
template <class T>
bool not_equal(T a, T b) {
  return a < b || a > b || (std::is_integral_v<T> && a != b);
}
// For numbers `compare`, and true for a NaN.
template <class T, bool (*compare)(T, T)>
bool or_nan(T a, T b) {
  return any_nan(a, b) || compare(a, b);
}

// --- Conversions with a rule of their own ----------------------------------------------------------------------------

float narrowed(double a) { return one_nan(float(a)); }

// Towards zero; past the ends to the ends.
int64_t truncate(double a) {
  if (a != a) return std::numeric_limits<int64_t>::min();
  if (a >= 0x1p63) return std::numeric_limits<int64_t>::max();
  return a <= -0x1p63 ? std::numeric_limits<int64_t>::min() : int64_t(a);
}

// A float of `digits` binary digits, the first one included, whose smallest exponent of a normal number is `least` and
// that ends before 2^end: to nearest, ties to even. Exact, for doubles hold all there is on the way.
double rounded(double x, int digits, int least, int end) {
  int exponent;
  std::frexp(x, &exponent);  // |x| in [1/2, 1) · 2^exponent
  const int unit = std::max(exponent - 1, least) - (digits - 1);
  const double result = std::ldexp(std::nearbyint(std::ldexp(x, -unit)), unit);
  return std::fabs(result) >= std::ldexp(1.0, end) ? std::copysign(INFINITY, x) : result;
}
uint32_t bits_of(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits;
}
uint32_t to_bf16(float x) {
  if (x != x) return 0x7fff;
  return bits_of(float(std::isinf(x) ? x : rounded(x, 8, -126, 128))) >> 16;
}
uint32_t to_f16(float x) {
  if (x != x) return 0x7fff;
  const uint32_t sign = std::signbit(x) ? 0x8000 : 0;
  const double size = std::fabs(std::isinf(x) ? x : rounded(x, 11, -14, 16));
  if (std::isinf(size)) return sign | 0x7c00;
  if (size < 0x1p-14) return sign | uint32_t(size * 0x1p24);
  const int exponent = std::ilogb(size);
  return sign | uint32_t(exponent + 15) << 10 | (uint32_t(std::ldexp(size, 10 - exponent)) & 0x3ff);
}
// The first operand's is the upper half.
template <uint32_t (*narrow)(float)>
uint32_t pair(float high, float low) {
  return narrow(high) << 16 | narrow(low);
}
// To nearest, ties away from zero.
uint32_t to_tf32(float x) {
  if (x != x) return 0x7fffffff;
  if (std::isinf(x)) return bits_of(x);
  int exponent;
  std::frexp(x, &exponent);
  const int unit = std::max(exponent - 1, -126) - 10;
  return bits_of(float(std::ldexp(std::round(std::ldexp(double(x), -unit)), unit)));
}

// --- The table -------------------------------------------------------------------------------------------------------

template <class T>
void add_integer(Forms& f, const std::string& type) {
  f["add" + type] = form<add<T>>();
  f["sub" + type] = form<subtract<T>>();
  f["mul.lo" + type] = form<multiply_low<T>>();
  f["mad.lo" + type] = form<multiply_add<T>>();
  f["div" + type] = form<divide<T>>();
  f["rem" + type] = form<remainder<T>>();
  f["min" + type] = form<smaller<T>>();
  f["max" + type] = form<larger<T>>();
  f["shr" + type] = form<shift_right<T>>();
  f["setp.eq" + type] = form<equal<T>>();
  f["setp.ne" + type] = form<not_equal<T>>();
  f["setp.lt" + type] = form<less<T>>();
  f["setp.le" + type] = form<less_equal<T>>();
  f["setp.gt" + type] = form<greater<T>>();
  f["setp.ge" + type] = form<greater_equal<T>>();
  f["selp" + type] = form<select<T>>();
  f["mov" + type] = form<move<T>>();
  if (std::is_signed_v<T>) f["neg" + type] = form<negative<T>>();
}

template <class T>
void add_bits(Forms& f, const std::string& type) {
  f["and" + type] = form<bits_and<T>>();
  f["or" + type] = form<bits_or<T>>();
  f["xor" + type] = form<bits_xor<T>>();
  f["not" + type] = form<bits_not<T>>();
  if constexpr (sizeof(T) > 1) {
    f["shl" + type] = form<shift_left<T>>();
    f["selp" + type] = form<select<T>>();
    f["setp.eq" + type] = form<equal<T>>();
    f["setp.ne" + type] = form<not_equal<T>>();
  }
  f["mov" + type] = form<move<T>>();
}

template <class T>
void add_floating(Forms& f, const std::string& type) {
  for (const char* rounding : {"", ".rn"}) {
    f["add" + (rounding + type)] = form<plus<T>>();
    f["sub" + (rounding + type)] = form<minus<T>>();
    f["mul" + (rounding + type)] = form<times<T>>();
  }
  f["fma.rn" + type] = form<fused<T>>();
  f["div.rn" + type] = form<quotient<T>>();
  f["rcp.rn" + type] = form<reciprocal<T>>();
  f["sqrt.rn" + type] = form<root<T>>();
  f["neg" + type] = form<opposite<T>>();
  f["abs" + type] = form<magnitude<T>>();
  f["max" + type] = form<maximum<T>>();
  f["setp.eq" + type] = form<equal<T>>();
  f["setp.ne" + type] = form<not_equal<T>>();
  f["setp.lt" + type] = form<less<T>>();
  f["setp.le" + type] = form<less_equal<T>>();
  f["setp.gt" + type] = form<greater<T>>();
  f["setp.ge" + type] = form<greater_equal<T>>();
  f["setp.equ" + type] = form<or_nan<T, equal<T>>>();
  f["setp.neu" + type] = form<or_nan<T, not_equal<T>>>();
  f["setp.ltu" + type] = form<or_nan<T, less<T>>>();
  f["setp.leu" + type] = form<or_nan<T, less_equal<T>>>();
  f["setp.gtu" + type] = form<or_nan<T, greater<T>>>();
  f["setp.geu" + type] = form<or_nan<T, greater_equal<T>>>();
  f["setp.num" + type] = form<both_numbers<T>>();
  f["setp.nan" + type] = form<any_nan<T>>();
  f["selp" + type] = form<select<T>>();
  f["mov" + type] = form<move<T>>();
}

}  // namespace

void add_arithmetic(Forms& f) {
  add_integer<uint16_t>(f, ".u16"), add_integer<int16_t>(f, ".s16");
  add_integer<uint32_t>(f, ".u32"), add_integer<int32_t>(f, ".s32");
  add_integer<uint64_t>(f, ".u64"), add_integer<int64_t>(f, ".s64");
  add_bits<bool>(f, ".pred"), add_bits<uint16_t>(f, ".b16");
  add_bits<uint32_t>(f, ".b32"), add_bits<uint64_t>(f, ".b64");
  add_floating<float>(f, ".f32"), add_floating<double>(f, ".f64");
  f["max.NaN.f32"] = form<maximum_or_nan>();
  f["rsqrt.approx.f32"] = form<reciprocal_root>();

  f["mul.hi.s64"] = form<multiply_high>();
  f["mul.wide.u16"] = form<multiply_wide<uint32_t, uint16_t>>();
  f["mul.wide.u32"] = form<multiply_wide<uint64_t, uint32_t>>();
  f["mul.wide.s32"] = form<multiply_wide<int64_t, int32_t>>();
  f["bfi.b32"] = form<insert_field<uint32_t>>();
  f["bfi.b64"] = form<insert_field<uint64_t>>();
  f["bfind.shiftamt.u32"] = form<find_shift>();
  f["brev.b32"] = form<reverse>();
  f["popc.b32"] = form<count_ones>();

  f["mov.b64 to {}"] = {unpack, "{ww}l"};
  f["mov.b64 of {}"] = {pack, "l{ww}"};

  f["cvt.s64.s32"] = form<convert<int64_t, int32_t>>();
  f["cvt.u64.u32"] = form<convert<uint64_t, uint32_t>>();
  f["cvt.u32.u64"] = form<convert<uint32_t, uint64_t>>();
  f["cvt.u16.u32"] = form<convert<uint16_t, uint32_t>>();
  f["cvt.u32.u16"] = form<convert<uint32_t, uint16_t>>();
  f["cvt.rn.f32.s16"] = form<convert<float, int16_t>>();
  f["cvt.rn.f32.s32"] = form<convert<float, int32_t>>();
  f["cvt.rn.f32.s64"] = form<convert<float, int64_t>>();
  f["cvt.rn.f64.s16"] = form<convert<double, int16_t>>();
  f["cvt.rn.f64.s32"] = form<convert<double, int32_t>>();
  f["cvt.rn.f64.s64"] = form<convert<double, int64_t>>();
  f["cvt.f64.f32"] = form<convert<double, float>>();
  f["cvt.rn.f32.f64"] = form<narrowed>();
  f["cvt.rzi.s64.f64"] = form<truncate>();
  f["cvt.rn.bf16x2.f32"] = form<pair<to_bf16>>();
  f["cvt.rn.f16x2.f32"] = form<pair<to_f16>>();
  f["cvt.rna.tf32.f32"] = form<to_tf32>();
}

}  // namespace pddm::ptx
