// What csrc/cuda/warpgroup.cuh says in PTX, in C++.
#pragma once

#include "emulated_device.h"

namespace pddm::cuda {

inline unsigned char* aligned_shared_memory() { return emulation::aligned_shared_memory(); }

inline uint32_t shared_address(const void* p) {
  return emulation::kSharedAddress + emulation::shared_offset(p, 0, "the address of");
}

inline int cluster_rank() { return int(emulation::cluster_rank()); }
inline void sync_cluster() { emulation::cluster_arrive(), emulation::cluster_wait(); }

namespace emulated {

inline uint32_t place_of(const uint64_t* barrier) { return emulation::shared_offset(barrier, 8, "a barrier at"); }

}  // namespace emulated

inline void init_barrier(uint64_t* barrier, int count) { emulation::init_barrier(emulated::place_of(barrier), count); }
inline void publish_barriers() { emulation::publish_barriers(); }
inline void arrive_expecting(uint64_t* barrier, int bytes) {
  emulation::arrive(emulated::place_of(barrier), emulation::cluster_rank(), bytes);
}
inline void arrive_at(uint64_t* barrier, int rank) {
  emulation::arrive(emulated::place_of(barrier), unsigned(rank), 0);
}
inline void await(uint64_t* barrier, int parity) {
  while (!emulation::try_wait(emulated::place_of(barrier), unsigned(parity))) {
  }
}

inline void copy_to_cluster(void* to, const void* from, int bytes, uint64_t* barrier) {
  emulation::copy_to_cluster(emulation::shared_offset(to, size_t(bytes), "a bulk copy to"), from, size_t(bytes),
                             emulated::place_of(barrier), (1u << kClusterBlocks) - 1);
}
// Whoever stored it: who stores what is not seen here.
inline void show_to_matrix_unit() { emulation::show_all(); }

inline void sync_warpgroup(int which) { emulation::some_barrier(unsigned(which), kWarpgroup); }

template <int Registers>
void give_up_registers() {
  emulation::change_registers("setmaxnreg.dec", Registers, false);
}
template <int Registers>
void take_registers() {
  emulation::change_registers("setmaxnreg.inc", Registers, true);
}

using Descriptor = uint64_t;
inline Descriptor descriptor(const void* tile) {
  constexpr uint64_t kEightRows = 8 * kRowBytes / 16, kSwizzle64 = 2;
  return uint64_t(shared_address(tile)) >> 4 | uint64_t(1) << 16 | kEightRows << 32 | kSwizzle64 << 62;
}

inline void begin_products() { emulation::begin_products(); }
inline void commit_products() { emulation::commit_products(); }
template <int Pending>
void wait_products() {
  emulation::wait_products(Pending);
}

namespace emulated {

// In the order of multiply_warp.
template <class Operand>
void multiply_rows(float* product, const uint16_t* a, const uint16_t* b, unsigned columns) {
  float right[16][256];
  for (unsigned n = 0; n < columns; ++n)
    for (unsigned k = 0; k < 16; ++k) right[k][n] = widen(Operand{}, b[n * 16 + k]);
  for (unsigned m = 0; m < 16; ++m) {
    float left[16];
    for (unsigned k = 0; k < 16; ++k) left[k] = widen(Operand{}, a[m * 16 + k]);
    for (unsigned n = 0; n < columns; n += 8) {
      Numbers low = {}, high = {};
      for (unsigned k = 0; k < 16; ++k) {
        Numbers x[2];
        std::memcpy(x, right[k] + n, sizeof x);
        low += left[k] * x[0], high += left[k] * x[1];
      }
      std::memcpy(product + m * columns + n, &low, sizeof low);
      std::memcpy(product + m * columns + n + 4, &high, sizeof high);
    }
  }
}

template <class Operand>
void multiply_async(const char* where, float* d, unsigned columns, const uint32_t* a, Descriptor a_tile, Descriptor b,
                    bool add) {
  const auto registers = [](const void* first) {
    return emulation::Registers{static_cast<unsigned char*>(const_cast<void*>(first)), nullptr};
  };
  emulation::multiply_async({where, multiply_rows<Operand>, columns, registers(d), registers(a), a_tile, b, add});
}

}  // namespace emulated

#define PDDM_WARPGROUP_MULTIPLY(type, n)                                                                            \
  inline void multiply_add(type, float (&d)[n / 2], const uint32_t (&a)[4], Descriptor b, bool add) {               \
    emulated::multiply_async<type>("wgmma of " #type ", 64 by " #n ", of registers", d, n, a, 0, b, add);           \
  }                                                                                                                 \
  inline void multiply_add(type, float (&d)[n / 2], Descriptor a, Descriptor b, bool add) {                         \
    emulated::multiply_async<type>("wgmma of " #type ", 64 by " #n ", of shared memory", d, n, nullptr, a, b, add); \
  }
#define PDDM_WARPGROUP_MULTIPLIES(n) PDDM_WARPGROUP_MULTIPLY(Bf16, n) PDDM_WARPGROUP_MULTIPLY(F16, n)
PDDM_WARPGROUP_MULTIPLIES(64)
PDDM_WARPGROUP_MULTIPLIES(128)
PDDM_WARPGROUP_MULTIPLIES(192)
PDDM_WARPGROUP_MULTIPLIES(256)
#undef PDDM_WARPGROUP_MULTIPLY
#undef PDDM_WARPGROUP_MULTIPLIES

}  // namespace pddm::cuda
