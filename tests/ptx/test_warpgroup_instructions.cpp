// Hopper's instructions, in kernels of a few lines for a cluster of two blocks, against values worked out by hand; and
// what is refused.
#include <cmath>
#include <cstdio>
#include <cstdlib>

#include "run.h"

namespace {

using namespace pddm;
using ptx::Module;
using ptx::Ran;

// %to: the parameter; %rank, %thread; %at: shared memory, of 16 KiB.
std::string kernel(const std::string& body) {
  return ".version 9.0\n.target sm_90a\n.address_size 64\n.extern .shared .align 1024 .b8 shared_bytes[];\n"
         ".visible .entry test(.param .u64 to)\n.maxntid 384, 1, 1\n.explicitcluster\n.reqnctapercluster 2, 1, 1\n{\n"
         ".reg .pred %p<9>;\n.reg .b16 %h<9>;\n.reg .b32 %r<40>;\n.reg .b64 %rd<20>, %to;\n.reg .f32 %f<140>;\n"
         ".reg .b32 %rank, %thread, %at;\nld.param.u64 %to, [to];\ncvta.to.global.u64 %to, %to;\n"
         "mov.u32 %thread, %tid.x;\nmov.u32 %rank, %cluster_ctarank;\nmov.u32 %at, shared_bytes;\n" +
         body + "\nret;\n}\n";
}

Ran run(const std::string& body, unsigned threads = 32, std::vector<uint64_t> words = std::vector<uint64_t>(256),
        size_t shared_bytes = 48 << 10) {
  return ptx::run_text(kernel(body), {dim3(2), dim3(threads), shared_bytes, nullptr, nullptr, 2, 9}, std::move(words));
}

constexpr const char* kOrders[] = {"ascending", "descending", "shuffled:1", "shuffled:2", "shuffled:3", "shuffled:4"};

// In every order; `expected` are the first words.
void expect(const char* what, const std::string& body, const std::vector<uint64_t>& expected, unsigned threads = 32) {
  for (const char* order : kOrders) {
    setenv("PDDM_EMULATION_ORDER", order, 1);
    const Ran ran = run(body, threads);
    CHECK(ran.error.empty(), "%s, %s: %s", what, order, ran.error.c_str());
    for (size_t w = 0; w < expected.size(); ++w)
      CHECK(ran.words[w] == expected[w], "%s, %s: word %zu is %s instead of %s", what, order, w,
            ptx::hexadecimal(ran.words[w]).c_str(), ptx::hexadecimal(expected[w]).c_str());
  }
}
void expect_refused(const char* what, const std::string& body, const char* because, unsigned threads = 32) {
  for (const char* order : kOrders) {
    setenv("PDDM_EMULATION_ORDER", order, 1);
    ptx::expect_refused(what, run(body, threads), because);
  }
}

// Only one thread of each block, or that of one block.
std::string one_thread(const std::string& body) {
  static int number = 0;
  const std::string end = "$end" + std::to_string(++number);
  return "setp.ne.s32 %p8, %thread, 0;\n@%p8 bra " + end + ";\n" + body + end + ":\n";
}
std::string of_block(int rank, const std::string& body) {
  static int number = 0;
  const std::string end = "$other" + std::to_string(++number);
  return "setp.ne.s32 %p7, %rank, " + std::to_string(rank) + ";\n@%p7 bra " + end + ";\n" + body + end + ":\n";
}
const std::string kSync = "barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;\n";
std::string begin(int count) {
  return one_thread("mbarrier.init.shared::cta.b64 [%at], " + std::to_string(count) +
                    ";\nfence.mbarrier_init.release.cluster;\n") +
         kSync;
}
std::string arrive_at(const std::string& rank) {
  return "mapa.shared::cluster.u32 %r30, %at, " + rank +
         ";\nmbarrier.arrive.release.cluster.shared::cluster.b64 _, [%r30];\n";
}
std::string await(const std::string& parity) {
  static int number = 0;
  const std::string again = "$again" + std::to_string(++number);
  return again + ":\nmbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 %p6, [%at], " + parity + ";\n@!%p6 bra " +
         again + ";\n";
}

void check_clusters() {
  expect("ranks",
         "mul.wide.u32 %rd1, %rank, 8;\nadd.s64 %rd1, %rd1, %to;\nadd.s32 %r1, %rank, 5;\n"
         "st.global.u32 [%rd1], %r1;\n",
         {5, 6});
  expect("the cluster's barrier",
         of_block(0, "st.global.u32 [%to], 7;\n") + kSync +
             of_block(1, "ld.global.u32 %r1, [%to];\nst.global.u32 [%to+8], %r1;\n"),
         {7, 7});
  expect_refused("a second arrival",
                 "barrier.cluster.arrive.release.aligned;\nbarrier.cluster.arrive.release.aligned;\n",
                 "a second arrival at the cluster's barrier");
  expect_refused("a wait alone", "barrier.cluster.wait.acquire.aligned;\n", "without an arrival");
  expect_refused("a third block", "mapa.shared::cluster.u32 %r1, %at, 2;\n", "the block 2 of a cluster of 2");
  expect_refused("a place that is none", "mapa.shared::cluster.u32 %r1, 8, 1;\n", "is no address in the block's");
  expect("some threads",
         "setp.ge.s32 %p1, %thread, 128;\n@%p1 bra $end;\nmov.u32 %r2, 3;\nmul.wide.u32 %rd1, %thread, 4;\n"
         "mad.lo.s32 %r3, %thread, 4, %at;\nst.shared.u32 [%r3], %thread;\nbar.sync %r2, 128;\n"
         "xor.b32 %r4, %r3, 508;\nld.shared.u32 %r5, [%r4];\nsetp.eq.s32 %p2, %thread, 100;\n"
         "@%p2 st.global.u32 [%to], %r5;\n$end:\n",
         {27}, 256);
  expect_refused("half of them", "setp.ge.s32 %p1, %thread, 64;\n@%p1 bra $end;\nbar.sync 3, 128;\n$end:\n",
                 "barrier 3, at which 64 of 128 are", 128);
  expect("registers",
         "setp.ge.s32 %p1, %thread, 128;\n@%p1 bra $more;\nsetmaxnreg.dec.sync.aligned.u32 24;\nbra $end;\n$more:\n"
         "setmaxnreg.inc.sync.aligned.u32 240;\n$end:\n",
         {}, 384);
  expect_refused("too many registers", "setmaxnreg.inc.sync.aligned.u32 240;\n", "240 registers instead of 168", 384);
  expect_refused("a barrier of the block", "bar.sync 1;\n", "the barrier 1; accepted is 0");
}

void check_barriers() {
  expect(
      "an arrival of the other block",
      begin(1) +
          one_thread(of_block(0, await("1") + await("0") + "ld.global.u32 %r1, [%to];\nst.global.u32 [%to+8], %r1;\n") +
                     of_block(1, "st.global.u32 [%to], 9;\n" + arrive_at("0"))) +
          kSync,
      {9, 9});
  expect("phases",
         begin(2) +
             one_thread(arrive_at("0") + arrive_at("1") + await("0") + arrive_at("%rank") + arrive_at("%rank") +
                        await("1") + await("1")) +
             kSync,
         {});
  expect("no bytes",
         begin(1) + one_thread("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%at], 0;\n" + await("0")) + kSync, {});
  expect_refused("an arrival too few", begin(2) + one_thread(arrive_at("%rank") + await("0")) + kSync,
                 "the phase of parity 0 of the barrier at byte 0, which is in phase 0: 1 of 2 arrivals are missing");
  expect_refused(
      "bytes too many",
      begin(1) + one_thread("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%at], 32;\n" + await("0")) + kSync,
      "0 of 1 arrivals are missing, and 32 bytes of those announced");
  expect_refused("no barrier", arrive_at("%rank"), "where none was initialised");
  expect_refused("an odd place", "mbarrier.init.shared::cta.b64 [%at+4], 1;\n", "is not aligned to 8 bytes");
  expect_refused("outside", "mbarrier.init.shared::cta.b64 [%at+49152], 1;\n", "is not in the block's shared memory");
  // One that has not ended has a waiter give up before it does.
  expect("one try",
         begin(1) + one_thread("mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 %p6, [%at], 0;\n"
                               "selp.u32 %r1, 1, 2, %p6;\nst.global.u32 [%to], %r1;\n"),
         {2});
}

const char* const kCopy =
    "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster [%r1], [%rd1], %r2, [%at], "
    "%h1;\n";

void check_copies() {
  const auto copied = [](const std::string& announced, const std::string& wait) {
    return begin(1) +
           one_thread(
               "mov.u16 %h1, 3;\nmov.u32 %r2, 16;\nmad.lo.s32 %r1, %rank, 16, %at;\nadd.s32 %r1, %r1, 1024;\n"
               "mul.wide.u32 %rd1, %rank, 16;\nadd.s64 %rd1, %rd1, %to;\nadd.s64 %rd1, %rd1, 64;\n"
               "mbarrier.arrive.expect_tx.shared::cta.b64 _, [%at], " +
               announced + ";\n" + kCopy) +
           wait +
           one_thread(
               "mul.wide.u32 %rd2, %rank, 32;\nadd.s64 %rd2, %rd2, %to;\nld.shared.u64 %rd3, [%at+1024];\n"
               "ld.shared.u64 %rd4, [%at+1032];\nld.shared.u64 %rd5, [%at+1040];\nld.shared.u64 %rd6, [%at+1048];\n"
               "st.global.v2.u64 [%rd2], {%rd3, %rd4};\nst.global.v2.u64 [%rd2+16], {%rd5, %rd6};\n") +
           kSync;
  };
  const std::vector<uint64_t> words = {0, 0, 0, 0, 0, 0, 0, 0, 11, 12, 13, 14};
  const std::vector<uint64_t> expected = {11, 12, 13, 14, 11, 12, 13, 14};
  bool early = false;
  for (const char* order : kOrders) {
    setenv("PDDM_EMULATION_ORDER", order, 1);
    const Ran ran = run(copied("32", await("0")), 32, words);
    CHECK(ran.error.empty() && std::equal(expected.begin(), expected.end(), ran.words.begin()), "%s: %s", order,
          ran.error.c_str());
    const Ran unawaited = run(copied("32", ""), 32, words);
    early |= !unawaited.error.empty() || !std::equal(expected.begin(), expected.end(), unawaited.words.begin());
  }
  CHECK(early, "a copy that is not waited for is always there");
  expect_refused("too few bytes announced", copied("16", await("0")) + await("1"),
                 "16 bytes came that nobody announced");
  expect_refused("too many bytes announced", copied("48", await("0")), "16 bytes of those announced");
  const auto copy = [](const std::string& before) {
    return begin(1) + one_thread("mov.u16 %h1, 3;\nmov.u32 %r2, 16;\nadd.s32 %r1, %at, 1024;\nmov.u64 %rd1, %to;\n" +
                                 before + kCopy);
  };
  expect_refused("8 bytes", copy("mov.u32 %r2, 8;\n"), "are to be multiples of 16");
  expect_refused("none", copy("mov.u32 %r2, 0;\n"), "are to be multiples of 16");
  expect_refused("past the end", copy("add.s32 %r1, %at, 49136;\nmov.u32 %r2, 32;\n"), "ends outside of shared memory");
  expect_refused("to a third block", copy("mov.u16 %h1, 7;\n"), "to the blocks 0x7 of a cluster of 2");
  expect_refused("from shared memory", copy("mov.u64 %rd1, shared_bytes;\n"), "is not in global memory");
  expect_refused("an odd place", copy("add.s32 %r1, %at, 1032;\n"), "is not aligned to 16 bytes");
}

// --- Products --------------------------------------------------------------------------------------------------------

uint16_t number(bool half, int x) {
  const float value = float(x);
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  if (!half) return uint16_t(bits >> 16);
  if (x == 0) return 0;
  const int exponent = std::ilogb(std::abs(x));
  return uint16_t((x < 0 ? 0x8000 : 0) | (exponent + 15) << 10 | (int(std::ldexp(std::abs(x), 10 - exponent)) & 0x3ff));
}
int left_number(int row, int k) { return (row * 5 + k * 3) % 31 - 15; }
int right_number(int column, int k) { return (column * 7 + k * 11) % 61 - 30; }

// What a descriptor names: of rows of 128 bytes, bits 4 to 6 of an address are those of the piece exclusively or-ed
// with bits 7 to 9, which are the row; of rows of 64 bytes, bits 4 and 5 with bits 7 and 8. Each in room for 128 bytes
// a row.
std::vector<uint64_t> tile(bool half, int rows, int (*of)(int, int), int row_bytes) {
  std::vector<uint64_t> words(size_t(rows) * 16);
  for (int row = 0; row < rows; ++row)
    for (int k = 0; k < row_bytes / 2; ++k) {
      const unsigned address = unsigned(row * row_bytes + k * 2);
      const unsigned swizzled = address ^ (address >> 7 & unsigned(row_bytes / 16 - 1)) << 4;
      reinterpret_cast<uint16_t*>(words.data())[swizzled / 2] = number(half, of(row, k));
    }
  return words;
}

std::string registers(char letter, int count) {
  std::string all = "{";
  for (int r = 0; r < count; ++r) all += (r ? ", %" : "%") + std::string(1, letter) + std::to_string(r);
  return all + "}";
}

struct Pieces {
  std::string fill, show = "fence.proxy.async.shared::cta;\n", sync = "bar.sync 0;\n", load,
                    begin = "wgmma.fence.sync.aligned;\n", after, commit = "wgmma.commit_group.sync.aligned;\n",
                    meanwhile, wait = "wgmma.wait_group.sync.aligned 0;\n", numbers = "1, 1, 0";
};
// Step 1 of 4 of a (64 rows, from byte 1024) by b (`columns`, from byte 9216), onto −1; by block 0 alone.
std::string product(bool half, int columns, bool in_registers, bool add, const Pieces& p, int row_bytes) {
  const std::string type = half ? ".f16" : ".bf16";
  std::string body = p.fill + p.show + p.sync;
  for (int i = 0; i < columns / 2; ++i) body += "mov.f32 %f" + std::to_string(i) + ", 0fBF800000;\n";
  // a's fragment as it is in memory: row thread / 32 · 16 + thread % 32 / 4, numbers 16 + thread % 4 · 2 and on.
  body +=
      "shr.u32 %r10, %thread, 5;\nmad.lo.s32 %r10, %r10, 2048, %at;\nand.b32 %r11, %thread, 31;\n"
      "shr.u32 %r11, %r11, 2;\nmad.lo.s32 %r10, %r11, 128, %r10;\nand.b32 %r12, %thread, 3;\n"
      "mad.lo.s32 %r10, %r12, 4, %r10;\nshl.b32 %r11, %r11, 4;\nxor.b32 %r13, %r11, 32;\nxor.b32 %r14, %r11, 48;\n"
      "add.s32 %r13, %r13, %r10;\nadd.s32 %r14, %r14, %r10;\n"
      "ld.shared.u32 %r0, [%r13+1024];\nld.shared.u32 %r1, [%r13+2048];\nld.shared.u32 %r2, [%r14+1024];\n"
      "ld.shared.u32 %r3, [%r14+2048];\n" +
      p.load;
  // The start over 16, the stride of eight rows over 16, and the swizzle; 16 inputs are 32 bytes.
  const uint64_t fields = uint64_t(row_bytes / 2) << 32 | uint64_t(row_bytes == 128 ? 1 : 2) << 62 | 1 << 16;
  body += "mov.u64 %rd1, shared_bytes;\nshr.u64 %rd1, %rd1, 4;\nor.b64 %rd1, %rd1, " + std::to_string(fields) +
          ";\n"
          "add.s64 %rd2, %rd1, 66;\nadd.s64 %rd3, %rd1, 578;\nsetp.ne.b32 %p1, " +
          std::to_string(int(add)) + ", 0;\n";
  body += p.begin + "wgmma.mma_async.sync.aligned.m64n" + std::to_string(columns) + "k16.f32" + type + type + " " +
          registers('f', columns / 2) + ", " + (in_registers ? registers('r', 4) : "%rd2") + ", %rd3, %p1, " +
          p.numbers + (in_registers ? "" : ", 0") + ";\n" + p.after + p.commit + p.meanwhile + p.wait;
  const int tiles = 8192 + columns * 128;
  body += "mul.wide.u32 %rd5, %thread, " + std::to_string(columns * 2) + ";\nadd.s64 %rd5, %rd5, %to;\n";
  for (int i = 0; i < columns / 2; ++i)
    body += "st.global.f32 [%rd5+" + std::to_string(tiles + 4 * i) + "], %f" + std::to_string(i) + ";\n";
  return of_block(0, body);
}
// Copies the tiles to shared memory, 16 bytes of a thread at a time.
std::string fill(int columns) {
  return "mul.wide.u32 %rd6, %thread, 16;\nadd.s64 %rd6, %rd6, %to;\nmad.lo.s32 %r20, %thread, 16, %at;\n"
         "mov.u32 %r21, 0;\n$fill:\nld.global.v4.u32 {%r22, %r23, %r24, %r25}, [%rd6];\n"
         "st.shared.v4.u32 [%r20+1024], {%r22, %r23, %r24, %r25};\nadd.s64 %rd6, %rd6, 2048;\nadd.s32 %r20, %r20, "
         "2048;\n"
         "add.s32 %r21, %r21, 1;\nsetp.lt.s32 %p2, %r21, " +
         std::to_string((8192 + columns * 128) / 2048) + ";\n@%p2 bra $fill;\n";
}
std::vector<uint64_t> tiles(bool half, int columns, int row_bytes) {
  std::vector<uint64_t> words = tile(half, 64, left_number, row_bytes),
                        right = tile(half, columns, right_number, row_bytes);
  words.insert(words.end(), right.begin(), right.end());
  words.resize(words.size() + 128 * size_t(columns) / 4);
  return words;
}
Ran multiplied(bool half, int columns, bool in_registers, bool add, Pieces p, int row_bytes = 128) {
  p.fill = fill(columns) + p.fill;
  return run(product(half, columns, in_registers, add, p, row_bytes), 128, tiles(half, columns, row_bytes));
}

void check_product(bool half, int columns, bool in_registers, bool add, int row_bytes = 128) {
  const Ran ran = multiplied(half, columns, in_registers, add, {}, row_bytes);
  CHECK(ran.error.empty(), "%s", ran.error.c_str());
  std::vector<float> sums(ran.words.size() * 2);
  std::memcpy(sums.data(), ran.words.data(), ran.words.size() * 8);
  for (int thread = 0; thread < 128; ++thread)
    for (int i = 0; i < columns / 2; ++i) {
      const int row = thread / 32 * 16 + thread % 32 / 4 + i % 4 / 2 * 8, column = i / 4 * 8 + thread % 4 * 2 + i % 2;
      float expected = add ? -1 : 0;
      for (int k = 16; k < 32; ++k) expected += float(left_number(row, k) * right_number(column, k));
      const float got = sums[size_t((8192 + columns * 128) / 4 + thread * columns / 2 + i)];
      CHECK(got == expected, "%d columns, half %d, registers %d, thread %d, sum %d: %g instead of %g", columns, half,
            in_registers, thread, i, got, expected);
      if (failures > 20) return;
    }
}

void check_products() {
  for (const char* order : kOrders) {
    setenv("PDDM_EMULATION_ORDER", order, 1);
    for (bool in_registers : {false, true})
      for (bool add : {false, true})
        for (bool half : {false, true}) check_product(half, 64, in_registers, add);
  }
  for (bool in_registers : {false, true}) check_product(false, 128, in_registers, true);
  for (bool in_registers : {false, true}) check_product(true, 256, in_registers, false);
  for (bool half : {false, true}) check_product(half, 192, !half, true);
  check_product(true, 128, false, true, 64), check_product(false, 256, false, false, 64);
  check_product(true, 128, true, false), check_product(false, 256, true, false);

  const auto refused = [](const char* what, const Pieces& p, const char* because, bool in_registers = true) {
    for (const char* order : kOrders) {
      setenv("PDDM_EMULATION_ORDER", order, 1);
      const Ran ran = multiplied(false, 64, in_registers, true, p);
      CHECK(ran.error.find(because) != std::string::npos, "%s: '%s' lacks '%s'", what, ran.error.c_str(), because);
    }
  };
  const auto with = [](std::string Pieces::* which, const std::string& text) {
    Pieces p;
    p.*which = text;
    return p;
  };
  const std::string again = "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 " + registers('f', 32) + ", ";
  refused("not shown", with(&Pieces::show, ""), "was stored and not shown");
  refused("shown by one", with(&Pieces::show, "setp.eq.s32 %p3, %thread, 5;\n@%p3 fence.proxy.async.shared::cta;\n"),
          "was stored and not shown");
  refused("shown by one after the barrier",
          with(&Pieces::sync, "bar.sync 0;\nfence.proxy.async.shared::cta;\nst.shared.u8 [%at+9248], 0;\n"),
          "row 0 of b, at byte 9248, was stored and not shown");
  refused("shown by all but one",
          with(&Pieces::show, "setp.ne.s32 %p3, %thread, 3;\n@%p3 fence.proxy.async.shared::cta;\n"),
          "was stored and not shown");
  const std::string copy =
                        "setp.eq.s32 %p3, %thread, 3;\n@%p3 st.global.u32 [%to], 77;\n@%p3 cp.async.cg.shared.global "
                        "[%at+9248], [%to], 16;\n"
                        "cp.async.commit_group;\n",
                    sync = "bar.sync 0;\n", shown = "fence.proxy.async.shared::cta;\n",
                    waited = "cp.async.wait_group 0;\n";
  refused("copied after it was shown", with(&Pieces::sync, sync + copy + shown + waited + sync),
          "was stored and not shown");
  const Ran copied = multiplied(false, 64, true, true, with(&Pieces::sync, sync + copy + waited + shown + sync));
  CHECK(copied.error.empty(), "%s", copied.error.c_str());
  refused("no fence", with(&Pieces::begin, ""), "no wgmma.fence before it");
  refused("a written after the fence", with(&Pieces::begin, "wgmma.fence.sync.aligned;\nmov.b32 %r2, 5;\n"),
          "was written to since the last wgmma.fence");
  refused("a sum written after the fence",
          with(&Pieces::begin, "wgmma.fence.sync.aligned;\nmov.f32 %f9, 0f3F800000;\n"),
          "was written to since the last wgmma.fence", false);
  refused("not waited for", with(&Pieces::wait, ""), "a register of a product on its way");
  refused("one group too few", with(&Pieces::wait, "wgmma.wait_group.sync.aligned 1;\n"), "a product on its way");
  refused("not committed", with(&Pieces::commit, ""), "a register of a product on its way");
  refused("a sum read", with(&Pieces::meanwhile, "add.f32 %f100, %f3, %f100;\n"), "a register of a product on its way");
  refused("a sum written", with(&Pieces::meanwhile, "mov.f32 %f3, 0f00000000;\n"),
          "a register of a product on its way");
  refused("a written", with(&Pieces::meanwhile, "mov.u32 %r3, 0;\n"), "a register of a product on its way");
  refused("a read", with(&Pieces::meanwhile, "@%p1 add.s32 %r9, %r9, %r3;\n"), "a register of a product on its way");
  refused("sums of another shape",
          with(&Pieces::after, "wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 " + registers('f', 64) +
                                   ", %rd2, %rd3, %p1, 1, 1, 0, 0;\n"),
          "a sum is in a register of a product on its way");
  refused("negated", with(&Pieces::numbers, "1, 2, 0"), "other numbers at the end");
  refused("the other way round", with(&Pieces::numbers, "1, 1, 1"), "other numbers at the end");
  refused(
      "another descriptor in one warp",
      with(&Pieces::begin, "setp.gt.s32 %p3, %thread, 95;\n@%p3 add.s64 %rd3, %rd3, 2;\nwgmma.fence.sync.aligned;\n"),
      "is not what another warp of the warpgroup has issued");
  refused(
      "another descriptor in one lane",
      with(&Pieces::begin, "setp.eq.s32 %p3, %thread, 7;\n@%p3 add.s64 %rd3, %rd3, 2;\nwgmma.fence.sync.aligned;\n"),
      "several descriptors");
  // On the same sums, without a fence between; and what is stored meanwhile.
  const Ran both = multiplied(false, 64, true, true, with(&Pieces::after, again + "%rd2, %rd3, %p1, 1, 1, 0, 0;\n"));
  CHECK(both.error.empty(), "%s", both.error.c_str());
  bool noticed = false;
  for (const char* order : kOrders) {
    setenv("PDDM_EMULATION_ORDER", order, 1);
    noticed |=
        !multiplied(false, 64, true, true, with(&Pieces::meanwhile, "st.shared.u8 [%at+9248], 77;\n")).error.empty();
  }
  CHECK(noticed, "b is stored to before the wait");

  const char* const unknown[] = {
      "wgmma.mma_async.sync.aligned.m64n64k8.f32.tf32.tf32 {%f0}, %rd1, %rd2, %p1, 1, 1;",
      "wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 {%f0}, %rd1, %rd2, %p1, 1, 1, 0, 0;",
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%r1], [%rd1], %r2, [%at];",
      "fence.proxy.async;",
      "mbarrier.arrive.shared::cta.b64 _, [%at];",
      "mbarrier.inval.shared::cta.b64 [%at];",
      "barrier.cluster.arrive.relaxed.aligned;"};
  for (const char* text : unknown) expect_refused(text, text, "is not among those that are known");
  const Module module = ptx::parse(kernel(""));
  try {
    const uint64_t x = 0;
    ptx::launch(module.kernel("test"), {dim3(2), dim3(32), 0, nullptr, nullptr}, {{&x, 8, 8}});
    CHECK(false, "a launch without clusters");
  } catch (const std::runtime_error& error) {
    CHECK(std::string(error.what()) == "ptx: test is for clusters of 2 blocks", "%s", error.what());
  }
}

}  // namespace

int main() {
  check_clusters();
  check_barriers();
  check_copies();
  check_products();
  if (failures) std::printf("%d checks failed\n", failures);
  return failures != 0;
}
