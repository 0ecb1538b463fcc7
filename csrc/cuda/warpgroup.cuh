// The machine below the Hopper kernel (sm_90a): barriers that count bytes, bulk copies to both blocks of a cluster, and
// matrix instructions of four warps.
//
// Operands in shared memory are tiles as in tile.cuh, which descriptors call 64-byte swizzle; they start at multiples
// of 512 bytes.
#pragma once

#include "tile.cuh"

// Where kernels that are made of it have a body.
#if defined(PDDM_EMULATED) || !defined(__CUDA_ARCH__) || defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define PDDM_WARPGROUPS_HERE
#endif

namespace pddm::cuda {

constexpr int kWarpgroup = 4 * kWarp;

// Of the two blocks of a cluster.
constexpr int kClusterBlocks = 2;

// Of two numbers as pack has them.
__device__ __forceinline__ uint32_t absolute_of_both(uint32_t both) { return both & 0x7fff7fff; }

// A fragment's element k of 16 inputs is given by the thread that has it: each thread of four has 4 inputs side by side
// in memory, where the instruction's order would have two pairs, 8 apart. This is which input stands at place k of a
// tile of weights that meets such fragments.
__host__ __device__ constexpr int input_at(int place) {
  return place / 16 * 16 + place % 8 / 2 * 4 + place / 8 % 2 * 2 + place % 2;
}

}  // namespace pddm::cuda

#if defined(PDDM_EMULATED)
#include <emulated_warpgroup.h>
#else

namespace pddm::cuda {

// Of the block, as large as the launch asked for; 1024 bytes aligned.
__device__ __forceinline__ unsigned char* aligned_shared_memory() {
  extern __shared__ __align__(1024) unsigned char aligned_bytes[];
  return aligned_bytes;
}

__device__ __forceinline__ uint32_t shared_address(const void* p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}

// --- The cluster ---------------------------------------------------------------------------------------------------

__device__ __forceinline__ int cluster_rank() {
  int rank;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}

// All threads of both blocks; what was written to shared memory before is visible to both after it.
__device__ __forceinline__ void sync_cluster() {
  asm volatile("barrier.cluster.arrive.release.aligned;\n\tbarrier.cluster.wait.acquire.aligned;" ::: "memory");
}

// --- Barriers in shared memory --------------------------------------------------------------------------------------

// A phase ends when `count` have arrived and as many bytes as were announced.

__device__ __forceinline__ void init_barrier(uint64_t* barrier, int count) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(count) : "memory");
}

// After init_barrier and before sync_cluster.
__device__ __forceinline__ void publish_barriers() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

// Arrives, and announces bytes.
__device__ __forceinline__ void arrive_expecting(uint64_t* barrier, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)), "r"(bytes)
               : "memory");
}

// Arrives at the same barrier of block `rank` of the cluster.
__device__ __forceinline__ void arrive_at(uint64_t* barrier, int rank) {
  uint32_t remote;
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(remote) : "r"(shared_address(barrier)), "r"(rank));
  asm volatile("mbarrier.arrive.shared::cluster.b64 _, [%0];" ::"r"(remote) : "memory");
}

// Until the phase of this parity has ended: 0 for the first, then 1, 0, …
__device__ __forceinline__ void await(uint64_t* barrier, int parity) {
  uint32_t ended;
  do {
    asm volatile(
        "{\n\t.reg .pred p;\n\tmbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\n\t"
        "selp.u32 %0, 1, 0, p;\n\t}"
        : "=r"(ended)
        : "r"(shared_address(barrier)), "r"(parity)
        : "memory");
  } while (!ended);
}

// --- Copies ----------------------------------------------------------------------------------------------------------

// `bytes` (a multiple of 16) to the same place in the shared memory of all blocks of the cluster; they count at the
// same barrier of each.
__device__ __forceinline__ void copy_to_cluster(void* to, const void* from, int bytes, uint64_t* barrier) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster [%0], [%1], %2, [%3], "
      "%4;" ::"r"(shared_address(to)),
      "l"(from), "r"(bytes), "r"(shared_address(barrier)), "h"(static_cast<uint16_t>((1 << kClusterBlocks) - 1))
      : "memory");
}

// What this thread has stored in shared memory before is seen by matrix instructions that come after (and, by a
// barrier, by those of other threads).
__device__ __forceinline__ void show_to_matrix_unit() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// --- Threads ---------------------------------------------------------------------------------------------------------

// The threads of one warpgroup; `which` is not 0, which is __syncthreads'.
__device__ __forceinline__ void sync_warpgroup(int which) {
  asm volatile("bar.sync %0, %1;" ::"r"(which), "n"(kWarpgroup) : "memory");
}

// By all warps of a warpgroup.
template <int Registers>
__device__ __forceinline__ void give_up_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(Registers));
}
template <int Registers>
__device__ __forceinline__ void take_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(Registers));
}

// --- The matrix instruction: d (64 × N) += a (64 × 16) · bᵀ (N × 16), of all warps of a warpgroup -------------------

// An operand in shared memory: 8 rows are 512 bytes. 16 inputs, or 32 bytes, further on it is 2 more.
using Descriptor = uint64_t;
__device__ __forceinline__ Descriptor descriptor(const void* tile) {
  constexpr uint64_t kEightRows = 8 * kRowBytes / 16, kSwizzle64 = 2;
  return uint64_t(shared_address(tile)) >> 4 | uint64_t(1) << 16 | kEightRows << 32 | kSwizzle64 << 62;
}

// Before the first of some matrix instructions, and whenever others have written registers that they read.
__device__ __forceinline__ void begin_products() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void commit_products() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

// Until at most `Pending` of the groups committed are on their way. Until then neither sums nor a fragment may be
// touched.
template <int Pending>
__device__ __forceinline__ void wait_products() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(Pending) : "memory");
}

