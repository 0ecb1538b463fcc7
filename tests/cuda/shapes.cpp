// Prints the scoring kernels' names and the shared memory they ask for with 512 hidden outputs; needs no device.
#include <cstdio>

#include "../../csrc/cuda/prepared.cuh"

namespace pddm::cuda {
std::atomic<int64_t> launches, allocations, bytes_alive, bytes_peak;

template <class A, class S>
void print_shape(const char* arithmetic) {
  std::printf("score_kernel<%s, Shape<%d, %d, %d, %d, %d, %d, %d>>\t%lld\n", arithmetic, S::kPairs, S::kOutputs,
              S::kWarpsM, S::kWarpsN, S::kStages, S::kBlocks, S::kWorth,
              static_cast<long long>(Layout<A, S>::resident(512 / kDepth<A>)));
}
template <class A, class S>
void print_cluster(const char* arithmetic) {
  constexpr int kMost = 227 << 10;  // of a block on sm_90
  const int64_t stages = ClusterLayout<S>::stages(kMost, 512 / kDepth<A>);
  for (const char* grid : {"false", "true"})
    std::printf("hopper_score_kernel<%s, ClusterShape<%d, %d, %d>, %s>\t%lld\n", arithmetic, S::kOutputs, S::kConsumers,
                S::kWorth, grid, static_cast<long long>(stages ? ClusterLayout<S>::bytes(stages, 512 / kDepth<A>) : 0));
}
template <class A, class S, bool Left, bool Right, class Number>
void print_product(const char* arithmetic, const char* number) {
  std::printf("multiply_kernel<%s, Shape<%d, %d, %d, %d, %d, %d, %d>, %s, %s, %s>\t%d\n", arithmetic, S::kPairs,
              S::kOutputs, S::kWarpsM, S::kWarpsN, S::kStages, S::kBlocks, S::kWorth, Left ? "true" : "false",
              Right ? "true" : "false", number, S::kStages * kStageBytes<ProductSums<A, S, Left, Right, Number>>);
}
template <class A, class S>
void print_products(const char* arithmetic) {
  const char* const real = sizeof(typename A::Real) == 8 ? "double" : "float";
  print_product<A, S, true, true, typename A::Real>(arithmetic, real);
  print_product<A, S, true, false, typename A::Real>(arithmetic, real);
  print_product<A, S, false, false, typename A::Real>(arithmetic, real);
  if constexpr (kNarrow<A>) print_product<A, S, true, true, Kept<A>>(arithmetic, "Bfloat16");
}
template <class A, class... S>
void print_all(const char* arithmetic, Shapes<S...>) {
  (print_shape<A, S>(arithmetic), ...);
}
template <class A, class... S>
void print_clusters(const char* arithmetic, Shapes<S...>) {
  (print_cluster<A, S>(arithmetic), ...);
}
}  // namespace pddm::cuda

int main() {
  using namespace pddm::cuda;
  print_all<ArithmeticF32>("F32", ShapesOf<ArithmeticF32>::List{});
  print_all<ArithmeticF64>("F64", ShapesOf<ArithmeticF64>::List{});
  print_all<ArithmeticTf32>("Tf32", ShapesOf<ArithmeticTf32>::List{});
  print_all<ArithmeticBf16>("Bf16", ShapesOf<ArithmeticBf16>::List{});
  print_all<ArithmeticF16>("F16", ShapesOf<ArithmeticF16>::List{});
  print_clusters<ArithmeticBf16>("Bf16", ClusterShapesOf<ArithmeticBf16>::List{});
  print_clusters<ArithmeticF16>("F16", ClusterShapesOf<ArithmeticF16>::List{});
  print_products<ArithmeticF32, SmallProduct<ArithmeticF32>>("F32");
  print_products<ArithmeticF64, SmallProduct<ArithmeticF64>>("F64");
  print_products<ArithmeticTf32, SmallProduct<ArithmeticTf32>>("Tf32");
  print_products<ArithmeticTf32, LargeProduct<ArithmeticTf32>>("Tf32");
  print_products<ArithmeticBf16, SmallProduct<ArithmeticBf16>>("Bf16");
  print_products<ArithmeticBf16, LargeProduct<ArithmeticBf16>>("Bf16");
}
