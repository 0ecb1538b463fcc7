// Every emulated instruction against its documented layout and rounding, and broken kernels, which must not get by.
// In the order of PDDM_EMULATION_ORDER; where orders are compared, in several.
#include <cuda_runtime.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <limits>
#include <random>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

namespace pddm::cuda {
struct Bf16 {};
struct F16 {};
struct Tf32 {};
}  // namespace pddm::cuda
#include <emulated_device.h>

#include "../native/check.h"

namespace {

using namespace pddm::cuda;

template <class F>
__global__ void call(const F f) {
  f();
}

template <class F>
cudaError_t launch(dim3 grid, dim3 block, size_t shared, const F& f) {
  cudaLaunchConfig_t config = {};
  config.gridDim = grid, config.blockDim = block, config.dynamicSmemBytes = shared;
  return cudaLaunchKernelEx(&config, call<F>, f);
}

// What the kernel throws, or nothing.
template <class F>
std::string complaint(unsigned threads, size_t shared, const F& f) {
  try {
    const cudaError_t error = launch(1, threads, shared, f);
    return error == cudaSuccess ? "" : cudaGetErrorString(error);
  } catch (const std::runtime_error& error) {
    return error.what();
  }
}
bool has(const std::string& text, const char* part) { return text.find(part) != std::string::npos; }

// f() in every order.
template <class F>
auto in_orders(const F& f) {
  const char* const set = std::getenv("PDDM_EMULATION_ORDER");
  const std::string before = set ? set : "ascending";
  std::vector<decltype(f())> results;
  for (const char* order : {"ascending", "descending", "shuffled:1", "shuffled:2"}) {
    setenv("PDDM_EMULATION_ORDER", order, 1);
    results.push_back(f());
  }
  setenv("PDDM_EMULATION_ORDER", before.c_str(), 1);
  return results;
}

float* floats() { return reinterpret_cast<float*>(shared_memory()); }

// --- Instructions ----------------------------------------------------------------------------------------------------

void test_load_matrices() {
  // Row `row` of matrix q stands at place[8 q + row]; the element with number e is the 16-bit number e.
  int place[32];
  for (int i = 0; i < 32; ++i) place[i] = (i * 13 + 5) % 40;
  uint32_t got[32][4], transposed[32][4];
  launch(1, 32, 40 * 16, [&] {
    auto* const elements = reinterpret_cast<uint16_t*>(shared_memory());
    for (int e = int(threadIdx.x); e < 40 * 8; e += 32) elements[e] = uint16_t(e);
    __syncwarp();
    load_matrices(got[threadIdx.x], elements + place[threadIdx.x] * 8);
    load_matrices_transposed(transposed[threadIdx.x], elements + place[threadIdx.x] * 8);
  });
  for (int t = 0; t < 32; ++t)
    for (int q = 0; q < 4; ++q) {
      const uint32_t element = uint32_t(place[8 * q + t / 4] * 8 + 2 * (t % 4));
      CHECK(got[t][q] == (element | (element + 1) << 16), "lane %d, matrix %d: %08x", t, q, got[t][q]);
      const int row = 8 * q + 2 * (t % 4);
      const uint32_t low = uint32_t(place[row] * 8 + t / 4), high = uint32_t(place[row + 1] * 8 + t / 4);
      CHECK(transposed[t][q] == (low | high << 16), "lane %d, matrix %d transposed: %08x", t, q, transposed[t][q]);
    }
  CHECK(has(complaint(32, 1024,
                      [] {
                        uint32_t r[4];
                        load_matrices(r, shared_memory() + (threadIdx.x == 5 ? 8 : 0));
                      }),
            "thread (5, 0, 0): ldmatrix of a row that is not aligned"),
        "misaligned");
  CHECK(has(complaint(32, 1000,
                      [] {
                        uint32_t r[4];
                        load_matrices(r, shared_memory() + (threadIdx.x == 5 ? 992 : 0));
                      }),
            "outside of shared memory"),
        "the row's end is outside");
}

template <class T>
uint32_t pair_of(float low, float high) {
  return pack(T{}, low, high);
}

// D = A B + C by the layout of m16n8k16: g is the lane's group, t its place in it.
template <class T>
void test_multiply_halves(const char* name) {
  float a[16][16], b[16][8], got[16][8];
  std::mt19937 random(1);
  for (auto& row : a)
    for (float& x : row) x = float(int(random() % 255) - 127);
  for (auto& row : b)
    for (float& x : row) x = float(int(random() % 255) - 127);
  launch(1, 32, 0, [&] {
    const int g = int(threadIdx.x) / 4, t = int(threadIdx.x) % 4;
    const uint32_t left[4] = {
        pair_of<T>(a[g][2 * t], a[g][2 * t + 1]), pair_of<T>(a[g + 8][2 * t], a[g + 8][2 * t + 1]),
        pair_of<T>(a[g][2 * t + 8], a[g][2 * t + 9]), pair_of<T>(a[g + 8][2 * t + 8], a[g + 8][2 * t + 9])};
    const uint32_t b0 = pair_of<T>(b[2 * t][g], b[2 * t + 1][g]), b1 = pair_of<T>(b[2 * t + 8][g], b[2 * t + 9][g]);
    float d[4] = {float(g * 8 + 2 * t), float(g * 8 + 2 * t + 1), float(g * 8 + 64 + 2 * t), float(g * 8 + 65 + 2 * t)};
    multiply_add(T{}, d, left, b0, b1);
    got[g][2 * t] = d[0], got[g][2 * t + 1] = d[1], got[g + 8][2 * t] = d[2], got[g + 8][2 * t + 1] = d[3];
  });
  for (int i = 0; i < 16; ++i)
    for (int j = 0; j < 8; ++j) {
      float expected = float(i * 8 + j);
      for (int k = 0; k < 16; ++k) expected += a[i][k] * b[k][j];
      CHECK(got[i][j] == expected, "%s (%d, %d): %g, expected %g", name, i, j, got[i][j], expected);
    }
}

void test_multiply_tf32() {
  float a[16][8], b[8][8], got[16][8];
  std::mt19937 random(2);
  for (auto& row : a)
    for (float& x : row) x = float(int(random() % 2001) - 1000);
  for (auto& row : b)
    for (float& x : row) x = float(int(random() % 2001) - 1000);
  launch(1, 32, 0, [&] {
    const int g = int(threadIdx.x) / 4, t = int(threadIdx.x) % 4;
    const auto bits = [](float x) { return __float_as_uint(x) | 0x1abc; };  // what is below tf32 is not looked at
    const uint32_t left[4] = {bits(a[g][t]), bits(a[g + 8][t]), bits(a[g][t + 4]), bits(a[g + 8][t + 4])};
    float d[4] = {};
    multiply_add(Tf32{}, d, left, bits(b[t][g]), bits(b[t + 4][g]));
    got[g][2 * t] = d[0], got[g][2 * t + 1] = d[1], got[g + 8][2 * t] = d[2], got[g + 8][2 * t + 1] = d[3];
  });
  for (int i = 0; i < 16; ++i)
    for (int j = 0; j < 8; ++j) {
      float expected = 0;
      for (int k = 0; k < 8; ++k) expected += a[i][k] * b[k][j];
      CHECK(got[i][j] == expected, "tf32 (%d, %d): %g, expected %g", i, j, got[i][j], expected);
    }
}

// The number with these exponent and fraction fields.
double number(int exponent, int fraction, int bias, int digits) {
  return exponent == 0 ? std::ldexp(fraction, 1 - bias - digits)
                       : std::ldexp((1 << digits) + fraction, exponent - bias - digits);
}

// Between any two neighbours, infinity among them: what is nearer, and a tie to the even one.
template <class T>
void test_pack(const char* name, int bias, int digits) {
  const float infinity = std::numeric_limits<float>::infinity();
  const uint32_t infinite = 0x7fffu >> digits << digits;
  const auto value = [&](uint32_t bits) {
    return number(int(bits >> digits), int(bits & ((1u << digits) - 1)), bias, digits);
  };
  for (uint32_t low = 0; low < infinite; ++low) {
    // Beyond the largest number, where infinity would be if it were one.
    const double below = value(low), above = value(low + 1);
    const float middle = float((below + above) / 2);
    const float just_below = std::nextafter(middle, 0.0f), just_above = std::nextafter(middle, infinity);
    const uint32_t even = low + (low & 1);
    CHECK(pack(T{}, float(below), 0) == low, "%s: %g", name, below);
    CHECK(pack(T{}, middle, just_above) == (even | (low + 1) << 16), "%s: above %g", name, below);
    CHECK(pack(T{}, -middle, just_below) == (even | 0x8000 | low << 16), "%s: above %g", name, below);
    CHECK(double(widen(T{}, uint16_t(low))) == below, "%s: 0x%04x", name, low);
    CHECK(double(widen(T{}, uint16_t(low | 0x8000))) == -below, "%s: -0x%04x", name, low);
    if (failures > 20) return;
  }
  CHECK(pack(T{}, std::numeric_limits<float>::max(), -infinity) == (infinite | (infinite | 0x8000) << 16), "%s", name);
  CHECK(pack(T{}, -0.0f, 0.0f) == 0x8000, "%s: zeros", name);
  for (uint32_t nan : {0x7f800001u, 0x7fffffffu, 0xff800001u, 0xffc00000u})
    CHECK(std::isnan(widen(T{}, uint16_t(pack(T{}, __uint_as_float(nan), 0)))), "%s: %08x", name, nan);
  CHECK(widen(T{}, uint16_t(infinite)) == infinity && widen(T{}, uint16_t(infinite | 0x8000)) == -infinity, "%s", name);
  CHECK(std::isnan(widen(T{}, uint16_t(infinite + 1))) && std::isnan(widen(T{}, 0xffff)), "%s", name);
}

void test_round_tf32() {
  const float infinity = std::numeric_limits<float>::infinity();
  std::mt19937 random(3);
  for (int repeat = 0; repeat < 100000; ++repeat) {
    const int exponent = repeat < 2000 ? repeat % 2 * 254 : int(random() % 255), fraction = int(random() % 1024);
    const float low = float(number(exponent, fraction, 127, 10));
    const float high = float(number(exponent, fraction, 127, 10) + std::ldexp(1, std::max(exponent, 1) - 137));
    const float middle = float(number(exponent, 2 * fraction + 1, 127, 11));
    CHECK(round_tf32(low) == __float_as_uint(low), "%a", low);
    CHECK(round_tf32(std::nextafter(middle, 0.0f)) == __float_as_uint(low), "below the middle over %a", low);
    CHECK(round_tf32(middle) == __float_as_uint(high) && round_tf32(-middle) == __float_as_uint(-high), "over %a", low);
    if (failures > 20) return;
  }
  CHECK(round_tf32(infinity) == 0x7f800000 && round_tf32(-infinity) == 0xff800000, "infinity");
  CHECK(round_tf32(std::numeric_limits<float>::max()) == 0x7f800000, "overflow");
  for (uint32_t nan : {0x7f800001u, 0x7fffffffu, 0xffffffffu}) {
    const uint32_t rounded = round_tf32(__uint_as_float(nan));
    CHECK(std::isnan(__uint_as_float(rounded)) && (rounded & 0x1fff) == 0, "%08x becomes %08x", nan, rounded);
  }
}

// --- Lanes and threads -----------------------------------------------------------------------------------------------

template <class T>
void test_shuffles(const char* name) {
  const auto value = [](int lane) { return T(lane * 1000003 + 7); };
  T got[8][32];
  launch(1, 32, 0, [&] {
    const int l = int(threadIdx.x);
    const T x = value(l);
    got[0][l] = __shfl_sync(~0u, x, (l * 5 + 3) % 32), got[1][l] = __shfl_xor_sync(~0u, x, 9);
    got[2][l] = __shfl_up_sync(~0u, x, 3), got[3][l] = __shfl_down_sync(~0u, x, 3);
    got[4][l] = __shfl_sync(~0u, x, 2, 8), got[5][l] = __shfl_xor_sync(~0u, x, 12, 8);
    got[6][l] = __shfl_up_sync(~0u, x, 3, 8), got[7][l] = __shfl_down_sync(~0u, x, 3, 8);
  });
  for (int l = 0; l < 32; ++l) {
    const int xor_8 = (l ^ 12) > (l | 7) ? l : l ^ 12;
    const int expected[8] = {(l * 5 + 3) % 32, l ^ 9, l < 3 ? l : l - 3,     l > 28 ? l : l + 3,
                             l / 8 * 8 + 2,    xor_8, l % 8 < 3 ? l : l - 3, l % 8 > 4 ? l : l + 3};
    for (int i = 0; i < 8; ++i) CHECK(got[i][l] == value(expected[i]), "%s: shuffle %d of lane %d", name, i, l);
  }
}

void test_votes() {
  unsigned ballots[64], parts[64], flags[64];
  launch(1, 64, 0, [&] {
    const int thread = int(threadIdx.x), l = thread % 32;
    ballots[thread] = __ballot_sync(~0u, l % 3 == 0 || thread == 33);
    flags[thread] = unsigned(__any_sync(~0u, thread == 40) | __all_sync(~0u, thread < 40) << 1);
    const unsigned mask = l < 10 ? 0x3ff : ~0x3ffu;  // each part by itself
    parts[thread] = l < 10 ? __ballot_sync(mask, 1) : __ballot_sync(mask, l % 2);
    __syncwarp();
  });
  unsigned thirds = 0;
  for (int l = 0; l < 32; l += 3) thirds |= 1u << l;
  for (int t = 0; t < 64; ++t) {
    CHECK(ballots[t] == (t < 32 ? thirds : thirds | 2), "thread %d: %08x", t, ballots[t]);
    CHECK(flags[t] == (t < 32 ? 2u : 1u), "thread %d: %u", t, flags[t]);
    CHECK(parts[t] == (t % 32 < 10 ? 0x3ffu : 0xaaaaaaaau & ~0x3ffu), "thread %d: %08x", t, parts[t]);
  }
  float outside = 0;
  launch(1, 32, 0, [&] {
    if (threadIdx.x < 16) {
      const float x = __shfl_sync(0xffffu, 1.0f, 20);
      if (threadIdx.x == 0) outside = x;
    }
  });
  CHECK(std::isnan(outside), "a lane outside of the mask gave %g", outside);
}

void test_barriers() {
  // A tree over 256 threads; the last warp takes part in half of it and ends.
  float sum = 0;
  int votes[3][256] = {};
  launch(1, 256, 256 * sizeof(float), [&] {
    const unsigned t = threadIdx.x;
    floats()[t] = float(t);
    __syncthreads();
    for (unsigned half = 128; half > 0; half /= 2) {
      if (t < half) floats()[t] += floats()[t + half];
      votes[half == 128][t] = __syncthreads_or(t == 200 && half == 128);
      if (t >= 224 && half == 64) return;
    }
    if (t == 0) sum = floats()[0];
    votes[2][t] = __syncthreads_or(t == 3);
  });
  CHECK(sum == 255 * 256 / 2, "%g", sum);
  for (int t = 0; t < 256; ++t) {
    CHECK(votes[1][t] == 1 && votes[0][t] == 0, "thread %d", t);
    CHECK(votes[2][t] == (t < 224), "thread %d", t);
  }
}

void test_indices() {
  const dim3 grid(3, 2, 2), block(5, 4, 3);
  std::vector<int> seen(12 * 60);
  launch(grid, block, 0, [&] {
    const unsigned b = blockIdx.x + gridDim.x * (blockIdx.y + gridDim.y * blockIdx.z);
    const unsigned t = threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z);
    ++seen[b * 60 + t];
  });
  for (int times : seen) CHECK(times == 1, "a thread ran %d times", times);
}

