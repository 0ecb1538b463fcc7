// Instructions one by one, in kernels of a few lines, against values worked out by hand; and what is refused.
#include <cmath>
#include <cstdio>
#include <limits>

#include "run.h"

namespace {

using namespace pddm;
using ptx::expect_refused;
using ptx::Module;
using ptx::Ran;

constexpr float kInf = INFINITY;
const float kNaN = std::numeric_limits<float>::quiet_NaN();
const double kWideNaN = std::numeric_limits<double>::quiet_NaN();

template <class To, class From>
To same_bits(From from) {
  static_assert(sizeof(To) == sizeof(From), "as many bits");
  To to;
  std::memcpy(&to, &from, sizeof to);
  return to;
}
uint64_t bits(float x) { return same_bits<uint32_t>(x); }
uint64_t bits(double x) { return same_bits<uint64_t>(x); }
uint64_t bits(int x) { return uint32_t(x); }
uint64_t bits(long x) { return uint64_t(x); }

// A kernel of one parameter, `to`, in %to, with registers of every type.
std::string kernel(const std::string& body) {
  return ".version 9.0\n.target sm_80\n.address_size 64\n.extern .shared .align 128 .b8 shared_bytes[];\n"
         ".global .align 8 .u64 counter;\n.global .align 4 .b32 table[3] = {7, 8, 9};\n"
         ".global .align 1 .b8 $format[8] = {97, 32, 37, 108, 108, 100, 33};\n"  // a %lld!
         ".extern .func (.param .b32 func_retval0) vprintf(.param .b64 vprintf_param_0, .param .b64 vprintf_param_1);\n"
         ".visible .entry test(.param .u64 to)\n.maxntid 1024, 1, 1\n{\n"
         ".local .align 8 .b8 depot[32];\n.reg .pred %p<9>;\n.reg .b16 %h<9>;\n.reg .b32 %r<40>;\n.reg .b64 %rd<9>;\n"
         ".reg .f32 %f<40>;\n.reg .f64 %fd<9>;\n.reg .b64 %to, %at;\n.reg .b32 %lane;\n"
         "ld.param.u64 %to, [to];\ncvta.to.global.u64 %to, %to;\nmov.u32 %lane, %tid.x;\n" +
         body + "\nret;\n}\n";
}

// `words` are at %to.
Ran run(const std::string& body, unsigned threads = 1, std::vector<uint64_t> words = std::vector<uint64_t>(256),
        size_t shared_bytes = 4096) {
  return ptx::run_text(kernel(body), {dim3(1), dim3(threads), shared_bytes, nullptr, nullptr}, std::move(words));
}

// --- One result of up to three operands ------------------------------------------------------------------------------

// The letters of module.h, the result's first.
struct Row {
  const char *opcode, *letters;
  uint64_t a, b, c, expected;
};

std::string name_of(char letter, int number) {
  static const std::map<char, std::string> names = {{'p', "%p"},  {'h', "%h"}, {'w', "%r"},
                                                    {'l', "%rd"}, {'f', "%f"}, {'d', "%fd"}};
  return names.at(letter) + std::to_string(number);
}

void check_row(const Row& row) {
  std::string body, operands = name_of(row.letters[0], 0);
  const uint64_t values[] = {row.a, row.b, row.c};
  const auto suffix = [](char letter) {
    return letter == 'h'   ? ".u16 "
           : letter == 'w' ? ".u32 "
           : letter == 'l' ? ".u64 "
           : letter == 'f' ? ".f32 "
                           : ".f64 ";
  };
  std::vector<uint64_t> words(256);
  for (int q = 1; row.letters[q]; ++q) {
    const char letter = row.letters[q];
    words[size_t(q)] = values[q - 1];
    const std::string from = ", [%to+" + std::to_string(8 * q) + "];\n";
    if (letter == 'p')
      body += "ld.global.u32 %r30" + from + "setp.ne.s32 " + name_of('p', q) + ", %r30, 0;\n";
    else
      body += "ld.global" + std::string(suffix(letter)) + name_of(letter, q) + from;
    operands += ", " + name_of(letter, q);
  }
  body += std::string(row.opcode) + " " + operands + ";\n";
  if (row.letters[0] == 'p')
    body += "selp.u32 %r31, 1, 0, %p0;\nst.global.u32 [%to], %r31;";
  else
    body += "st.global" + std::string(suffix(row.letters[0])) + "[%to], " + name_of(row.letters[0], 0) + ";";
  const Ran ran = run(body, 1, words);
  CHECK(ran.error.empty(), "%s: %s", row.opcode, ran.error.c_str());
  CHECK(ran.words[0] == row.expected, "%s of %s, %s, %s: %s instead of %s", row.opcode, ptx::hexadecimal(row.a).c_str(),
        ptx::hexadecimal(row.b).c_str(), ptx::hexadecimal(row.c).c_str(), ptx::hexadecimal(ran.words[0]).c_str(),
        ptx::hexadecimal(row.expected).c_str());
}

constexpr uint64_t kNo = 0, kLow = uint64_t(1) << 63, kOne32 = 0xffffffff, kOnes = ~uint64_t(0);
constexpr uint64_t kCanonical = 0x7fffffff;  // NaN

void check_integers() {
  const Row rows[] = {
      {"add.s32", "www", 0x7fffffff, 1, kNo, 0x80000000},
      {"add.s64", "lll", kOne32, 1, kNo, kOne32 + 1},
      {"add.u64", "lll", kOnes, 2, kNo, 1},
      {"sub.s32", "www", 3, 5, kNo, 0xfffffffe},
      {"sub.s64", "lll", 3, 5, kNo, kOnes - 1},
      {"mul.lo.s32", "www", 0x10003, 0x10005, kNo, 0x8000f},
      {"mul.lo.s64", "lll", 0x100000003, 0x100000005, kNo, 0x80000000f},
      {"mul.hi.s64", "lll", bits(-3L), 5, kNo, kOnes},
      {"mul.hi.s64", "lll", 0x5000000000000000, 0x70, kNo, 0x23},
      {"mul.wide.s32", "lww", bits(-3), 5, kNo, bits(-15L)},
      {"mul.wide.u32", "lww", bits(-3), 5, kNo, 0x4fffffff1},
      {"mul.wide.u16", "whh", 0xfffd, 5, kNo, 0x4fff1},
      {"mad.lo.s32", "wwww", 0x10003, 0x10005, 0xfffffff8, 0x80007},
      {"div.s32", "www", bits(-7), 2, kNo, bits(-3)},
      {"div.u32", "www", bits(-7), 2, kNo, 0x7ffffffc},
      {"div.s64", "lll", bits(-7L), 2, kNo, bits(-3L)},
      {"div.u64", "lll", bits(-7L), 2, kNo, 0x7ffffffffffffffc},
      {"rem.u32", "www", bits(-7), 4, kNo, 1},
      {"rem.s64", "lll", bits(-7L), 4, kNo, bits(-3L)},
      {"min.s64", "lll", bits(-1L), 1, kNo, bits(-1L)},
      {"max.s32", "www", bits(-1), 1, kNo, 1},
      {"max.s64", "lll", bits(-1L), 1, kNo, 1},
      {"max.u64", "lll", bits(-1L), 1, kNo, bits(-1L)},
      {"neg.s64", "ll", 5, kNo, kNo, bits(-5L)},
      {"neg.s64", "ll", kLow, kNo, kNo, kLow},
      {"and.b32", "www", 0xf0f0, 0xff00, kNo, 0xf000},
      {"and.b64", "lll", 0xf0f000000000, 0xff0000000000, kNo, 0xf00000000000},
      {"or.b32", "www", 0xf0f0, 0xff00, kNo, 0xfff0},
      {"or.b64", "lll", 0xf0f000000000, 0xff0000000000, kNo, 0xfff000000000},
      {"xor.b32", "www", 0xf0f0, 0xff00, kNo, 0x0ff0},
      {"xor.b64", "lll", 0xf0f000000000, 0xff0000000000, kNo, 0x0ff000000000},
      {"xor.b16", "hhh", 0xf0f0, 0xff00, kNo, 0x0ff0},
      {"not.b32", "ww", 0xf0f0, kNo, kNo, 0xffff0f0f},
      {"not.b64", "ll", 0xf0f0, kNo, kNo, 0xffffffffffff0f0f},
      {"and.pred", "ppp", 1, 0, kNo, 0},
      {"or.pred", "ppp", 1, 0, kNo, 1},
      {"xor.pred", "ppp", 1, 1, kNo, 0},
      {"not.pred", "pp", 1, kNo, kNo, 0},
      {"shl.b32", "www", 0x80000001, 1, kNo, 2},
      {"shl.b32", "www", 0x80000001, 32, kNo, 0},
      {"shl.b32", "www", 0x80000001, 33, kNo, 0},
      {"shl.b64", "llw", 0x80000001, 32, kNo, 0x8000000100000000},
      {"shl.b64", "llw", 0x80000001, 64, kNo, 0},
      {"shr.s32", "www", 0x80000000, 4, kNo, 0xf8000000},
      {"shr.s32", "www", 0x80000000, 32, kNo, kOne32},
      {"shr.s32", "www", 0x40000000, 40, kNo, 0},
      {"shr.u32", "www", 0x80000000, 4, kNo, 0x08000000},
      {"shr.u32", "www", 0x80000000, 32, kNo, 0},
      {"shr.s64", "llw", kLow, 4, kNo, 0xf800000000000000},
      {"shr.s64", "llw", kLow, 64, kNo, kOnes},
      {"shr.u64", "llw", kLow, 4, kNo, 0x0800000000000000},
      {"shr.u64", "llw", kLow, 0x40000001, kNo, 0},
      {"bfind.shiftamt.u32", "ww", 1, kNo, kNo, 31},
      {"bfind.shiftamt.u32", "ww", 0x00ff0000, kNo, kNo, 8},
      {"bfind.shiftamt.u32", "ww", 0, kNo, kNo, kOne32},
      {"brev.b32", "ww", 0x00000013, kNo, kNo, 0xc8000000},
      {"popc.b32", "ww", 0x80f00001, kNo, kNo, 6},
      {"selp.b32", "wwwp", 4, 9, 1, 4},
      {"selp.b32", "wwwp", 4, 9, 0, 9},
      {"selp.b64", "lllp", 4, 9, 1, 4},
      {"selp.u16", "hhhp", 4, 9, 0, 9},
      {"selp.u32", "wwwp", 4, 9, 1, 4},
      {"selp.u64", "lllp", 4, 9, 0, 9},
      {"mov.u16", "hh", 0x1234, kNo, kNo, 0x1234},
      {"mov.b32", "ww", 0x12345678, kNo, kNo, 0x12345678},
      {"mov.b32", "wf", bits(1.0f), kNo, kNo, bits(1.0f)},
      {"mov.b64", "ld", bits(1.0), kNo, kNo, bits(1.0)},
      {"mov.u64", "ll", kOnes - 1, kNo, kNo, kOnes - 1},
      {"mov.pred", "pp", 1, kNo, kNo, 1},
      {"setp.eq.s16", "phh", 0xffff, 0xffff, kNo, 1},
      {"setp.ne.s16", "phh", 0xffff, 0xffff, kNo, 0},
      {"setp.eq.b32", "pww", 5, 5, kNo, 1},
      {"setp.eq.s32", "pww", 5, 5, kNo, 1},
      {"setp.eq.s64", "pll", kLow, 0, kNo, 0},
      {"setp.ne.s32", "pww", 5, 6, kNo, 1},
      {"setp.ne.s64", "pll", kLow, 0, kNo, 1},
      {"setp.lt.s32", "pww", bits(-1), 0, kNo, 1},
      {"setp.lt.u32", "pww", bits(-1), 0, kNo, 0},
      {"setp.lt.s64", "pll", bits(-1L), 0, kNo, 1},
      {"setp.lt.u64", "pll", bits(-1L), 0, kNo, 0},
      {"setp.le.s32", "pww", 3, 3, kNo, 1},
      {"setp.le.s64", "pll", 3, 2, kNo, 0},
      {"setp.gt.s32", "pww", bits(-1), 0, kNo, 0},
      {"setp.gt.s64", "pll", bits(-1L), 0, kNo, 0},
      {"setp.gt.u64", "pll", bits(-1L), 0, kNo, 1},
      {"setp.ge.s32", "pww", 3, 3, kNo, 1},
      {"setp.ge.s64", "pll", bits(-4L), 3, kNo, 0},
      {"cvt.s64.s32", "lw", bits(-5), kNo, kNo, bits(-5L)},
      {"cvt.u64.u32", "lw", bits(-5), kNo, kNo, 0xfffffffb},
      {"cvt.u32.u64", "wl", 0x123456789a, kNo, kNo, 0x3456789a},
      {"cvt.u16.u32", "hw", 0x12345678, kNo, kNo, 0x5678},
      {"cvt.u32.u16", "wh", 0x8765, kNo, kNo, 0x8765},
  };
  for (const Row& row : rows) check_row(row);

  const auto insert = [](uint64_t a, uint64_t b, int first, int length, uint64_t expected) {
    const Ran ran = run("ld.global.u64 %rd1, [%to+8];\nld.global.u64 %rd2, [%to+16];\nbfi.b64 %rd0, %rd1, %rd2, " +
                            std::to_string(first) + ", " + std::to_string(length) + ";\nst.global.u64 [%to], %rd0;",
                        1, {0, a, b});
    CHECK(ran.error.empty() && ran.words[0] == expected, "bfi.b64 at %d: %s", first, ran.error.c_str());
  };
  insert(0xabcd, kOnes, 8, 8, 0xffffffffffffcdff);
  insert(0xabcd, 0, 32, 32, 0xabcd00000000);
  insert(kOnes, 0, 60, 32, 0xf000000000000000);
  insert(kOnes, 5, 0, 0, 5);

  const Ran halves =
      run("mov.u64 %rd1, 4886718345;\nmov.b64 {%r1, %r2}, %rd1;\nmov.b64 %rd2, {%r2, %r1};\n"
          "st.global.v2.u32 [%to], {%r1, %r2};\nst.global.u64 [%to+8], %rd2;");
  CHECK(halves.words[0] == 0x123456789 && halves.words[1] == 0x2345678900000001, "%s", halves.error.c_str());
}

void check_floating() {
  const float tiny = std::numeric_limits<float>::denorm_min();
  const double wide_tiny = std::numeric_limits<double>::denorm_min();
  const Row rows[] = {
      {"add.f32", "fff", bits(1.0f), bits(0x1p-24f), kNo, bits(1.0f)},  // ties to even
      {"add.f32", "fff", bits(1 + 0x1p-23f), bits(0x1p-24f), kNo, bits(1 + 0x1p-22f)},
      {"add.f32", "fff", bits(tiny), bits(tiny), kNo, bits(2 * tiny)},  // subnormal numbers are kept
      {"add.f32", "fff", bits(-0.0f), bits(0.0f), kNo, bits(0.0f)},
      {"add.f32", "fff", bits(kInf), bits(-kInf), kNo, kCanonical},
      {"add.f64", "ddd", bits(1.0), bits(0x1p-53), kNo, bits(1.0)},
      {"sub.f32", "fff", bits(1.0f), bits(3.0f), kNo, bits(-2.0f)},
      {"sub.f64", "ddd", bits(1.0), bits(3.0), kNo, bits(-2.0)},
      {"mul.f32", "fff", bits(1 + 0x1p-23f), bits(1 + 0x1p-23f), kNo, bits(1 + 0x1p-22f)},
      {"mul.f32", "fff", bits(-0.0f), bits(3.0f), kNo, bits(-0.0f)},
      {"mul.f32", "fff", bits(0.0f), bits(kInf), kNo, kCanonical},
      {"mul.f64", "ddd", bits(1 + 0x1p-52), bits(1 + 0x1p-52), kNo, bits(1 + 0x1p-51)},
      // What a product rounded on its own would lose.
      {"fma.rn.f32", "ffff", bits(1 + 0x1p-23f), bits(1 + 0x1p-23f), bits(-1 - 0x1p-22f), bits(0x1p-46f)},
      {"fma.rn.f32", "ffff", bits(2.0f), bits(3.0f), bits(7.0f), bits(13.0f)},
      {"fma.rn.f32", "ffff", bits(kInf), bits(0.0f), bits(1.0f), kCanonical},
      {"fma.rn.f64", "dddd", bits(1 + 0x1p-52), bits(1 + 0x1p-52), bits(-1 - 0x1p-51), bits(0x1p-104)},
      {"div.rn.f32", "fff", bits(1.0f), bits(3.0f), kNo, bits(1.0f / 3.0f)},
      {"div.rn.f32", "fff", bits(1.0f), bits(-0.0f), kNo, bits(-kInf)},
      {"div.rn.f32", "fff", bits(0.0f), bits(0.0f), kNo, kCanonical},
      {"div.rn.f64", "ddd", bits(1.0), bits(3.0), kNo, bits(1.0 / 3.0)},
      {"rcp.rn.f32", "ff", bits(3.0f), kNo, kNo, bits(1.0f / 3.0f)},
      {"rcp.rn.f64", "dd", bits(3.0), kNo, kNo, bits(1.0 / 3.0)},
      {"rsqrt.approx.f32", "ff", bits(0.25f), kNo, kNo, bits(2.0f)},
      {"rsqrt.approx.f32", "ff", bits(0.0f), kNo, kNo, bits(kInf)},
      {"rsqrt.approx.f32", "ff", bits(-1.0f), kNo, kNo, kCanonical},
      {"sqrt.rn.f32", "ff", bits(2.0f), kNo, kNo, 0x3fb504f3},
      {"sqrt.rn.f32", "ff", bits(-1.0f), kNo, kNo, kCanonical},
      {"sqrt.rn.f32", "ff", bits(-0.0f), kNo, kNo, bits(-0.0f)},
      {"sqrt.rn.f64", "dd", bits(2.0), kNo, kNo, 0x3ff6a09e667f3bcd},
      {"neg.f32", "ff", bits(0.0f), kNo, kNo, bits(-0.0f)},
      {"neg.f64", "dd", bits(-2.0), kNo, kNo, bits(2.0)},
      {"abs.f32", "ff", bits(-0.0f), kNo, kNo, bits(0.0f)},
      {"abs.f32", "ff", bits(-kInf), kNo, kNo, bits(kInf)},
      {"abs.f64", "dd", bits(-wide_tiny), kNo, kNo, bits(wide_tiny)},
      {"max.f32", "fff", bits(-0.0f), bits(0.0f), kNo, bits(0.0f)},
      {"max.f32", "fff", bits(0.0f), bits(-0.0f), kNo, bits(0.0f)},
      {"max.f32", "fff", bits(kNaN), bits(-3.0f), kNo, bits(-3.0f)},
      {"max.f32", "fff", bits(-3.0f), bits(kNaN), kNo, bits(-3.0f)},
      {"max.f32", "fff", bits(kNaN), bits(kNaN), kNo, kCanonical},
      {"max.f64", "ddd", bits(kWideNaN), bits(-3.0), kNo, bits(-3.0)},
      {"max.f64", "ddd", bits(2.0), bits(-3.0), kNo, bits(2.0)},
      {"max.NaN.f32", "fff", bits(kNaN), bits(-3.0f), kNo, kCanonical},
      {"max.NaN.f32", "fff", bits(-3.0f), bits(kNaN), kNo, kCanonical},
      {"max.NaN.f32", "fff", bits(-3.0f), bits(-2.0f), kNo, bits(-2.0f)},
      {"max.NaN.f32", "fff", bits(-0.0f), bits(0.0f), kNo, bits(0.0f)},
      {"selp.f32", "fffp", bits(1.0f), bits(2.0f), 0, bits(2.0f)},
      {"selp.f64", "dddp", bits(1.0), bits(2.0), 1, bits(1.0)},
      {"mov.f32", "ff", bits(-0.0f), kNo, kNo, bits(-0.0f)},
      {"mov.f64", "dd", bits(-0.0), kNo, kNo, bits(-0.0)},
      {"cvt.rn.f32.s16", "fh", 0xfffe, kNo, kNo, bits(-2.0f)},
      {"cvt.rn.f32.s32", "fw", bits(-0x1000001), kNo, kNo, bits(-0x1p24f)},
      {"cvt.rn.f32.s64", "fl", bits(0x1000003L), kNo, kNo, bits(0x1p24f + 4)},
      {"cvt.rn.f64.s16", "dh", 0xfffe, kNo, kNo, bits(-2.0)},
      {"cvt.rn.f64.s32", "dw", bits(-7), kNo, kNo, bits(-7.0)},
      {"cvt.rn.f64.s64", "dl", (uint64_t(1) << 53) + 1, kNo, kNo, bits(0x1p53)},
      {"cvt.rn.f64.s64", "dl", bits(-7L), kNo, kNo, bits(-7.0)},
      {"cvt.f64.f32", "df", bits(-0x1p-149f), kNo, kNo, bits(-0x1p-149)},
      {"cvt.rn.f32.f64", "fd", bits(1 + 0x1p-24), kNo, kNo, bits(1.0f)},
      {"cvt.rn.f32.f64", "fd", bits(1 + 3 * 0x1p-24), kNo, kNo, bits(1 + 0x1p-22f)},
      {"cvt.rn.f32.f64", "fd", bits(kWideNaN), kNo, kNo, kCanonical},
      {"cvt.rzi.s64.f64", "ld", bits(-2.9), kNo, kNo, bits(-2L)},
      {"cvt.rzi.s64.f64", "ld", bits(2.9), kNo, kNo, 2},
      {"cvt.rzi.s64.f64", "ld", bits(1e30), kNo, kNo, 0x7fffffffffffffff},
      {"cvt.rzi.s64.f64", "ld", bits(-1e30), kNo, kNo, kLow},
      {"cvt.rzi.s64.f64", "ld", bits(kWideNaN), kNo, kNo, kLow},
      // The first operand becomes the upper half. 0x3f80 is 1; its neighbour is 2^-7 away.
      {"cvt.rn.bf16x2.f32", "wff", bits(2.0f), bits(1.0f), kNo, 0x40003f80},
      {"cvt.rn.bf16x2.f32", "wff", bits(1 + 0x1p-8f), bits(1 + 3 * 0x1p-8f), kNo, 0x3f803f82},
      {"cvt.rn.bf16x2.f32", "wff", bits(1 + 0x1p-8f + 0x1p-23f), bits(-0.0f), kNo, 0x3f818000},
      {"cvt.rn.bf16x2.f32", "wff", bits(kNaN), bits(-kInf), kNo, 0x7fffff80},
      {"cvt.rn.bf16x2.f32", "wff", 0x7f7fffff, 0x00010000, kNo, 0x7f800001},
      {"cvt.rn.bf16x2.f32", "wff", 0x00008000, 0x00018000, kNo, 0x00000002},  // ties below the normal numbers
      {"cvt.rn.f16x2.f32", "wff", bits(2.0f), bits(-1.0f), kNo, 0x4000bc00},
      {"cvt.rn.f16x2.f32", "wff", bits(1 + 0x1p-11f), bits(1 + 3 * 0x1p-11f), kNo, 0x3c003c02},
      {"cvt.rn.f16x2.f32", "wff", bits(65519.0f), bits(65520.0f), kNo, 0x7bff7c00},
      {"cvt.rn.f16x2.f32", "wff", bits(0x1p-24f), bits(0x1p-25f), kNo, 0x00010000},
      {"cvt.rn.f16x2.f32", "wff", bits(3 * 0x1p-25f), bits(0x1p-14f - 0x1p-26f), kNo, 0x00020400},
      {"cvt.rn.f16x2.f32", "wff", bits(kNaN), bits(kInf), kNo, 0x7fff7c00},
      // tf32's neighbour of 1 is 2^-10 away; ties go away from zero.
      {"cvt.rna.tf32.f32", "wf", bits(1 + 0x1p-11f), kNo, kNo, bits(1 + 0x1p-10f)},
      {"cvt.rna.tf32.f32", "wf", bits(-1 - 0x1p-11f), kNo, kNo, bits(-1 - 0x1p-10f)},
      {"cvt.rna.tf32.f32", "wf", bits(1 + 0x1p-12f), kNo, kNo, bits(1.0f)},
      {"cvt.rna.tf32.f32", "wf", 0x7f7fffff, kNo, kNo, bits(kInf)},
      {"cvt.rna.tf32.f32", "wf", 0x00001000, kNo, kNo, 0x00002000},
      {"cvt.rna.tf32.f32", "wf", bits(kNaN), kNo, kNo, kCanonical},
  };
  for (const Row& row : rows) check_row(row);

  // Whether it holds for less, equal, greater, and where one of the two is a NaN.
  const struct {
    const char* name;
    bool less, equal, greater, nan;
  } comparisons[] = {
      {"eq", false, true, false, false}, {"ne", true, false, true, false},  {"lt", true, false, false, false},
      {"le", true, true, false, false},  {"gt", false, false, true, false}, {"ge", false, true, true, false},
      {"equ", false, true, false, true}, {"neu", true, false, true, true},  {"ltu", true, false, false, true},
      {"leu", true, true, false, true},  {"gtu", false, false, true, true}, {"geu", false, true, true, true},
      {"num", true, true, true, false},  {"nan", false, false, false, true}};
  for (const auto& c : comparisons) {
    const std::string single = std::string("setp.") + c.name + ".f32", twice = std::string("setp.") + c.name + ".f64";
    check_row({single.c_str(), "pff", bits(-1.0f), bits(1.0f), kNo, c.less});
    check_row({single.c_str(), "pff", bits(-0.0f), bits(0.0f), kNo, c.equal});
    check_row({single.c_str(), "pff", bits(2.0f), bits(1.0f), kNo, c.greater});
    check_row({single.c_str(), "pff", bits(kNaN), bits(1.0f), kNo, c.nan});
    check_row({single.c_str(), "pff", bits(1.0f), bits(kNaN), kNo, c.nan});
    check_row({twice.c_str(), "pdd", bits(-1.0), bits(1.0), kNo, c.less});
    check_row({twice.c_str(), "pdd", bits(-0.0), bits(0.0), kNo, c.equal});
    check_row({twice.c_str(), "pdd", bits(2.0), bits(1.0), kNo, c.greater});
    check_row({twice.c_str(), "pdd", bits(1.0), bits(kWideNaN), kNo, c.nan});
  }
}

// --- Memory ----------------------------------------------------------------------------------------------------------

// Registers that share a slot find nothing of each other's, and one that nobody has written to holds ones.
void check_registers() {
  const Ran ran =
      run("mov.u32 %r1, 7;\nst.global.u32 [%to], %r1;\nmov.u32 %r2, 8;\nst.global.u32 [%to+4], %r2;\n"
          "setp.ne.s32 %p1, %r2, 8;\n@%p1 mov.u32 %r3, 9;\nst.global.u32 [%to+8], %r3;\n"
          "mov.u32 %r5, 0;\nmov.u32 %r6, 0;\n"
          "again:\nadd.s32 %r7, %r6, 1;\nmov.u32 %r6, %r7;\nadd.s32 %r8, %r5, %r7;\nmov.u32 %r5, %r8;\n"
          "setp.lt.s32 %p2, %r6, 4;\n@!%p2 bra done;\nbra again;\ndone:\nst.global.u32 [%to+12], %r5;");
  CHECK(ran.error.empty() && ran.words[0] == 0x800000007 && ran.words[1] == 0xaffffffff, "registers: %s, %s, %s",
        ran.error.c_str(), ptx::hexadecimal(ran.words[0]).c_str(), ptx::hexadecimal(ran.words[1]).c_str());
  expect_refused("a loop without an end", run("again:\nbra again;"), "the thread does not end");
}

void check_memory() {
  Ran ran =
      run("ld.global.v4.u32 {%r1, %r2, %r3, %r4}, [%to];\nst.global.v4.u32 [%to+16], {%r4, %r3, %r2, %r1};\n"
          "ld.global.s32 %rd1, [%to+4];\nst.global.u64 [%to+32], %rd1;\nld.global.u8 %h1, [%to+7];\n"
          "st.global.u16 [%to+40], %h1;\nld.global.nc.v2.u64 {%rd2, %rd3}, [%to];\nst.global.u64 [%to+48], %rd3;\n"
          "st.global.u8 [%to+56], %h1;\nst.global.f32 [%to+64], 0f3F800000;",
          1, {0x8000000200000001, 0x0000000400000003, 0, 0, 0, 0, 0, kOnes, 0});
  CHECK(ran.error.empty(), "%s", ran.error.c_str());
  const std::vector<uint64_t> expected = {0x8000000200000001, 0x0000000400000003, 0x0000000300000004,
                                          0x0000000180000002, 0xffffffff80000002, 0x80,
                                          0x0000000400000003, 0xffffffffffffff80, 0x3f800000};
  CHECK(ran.words == expected, "loads and stores");

  ran =
      run("ld.param.s8 %r1, [to+7];\nld.param.v2.u8 {%h1, %h2}, [to];\nmov.b64 %rd1, to;\nld.param.u64 %rd2, [%rd1];\n"
          "sub.s64 %rd2, %rd2, %to;\nst.global.u64 [%to], %rd2;\nmov.u64 %rd3, table;\nld.global.u32 %r2, [%rd3+4];\n"
          "st.global.u32 [%to+8], %r2;");
  CHECK(ran.error.empty() && ran.words[0] == 0 && ran.words[1] == 8, "parameters and constants: %s", ran.error.c_str());

  ran =
      run("ld.param.v2.u32 {%r1, %r2}, [to];\nst.global.v2.u32 [%to], {%r1, %r2};\nld.param.b32 %r3, [to];\n"
          "ld.param.s32 %r4, [to+4];\nst.global.v2.u32 [%to+8], {%r3, %r4};\nld.param.f32 %f1, [to];\n"
          "ld.param.u32 %r5, [to+4];\nst.global.f32 [%to+16], %f1;\nst.global.u32 [%to+20], %r5;\nld.param.f64 %fd1, "
          "[to];\n"
          "st.global.f64 [%to+24], %fd1;\nld.param.u8 %h1, [to+1];\nst.global.u8 [%to+32], %h1;",
          1, std::vector<uint64_t>(5));
  const uint64_t to = ran.words[0];
  CHECK(ran.error.empty() && ran.words == (std::vector<uint64_t>{to, to, to, to, to >> 8 & 0xff}) && to != 0,
        "parameters: %s", ran.error.c_str());

  // The window's addresses, of 32 bits and of 64, and the generic one.
  ran =
      run("mov.u32 %r1, shared_bytes;\nst.shared.u32 [%r1+4], 5;\nmov.u64 %rd1, shared_bytes;\n"
          "ld.shared.u32 %r2, [%rd1+4];\ncvta.shared.u64 %rd2, %rd1;\nld.u32 %r3, [%rd2+4];\n"
          "st.global.v2.u32 [%to], {%r2, %r3};\nmov.u64 %rd3, depot;\nst.local.u64 [%rd3+8], 6;\n"
          "cvta.local.u64 %rd4, %rd3;\nld.u64 %rd5, [%rd4+8];\nst.u64 [%to+8], %rd5;\nld.shared.f32 %f1, [%r1+8];\n"
          "st.global.f32 [%to+16], %f1;");
  CHECK(ran.error.empty() && ran.words[0] == 0x500000005 && ran.words[1] == 6 && ran.words[2] == 0xffffffff,
        "spaces: %s", ran.error.c_str());

  ran =
      run("atom.global.add.u64 %rd1, [%to], 5;\natom.global.max.u64 %rd2, [%to], 40;\n"
          "atom.global.max.u64 %rd3, [%to], 3;\nst.global.u64 [%to+8], %rd1;\nst.global.u64 [%to+16], %rd2;\n"
          "st.global.u64 [%to+24], %rd3;\nmov.u64 %rd4, counter;\natom.global.add.u64 %rd5, [%rd4], 1;\n"
          "st.global.u64 [%to+32], %rd5;",
          1, {10, 0, 0, 0, 9});
  CHECK(ran.error.empty() && ran.words == (std::vector<uint64_t>{40, 10, 15, 40, 0}), "atomics: %s", ran.error.c_str());
  ran =
      run("mov.u32 %r1, shared_bytes;\nst.shared.u32 [%r1+8], 7;\natom.shared.add.u32 %r2, [%r1+8], 5;\n"
          "ld.shared.u32 %r3, [%r1+8];\nst.global.v2.u32 [%to], {%r2, %r3};");
  CHECK(ran.error.empty() && ran.words[0] == (uint64_t(12) << 32 | 7), "atomics in shared memory: %s",
        ran.error.c_str());
  expect_refused("a global address", run("atom.shared.add.u32 %r2, [%to], 5;"), "is not in the block's shared memory");

  ran = run("add.s64 %rd1, %to, 16;\nld.global.u64 %rd2, [%rd1+-8];\nst.global.u64 [%rd1+-16], %rd2;", 1, {0, 7, 0});
  CHECK(ran.error.empty() && ran.words[0] == 7, "negative offsets: %s", ran.error.c_str());

  expect_refused("shared as global", run("mov.u64 %rd1, shared_bytes;\nst.global.u32 [%rd1], 1;"),
                 "st.global.u32 [%rd1], 1: the address 0x1000 is not in global memory");
  expect_refused("local as global", run("mov.u64 %rd1, depot;\nld.global.u64 %rd2, [%rd1];"),
                 "is not in global memory");
  expect_refused("far in shared memory, as global",
                 run("mov.u64 %rd1, shared_bytes;\nld.global.u32 %r1, [%rd1+163840];"),
                 "the address 0x29000 is not in global memory");
  expect_refused("global as shared", run("ld.shared.u32 %r1, [%to];"), "is not in the block's shared memory");
  expect_refused("global as local", run("ld.local.u32 %r1, [%to];"), "is not in the thread's local memory");
  expect_refused("generic as shared",
                 run("mov.u64 %rd1, shared_bytes;\ncvta.shared.u64 %rd1, %rd1;\nld.shared.u32 %r1, "
                     "[%rd1];"),
                 "is not in the block's shared memory");
  expect_refused("generic as global",
                 run("mov.u64 %rd1, shared_bytes;\ncvta.shared.u64 %rd1, %rd1;\nld.global.u32 %r1, "
                     "[%rd1];"),
                 "is not in global memory");
  expect_refused("past the block's", run("mov.u64 %rd1, shared_bytes;\nld.shared.u32 %r1, [%rd1+4096];"),
                 "is not in the block's shared memory");
  expect_refused("past the thread's", run("mov.u64 %rd1, depot;\nld.local.u64 %rd2, [%rd1+32];"),
                 "is not in the thread's local memory");
  expect_refused("past the parameters", run("ld.param.u64 %rd2, [to+8];"), "is not in the kernel's parameters");
  expect_refused("a parameter", run("st.param.u64 [to], 1;"), "the kernel's own parameters");
  expect_refused("unaligned", run("ld.global.v4.f32 {%f1, %f2, %f3, %f4}, [%to+8];"), "is not aligned to 16 bytes");
  expect_refused("unaligned", run("ld.global.u64 %rd1, [%to+4];"), "is not aligned to 8 bytes");
  expect_refused("null", run("mov.u64 %rd1, 0;\nld.global.u32 %r1, [%rd1+16];"), "is not in global memory");
}

// Of every type, one or several side by side, through every space: bytes, and their signs where registers are wider.
void check_accesses() {
  const struct {
    const char* type;
    char letter;
    size_t bytes;
    bool is_signed;
  } types[] = {{".u8", 'l', 1, false},  {".s8", 'l', 1, true},   {".b8", 'l', 1, false},  {".u16", 'l', 2, false},
               {".s16", 'l', 2, true},  {".b16", 'l', 2, false}, {".u32", 'l', 4, false}, {".s32", 'l', 4, true},
               {".b32", 'l', 4, false}, {".u64", 'l', 8, false}, {".s64", 'l', 8, true},  {".b64", 'l', 8, false},
               {".f32", 'f', 4, false}, {".f64", 'd', 8, false}};
  const struct {
    const char *name, *address;
  } spaces[] = {{".shared", "mov.u64 %at, shared_bytes;\n"},
                {".local", "mov.u64 %at, depot;\n"},
                {".global", "add.s64 %at, %to, 128;\n"},
                {"", "mov.u64 %at, shared_bytes;\ncvta.shared.u64 %at, %at;\n"},
                {"", "mov.u64 %at, depot;\ncvta.local.u64 %at, %at;\n"},
                {"", "add.s64 %at, %to, 128;\ncvta.global.u64 %at, %at;\n"}};
  std::vector<uint64_t> words(32);
  for (size_t e = 0; e < 32; ++e)
    reinterpret_cast<unsigned char*>(words.data())[e] = static_cast<unsigned char>(0x71 + 9 * e);
  for (const auto& space : spaces) {
    for (const auto& t : types) {
      for (size_t count : {1, 2, 4}) {
        if (count * t.bytes > 16) continue;
        const std::string vector = count == 1 ? "" : ".v" + std::to_string(count), type = vector + t.type;
        const auto registers = [&](int first) {
          std::string all = name_of(t.letter, first);
          for (size_t e = 1; e < count; ++e) all += ", " + name_of(t.letter, first + int(e));
          return count == 1 ? all : "{" + all + "}";
        };
        std::string body = space.address + ("ld.global" + type) + " " + registers(1) + ", [%to+16];\nst" + space.name +
                           type + " [%at+16], " + registers(1) + ";\nld" + space.name + type + " " + registers(5) +
                           ", [%at+16];\n";
        for (size_t e = 0; e < count; ++e)
          body += std::string("st.global") +
                  (t.letter == 'f'   ? ".f32"
                   : t.letter == 'd' ? ".f64"
                                     : ".u64") +
                  " [%to+" + std::to_string(32 + 8 * e) + "], " + name_of(t.letter, 5 + int(e)) + ";\n";
        const Ran ran = run(body, 1, words);
        for (size_t e = 0; e < count; ++e) {
          uint64_t expected = 0;
          std::memcpy(&expected, reinterpret_cast<const unsigned char*>(words.data()) + 16 + e * t.bytes, t.bytes);
          const int above = 64 - 8 * int(t.bytes);
          if (t.is_signed) expected = uint64_t(int64_t(expected << above) >> above);
          CHECK(ran.error.empty() && ran.words[4 + e] == expected, "%s%s: %s instead of %s; %s", space.name,
                type.c_str(), ptx::hexadecimal(ran.words[4 + e]).c_str(), ptx::hexadecimal(expected).c_str(),
                ran.error.c_str());
        }
      }
    }
  }
}

// Before the wait that covers its group a copy's target holds NaNs.
void check_copies() {
  const std::string copy =
                        "cp.async.cg.shared.global [%r1], [%to], 16;\ncp.async.commit_group;\n"
                        "cp.async.cg.shared.global [%r1+16], [%to+16], 16;\ncp.async.commit_group;\n",
                    prepare = "mov.u32 %r1, shared_bytes;\nst.shared.u64 [%r1], 3;\n",
                    give =
                        "ld.shared.u64 %rd1, [%r1];\nld.shared.u64 %rd2, [%r1+16];\nst.global.u64 [%to+32], %rd1;\n"
                        "st.global.u64 [%to+40], %rd2;";
  const auto after = [&](const std::string& wait, uint64_t first, uint64_t second) {
    const Ran ran = run(prepare + copy + wait + give, 1, {11, 12, 13, 14, 0, 0});
    CHECK(ran.error.empty() && ran.words[4] == first && ran.words[5] == second, "copies after '%s': %s", wait.c_str(),
          ran.error.c_str());
  };
  after("", kOnes, kOnes);
  after("cp.async.wait_group 2;\n", kOnes, kOnes);
  after("cp.async.wait_group 1;\n", 11, kOnes);
  after("cp.async.wait_group 0;\n", 11, 13);
  expect_refused(
      "a copy from shared memory",
      run("mov.u32 %r1, shared_bytes;\nmov.u64 %rd1, shared_bytes;\ncp.async.cg.shared.global [%r1], [%rd1], 16;"),
      "is not in global memory");
  expect_refused("a copy of 8 bytes", run("mov.u32 %r1, shared_bytes;\ncp.async.cg.shared.global [%r1], [%to], 8;"),
                 "a copy of 8 bytes; accepted is 16");
  expect_refused("a copy to an odd place",
                 run("mov.u32 %r1, shared_bytes;\ncp.async.cg.shared.global [%r1+8], [%to], 16;"),
                 "is not aligned to 16 bytes");
}

// --- Lanes together --------------------------------------------------------------------------------------------------

// 4 bytes of every lane, stored from %r0.
const char* const kGive = "mul.wide.u32 %at, %lane, 4;\nadd.s64 %at, %at, %to;\nst.global.u32 [%at], %r0;";
uint32_t of_lane(const Ran& ran, unsigned lane) { return uint32_t(ran.words[lane / 2] >> (lane % 2 * 32)); }

void check_shuffles() {
  const auto shuffled = [](const std::string& mode, const char* b, const char* c, uint32_t (*expected)(uint32_t lane)) {
    const Ran ran = run("add.s32 %r1, %lane, 100;\nshfl.sync." + mode + ".b32 %r0|%p1, %r1, " + b + ", " + c +
                            ", -1;\n" + "@!%p1 add.s32 %r0, %r0, 1000;\n" + kGive,
                        32);
    for (unsigned lane = 0; lane < 32; ++lane)
      CHECK(ran.error.empty() && of_lane(ran, lane) == expected(lane), "shfl.sync.%s, lane %u: %u %s", mode.c_str(),
            lane, of_lane(ran, lane), ran.error.c_str());
  };
  shuffled("bfly", "3", "31", [](uint32_t l) { return 100 + (l ^ 3); });
  shuffled("up", "2", "0", [](uint32_t l) { return l < 2 ? 1100 + l : 100 + l - 2; });
  shuffled("down", "2", "31", [](uint32_t l) { return l >= 30 ? 1100 + l : 100 + l + 2; });
  shuffled("idx", "5", "31", [](uint32_t) { return 105u; });
  // Segments of 8 lanes: their mask is 24, in bits 8 to 12.
  shuffled("idx", "5", "6175", [](uint32_t l) { return 100 + l / 8 * 8 + 5; });
  shuffled("up", "3", "6144", [](uint32_t l) { return l % 8 < 3 ? 1100 + l : 100 + l - 3; });
  shuffled("bfly", "12", "6175", [](uint32_t l) { return (l ^ 12) > (l | 7) ? 1100 + l : 100 + (l ^ 12); });

  const Ran votes = run("setp.lt.s32 %p1, %lane, 5;\nvote.sync.ballot.b32 %r0, %p1, -1;\n" + std::string(kGive), 32);
  for (unsigned lane = 0; lane < 32; ++lane) CHECK(of_lane(votes, lane) == 31, "vote: %s", votes.error.c_str());
  const Ran some =
      run("setp.ge.s32 %p1, %lane, 16;\n@%p1 bra $end;\nsetp.ge.s32 %p2, %lane, 10;\n"
          "vote.sync.ballot.b32 %r0, %p2, 65535;\n" +
              std::string(kGive) + "\n$end:",
          32);
  CHECK(some.error.empty() && of_lane(some, 3) == 0xfc00, "vote of half a warp: %s", some.error.c_str());

  expect_refused("half a warp",
                 run("setp.ge.s32 %p1, %lane, 16;\n@%p1 bra $end;\nshfl.sync.bfly.b32 %r0|%p2, %lane, 1, "
                     "31, -1;\n$end:",
                     32),
                 "is stuck; its threads are 0 to 15: shfl.sync.bfly.b32; 16 to 31: ended");
  expect_refused("two modes",
                 run("setp.ge.s32 %p1, %lane, 16;\n@%p1 bra $other;\nshfl.sync.bfly.b32 %r0|%p2, %lane, 1, "
                     "31, -1;\nret;\n$other:\nshfl.sync.idx.b32 %r0|%p2, %lane, 1, 31, -1;",
                     32),
                 "is stuck");
  expect_refused("a barrier passed by",
                 run("setp.ge.s32 %p1, %lane, 40;\n@%p1 bra $other;\nbar.sync 0;\nret;\n$other:\n"
                     "bar.sync 0;",
                     64),
                 "is stuck");
  expect_refused("another barrier", run("bar.sync 1;", 32), "the barrier 1; accepted is 0");
  const Ran together =
      run("mul.wide.u32 %rd1, %lane, 4;\nmov.u64 %rd2, shared_bytes;\nadd.s64 %rd3, %rd1, %rd2;\n"
          "st.shared.u32 [%rd3], %lane;\nbar.sync 0;\nsub.s32 %r1, 63, %lane;\nmul.wide.u32 %rd4, %r1, 4;\n"
          "add.s64 %rd4, %rd4, %rd2;\nld.shared.u32 %r0, [%rd4];\n" +
              std::string(kGive),
          64);
  for (unsigned lane = 0; lane < 64; ++lane)
    CHECK(of_lane(together, lane) == 63 - lane, "bar.sync: %s", together.error.c_str());
}

// Matrix m's number (row, column) is 64 m + 8 row + column. Two warps, so that a lane is not its thread.
void check_loads_of_matrices() {
  std::vector<uint64_t> words(1024);
  for (unsigned e = 0; e < 256; ++e) words[512 + e / 4] |= uint64_t(e) << (e % 4 * 16);
  const std::string prepare =
      "and.b32 %r9, %lane, 31;\nmul.wide.u32 %rd1, %r9, 16;\nadd.s64 %rd1, %rd1, %to;\n"
      "ld.global.v2.u64 {%rd2, %rd3}, [%rd1+4096];\nmov.u32 %r10, shared_bytes;\nshl.b32 %r11, %r9, 4;\n"
      "add.s32 %r10, %r10, %r11;\nst.shared.v2.u64 [%r10], {%rd2, %rd3};\nbar.sync 0;\n";
  for (int count : {1, 2, 4}) {
    for (bool transposed : {false, true}) {
      std::string registers, stores;
      for (int m = 0; m < count; ++m) {
        registers += (m ? ", %r" : "%r") + std::to_string(m);
        stores += "st.global.u32 [%at+" + std::to_string(4 * m) + "], %r" + std::to_string(m) + ";\n";
      }
      const std::string opcode =
          "ldmatrix.sync.aligned.m8n8.x" + std::to_string(count) + (transposed ? ".trans" : "") + ".shared.b16";
      const Ran ran = run(prepare + opcode + " {" + registers + "}, [%r10];\nmul.wide.u32 %at, %lane, 16;\n" +
                              "add.s64 %at, %at, %to;\n" + stores,
                          64, words);
      CHECK(ran.error.empty(), "%s", ran.error.c_str());
      for (unsigned lane = 0; lane < 64 && ran.error.empty(); ++lane) {
        for (int m = 0; m < count; ++m) {
          const unsigned line = lane % 32 / 4, pair = lane % 4 * 2;
          const uint32_t low = 64 * m + (transposed ? pair * 8 + line : line * 8 + pair),
                         high = low + (transposed ? 8 : 1);
          const uint32_t got = uint32_t(ran.words[lane * 2 + m / 2] >> (m % 2 * 32));
          CHECK(got == (low | high << 16), "%s, lane %u, matrix %d: %08x", opcode.c_str(), lane, m, got);
        }
      }
    }
  }
  expect_refused("a row at an odd place",
                 run("mov.u32 %r9, shared_bytes;\nldmatrix.sync.aligned.m8n8.x1.shared.b16 {%r0}, [%r9+8];", 32),
                 "is not aligned to 16 bytes");
}

// d = a · b + c for every place of a one in a and of a number in b: what a fragment's element stands for follows from
// where it shows up. Drawn from the manual's figures, row by row.
void check_products(const std::string& opcode, int depth, uint32_t one, uint32_t (*number)(int)) {
  const int per = depth / 8, bits_each = 32 / per;
  // Lane and register of a's (row, k), b's (k, column) and d's (row, column).
  struct Place {
    int lane, element;
  };
  const auto of_a = [&](int row, int k) {
    const int quarter = (row >= 8) + 2 * (k >= depth / 2), within = k % (depth / 2);
    return Place{row % 8 * 4 + within / per, quarter * per + within % per};
  };
  const auto of_b = [&](int k, int column) {
    const int within = k % (depth / 2);
    return Place{column * 4 + within / per, (k >= depth / 2) * per + within % per};
  };
  std::string body = "mul.wide.u32 %at, %lane, 32;\nadd.s64 %at, %at, %to;\n";
  for (int r = 0; r < 6; ++r)
    body += "ld.global.u32 %r" + std::to_string(r) + ", [%at+" + std::to_string(4 * r) + "];\n";
  body +=
      "cvt.u16.u32 %h1, %lane;\ncvt.rn.f32.s16 %f4, %h1;\nadd.f32 %f5, %f4, 0f42C80000;\nadd.f32 %f6, %f5, "
      "0f42C80000;\nadd.f32 %f7, %f6, 0f42C80000;\n" +
      opcode +
      " {%f0, %f1, %f2, %f3}, {%r0, %r1, %r2, %r3}, {%r4, %r5}, {%f4, %f5, %f6, %f7};\n"
      "st.global.v4.f32 [%at], {%f0, %f1, %f2, %f3};\n";
  for (int k = 0; k < depth; ++k) {
    const int row = (k * 7 + 3) % 16;  // has a one at k
    std::vector<uint64_t> words(32 * 4);
    std::vector<uint32_t> given(32 * 8);
    const auto set = [&](Place place, int first, uint32_t x) {
      given[place.lane * 8 + first + place.element / per] |= x << (place.element % per * bits_each);
    };
    set(of_a(row, k), 0, one);
    for (int j = 0; j < depth; ++j)
      for (int column = 0; column < 8; ++column) set(of_b(j, column), 4, number(1 + j * 8 + column));
    std::memcpy(words.data(), given.data(), given.size() * 4);
    const Ran ran = run(body, 32, words);
    CHECK(ran.error.empty(), "%s: %s", opcode.c_str(), ran.error.c_str());
    std::vector<float> sums(32 * 8);
    std::memcpy(sums.data(), ran.words.data(), sums.size() * 4);
    for (int r = 0; r < 16; ++r) {
      for (int column = 0; column < 8; ++column) {
        const int lane = r % 8 * 4 + column / 2, element = (r >= 8) * 2 + column % 2;
        const float expected = float(lane + 100 * element + (r == row ? 1 + k * 8 + column : 0));
        CHECK(sums[lane * 8 + element] == expected, "%s, k = %d, (%d, %d): %g instead of %g", opcode.c_str(), k, r,
              column, sums[lane * 8 + element], expected);
      }
    }
  }
}

uint32_t bf16_number(int x) { return uint32_t(bits(float(x)) >> 16); }  // up to 256
uint32_t f16_number(int x) {
  const int exponent = std::ilogb(x);
  return uint32_t(exponent + 15) << 10 | (uint32_t(std::ldexp(x, 10 - exponent)) & 0x3ff);
}
uint32_t tf32_number(int x) { return uint32_t(bits(float(x))); }

void check_matrices() {
  check_loads_of_matrices();
  check_products("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32", 16, 0x3f80, bf16_number);
  check_products("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32", 16, 0x3c00, f16_number);
  check_products("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32", 8, 0x3f800000, tf32_number);
  expect_refused("no tf32",
                 run("mov.u32 %r0, 1065353217;\nmma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%f0, %f1, "
                     "%f2, %f3}, {%r0, %r0, %r0, %r0}, {%r0, %r0}, {%f0, %f1, %f2, %f3};",
                     32),
                 "which is not in tf32");
  expect_refused("part of a warp",
                 run("setp.eq.s32 %p1, %lane, 0;\n@%p1 bra $end;\nmov.u32 %r0, 0;\n"
                     "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%f0, %f1, %f2, %f3}, {%r0, "
                     "%r0, %r0, %r0}, {%r0, %r0}, {%f0, %f1, %f2, %f3};\n$end:",
                     32),
                 "is stuck");
}

// --- The text --------------------------------------------------------------------------------------------------------

void check_text() {
  const Ran counted =
      run("mov.u32 %r1, 0;\n$again:\nadd.s32 %r1, %r1, 1;\nsetp.lt.s32 %p1, %r1, 10;\n@%p1 bra "
          "$again;\nst.global.u32 [%to], %r1;\n{ .reg .b32 %r1; mov.u32 %r1, 3; }\n@!%p1 bra.uni $end;\n"
          "trap;\n$end:\nst.global.u32 [%to+8], %r1;");
  CHECK(counted.error.empty() && counted.words[0] == 10 && counted.words[1] == 10, "%s", counted.error.c_str());
  const Ran indices =
      run("mov.u32 %r1, %ntid.x;\nmov.u32 %r2, %nctaid.x;\nmov.u32 %r3, %ctaid.x;\n"
          "st.global.v2.u32 [%to], {%r1, %r2};\nst.global.u32 [%to+8], %r3;",
          7);
  CHECK(indices.words[0] == 0x100000007 && indices.words[1] == 0, "%s", indices.error.c_str());
  expect_refused("lanes that do not meet",
                 run("setp.eq.s32 %p1, %lane, 3;\n@%p1 bra $end;\nbar.warp.sync -1;\n$end:", 32),
                 "0 to 2: bar.warp.sync; 3 to 3: ended");
  expect_refused("trap", run("trap;"), "the thread gives up");
  expect_refused("what is printed",
                 run("mov.u64 %rd1, depot;\nmov.u64 %rd2, 5;\nst.local.v2.u64 [%rd1], {%rd2, %rd2};\n"
                     "cvta.local.u64 %rd1, %rd1;\nmov.u64 %rd3, $format;\ncvta.global.u64 %rd3, %rd3;\n{\n"
                     ".param .b64 param0;\nst.param.b64 [param0+0], %rd3;\n.param .b64 param1;\n"
                     "st.param.b64 [param1+0], %rd1;\n.param .b32 retval0;\n"
                     "call.uni (retval0), vprintf, (param0, param1);\nld.param.b32 %r1, [retval0+0];\n}\ntrap;"),
                 "the thread gives up, and prints: a 5!");

  expect_refused("an unknown opcode", run("frobnicate.u32 %r1, %r2;"),
                 "'frobnicate.u32 %r1, %r2': 'frobnicate.u32' is not");
  expect_refused("an unknown rounding", run("fma.rz.f32 %f0, %f1, %f2, %f3;"), "'fma.rz.f32' is not among");
  expect_refused("flushed subnormals", run("add.ftz.f32 %f0, %f1, %f2;"), "'add.ftz.f32' is not among");
  expect_refused("an unknown layout",
                 run("mma.sync.aligned.m16n8k16.col.col.f32.bf16.bf16.f32 {%f0, %f1, %f2, %f3}, {%r0, "
                     "%r0, %r0, %r0}, {%r0, %r0}, {%f0, %f1, %f2, %f3};"),
                 "is not among");
  expect_refused("a narrow register", run("add.s64 %rd1, %rd1, %r1;"), "'%r1' is not of the operand's type");
  expect_refused("a float as an integer", run("add.s32 %r1, %f1, 1;"), "'%f1' is not of the operand's type");
  expect_refused("an integer as a float", run("add.f32 %f1, %f1, 1;"), "the number '1'");
  expect_refused("too large a number", run("add.s32 %r1, %r1, 4294967296;"), "the number '4294967296'");
  expect_refused("a number to write to", run("add.s32 5, %r1, 1;"), "'5' is no register to write to");
  expect_refused("a special one to write to", run("mov.u32 %tid.x, 1;"), "'%tid.x' is no register to write to");
  expect_refused("an unknown register", run("mov.u32 %r99, 1;"), "'%r99' is no register to write to");
  expect_refused("an unknown special one", run("mov.u32 %r1, %warpid;"), "'%warpid' is unknown");
  expect_refused("too many operands", run("add.s32 %r1, %r1, 1, 2;"), "',' after its operands");
  expect_refused("a vector too short", run("st.global.v2.u32 [%to], {%r1};"), "'}' where ',' is expected");
  expect_refused("a label that is nowhere", run("bra $nowhere;"), "the label '$nowhere' is nowhere");
  expect_refused("a division by zero", run("mov.u32 %r1, 0;\ndiv.u32 %r0, %r1, %r1;"), "a division by zero");

  const Module module = ptx::parse(kernel(""));
  const auto launched = [&](const emulation::Parameters& parameters, unsigned threads) {
    Ran ran;
    try {
      ptx::launch(module.kernel("test"), {dim3(1), dim3(threads), 0, nullptr, nullptr}, parameters);
    } catch (const std::exception& error) {
      ran.error = error.what();
    }
    return ran;
  };
  const uint64_t x = 0;
  expect_refused("no parameter", launched({}, 1), "test declares 1 parameters and is given 0");
  expect_refused("a small parameter", launched({{&x, 4, 8}}, 1), "of 8 bytes, aligned to 8, and is given 4 bytes");
  expect_refused("a parameter less aligned", launched({{&x, 8, 4}}, 1), "and is given 8 bytes, aligned to 4");
  expect_refused("a block too large", launched({{&x, 8, 8}}, 1025), "is for blocks of up to 1024 threads");
  try {
    module.kernel("other");
    CHECK(false, "an unknown kernel");
  } catch (const std::runtime_error& error) {
    CHECK(std::string(error.what()) == "ptx: the module has no kernel 'other'", "%s", error.what());
  }
}

}  // namespace

int main() {
  check_integers();
  check_floating();
  check_registers();
  check_memory();
  check_accesses();
  check_copies();
  check_shuffles();
  check_matrices();
  check_text();
  if (failures) std::printf("%d checks failed\n", failures);
  return failures != 0;
}
