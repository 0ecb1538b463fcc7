// Prints the scoring kernels' names and the shared memory they ask for with 512 hidden outputs; needs no device.
#include <cstdio>

#include "../../csrc/cuda/prepared.cuh"

namespace pddm::cuda {
std::atomic<int64_t> launches, bytes_alive, bytes_peak;

template <class A, class S>
void print_shape(const char* arithmetic) {
  std::printf("score_kernel<%s, Shape<%d, %d, %d, %d, %d, %d, %d>>\t%lld\n", arithmetic, S::kPairs, S::kOutputs,
              S::kRows, S::kColumns, S::kStages, S::kBlocks, S::kWorth,
              static_cast<long long>(Layout<A, S>::resident(512 / kDepth<A>)));
}
template <class A, class... S>
void print_all(const char* arithmetic, Shapes<S...>) {
  (print_shape<A, S>(arithmetic), ...);
  std::printf("multiply_kernel<%s>\t%d\n", arithmetic, 4 * MultiplyShape<A>::kPairs * kRowBytes);
}
}  // namespace pddm::cuda

int main() {
  using namespace pddm::cuda;
  print_all<ArithmeticF32>("F32", ShapesOf<ArithmeticF32>::List{});
  print_all<ArithmeticF64>("F64", ShapesOf<ArithmeticF64>::List{});
  print_all<ArithmeticTf32>("Tf32", ShapesOf<ArithmeticTf32>::List{});
  print_all<ArithmeticBf16>("Bf16", ShapesOf<ArithmeticBf16>::List{});
  print_all<ArithmeticF16>("F16", ShapesOf<ArithmeticF16>::List{});
}
