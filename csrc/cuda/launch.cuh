// Launches on the caller's stream, scratch from the caller's allocator, and errors as exceptions.
#pragma once

#include <atomic>
#include <cstdlib>
#include <stdexcept>
#include <string>
#include <type_traits>

#include "backend.h"
#include "device.cuh"

namespace pddm::cuda {

inline void check(cudaError_t error, const char* what) {
  if (error != cudaSuccess) throw std::runtime_error(std::string("pddm: ") + what + ": " + cudaGetErrorString(error));
}

// A kernel's parameter; a number that it has no room for is an error, where a conversion would cut it.
template <class Parameter, class Argument>
Parameter fitted(const Argument& argument) {
  const auto parameter = static_cast<Parameter>(argument);
  if constexpr (std::is_integral<Argument>::value && std::is_integral<Parameter>::value) {
    if (static_cast<Argument>(parameter) != argument || (parameter < Parameter(0)) != (argument < Argument(0)))
      throw std::runtime_error("pddm: a kernel has no room for the number " + std::to_string(argument));
  }
  return parameter;
}

extern std::atomic<int64_t> launches, allocations, bytes_alive, bytes_peak;  // for Counters

class Context {
 public:
  // The runtime in here is not the host framework's, and has a current device of its own.
  explicit Context(const Caller& caller) : caller_(caller) {
    check(cudaSetDevice(caller.device), "the device is not there");
    const int major = attribute(cudaDevAttrComputeCapabilityMajor);
    if (major < 8)
      throw std::runtime_error(
          "pddm: CUDA device " + std::to_string(caller.device) + " is of compute capability " + std::to_string(major) +
          "." + std::to_string(attribute(cudaDevAttrComputeCapabilityMinor)) + "; the kernels need 8.0 or later");
  }
  Context(const Context&) = delete;
  ~Context() { bytes_alive -= taken_; }

  // Lives as long as the call; aligned for everything.
  template <class T>
  T* take(int64_t count) const {
    const int64_t bytes = count * int64_t(sizeof(T)), alive = bytes_alive += bytes;
    taken_ += bytes;
    for (int64_t peak = bytes_peak; peak < alive && !bytes_peak.compare_exchange_weak(peak, alive);) {
    }
    const int64_t rounded = (bytes + kAlignment - 1) / kAlignment * kAlignment;
    if (rounded > caller_.slab / 2) return static_cast<T*>(allocate(bytes));
    if (rounded > left_) free_ = static_cast<unsigned char*>(allocate(caller_.slab)), left_ = caller_.slab;
    void* const taken = free_;
    free_ += rounded, left_ -= rounded;
    return static_cast<T*>(taken);
  }

  template <class... Parameters, class... Arguments>
  void launch(void (*kernel)(Parameters...), int64_t blocks, int threads, int64_t shared,
              const Arguments&... arguments) const {
    launch_clusters(1, kernel, blocks, threads, shared, arguments...);
  }
  // `blocks` is a multiple of `cluster`, whose blocks run at once.
  template <class... Parameters, class... Arguments>
  void launch_clusters(int cluster, void (*kernel)(Parameters...), int64_t blocks, int threads, int64_t shared,
                       const Arguments&... arguments) const {
    if (blocks == 0) return;
    if (blocks > 0x7fffffff) throw std::runtime_error("pddm: a launch of more than 2^31 blocks");
    cudaLaunchConfig_t config = {};
    config.gridDim = dim3(static_cast<unsigned>(blocks));
    config.blockDim = dim3(static_cast<unsigned>(threads));
    config.dynamicSmemBytes = static_cast<size_t>(shared);
    config.stream = stream();
    cudaLaunchAttribute dimension = {};
    if (cluster > 1) {
      dimension.id = cudaLaunchAttributeClusterDimension;
      dimension.val.clusterDim.x = static_cast<unsigned>(cluster);
      dimension.val.clusterDim.y = dimension.val.clusterDim.z = 1;
      config.attrs = &dimension, config.numAttrs = 1;
    }
    check(cudaLaunchKernelEx(&config, kernel, fitted<Parameters>(arguments)...), "a kernel did not launch");
    ++launches;
  }

  int attribute(cudaDeviceAttr which) const {
    int value = 0;
    check(cudaDeviceGetAttribute(&value, which, caller_.device), "the device does not answer");
    return value;
  }
  int device() const { return caller_.device; }
  cudaStream_t stream() const { return static_cast<cudaStream_t>(caller_.stream); }

 private:
  static constexpr int64_t kAlignment = 256;  // as every allocation's

  void* allocate(int64_t bytes) const {
    ++allocations;
    return caller_.allocate(caller_.context, bytes);
  }

  const Caller& caller_;
  mutable int64_t taken_ = 0;
  mutable unsigned char* free_ = nullptr;  // of the last slab
  mutable int64_t left_ = 0;
};

// Whether a device has what hopper.cuh is made of; PDDM_WARPGROUPS=off leaves the work to score.cuh.
inline bool has_warpgroups(int device) {
  const char* const wanted = std::getenv("PDDM_WARPGROUPS");
  const std::string choice = wanted ? wanted : "on";
  if (choice != "on" && choice != "off")
    throw std::runtime_error("pddm: PDDM_WARPGROUPS is '" + choice + "'; on and off are accepted");
  int major = 0;
  check(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device), "the device does not answer");
  return choice == "on" && major == 9;
}

inline int64_t divided_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

}  // namespace pddm::cuda
