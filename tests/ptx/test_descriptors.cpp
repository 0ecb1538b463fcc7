// How the emulation decodes a descriptor, and where csrc/cuda/warpgroup.cuh puts a number, against CUTLASS's own
// headers.
#include <stdexcept>

#include "../../csrc/cuda/warpgroup.cuh"
#include "../native/check.h"
#include "cutlass.h"

using namespace pddm;

namespace {

uint64_t made;
__global__ void make() { made = cuda::descriptor(cuda::aligned_shared_memory() + 5 * 1024); }

bool accepted(uint64_t descriptor) {
  try {
    emulation::tile_address(descriptor, 0, 0);
    return true;
  } catch (const std::invalid_argument&) {
    return false;
  }
}

}  // namespace

int main() {
  cudaLaunchAttribute attribute = {};
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim = {1, 1, 1};
  cudaLaunchConfig_t config = {};
  config.gridDim = 1, config.blockDim = 1, config.dynamicSmemBytes = 6 * 1024;
  config.attrs = &attribute, config.numAttrs = 1;
  setenv("PDDM_EMULATION_DEVICE", "sm_90", 1);
  CHECK(cudaLaunchKernelEx(&config, make) == cudaSuccess, "a descriptor");

  const unsigned start = emulation::kSharedAddress + 5 * 1024;
  CHECK(made == (cutlass_rows(cuda::kRowBytes).descriptor | start >> 4), "the kernels' descriptor is %llx",
        static_cast<unsigned long long>(made));
  for (int row_bytes : {64, 128}) {
    const CutlassRows theirs = cutlass_rows(row_bytes);
    for (int step = 0; step < row_bytes / 32; ++step) {
      const uint64_t advanced = theirs.advanced(theirs.descriptor | start >> 4, step);
      CHECK(row_bytes != cuda::kRowBytes || advanced == made + 2 * uint64_t(step), "step %d: %llx", step,
            static_cast<unsigned long long>(advanced));
      for (int row = 0; row < 256; ++row)
        for (int k = 0; k < 16; ++k) {
          const unsigned place = theirs.place(row, 16 * step + k), within = unsigned(k % 8 * 2);
          const unsigned decoded = emulation::tile_address(advanced, unsigned(row), unsigned(k / 8)) + within;
          const unsigned stored = unsigned(cuda::piece_offset(row, (16 * step + k) / 8)) + within;
          CHECK(decoded == start + place && (row_bytes != cuda::kRowBytes || stored == place),
                "rows of %d bytes, (%d, %d): %u and %u instead of %u", row_bytes, row, 16 * step + k, decoded - start,
                stored, place);
          if (failures > 20) return 1;
        }
    }
  }
  // As the tests of the emulation have them.
  for (int thread = 0; thread < 128; ++thread) {
    const int row = thread / 32 * 16 + thread % 32 / 4, pair = thread % 4 * 2;
    for (int i = 0; i < 128; ++i) {
      const CutlassPlace sum = cutlass_sum(thread, i);
      CHECK(sum.row == row + i / 2 % 2 * 8 && sum.column == i / 4 * 8 + pair + i % 2, "thread %d, sum %d", thread, i);
    }
    for (int i = 0; i < 8; ++i) {
      const CutlassPlace left = cutlass_left(thread, i);
      CHECK(left.row == row + i / 2 % 2 * 8 && left.column == i / 4 * 8 + pair + i % 2, "thread %d, a %d", thread, i);
    }
  }
  // Their fields, one by one: another stride, and what is refused.
  CHECK(emulation::tile_address(cutlass_descriptor(start >> 4, 1, 2048 >> 4, 0, 1), 19, 1) ==
            emulation::tile_address(cutlass_descriptor(start >> 4, 1, 1024 >> 4, 0, 1), 3, 1) + 2 * 2048,
        "a stride of 2048 bytes");
  for (unsigned layout : {0u, 1u, 2u, 3u})
    CHECK(accepted(cutlass_descriptor(start >> 4, 1, 64, 0, layout)) == (layout == 1 || layout == 2), "the swizzle %u",
          layout);
  CHECK(!accepted(cutlass_descriptor(start >> 4, 1, 64, 3, 1)), "rows that start elsewhere");
  if (failures) std::printf("%d checks failed\n", failures);
  return failures != 0;
}
