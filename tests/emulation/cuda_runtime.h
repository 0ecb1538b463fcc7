// CUDA's language and runtime, as far as the kernels and their launches need them, for the host's compiler.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <tuple>
#include <type_traits>
#include <utility>

#include "emulation.h"
#include "vector_types.h"

#define __global__
#define __device__
#define __host__
#define __constant__
#define __grid_constant__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __align__(bytes) __attribute__((aligned(bytes)))
// __shared__ is missing on purpose: shared memory is what shared_memory() gives.

constexpr int warpSize = 32;

// --- Numbers ---------------------------------------------------------------------------------------------------------

namespace pddm::emulation {

template <class To, class From>
To same_bits(const From& from) {
  static_assert(sizeof(To) == sizeof(From), "as many bits");
  To to;
  std::memcpy(&to, &from, sizeof to);
  return to;
}

}  // namespace pddm::emulation

inline unsigned __float_as_uint(float x) { return pddm::emulation::same_bits<unsigned>(x); }
inline float __uint_as_float(unsigned x) { return pddm::emulation::same_bits<float>(x); }
inline long long __double_as_longlong(double x) { return pddm::emulation::same_bits<long long>(x); }
inline double __longlong_as_double(long long x) { return pddm::emulation::same_bits<double>(x); }
inline int max(int a, int b) { return a < b ? b : a; }
inline int min(int a, int b) { return b < a ? b : a; }
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __clz(int x) { return x ? __builtin_clz(unsigned(x)) : 32; }
inline int __ffs(int x) { return __builtin_ffs(x); }
using std::sqrt;  // a float's is a float
inline float rsqrtf(float x) { return float(1 / std::sqrt(double(x))); }
inline float __fmaf_rn(float a, float b, float c) { return std::fmaf(a, b, c); }
template <class T>
T __ldg(const T* address) {
  return *address;
}

// --- Threads together ------------------------------------------------------------------------------------------------

inline void __syncthreads() { pddm::emulation::barrier("__syncthreads", false); }
inline int __syncthreads_or(int vote) { return pddm::emulation::barrier("__syncthreads_or", vote != 0); }
inline void __syncwarp(unsigned mask = ~0u) { pddm::emulation::meet("__syncwarp", mask, nullptr, nullptr); }
inline void __threadfence() {}
inline void __threadfence_block() {}
[[noreturn]] inline void __trap() { pddm::emulation::fail("__trap"); }

namespace pddm::emulation {

// The value of lane `source`; what a lane outside of the mask has is nothing to rely on.
template <class T>
T shuffle(const char* where, unsigned mask, T x, unsigned source) {
  static_assert(std::is_arithmetic_v<T> && (sizeof(T) == 4 || sizeof(T) == 8), "4 or 8 bytes");
  struct Lane {
    T value, result;
    unsigned source;
  } lane{x, {}, source};
  const auto work = [](void* const* lanes, unsigned mask) {
    for (unsigned l = 0; l < kLanes; ++l) {
      if (!(mask >> l & 1)) continue;
      Lane& to = *static_cast<Lane*>(lanes[l]);
      if (mask >> to.source & 1)
        to.result = static_cast<const Lane*>(lanes[to.source])->value;
      else
        std::memset(&to.result, 0xFF, sizeof(T));
    }
  };
  meet(where, mask, work, &lane);
  return lane.result;
}

// Lanes of `mask` with a predicate that holds.
inline unsigned ballot(const char* where, unsigned mask, bool predicate) {
  struct Lane {
    bool predicate;
    unsigned result;
  } lane{predicate, 0};
  const auto work = [](void* const* lanes, unsigned mask) {
    unsigned result = 0;
    for (unsigned l = 0; l < kLanes; ++l)
      if (mask >> l & 1) result |= unsigned(static_cast<const Lane*>(lanes[l])->predicate) << l;
    for (unsigned l = 0; l < kLanes; ++l)
      if (mask >> l & 1) static_cast<Lane*>(lanes[l])->result = result;
  };
  meet(where, mask, work, &lane);
  return lane.result;
}

}  // namespace pddm::emulation