template <class T>
void test_atomics() {
  T sum = 5, most = 7, least = 100, last = 1, swapped = 0;
  T before[64];
  launch(2, 32, 0, [&] {
    const T i = T(threadIdx.x + 32 * blockIdx.x);
    before[i] = atomicAdd(&sum, T(1));
    atomicMax(&most, i), atomicMin(&least, T(i + 3)), atomicExch(&last, T(9));
    for (T expected = swapped, seen;; expected = seen) {
      seen = atomicCAS(&swapped, expected, T(expected + i));
      if (seen == expected) break;
    }
  });
  std::sort(before, before + 64);
  for (int i = 0; i < 64; ++i) CHECK(before[i] == T(i + 5), "what was there before: %d", int(before[i]));
  CHECK(sum == 69 && most == 63 && least == 3 && last == 9 && swapped == 63 * 64 / 2, "%zu bytes", sizeof(T));
}

void test_copies() {
  alignas(16) float from[16];
  for (int i = 0; i < 16; ++i) from[i] = float(i + 1);
  // What is there of each of four pieces: after the start, and when at most two, one and none is on its way.
  float seen[4][4];
  launch(1, 1, 256, [&] {
    const auto look = [&](int when) {
      for (int piece = 0; piece < 4; ++piece) seen[when][piece] = floats()[4 * piece + 3];
    };
    for (int i = 0; i < 16; ++i) floats()[i] = 0;
    copy_async(floats(), from), copy_async(floats() + 4, from + 4), commit_copies();
    copy_async(floats() + 8, from + 8), commit_copies();
    commit_copies();                       // a group may be empty
    copy_async(floats() + 12, from + 12);  // and this one is in none
    look(0);
    wait_copies<2>(), look(1);
    wait_copies<1>(), look(2);
    wait_copies<0>(), look(3);
  });
  for (int piece = 0; piece < 4; ++piece) {
    const int arrival[4] = {1, 1, 2, 4};
    for (int when = 0; when < 4; ++when) {
      const float x = seen[when][piece];
      CHECK(when < arrival[piece] ? std::isnan(x) : x == from[4 * piece + 3], "piece %d at %d: %g", piece, when, x);
    }
  }
  CHECK(has(complaint(1, 64, [&] { copy_async(floats() + 1, from); }), "not aligned"), "shared");
  CHECK(has(complaint(1, 64, [&] { copy_async(floats(), from + 2); }), "not aligned"), "global");
  CHECK(has(complaint(1, 64, [&] { copy_async(floats() + 16, from); }), "outside of shared memory"), "outside");
  CHECK(has(complaint(1, 64, [&] { copy_async(from, floats()); }), "outside of shared memory"), "the wrong way round");
}

