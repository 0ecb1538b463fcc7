// The device that is played, and what it refuses to launch.
#include <algorithm>
#include <cstdlib>
#include <map>
#include <mutex>
#include <stdexcept>
#include <string>
#include <utility>

#include "cuda_runtime.h"

namespace pddm::emulation {
namespace {

struct Device {
  const char* name;
  int major, minor, shared_per_block, threads_per_multiprocessor, blocks_per_multiprocessor;
};

constexpr int kReserved = 1024;  // of every block's shared memory, for the system
constexpr Device kDevices[] = {
    {"sm_75", 7, 5, 64 << 10, 1024, 16},   {"sm_80", 8, 0, 163 << 10, 2048, 32}, {"sm_86", 8, 6, 99 << 10, 1536, 16},
    {"sm_89", 8, 9, 99 << 10, 1536, 24},   {"sm_90", 9, 0, 227 << 10, 2048, 32}, {"sm_100", 10, 0, 227 << 10, 2048, 32},
    {"sm_120", 12, 0, 99 << 10, 1536, 24},
};
constexpr size_t kSharedWithoutAsking = 48 << 10;

const Device& device() {
  const char* const set = std::getenv("PDDM_EMULATION_DEVICE");
  const std::string name = set ? set : "sm_80";
  for (const Device& d : kDevices)
    if (name == d.name) return d;
  throw std::invalid_argument("PDDM_EMULATION_DEVICE is '" + name + "', which is none of those that are known");
}

int multiprocessors() {
  const char* const set = std::getenv("PDDM_EMULATION_MULTIPROCESSORS");
  const int count = set ? std::atoi(set) : 3;
  if (count < 1) throw std::invalid_argument("PDDM_EMULATION_MULTIPROCESSORS is not a positive number");
  return count;
}

thread_local cudaError_t last_error = cudaSuccess;

cudaError_t remember(cudaError_t error) {
  if (error != cudaSuccess) last_error = error;
  return error;
}

// Shared memory that kernels have asked for.
std::mutex asked_mutex;
std::map<const void*, size_t>& asked() {
  static std::map<const void*, size_t> all;
  return all;
}

}  // namespace

cudaError_t set_attribute(const void* kernel, cudaFuncAttribute attribute, int value) {
  if (attribute != cudaFuncAttributeMaxDynamicSharedMemorySize || value < 0 || value > device().shared_per_block)
    return remember(cudaErrorInvalidValue);
  const std::lock_guard<std::mutex> lock(asked_mutex);
  asked()[kernel] = size_t(value);
  return cudaSuccess;
}

cudaError_t occupancy(int* blocks, int threads, size_t shared_bytes) {
  if (threads < 1) return remember(cudaErrorInvalidValue);
  const Device& d = device();
  const size_t by_memory = size_t(d.shared_per_block + kReserved) / (shared_bytes + kReserved);
  const int whole_warps = (threads + 31) / 32 * 32;
  *blocks = std::min({int(by_memory), d.threads_per_multiprocessor / whole_warps, d.blocks_per_multiprocessor});
  if (threads > int(kMaxThreads)) *blocks = 0;
  return cudaSuccess;
}

void (*run_instead)(const Launch& launch, const void* kernel, const Parameters& parameters) = nullptr;

cudaError_t launch(const cudaLaunchConfig_t& config, const void* kernel, void (*body)(void*), void* context,
                   const Parameters& parameters) {
  const dim3 grid = config.gridDim, block = config.blockDim;
  const size_t threads = size_t(block.x) * block.y * block.z, blocks = size_t(grid.x) * grid.y * grid.z;
  if (threads == 0 || threads > kMaxThreads || block.z > 64 || blocks == 0 || grid.x > 0x7fffffff || grid.y > 65535 ||
      grid.z > 65535)
    return remember(cudaErrorInvalidConfiguration);
  unsigned cluster = 0;
  for (unsigned a = 0; a < config.numAttrs; ++a) {
    const cudaLaunchAttribute& attribute = config.attrs[a];
    const auto& size = attribute.val.clusterDim;
    if (attribute.id != cudaLaunchAttributeClusterDimension || size.x > kMaxCluster || size.y != 1 || size.z != 1)
      return remember(cudaErrorNotSupported);  // by the emulation
    if (device().major < 9 || size.x == 0 || grid.x % size.x != 0) return remember(cudaErrorInvalidClusterSize);
    cluster = size.x;
  }
  if (blocks > 0x7fffffff) return remember(cudaErrorNotSupported);  // by the emulation
  size_t most = kSharedWithoutAsking;
  {
    const std::lock_guard<std::mutex> lock(asked_mutex);
    const auto found = asked().find(kernel);
    if (found != asked().end()) most = std::max(most, found->second);
  }
  if (config.dynamicSmemBytes > std::min(most, size_t(device().shared_per_block)))
    return remember(cudaErrorInvalidValue);
  const Launch whole{grid, block, config.dynamicSmemBytes, body, context, cluster, device().major};
  run_instead ? run_instead(whole, kernel, parameters) : run(whole);
  return cudaSuccess;
}

}  // namespace pddm::emulation

using namespace pddm::emulation;

const char* cudaGetErrorString(cudaError_t error) {
  switch (error) {
    case cudaSuccess: return "no error";
    case cudaErrorInvalidValue: return "invalid argument";
    case cudaErrorInvalidConfiguration: return "invalid configuration argument";
    case cudaErrorInvalidDevice: return "invalid device ordinal";
    case cudaErrorNotSupported: return "operation not supported";
    case cudaErrorInvalidClusterSize: return "misconfigured cluster size";
  }
  return "unrecognized error code";
}

cudaError_t cudaGetLastError() { return std::exchange(last_error, cudaSuccess); }
cudaError_t cudaPeekAtLastError() { return last_error; }

cudaError_t cudaGetDevice(int* index) {
  *index = 0;
  return cudaSuccess;
}
cudaError_t cudaSetDevice(int index) { return index == 0 ? cudaSuccess : remember(cudaErrorInvalidDevice); }

// Every index is the one device: callers that answer for CPU tensors have −1.
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  const Device& d = device();
  switch (attribute) {
    case cudaDevAttrMultiProcessorCount: *value = multiprocessors(); return cudaSuccess;
    case cudaDevAttrComputeCapabilityMajor: *value = d.major; return cudaSuccess;
    case cudaDevAttrComputeCapabilityMinor: *value = d.minor; return cudaSuccess;
    case cudaDevAttrMaxSharedMemoryPerMultiprocessor: *value = d.shared_per_block + kReserved; return cudaSuccess;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin: *value = d.shared_per_block; return cudaSuccess;
  }
  return remember(cudaErrorInvalidValue);
}