// Lanes in segments of `width`, a power of two; past their end a lane keeps its own value.
template <class T>
T __shfl_sync(unsigned mask, T x, int source, int width = 32) {
  const unsigned lane = pddm::emulation::lane(), within = unsigned(width) - 1;
  return pddm::emulation::shuffle("__shfl_sync", mask, x, (lane & ~within) | (unsigned(source) & within));
}
template <class T>
T __shfl_xor_sync(unsigned mask, T x, int bits, int width = 32) {
  const unsigned lane = pddm::emulation::lane(), source = lane ^ unsigned(bits), last = lane | (unsigned(width) - 1);
  return pddm::emulation::shuffle("__shfl_xor_sync", mask, x, source <= last ? source : lane);
}
template <class T>
T __shfl_up_sync(unsigned mask, T x, unsigned apart, int width = 32) {
  const unsigned lane = pddm::emulation::lane();
  return pddm::emulation::shuffle("__shfl_up_sync", mask, x, lane % unsigned(width) >= apart ? lane - apart : lane);
}
template <class T>
T __shfl_down_sync(unsigned mask, T x, unsigned apart, int width = 32) {
  const unsigned lane = pddm::emulation::lane(), last = lane | (unsigned(width) - 1);
  return pddm::emulation::shuffle("__shfl_down_sync", mask, x, apart <= last - lane ? lane + apart : lane);
}
inline unsigned __ballot_sync(unsigned mask, int predicate) {
  return pddm::emulation::ballot("__ballot_sync", mask, predicate != 0);
}
inline int __any_sync(unsigned mask, int predicate) {
  return pddm::emulation::ballot("__any_sync", mask, predicate != 0) != 0;
}
inline int __all_sync(unsigned mask, int predicate) {
  return pddm::emulation::ballot("__all_sync", mask, predicate == 0) == 0;
}

// Other host threads may run kernels too. Floating-point sums are missing on purpose: their order would be anyone's.
#define PDDM_ATOMICS(T)                                                                                       \
  inline T atomicAdd(T* at, T x) { return __atomic_fetch_add(at, x, __ATOMIC_RELAXED); }                      \
  inline T atomicExch(T* at, T x) { return __atomic_exchange_n(at, x, __ATOMIC_RELAXED); }                    \
  inline T atomicCAS(T* at, T expected, T x) {                                                                \
    __atomic_compare_exchange_n(at, &expected, x, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED);                 \
    return expected;                                                                                          \
  }                                                                                                           \
  inline T atomicMax(T* at, T x) {                                                                            \
    T old = __atomic_load_n(at, __ATOMIC_RELAXED);                                                            \
    while (old < x && !__atomic_compare_exchange_n(at, &old, x, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED)) { \
    }                                                                                                         \
    return old;                                                                                               \
  }                                                                                                           \
  inline T atomicMin(T* at, T x) {                                                                            \
    T old = __atomic_load_n(at, __ATOMIC_RELAXED);                                                            \
    while (x < old && !__atomic_compare_exchange_n(at, &old, x, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED)) { \
    }                                                                                                         \
    return old;                                                                                               \
  }
PDDM_ATOMICS(int)
PDDM_ATOMICS(unsigned)
PDDM_ATOMICS(unsigned long long)
#undef PDDM_ATOMICS

// --- The runtime -----------------------------------------------------------------------------------------------------

enum cudaError_t {
  cudaSuccess = 0,
  cudaErrorInvalidValue = 1,
  cudaErrorInvalidConfiguration = 9,
  cudaErrorInvalidDevice = 101,
  cudaErrorNotSupported = 801,
  cudaErrorInvalidClusterSize = 912,
};
enum cudaDeviceAttr {
  cudaDevAttrMultiProcessorCount = 16,
  cudaDevAttrComputeCapabilityMajor = 75,
  cudaDevAttrComputeCapabilityMinor = 76,
  cudaDevAttrMaxSharedMemoryPerMultiprocessor = 81,
  cudaDevAttrMaxSharedMemoryPerBlockOptin = 97,
};
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize = 8 };
enum cudaMemcpyKind {
  cudaMemcpyHostToHost,
  cudaMemcpyHostToDevice,
  cudaMemcpyDeviceToHost,
  cudaMemcpyDeviceToDevice,
  cudaMemcpyDefault
};
enum cudaStreamCaptureStatus { cudaStreamCaptureStatusNone };
using cudaStream_t = struct CUstream_st*;