// --- What must not get by --------------------------------------------------------------------------------------------

void test_missing_barriers() {
  const auto neighbours = [](bool whole, bool barrier) {
    return in_orders([=] {
      int wrong = 0;
      launch(1, 128, 128 * sizeof(float), [&wrong, whole, barrier] {
        const unsigned t = threadIdx.x, other = whole ? (t + 64) % 128 : t ^ 1;
        floats()[t] = float(t);
        if (barrier && whole) __syncthreads();
        if (barrier && !whole) __syncwarp();
        wrong += floats()[other] != float(other);
      });
      return wrong;
    });
  };
  for (bool whole : {false, true}) {
    for (int wrong : neighbours(whole, true)) CHECK(wrong == 0, "%d are wrong with a barrier", wrong);
    for (int wrong : neighbours(whole, false)) CHECK(wrong > 0, "%d are wrong without a barrier", wrong);
  }
  // Read by others before it is written, in one order only.
  const auto wrong = in_orders([] {
    int wrong = 0;
    launch(1, 64, sizeof(float), [&wrong] {
      if (threadIdx.x == 0) floats()[0] = 1;
      if (threadIdx.x == 40) wrong = floats()[0] != 1;
    });
    return wrong;
  });
  CHECK(wrong[0] == 0 && wrong[1] == 1, "ascending %d, descending %d", wrong[0], wrong[1]);
  // After every barrier the order begins anew.
  const auto first = in_orders([] {
    std::vector<unsigned> threads;
    launch(1, 96, 0, [&threads] {
      for (int i = 0; i < 3; ++i) __syncthreads(), threads.push_back(threadIdx.x);
    });
    return std::vector<unsigned>{threads[0], threads[95], threads[96], threads[192], threads[287]};
  });
  CHECK((first[0] == std::vector<unsigned>{0, 95, 0, 0, 95}), "ascending");
  CHECK((first[1] == std::vector<unsigned>{95, 0, 95, 95, 0}), "descending");
}

