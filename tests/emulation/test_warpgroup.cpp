// What csrc/cuda/warpgroup.cuh has for Hopper, emulated: each primitive against its description, and its misuse, which
// must not get by. In several orders, for what happens at moments of its own.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <set>
#include <stdexcept>
#include <string>
#include <vector>

#include "../../csrc/cuda/warpgroup.cuh"
#include "../native/check.h"

namespace {

using namespace pddm::cuda;

template <class F>
__global__ void call(const F f) {
  f();
}

constexpr unsigned kBytes = 48 << 10;
constexpr int kDeep = kRowBytes / 2, kSteps = kDeep / 16;  // numbers of a row of a tile

template <class F>
cudaError_t launch(unsigned blocks, unsigned threads, size_t shared, const F& f, unsigned cluster = kClusterBlocks) {
  cudaLaunchAttribute attribute = {};
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim.x = cluster, attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = blocks, config.blockDim = threads, config.dynamicSmemBytes = shared;
  config.attrs = &attribute, config.numAttrs = 1;
  return cudaLaunchKernelEx(&config, call<F>, f);
}

constexpr const char* kOrders[] = {"ascending",  "descending", "shuffled:1", "shuffled:2",
                                   "shuffled:3", "shuffled:4", "shuffled:5", "shuffled:6"};

// What two blocks complain of in every order, without repetition.
template <class F>
std::set<std::string> complaints(unsigned threads, const F& f) {
  std::set<std::string> all;
  for (const char* order : kOrders) {
    setenv("PDDM_EMULATION_ORDER", order, 1);
    try {
      const cudaError_t error = launch(2, threads, kBytes, f);
      all.insert(error == cudaSuccess ? "" : cudaGetErrorString(error));
    } catch (const std::runtime_error& error) {
      all.insert(error.what());
    }
  }
  return all;
}
bool has(const std::string& text, const char* part) { return text.find(part) != std::string::npos; }

template <class F>
void expect_none(const char* what, unsigned threads, const F& f) {
  for (const std::string& found : complaints(threads, f)) CHECK(found.empty(), "%s: %s", what, found.c_str());
}
// In every order, or in one at least.
template <class F>
void expect(const char* what, unsigned threads, const char* part, const F& f, bool always = true) {
  bool any = false;
  for (const std::string& found : complaints(threads, f)) {
    any |= has(found, part);
    CHECK(!always || has(found, part), "%s: '%s' lacks '%s'", what, found.c_str(), part);
  }
  CHECK(any, "%s: nobody says '%s'", what, part);
}

uint64_t* barrier(int which) { return reinterpret_cast<uint64_t*>(aligned_shared_memory()) + which; }
unsigned char* tile(int number) { return aligned_shared_memory() + 1024 * (1 + number); }
uint16_t& element(unsigned char* of, int row, int column) {
  return reinterpret_cast<uint16_t*>(of + piece_offset(row, column / 8))[column % 8];
}

// One thread's, and then everybody's.
void begin_barrier(int which, int count) {
  if (threadIdx.x == 0) init_barrier(barrier(which), count), publish_barriers();
  sync_cluster();
}

// --- Clusters --------------------------------------------------------------------------------------------------------

void test_clusters() {
  for (const char* order : kOrders) {
    setenv("PDDM_EMULATION_ORDER", order, 1);
    int seen[6][64] = {}, told[6][64] = {};
    launch(6, 64, 2048, [&] {
      const unsigned t = threadIdx.x;
      auto* const own = reinterpret_cast<int*>(aligned_shared_memory());
      CHECK(reinterpret_cast<uintptr_t>(own) % 1024 == 0 && own[t] == -1, "shared memory");
      own[t] = int(100 * blockIdx.x + t);
      seen[blockIdx.x][t] = cluster_rank() + 1;
      sync_cluster();
      // What the other block has written by now; and that it has memory of its own.
      told[blockIdx.x][t] = seen[blockIdx.x ^ 1][63 - t] * 1000 + own[t];
      if (t < 40) sync_cluster();  // who has ended is not waited for
    });
    for (int b = 0; b < 6; ++b)
      for (int t = 0; t < 64; ++t)
        CHECK(told[b][t] == (2 - b % 2) * 1000 + 100 * b + t, "block %d, thread %d: %d", b, t, told[b][t]);
  }
  CHECK(launch(3, 32, 0, [] {}) == cudaErrorInvalidClusterSize, "blocks that are no clusters");
  CHECK(launch(3, 32, 0, [] {}, 3) == cudaErrorNotSupported, "a cluster of three");
  const auto alone = [] {
    sync_cluster();
    if (cluster_rank() != 0) __trap();
  };
  CHECK(launch(3, 32, 0, alone, 1) == cudaSuccess, "of one");
  setenv("PDDM_EMULATION_DEVICE", "sm_80", 1);
  CHECK(launch(2, 32, 0, [] {}) == cudaErrorInvalidClusterSize, "a device without clusters");
  setenv("PDDM_EMULATION_DEVICE", "sm_100", 1);
  expect("another device", 128, "of compute capability 10; it is of 9.0 alone", [] { give_up_registers<24>(); });
  setenv("PDDM_EMULATION_DEVICE", "sm_90", 1);

  expect("a cluster that does not meet", 32, "the cluster's barrier, at which 32 of 64 are", [] {
    if (cluster_rank() == 0) sync_cluster();
    if (cluster_rank() == 1) sync_warpgroup(1);
  });
}

void test_warpgroup_barriers() {
  expect_none("two warpgroups", 256, [] {
    auto* const own = reinterpret_cast<int*>(tile(0));
    const int which = int(threadIdx.x) / kWarpgroup, t = int(threadIdx.x) % kWarpgroup;
    for (int turn = 0; turn < 3 + which; ++turn) {
      own[threadIdx.x] = turn * 1000 + t;
      sync_warpgroup(1 + which);
      CHECK(own[which * kWarpgroup + (t + 77) % kWarpgroup] == turn * 1000 + (t + 77) % kWarpgroup, "turn %d", turn);
      sync_warpgroup(1 + which);
    }
  });
  expect("half a warpgroup", 128, "barrier 3, at which 64 of 128 are", [] {
    if (threadIdx.x < 64) sync_warpgroup(3);
  });
  expect("__syncthreads'", 128, "it is __syncthreads'", [] { sync_warpgroup(0); });
  expect("there is no such", 128, "there are 16", [] { sync_warpgroup(16); });
}

// --- Barriers that count ---------------------------------------------------------------------------------------------

void test_counting() {
  int turns[2];
  expect_none("arrivals of both blocks", 64, [&] {
    begin_barrier(0, kClusterBlocks);
    await(barrier(0), 1);  // before the first phase: the one of parity 1 has ended
    sync_cluster();
    for (int turn = 0; turn < 7; ++turn) {
      if (threadIdx.x == 0) {
        turns[cluster_rank()] = turn;
        arrive_at(barrier(0), 0), arrive_at(barrier(0), 1);
      }
      await(barrier(0), turn % 2);
      CHECK(turns[0] == turn && turns[1] == turn, "turn %d: %d and %d", turn, turns[0], turns[1]);
      sync_cluster();
    }
  });
  expect_none("arrivals without and with bytes", 32, [] {
    begin_barrier(0, 2);
    if (threadIdx.x == 0) arrive_expecting(barrier(0), 0), arrive_at(barrier(0), cluster_rank());
    await(barrier(0), 0);
    sync_cluster();
  });

  expect("an arrival too few", 32, "the phase of parity 0 of the barrier at byte 8, which is in phase 0: 1 of 2", [] {
    begin_barrier(1, 2);
    if (threadIdx.x == 0) arrive_at(barrier(1), cluster_rank());
    await(barrier(1), 0);
  });
  expect("the wrong parity", 32, "the phase of parity 1 of the barrier at byte 0, which is in phase 1: 1 of 1", [] {
    begin_barrier(0, 1);
    if (threadIdx.x == 0) arrive_at(barrier(0), cluster_rank());
    await(barrier(0), 0), await(barrier(0), 1);
  });
  expect("no barrier", 32, "an arrival at the barrier at byte 16, where none was initialised", [] {
    begin_barrier(0, 1);
    arrive_expecting(barrier(2), 0);
  });
  expect(
      "nobody waits until it is there", 64, "where none was initialised",
      [] {
        if (threadIdx.x == 32) init_barrier(barrier(0), 1), publish_barriers();
        if (threadIdx.x == 0) await(barrier(0), 1);
        sync_cluster();
      },
      false);
  expect("a barrier that is not published", 32, "an arrival at the other block's barrier at byte 0, not published", [] {
    if (threadIdx.x == 0) init_barrier(barrier(0), 1);
    sync_cluster();
    if (threadIdx.x == 0) arrive_at(barrier(0), cluster_rank() ^ 1);
    sync_cluster();
  });
  expect("published by another thread", 64, "not published", [] {
    if (threadIdx.x == 0) init_barrier(barrier(0), 1);
    if (threadIdx.x == 1) publish_barriers();
    sync_cluster();
    if (threadIdx.x == 0) arrive_at(barrier(0), cluster_rank() ^ 1);
    sync_cluster();
  });
  expect("initialised twice", 32, "is initialised again", [] { init_barrier(barrier(0), 1); });
  expect("of nobody", 32, "of 0 arrivals", [] { init_barrier(barrier(0), 0); });
  expect("no parity", 32, "a wait for the parity 2", [] { begin_barrier(0, 1), await(barrier(0), 2); });
  expect("overwritten", 32, "which was overwritten", [] {
    begin_barrier(0, 1);
    *barrier(0) = 0;
    await(barrier(0), 1);
  });
  expect("beyond its count", 32, "beyond its 1", [] {
    begin_barrier(0, 1);
    if (threadIdx.x == 0) arrive_expecting(barrier(0), 16), arrive_expecting(barrier(0), 16);
    sync_cluster();
  });
  expect(
      "the other block has ended", 32, "which has ended",
      [] {
        begin_barrier(0, 1);
        if (cluster_rank() == 0 && threadIdx.x == 0) await(barrier(0), 0);
        if (cluster_rank() == 1 && threadIdx.x == 0) arrive_at(barrier(0), 0);
        if (cluster_rank() == 0 && threadIdx.x == 0) arrive_at(barrier(0), 1);
      },
      false);
}

// --- Copies ----------------------------------------------------------------------------------------------------------

constexpr int kCopied = 4096;
alignas(16) unsigned char source[2 * kCopied];

// Each block copies a half to both, which arrives in parts, at any time from the start to the wait.
void test_copies() {
  std::mt19937 random(5);
  for (unsigned char& byte : source) byte = static_cast<unsigned char>(random() % 255);
  bool none = false, some = false, all = false;
  expect_none("copies of both blocks", 64, [&] {
    begin_barrier(0, 1);
    if (threadIdx.x == 0) {
      const int from = cluster_rank() * kCopied;
      arrive_expecting(barrier(0), 2 * kCopied);
      copy_to_cluster(tile(0) + from, source + from, kCopied, barrier(0));
    }
    if (threadIdx.x < 32)
      for (int look = 0; look < 40; ++look) {
        int there = 0;
        for (int piece = 0; piece < 2 * kCopied; piece += 16) {
          const bool is = std::memcmp(tile(0) + piece, source + piece, 16) == 0;
          there += is;
          for (int byte = 0; byte < 16 && !is; ++byte) CHECK(tile(0)[piece + byte] == 0xFF, "part of 16 bytes");
        }
        none |= there == 0, some |= there > 0 && there < kCopied / 8, all |= there == kCopied / 8;
        __syncwarp();
      }
    await(barrier(0), 0);
    CHECK(std::memcmp(tile(0), source, sizeof source) == 0, "what arrived");
    sync_cluster();
  });
  CHECK(none && some && all, "nothing %d, something %d, everything %d was there early", none, some, all);

  // A stage filled again before others have read it, and a copy that nobody waits for.
  const auto filled = [](bool wait, bool ask) {
    return [=] {
      begin_barrier(0, 1), begin_barrier(1, 2 * 32);
      for (int turn = 0; turn < 6; ++turn) {
        if (threadIdx.x == 0) {
          await(barrier(ask ? 1 : 0), turn % 2 ^ 1);
          arrive_expecting(barrier(0), kCopied);
          if (cluster_rank() == 0) copy_to_cluster(tile(0), source + turn * 16, kCopied, barrier(0));
        } else if (threadIdx.x >= 32) {
          if (wait) await(barrier(0), turn % 2);
          if (std::memcmp(tile(0), source + turn * 16, kCopied) != 0) __trap();
          arrive_at(barrier(1), 0), arrive_at(barrier(1), 1);
        }
      }
      sync_cluster();
    };
  };
  expect_none("a stage of copies", 64, filled(true, true));
  expect("read before it is there", 64, "__trap", filled(false, true));
  expect("filled before it was read", 64, "__trap", filled(true, false), false);

  const auto copied = [](int announced, int bytes, bool publish, int apart = 0) {
    return [=] {
      if (threadIdx.x == 0) {
        init_barrier(barrier(0), 1);
        if (publish) publish_barriers();
      }
      sync_cluster();
      if (threadIdx.x == 0) {
        arrive_expecting(barrier(0), announced);
        if (cluster_rank() == 0) copy_to_cluster(tile(0) + apart, source, bytes, barrier(0));
      }
      await(barrier(0), 0);
      sync_cluster();
    };
  };
  expect_none("as many bytes as announced", 32, copied(64, 64, true));
  expect("too few bytes", 32, "0 of 1 arrivals are missing, and 16 bytes of those announced", copied(80, 64, true));
  expect("an unpublished barrier", 32, "not published", copied(64, 64, false));
  expect("an odd size", 32, "are to be multiples of 16", copied(40, 40, true));
  expect("an odd place", 32, "are to be multiples of 16", copied(64, 64, true, 8));
  expect("past the end", 32, "outside of shared memory", copied(64, 64, true, kBytes - 1024 - 48));
  expect("too many bytes", 32, "and 32 bytes came that nobody announced", [] {
    begin_barrier(0, 1);
    if (threadIdx.x == 0 && cluster_rank() == 0) copy_to_cluster(tile(0), source, 32, barrier(0));
    await(barrier(0), 0);
  });
  expect(
      "nobody waits", 32, "ends while a copy",
      [] {
        begin_barrier(0, 1);
        if (threadIdx.x == 0 && cluster_rank() == 0) copy_to_cluster(tile(0), source, 32, barrier(0));
      },
      false);
  expect("over what was stored", 32, "over what was stored and not shown", [] {
    begin_barrier(0, 1);
    if (threadIdx.x == 0) tile(0)[5] = 1;
    sync_cluster();
    if (threadIdx.x == 0 && cluster_rank() == 0) copy_to_cluster(tile(0), source, 32, barrier(0));
    sync_cluster();
  });
}

// --- Registers -------------------------------------------------------------------------------------------------------

template <int First, int Second, int Third>
void change_registers() {
  const int which = int(threadIdx.x) / kWarpgroup;
  if (which == 0) give_up_registers<First>();
  if (which == 1) take_registers<Second>();
  if (which == 2) take_registers<Third>();
}

void test_registers() {
  // Of 384 threads each has 168.
  expect_none("as many as there are", 384, [] { change_registers<24, 240, 240>(); });
  expect("more than there are", 384, "240 registers instead of 168, and ", [] { change_registers<40, 240, 240>(); });
  expect("no multiple of 8", 384, "accepted are multiples of 8", [] { change_registers<28, 240, 240>(); });
  expect("too few", 384, "accepted are multiples of 8 from 24", [] { change_registers<16, 240, 240>(); });
  expect("giving up takes", 384, "setmaxnreg.dec from 168 to 176", [] { change_registers<176, 168, 168>(); });
  expect("taking gives up", 384, "setmaxnreg.inc from 168 to 160", [] { change_registers<24, 160, 240>(); }, false);
  expect("one warp", 128, "warps of warpgroup 0 have 256 and 24 registers", [] {
    if (threadIdx.x >= 96) give_up_registers<24>();
  });
  expect("half a warp", 128, "0 to 15: setmaxnreg.dec; 16 to 127: ended", [] {
    if (threadIdx.x < 16) give_up_registers<24>();
  });
}

// --- Products --------------------------------------------------------------------------------------------------------

void test_places() {
  // Rows of 64 or 128 bytes: bits 4 and on of an address are the piece, exclusively or-ed with bits 7 and on.
  for (uint64_t row_bytes : {64, 128})
    for (unsigned row = 0; row < 256; ++row)
      for (unsigned step = 0; step < row_bytes / 32; ++step)
        for (unsigned piece = 0; piece < 2; ++piece) {
          const uint64_t tile = 0x5000,
                         descriptor = tile >> 4 | (8 * row_bytes / 16) << 32 | (row_bytes == 64 ? 2ull : 1ull) << 62;
          const unsigned plain = unsigned(row * row_bytes) + 32 * step + 16 * piece;
          const unsigned swizzled = plain ^ (plain / 128 % unsigned(row_bytes / 16)) * 16;
          CHECK(pddm::emulation::tile_address(descriptor + 2 * step, row, piece) == tile + swizzled,
                "rows of %u bytes, row %u, step %u, piece %u", unsigned(row_bytes), row, step, piece);
        }
  expect_none("descriptors", 32, [] {
    for (int row = 0; row < 256; ++row)
      for (int step = 0; step < kSteps; ++step)
        for (int piece = 0; piece < 2; ++piece)
          if (pddm::emulation::tile_address(descriptor(tile(3)) + 2 * uint64_t(step), unsigned(row), unsigned(piece)) !=
              shared_address(tile(3)) + unsigned(piece_offset(row, 2 * step + piece)))
            __trap();
  });
  std::set<int> inputs;
  for (int place = 0; place < 64; ++place) inputs.insert(input_at(place));
  CHECK(inputs.size() == 64 && *inputs.begin() == 0 && *inputs.rbegin() == 63, "a permutation");
  for (uint64_t wrong :
       {uint64_t(0), uint64_t(3) << 62, uint64_t(1) << 62 | uint64_t(1) << 49, uint64_t(1) << 62 | 8,
        uint64_t(1) << 62 | uint64_t(1) << 14, uint64_t(1) << 62 | 7, uint64_t(2) << 62 | 8, uint64_t(2) << 62 | 3})
    try {
      pddm::emulation::tile_address(wrong, 0, 0);
      CHECK(false, "the descriptor %llx", static_cast<unsigned long long>(wrong));
    } catch (const std::invalid_argument&) {
    }
}

// Of a warpgroup's thread, by the manual: the row and the column of its sum i.
int row_of(int thread, int i) { return thread / 32 * 16 + thread % 32 / 4 + i / 2 % 2 * 8; }
int column_of(int thread, int i) { return i / 4 * 8 + thread % 4 * 2 + i % 2; }

// Numbers whose products and sums are exact, every product another.
int left_number(int row, int k) { return (row * 5 + k * 3) % 31 - 15; }
int right_number(int column, int k) { return (column * 7 + k * 11) % 61 - 30; }
template <class T>
void fill(unsigned char* to, int rows, int (*number)(int, int), bool permuted = false) {
  for (int e = int(threadIdx.x) % kWarpgroup; e < rows * kDeep; e += kWarpgroup) {
    const int row = e / kDeep, k = e % kDeep;
    element(to, row, k) = uint16_t(pack(T{}, float(number(row, permuted ? input_at(k) : k)), 0));
  }
}
// This thread's fragment of step `step`; side by side: the numbers that input_at has in its place.
template <class T>
void load_left(uint32_t (&a)[4], int step, bool side_by_side = false) {
  const int thread = int(threadIdx.x) % kWarpgroup, row = thread / 32 * 16 + thread % 32 / 4, at = thread % 4;
  for (int r = 0; r < 4; ++r) {
    const int k = side_by_side ? 4 * at + r / 2 * 2 : 2 * at + r / 2 * 8;
    const auto number = [&](int e) { return float(left_number(row + r % 2 * 8, 16 * step + k + e)); };
    a[r] = pack(T{}, number(0), number(1));
  }
}

template <class T, int N>
void test_products(const char* name) {
  const auto products = [&](bool registers, bool add, bool one_group, bool permuted) {
    return [=] {
      fill<T>(tile(0), 64, left_number), fill<T>(tile(8), N, right_number, permuted);
      show_to_matrix_unit();
      __syncthreads();
      const int thread = int(threadIdx.x);
      float d[N / 2];
      uint32_t a[kSteps][4];
      for (int i = 0; i < N / 2; ++i) d[i] = float(thread - i);
      for (int step = 0; step < kSteps; ++step) load_left<T>(a[step], step, permuted);
      begin_products();
      for (int step = 0; step < kSteps; ++step) {
        const Descriptor b = descriptor(tile(8)) + 2 * uint64_t(step);
        const bool adds = add || step > 0;
        if (registers)
          multiply_add(T{}, d, a[step], b, adds);
        else
          multiply_add(T{}, d, descriptor(tile(0)) + 2 * uint64_t(step), b, adds);
        if (!one_group || step == kSteps - 1) commit_products();
      }
      if (!one_group) {
        wait_products<kSteps - 1>();
        CHECK(std::isnan(d[0]) && std::isnan(d[N / 2 - 1]), "sums before the last of their products");
      }
      wait_products<0>();
      for (int i = 0; i < N / 2; ++i) {
        float expected = add ? float(thread - i) : 0;
        for (int k = 0; k < kDeep; ++k)
          expected += float(left_number(row_of(thread, i), k) * right_number(column_of(thread, i), k));
        CHECK(d[i] == expected, "%s, %d columns, thread %d, sum %d: %g instead of %g", name, N, thread, i, d[i],
              expected);
      }
    };
  };
  const auto orders = [&](const char* what, const auto& f) {
    for (const char* order : {"ascending", "shuffled:3"}) {
      setenv("PDDM_EMULATION_ORDER", order, 1);
      CHECK(launch(1, kWarpgroup, kBytes, f, 1) == cudaSuccess, "%s", what);
    }
  };
  orders("of registers", products(true, false, false, false)), orders("added", products(true, true, true, false));
  orders("of shared memory", products(false, false, true, false)), orders("added", products(false, true, false, false));
  orders("side by side", products(true, false, true, true));
}

enum class Mistake {
  none,
  not_shown,
  no_barrier,
  not_begun,
  no_wait,
  no_commit,
  one_wait,
  sums_read,
  sums_written,
  a_changed,
  a_gone_begin,
  b_stored,
  several_descriptors,
  several_steps,
  several_predicates,
  one_warp,
  too_wide,
  outside,
  other_swizzle,
  half_sums
};

// Four warps: one product of registers, and one of shared memory; of two tiles of b, by turns.
template <Mistake mistake>
void multiply_once() {
  const int thread = int(threadIdx.x), warp = thread / 32;
  const auto is = [](Mistake which) { return mistake == which; };
  begin_barrier(0, 1);
  if (is(Mistake::too_wide)) give_up_registers<64>();
  fill<Bf16>(tile(0), 64, left_number), fill<Bf16>(tile(8), 128, right_number);
  if (!is(Mistake::not_shown)) show_to_matrix_unit();
  if (!is(Mistake::no_barrier)) __syncthreads();
  if (is(Mistake::one_warp) && warp == 3) return sync_cluster();
  float d[64] = {};
  uint32_t a[4];
  load_left<Bf16>(a, 0);
  Descriptor b = descriptor(tile(8));
  if (is(Mistake::several_descriptors) && thread == 37) b += 2;
  if (is(Mistake::several_steps) && warp == 2) b += 2;
  if (is(Mistake::outside)) b = descriptor(tile(40));
  if (is(Mistake::other_swizzle)) b |= uint64_t(3) << 62;
  if (!is(Mistake::not_begun)) begin_products();
  multiply_add(Bf16{}, d, a, b, is(Mistake::several_predicates) && thread == 9);
  if (is(Mistake::half_sums)) multiply_add(Bf16{}, reinterpret_cast<float (&)[32]>(d[32]), a, b, true);
  commit_products();
  if (is(Mistake::a_gone_begin)) wait_products<0>(), a[0] = 0;
  multiply_add(Bf16{}, d, descriptor(tile(0)) + 2, descriptor(tile(8)) + 2, true);
  if (!is(Mistake::no_commit)) commit_products();
  if (is(Mistake::a_changed)) a[2] ^= 1;
  if (is(Mistake::sums_written)) d[5] = 0;
  if (is(Mistake::b_stored) && thread == 99) element(tile(8), 70, 25) = 0;
  float early = 0;
  if (is(Mistake::sums_read)) early = d[7];
  if (is(Mistake::one_wait)) wait_products<1>();
  if (!is(Mistake::no_wait) && !is(Mistake::one_wait)) wait_products<0>();
  for (int i = 0; i < 64; ++i) {
    float expected = early;
    for (int k = 0; k < 32; ++k)
      expected += float(left_number(row_of(thread, i), k) * right_number(column_of(thread, i), k));
    if (d[i] != expected) __trap();
  }
  sync_cluster();
}

void test_misuse() {
  expect_none("no mistake", kWarpgroup, multiply_once<Mistake::none>);
  expect("not shown", kWarpgroup, "was stored and not shown to the matrix unit", multiply_once<Mistake::not_shown>);
  expect("no barrier", kWarpgroup, "were written to after it was issued", multiply_once<Mistake::no_barrier>, false);
  expect("not begun", kWarpgroup, "no wgmma.fence since", multiply_once<Mistake::not_begun>);
  expect("not begun again", kWarpgroup, "no wgmma.fence since", multiply_once<Mistake::a_gone_begin>);
  expect("no wait", kWarpgroup, "__trap", multiply_once<Mistake::no_wait>);
  expect("no commit", kWarpgroup, "__trap", multiply_once<Mistake::no_commit>);
  expect("one too few awaited", kWarpgroup, "__trap", multiply_once<Mistake::one_wait>);
  expect("sums read early", kWarpgroup, "__trap", multiply_once<Mistake::sums_read>);
  expect("sums written early", kWarpgroup, "was written to before the wait", multiply_once<Mistake::sums_written>);
  expect("a changed early", kWarpgroup, "has changed a's register 2", multiply_once<Mistake::a_changed>);
  expect("b stored early", kWarpgroup, "was stored and not shown", multiply_once<Mistake::b_stored>, false);
  expect("several descriptors", kWarpgroup, "several descriptors", multiply_once<Mistake::several_descriptors>);
  expect("several predicates", kWarpgroup, "several descriptors or predicates",
         multiply_once<Mistake::several_predicates>);
  expect("warps apart", kWarpgroup, "is not what another warp", multiply_once<Mistake::several_steps>);
  expect("three warps", kWarpgroup, "a matrix instruction that some warp of the warpgroup has not come to",
         multiply_once<Mistake::one_warp>);
  expect("too many registers", kWarpgroup, "has 68 operands in registers", multiply_once<Mistake::too_wide>);
  expect("outside", kWarpgroup, "reads outside of shared memory", multiply_once<Mistake::outside>);
  expect("other swizzle", kWarpgroup, "its swizzle is neither", multiply_once<Mistake::other_swizzle>);
  expect("part of the sums", kWarpgroup, "part of the sums", multiply_once<Mistake::half_sums>);
  expect("ends without a wait", kWarpgroup, "has not waited for its products", [] {
    float d[32] = {};
    show_to_matrix_unit();
    begin_products(), multiply_add(F16{}, d, descriptor(tile(0)), descriptor(tile(0)), false), commit_products();
  });
  expect("two warps", 64, "a warp that is of no warpgroup", [] {
    float d[32] = {};
    begin_products(), multiply_add(F16{}, d, descriptor(tile(0)), descriptor(tile(0)), false);
  });

  // The next tile of b is copied when the products that read the last one have been waited for, or before.
  const auto streamed = [](bool early) {
    return [=] {
      constexpr int kBytes = 64 * kRowBytes;
      alignas(16) static unsigned char zeros[kBytes];
      begin_barrier(0, 1);
      fill<F16>(tile(0), 64, left_number), fill<F16>(tile(8), 64, right_number);
      show_to_matrix_unit();
      sync_cluster();
      float d[32] = {};
      begin_products();
      for (uint64_t step = 0; step < kSteps; ++step)
        multiply_add(F16{}, d, descriptor(tile(0)) + 2 * step, descriptor(tile(8)) + 2 * step, true);
      commit_products();
      if (!early) wait_products<0>();
      sync_cluster();
      if (threadIdx.x == 0 && cluster_rank() == 0) copy_to_cluster(tile(8), zeros, kBytes, barrier(0));
      if (threadIdx.x == 0) arrive_expecting(barrier(0), kBytes);
      wait_products<0>();
      for (int i = 0; i < 32; ++i) {
        float expected = 0;
        for (int k = 0; k < kDeep; ++k)
          expected +=
              float(left_number(row_of(int(threadIdx.x), i), k) * right_number(column_of(int(threadIdx.x), i), k));
        if (d[i] != expected) __trap();
      }
      await(barrier(0), 0);
      sync_cluster();
    };
  };
  expect_none("copied after the wait", kWarpgroup, streamed(false));
  expect("copied before the wait", kWarpgroup, "were written to after it was issued", streamed(true));
}

}  // namespace

int main() {
  setenv("PDDM_EMULATION_DEVICE", "sm_90", 1);
  test_clusters(), test_warpgroup_barriers(), test_counting(), test_copies(), test_registers(), test_places();
  test_products<Bf16, 64>("bfloat16"), test_products<Bf16, 128>("bfloat16"), test_products<Bf16, 192>("bfloat16");
  test_products<Bf16, 256>("bfloat16");
  test_products<F16, 64>("float16"), test_products<F16, 128>("float16"), test_products<F16, 192>("float16");
  test_products<F16, 256>("float16");
  test_misuse();
  std::printf(failures ? "%d checks failed\n" : "all checks passed\n", failures);
  return failures != 0;
}