#define PDDM_TEN(t) "%" #t "0, %" #t "1, %" #t "2, %" #t "3, %" #t "4, %" #t "5, %" #t "6, %" #t "7, %" #t "8, %" #t "9"
#define PDDM_SUMS_64 PDDM_TEN() ", " PDDM_TEN(1) ", " PDDM_TEN(2) ", %30, %31"
#define PDDM_SUMS_128 \
  PDDM_TEN() ", " PDDM_TEN(1) ", " PDDM_TEN(2) ", " PDDM_TEN(3) ", " PDDM_TEN(4) ", " PDDM_TEN(5) ", %60, %61, %62, " \
                                                                                                  "%63"
#define PDDM_SUMS_192                                                                                                  \
  PDDM_TEN()                                                                                                           \
  ", " PDDM_TEN(1) ", " PDDM_TEN(2) ", " PDDM_TEN(3) ", " PDDM_TEN(4) ", " PDDM_TEN(5) ", " PDDM_TEN(6) ", " PDDM_TEN( \
      7) ", " PDDM_TEN(8) ", %90, %91, %92, %93, %94, %95"
#define PDDM_SUMS_256 \
  PDDM_TEN()          \
  ", " PDDM_TEN(1) ", " PDDM_TEN(2) ", " PDDM_TEN(3) ", " PDDM_TEN(4) ", " PDDM_TEN(5) ", " PDDM_TEN(6) ", "        \
  PDDM_TEN(7) ", " PDDM_TEN(8) ", " PDDM_TEN(9) ", " PDDM_TEN(10) ", " PDDM_TEN(11) ", %120, %121, %122, %123, "    \
  "%124, %125, %126, %127"
#define PDDM_BOUND_8(d, at)                                                                                          \
  "+f"(d[at]), "+f"(d[at + 1]), "+f"(d[at + 2]), "+f"(d[at + 3]), "+f"(d[at + 4]), "+f"(d[at + 5]), "+f"(d[at + 6]), \
      "+f"(d[at + 7])
#define PDDM_BOUND_32(d, at) \
  PDDM_BOUND_8(d, at), PDDM_BOUND_8(d, at + 8), PDDM_BOUND_8(d, at + 16), PDDM_BOUND_8(d, at + 24)
#define PDDM_BOUND_64(d) PDDM_BOUND_32(d, 0)
#define PDDM_BOUND_128(d) PDDM_BOUND_32(d, 0), PDDM_BOUND_32(d, 32)
#define PDDM_BOUND_192(d) PDDM_BOUND_128(d), PDDM_BOUND_32(d, 64)
#define PDDM_BOUND_256(d) PDDM_BOUND_192(d), PDDM_BOUND_32(d, 96)

// a in registers (a0 … a3 of the 16 × 16 of each warp, as multiply_add has them), or in shared memory. Without `add`
// the sums before count as zero. The numbers are those of the operands behind the sums.
#define PDDM_WARPGROUP_MULTIPLY(type, name, n, p0, p1, p2, p3, p4, p5)                                            \
  __device__ __forceinline__ void multiply_add(type, float (&d)[n / 2], const uint32_t (&a)[4], Descriptor b,     \
                                               bool add) {                                                        \
    asm volatile("{\n\t.reg .pred p;\n\tsetp.ne.b32 p, %" #p5 ", 0;\n\twgmma.mma_async.sync.aligned.m64n" #n      \
                 "k16.f32." name "." name " {" PDDM_SUMS_##n "}, {%" #p0 ", %" #p1 ", %" #p2 ", %" #p3 "}, %" #p4 \
                                                             ", p, 1, 1, 0;\n\t}"                                 \
                 : PDDM_BOUND_##n(d)                                                                              \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(int(add)));                            \
  }                                                                                                               \
  __device__ __forceinline__ void multiply_add(type, float (&d)[n / 2], Descriptor a, Descriptor b, bool add) {   \
    asm volatile("{\n\t.reg .pred p;\n\tsetp.ne.b32 p, %" #p2 ", 0;\n\twgmma.mma_async.sync.aligned.m64n" #n      \
                 "k16.f32." name "." name " {" PDDM_SUMS_##n "}, %" #p0 ", %" #p1 ", p, 1, 1, 0, 0;\n\t}"         \
                 : PDDM_BOUND_##n(d)                                                                              \
                 : "l"(a), "l"(b), "r"(int(add)));                                                                \
  }
#define PDDM_WARPGROUP_MULTIPLIES(type, name)                        \
  PDDM_WARPGROUP_MULTIPLY(type, name, 64, 32, 33, 34, 35, 36, 37)    \
  PDDM_WARPGROUP_MULTIPLY(type, name, 128, 64, 65, 66, 67, 68, 69)   \
  PDDM_WARPGROUP_MULTIPLY(type, name, 192, 96, 97, 98, 99, 100, 101) \
  PDDM_WARPGROUP_MULTIPLY(type, name, 256, 128, 129, 130, 131, 132, 133)
PDDM_WARPGROUP_MULTIPLIES(Bf16, "bf16")
PDDM_WARPGROUP_MULTIPLIES(F16, "f16")
#undef PDDM_TEN
#undef PDDM_SUMS_64
#undef PDDM_SUMS_128
#undef PDDM_SUMS_192
#undef PDDM_SUMS_256
#undef PDDM_BOUND_8
#undef PDDM_BOUND_32
#undef PDDM_BOUND_64
#undef PDDM_BOUND_128
#undef PDDM_BOUND_192
#undef PDDM_BOUND_256
#undef PDDM_WARPGROUP_MULTIPLY
#undef PDDM_WARPGROUP_MULTIPLIES

}  // namespace pddm::cuda
#endif