void test_copy_hazards() {
  alignas(16) const float from[4] = {1, 2, 3, 4};
  // `wait` or no wait; and a stage filled again while others may still read it.
  const auto broken = [&](bool wait, bool barrier) {
    return in_orders([&from, wait, barrier] {
      int wrong = 0;
      launch(1, 64, 64, [&, wait, barrier] {
        const auto fill = [&] {
          if (threadIdx.x == 0) copy_async(floats(), from);
          commit_copies();
        };
        fill();
        if (wait) wait_copies<0>();
        __syncthreads();
        wrong += floats()[2] != 3;
        if (barrier) __syncthreads();
        fill();
      });
      return wrong;
    });
  };
  for (int wrong : broken(true, true)) CHECK(wrong == 0, "%d", wrong);
  for (int wrong : broken(false, true)) CHECK(wrong == 64, "%d without a wait", wrong);
  CHECK(broken(true, false)[0] > 0, "a stage was filled while it was read");
}

void test_unwritten() {
  bool poisoned = true;
  launch(4, 64, 1000, [&] {
    for (int i = 0; i < 250; ++i) poisoned = poisoned && std::isnan(floats()[i]);
    poisoned = poisoned && std::isnan(*reinterpret_cast<double*>(shared_memory() + 8 * threadIdx.x));
    poisoned = poisoned && reinterpret_cast<uintptr_t>(shared_memory()) % 128 == 0;
    __syncthreads();
    floats()[threadIdx.x] = 1;  // the next block must not see it
  });
  CHECK(poisoned, "shared memory that nobody wrote, or its alignment");
  CHECK(has(complaint(32, 1000, [] { shared_memory()[1000 + threadIdx.x % 8] = 0; }), "outside of its shared memory"),
        "written in the gap before the page that faults");
  CHECK(has(complaint(32, 1000, [] { *(shared_memory() - 1 - threadIdx.x) = 0; }), "outside of its shared memory"),
        "written before the first byte");
}

