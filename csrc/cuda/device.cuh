// The machine below the kernels: asynchronous copies, fragments, the matrix instruction, and warp sums. sm_80 and
// later. On the host's emulation (tests/emulation) the same names are plain C++.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace pddm::cuda {

constexpr int kWarp = 32;

// Operand types of the matrix instruction.
struct Bf16 {};
struct F16 {};
struct Tf32 {};

}  // namespace pddm::cuda

#if defined(PDDM_EMULATED)
#include <emulated_device.h>
#else

#include <cuda_bf16.h>
#include <cuda_fp16.h>

namespace pddm::cuda {

// Of the block, as large as the launch asked for.
__device__ __forceinline__ unsigned char* shared_memory() {
  extern __shared__ __align__(128) unsigned char bytes[];
  return bytes;
}

// 16 bytes of global memory, both ends aligned, `Offset` bytes after the pointers; they have arrived after
// `wait_copies` for their group and a barrier.
template <int Offset = 0>
__device__ __forceinline__ void copy_async(void* shared, const void* global) {
  const auto to = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
  asm volatile("cp.async.cg.shared.global [%0+%2], [%1+%2], 16;" ::"r"(to), "l"(global), "n"(Offset) : "memory");
}
__device__ __forceinline__ void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Until at most `Pending` of the groups committed by this thread are on their way.
template <int Pending>
__device__ __forceinline__ void wait_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(Pending) : "memory");
}

// Four matrices of 8 rows of 16 bytes; lane l names row l % 8 of matrix l / 8. r[q] holds, of matrix q, 4 bytes of row
// lane / 4 at byte 4 (lane % 4).
__device__ __forceinline__ void load_matrices(uint32_t (&r)[4], const void* row) {
  const auto from = static_cast<uint32_t>(__cvta_generic_to_shared(row));
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(from)
               : "memory");
}
// The same, but that r[q] holds, of matrix q, number lane / 4 of 2 bytes in row 2 (lane % 4) and in the next row.
__device__ __forceinline__ void load_matrices_transposed(uint32_t (&r)[4], const void* row) {
  const auto from = static_cast<uint32_t>(__cvta_generic_to_shared(row));
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(from)
               : "memory");
}

// d (16 × 8) += a (16 × 32 bytes) · bᵀ (8 × 32 bytes), float32 sums.
#define PDDM_MULTIPLY_ADD(type, shape)                                                                        \
  __device__ __forceinline__ void multiply_add(type, float (&d)[4], const uint32_t (&a)[4], uint32_t b0,      \
                                               uint32_t b1) {                                                 \
    asm volatile("mma.sync.aligned." shape " {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};" \
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])                                             \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));                             \
  }
PDDM_MULTIPLY_ADD(Bf16, "m16n8k16.row.col.f32.bf16.bf16.f32")
PDDM_MULTIPLY_ADD(F16, "m16n8k16.row.col.f32.f16.f16.f32")
PDDM_MULTIPLY_ADD(Tf32, "m16n8k8.row.col.f32.tf32.tf32.f32")
#undef PDDM_MULTIPLY_ADD

// Rounded to nearest, `low` in the lower half.
__device__ __forceinline__ uint32_t pack(Bf16, float low, float high) {
  const __nv_bfloat162 both = __floats2bfloat162_rn(low, high);
  return *reinterpret_cast<const uint32_t*>(&both);
}
__device__ __forceinline__ uint32_t pack(F16, float low, float high) {
  const __half2 both = __floats2half2_rn(low, high);
  return *reinterpret_cast<const uint32_t*>(&both);
}
__device__ __forceinline__ uint32_t round_tf32(float x) {
  uint32_t bits;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(bits) : "f"(x));
  return bits;
}

}  // namespace pddm::cuda
#endif

namespace pddm::cuda {

// The thread's number, read anew: what follows from it is not carried in registers from before a loop.
__device__ __forceinline__ int fresh_thread_index() {
#if defined(PDDM_EMULATED)
  return int(threadIdx.x);
#else
  int thread;
  asm volatile("mov.u32 %0, %%tid.x;" : "=r"(thread));
  return thread;
#endif
}

__device__ __forceinline__ int lane_index() { return int(threadIdx.x) % kWarp; }
__device__ __forceinline__ int warp_index() { return int(threadIdx.x) / kWarp; }

// Sum over `Lanes` neighbouring lanes, the same bits in each of them.
template <int Lanes = kWarp, class T>
__device__ __forceinline__ T lanes_sum(T x) {
#pragma unroll
  for (int apart = Lanes / 2; apart > 0; apart /= 2) x += __shfl_xor_sync(~0u, x, apart);
  return x;
}

// Sum over this lane and those before it.
template <class T>
__device__ __forceinline__ T lanes_prefix(T x) {
#pragma unroll
  for (int apart = 1; apart < kWarp; apart *= 2) {
    const T other = __shfl_up_sync(~0u, x, apart);
    if (lane_index() >= apart) x += other;
  }
  return x;
}

// A NaN stays one.
__device__ __forceinline__ double relu(double x) { return x < 0 ? 0 : x; }
__device__ __forceinline__ float relu(float x) {
#if defined(PDDM_EMULATED)
  return x < 0 ? 0 : x;
#else
  asm("max.NaN.f32 %0, %0, 0f00000000;" : "+f"(x));
  return x;
#endif
}

__device__ __forceinline__ float absolute(float x) { return fabsf(x); }
__device__ __forceinline__ double absolute(double x) { return fabs(x); }

}  // namespace pddm::cuda