enum cudaLaunchAttributeID { cudaLaunchAttributeIgnore = 0, cudaLaunchAttributeClusterDimension = 4 };
struct cudaLaunchAttribute {
  cudaLaunchAttributeID id;
  union {
    char pad[64];
    struct {
      unsigned x, y, z;
    } clusterDim;
  } val;
};
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
  cudaLaunchAttribute* attrs;
  unsigned numAttrs;
};

const char* cudaGetErrorString(cudaError_t error);
cudaError_t cudaGetLastError();
cudaError_t cudaPeekAtLastError();

// The device is what PDDM_EMULATION_DEVICE (sm_80, sm_86, sm_89, sm_90, sm_100 or sm_120) and
// PDDM_EMULATION_MULTIPROCESSORS say at the time of the call; without them sm_80 with 3.
cudaError_t cudaGetDevice(int* device);
cudaError_t cudaSetDevice(int device);
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device);

namespace pddm::emulation {

cudaError_t set_attribute(const void* kernel, cudaFuncAttribute attribute, int value);
cudaError_t occupancy(int* blocks, int threads, size_t shared_bytes);
cudaError_t launch(const cudaLaunchConfig_t& config, const void* kernel, void (*body)(void*), void* context,
                   const Parameters& parameters);

}  // namespace pddm::emulation

template <class... P>
cudaError_t cudaFuncSetAttribute(void (*kernel)(P...), cudaFuncAttribute attribute, int value) {
  return pddm::emulation::set_attribute(reinterpret_cast<const void*>(kernel), attribute, value);
}
template <class... P>
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, void (*)(P...), int threads,
                                                          size_t shared_bytes) {
  return pddm::emulation::occupancy(blocks, threads, shared_bytes);
}

// Returns when the kernel has ended. What goes wrong in it is thrown.
template <class... Expected, class... Actual>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Expected...), Actual&&... actual) {
  struct Call {
    void (*kernel)(Expected...);
    std::tuple<std::decay_t<Expected>...> arguments;
  } call{kernel, {Expected(std::forward<Actual>(actual))...}};
  const auto body = [](void* context) {
    const Call& call = *static_cast<const Call*>(context);
    std::apply(call.kernel, call.arguments);
  };
  const auto listed = [](const auto&... argument) {
    return pddm::emulation::Parameters{{&argument, sizeof argument, alignof(std::decay_t<decltype(argument)>)}...};
  };
  return pddm::emulation::launch(*config, reinterpret_cast<const void*>(kernel), body, &call,
                                 std::apply(listed, call.arguments));
}

inline cudaError_t cudaMemsetAsync(void* at, int value, size_t bytes, cudaStream_t = nullptr) {
  if (bytes) std::memset(at, value, bytes);
  return cudaSuccess;
}
inline cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind, cudaStream_t = nullptr) {
  if (bytes) std::memcpy(to, from, bytes);
  return cudaSuccess;
}
template <class T>
cudaError_t cudaMemcpyFromSymbol(void* to, const T& symbol, size_t bytes, size_t offset = 0,
                                 cudaMemcpyKind = cudaMemcpyDeviceToHost) {
  if (offset + bytes > sizeof symbol) return cudaErrorInvalidValue;
  std::memcpy(to, reinterpret_cast<const unsigned char*>(&symbol) + offset, bytes);
  return cudaSuccess;
}
template <class T>
cudaError_t cudaMemcpyFromSymbolAsync(void* to, const T& symbol, size_t bytes, size_t offset, cudaMemcpyKind kind,
                                      cudaStream_t = nullptr) {
  return cudaMemcpyFromSymbol(to, symbol, bytes, offset, kind);
}
template <class T>
cudaError_t cudaMemcpyToSymbol(T& symbol, const void* from, size_t bytes, size_t offset = 0,
                               cudaMemcpyKind = cudaMemcpyHostToDevice) {
  if (offset + bytes > sizeof symbol) return cudaErrorInvalidValue;
  std::memcpy(reinterpret_cast<unsigned char*>(&symbol) + offset, from, bytes);
  return cudaSuccess;
}
inline cudaError_t cudaStreamSynchronize(cudaStream_t) { return cudaSuccess; }
inline cudaError_t cudaDeviceSynchronize() { return cudaSuccess; }
inline cudaError_t cudaStreamIsCapturing(cudaStream_t, cudaStreamCaptureStatus* status) {
  *status = cudaStreamCaptureStatusNone;
  return cudaSuccess;
}