void test_fault() {
  int ends[2];
  if (pipe(ends) != 0) return;
  std::fflush(stdout);
  const pid_t child = fork();
  if (child == 0) {
    dup2(ends[1], STDERR_FILENO);
    launch(1, 64, 1024, [] {
      if (threadIdx.x == 37) shared_memory()[1024] = 1;
    });
    _exit(0);
  }
  close(ends[1]);
  char text[400] = {};
  const ssize_t length = read(ends[0], text, sizeof text - 1);
  close(ends[0]);
  int status = 0;
  waitpid(child, &status, 0);
  CHECK(status != 0, "an overrun goes unpunished");
  CHECK(length > 0 && has(text, "thread (37, 0, 0)") && has(text, "outside of its shared memory"), "%s", text);
}

void test_deadlocks() {
  const auto half = complaint(64, 0, [] {
    if (threadIdx.x < 48) __shfl_xor_sync(~0u, 1.0f, 1);
    __syncthreads();
  });
  CHECK(has(half, "0 to 31: __syncthreads; 32 to 47: __shfl_xor_sync; 48 to 63: __syncthreads"), "%s", half.c_str());
  const auto ended = complaint(32, 0, [] {
    if (threadIdx.x < 31) __ballot_sync(~0u, 1);
  });
  CHECK(has(ended, "0 to 30: __ballot_sync; 31 to 31: ended"), "%s", ended.c_str());
  const auto partial = complaint(20, 0, [] { __syncwarp(); });
  CHECK(has(partial, "0 to 19: __syncwarp; 20 to 31: not in the block"), "%s", partial.c_str());
  const auto masks = complaint(32, 0, [] { __syncwarp(threadIdx.x < 16 ? ~0u : 0xffff0000u); });
  CHECK(has(masks, "0 to 15: __syncwarp; 16 to 31: ended"), "%s", masks.c_str());
  const auto kinds = complaint(32, 0, [] {
    if (threadIdx.x % 2)
      __any_sync(~0u, 1);
    else
      __all_sync(~0u, 1);
  });
  CHECK(has(kinds, "0 to 0: __all_sync; 1 to 1: __any_sync"), "%s", kinds.c_str());
  const auto barriers = complaint(64, 0, [] {
    if (threadIdx.x < 32)
      __syncthreads();
    else
      __syncthreads_or(0);
  });
  CHECK(has(barriers, "0 to 31: __syncthreads; 32 to 63: __syncthreads_or"), "%s", barriers.c_str());
  const auto absent = complaint(32, 0, [] { __syncwarp(1u << (threadIdx.x ^ 1)); });
  CHECK(has(absent, "in which this lane is not"), "%s", absent.c_str());
  const auto trapped = complaint(64, 0, [] {
    if (threadIdx.x == 33) __trap();
    __syncthreads();
  });
  CHECK(has(trapped, "block (0, 0, 0), thread (33, 0, 0): __trap"), "%s", trapped.c_str());
  CHECK(complaint(1024, 0, [] { __syncthreads(); }).empty(), "the next launch finds everything in order");
}

// --- The runtime -----------------------------------------------------------------------------------------------------

struct Numbers {
  int64_t count;
  float scale;
};
static __device__ unsigned long long counter;
__global__ void __launch_bounds__(64) scale_kernel(const __grid_constant__ Numbers numbers, const float* x, float* y) {
  const int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i >= numbers.count) return;
  y[i] = numbers.scale * __ldg(x + i);
  atomicAdd(&counter, 1ull);
}

void test_launch() {
  float x[100], y[100];
  for (int i = 0; i < 100; ++i) x[i] = float(i);
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(2), config.blockDim = dim3(64);
  CHECK(cudaLaunchKernelEx(&config, scale_kernel, Numbers{100, 2}, x, y) == cudaSuccess, "a kernel with parameters");
  for (int i = 0; i < 100; ++i) CHECK(y[i] == float(2 * i), "%d", i);
  unsigned long long count = 0;
  CHECK(cudaMemcpyFromSymbol(&count, counter, sizeof count) == cudaSuccess && count == 100, "%llu", count);
  count = 3;
  CHECK(cudaMemcpyToSymbol(counter, &count, sizeof count) == cudaSuccess && counter == 3, "%llu", counter);
  CHECK(cudaMemcpyToSymbol(counter, &count, 2 * sizeof count) == cudaErrorInvalidValue, "past the symbol's end");

  const auto refused = [&](dim3 grid, dim3 block, size_t shared, cudaError_t error) {
    config.gridDim = grid, config.blockDim = block, config.dynamicSmemBytes = shared;
    CHECK(cudaLaunchKernelEx(&config, scale_kernel, Numbers{0, 0}, x, y) == error, "%u %u %zu", grid.x, block.x,
          shared);
    CHECK(cudaPeekAtLastError() == error && cudaGetLastError() == error && cudaGetLastError() == cudaSuccess, "last");
  };
  refused(1, 1025, 0, cudaErrorInvalidConfiguration);
  refused(1, dim3(32, 33), 0, cudaErrorInvalidConfiguration);
  refused(1, 0, 0, cudaErrorInvalidConfiguration);
  refused(0, 32, 0, cudaErrorInvalidConfiguration);
  refused(dim3(1, 65536), 32, 0, cudaErrorInvalidConfiguration);
  refused(1, 32, 49152, cudaSuccess);
  refused(1, 32, 49153, cudaErrorInvalidValue);
  struct {
    const char* name;
    int shared, major, minor;
  } const devices[] = {{"sm_80", 166912, 8, 0}, {"sm_86", 101376, 8, 6}, {"sm_90", 232448, 9, 0}};
  for (const auto& device : devices) {
    setenv("PDDM_EMULATION_DEVICE", device.name, 1);
    const auto attribute = [](cudaDeviceAttr which) {
      int value = -1;
      cudaDeviceGetAttribute(&value, which, 0);
      return value;
    };
    const int shared = attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin);
    CHECK(shared == device.shared, "%s: %d", device.name, shared);
    CHECK(attribute(cudaDevAttrMaxSharedMemoryPerMultiprocessor) == shared + 1024, "%s", device.name);
    CHECK(attribute(cudaDevAttrComputeCapabilityMajor) == device.major, "%s", device.name);
    CHECK(attribute(cudaDevAttrComputeCapabilityMinor) == device.minor, "%s", device.name);
    const auto ask = [](int bytes) {
      return cudaFuncSetAttribute(scale_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
    };
    CHECK(ask(shared + 1) == cudaErrorInvalidValue && cudaGetLastError() == cudaErrorInvalidValue, "%s", device.name);
    CHECK(ask(shared) == cudaSuccess, "%s", device.name);
    refused(1, 32, size_t(shared), cudaSuccess);
    refused(1, 32, size_t(shared) + 1, cudaErrorInvalidValue);
    int blocks = 0;
    cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, scale_kernel, 256, size_t(shared));
    CHECK(blocks == 1, "%s: %d", device.name, blocks);
    cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, scale_kernel, 512, 0);
    CHECK(blocks == (device.minor ? 3 : 4), "%s: %d", device.name, blocks);
    cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, scale_kernel, 32, size_t(shared) + 1);
    CHECK(blocks == 0, "%s: %d", device.name, blocks);
  }
  unsetenv("PDDM_EMULATION_DEVICE");
}

// Every host thread has its own blocks.
void test_host_threads() {
  std::vector<std::thread> threads;
  std::vector<float> sums(4);
  for (int h = 0; h < 4; ++h)
    threads.emplace_back([&sums, h] {
      launch(20, 96, 96 * sizeof(float), [&sums, h] {
        floats()[threadIdx.x] = float(h);
        __syncthreads();
        float sum = floats()[(threadIdx.x + 40) % 96];
        for (int apart = 16; apart; apart /= 2) sum += __shfl_xor_sync(~0u, sum, apart);
        if (threadIdx.x % 32 == 0) sums[size_t(h)] += sum;
      });
    });
  for (std::thread& thread : threads) thread.join();
  for (int h = 0; h < 4; ++h) CHECK(sums[size_t(h)] == float(h * 20 * 96), "%d: %g", h, sums[size_t(h)]);
}

void print_speed() {
  constexpr int kRepeats = 2000, kWarps = 8;
  const auto start = std::chrono::steady_clock::now();
  launch(1, 32 * kWarps, 0, [] {
    const uint32_t one = pack(Bf16{}, 1, 1), a[4] = {one, one, one, one};
    float d[4] = {};
    for (int i = 0; i < kRepeats; ++i) multiply_add(Bf16{}, d, a, one, one);
    if (d[3] != 16 * kRepeats) __trap();
  });
  const std::chrono::duration<double, std::micro> time = std::chrono::steady_clock::now() - start;
  std::printf("a warp's mma takes %.2f us\n", time.count() / kRepeats / kWarps);
}

}  // namespace

int main() {
  test_load_matrices();
  test_multiply_halves<Bf16>("bfloat16"), test_multiply_halves<F16>("float16"), test_multiply_tf32();
  test_pack<Bf16>("bfloat16", 127, 7), test_pack<F16>("float16", 15, 10), test_round_tf32();
  test_shuffles<float>("float"), test_shuffles<int>("int"), test_shuffles<double>("double");
  test_shuffles<unsigned long long>("unsigned long long");
  test_votes(), test_barriers(), test_indices();
  test_atomics<int>(), test_atomics<unsigned>(), test_atomics<unsigned long long>();
  test_copies();
  test_missing_barriers(), test_copy_hazards(), test_unwritten(), test_fault(), test_deadlocks();
  test_launch(), test_host_threads();
  print_speed();
  std::printf(failures ? "%d checks failed\n" : "all checks passed\n", failures);
  return failures != 0;
}
