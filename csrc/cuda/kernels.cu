// Every kernel of one arithmetic (PDDM_ARITHMETIC: F32, F64, Tf32, Bf16 or F16), compiled once for each.
#include "asked.cuh"
#include "candidates.cuh"
#include "convert.cuh"
#include "dense.cuh"
#include "gradient.cuh"
#include "kernels.h"
#include "loss.cuh"
#include "mine.cuh"
#include "topk.cuh"

#define PDDM_JOIN_(a, b) a##b
#define PDDM_JOIN(a, b) PDDM_JOIN_(a, b)

namespace pddm::cuda {
namespace {

using Forward = PDDM_JOIN(Arithmetic, PDDM_ARITHMETIC);
// Gradients have float32's range.
using Backward = std::conditional_t<std::is_same<Forward, ArithmeticF16>::value, ArithmeticTf32, Forward>;
using Real = Forward::Real;
// Of features. Only half precisions' are another type than that of everything else.
using Stored = std::conditional_t<std::is_same<Forward, ArithmeticBf16>::value, Bf16,
                                  std::conditional_t<std::is_same<Forward, ArithmeticF16>::value, F16, Real>>;

class CudaBackend final : public DeviceBackend {
 public:
  explicit CudaBackend(const Caller& caller) : context_(caller) {}

  int64_t count_positive_pairs(const int64_t* labels, int64_t n) const override {
    return cuda::count_positive_pairs(context_, labels, n);
  }
  void mine(const Rows& rows, const int64_t* labels, const Unit& unit, Mode mode,
            const Quadruplets& out) const override {
    cuda::mine<Forward>(context_, rows, labels, unit, mode, out);
  }
  void score_pairs(const Rows& rows, const Pairs& pairs, const Unit& unit, void* scores) const override {
    cuda::score_pairs<Forward>(context_, rows, pairs, unit, static_cast<Real*>(scores));
  }
  void score_matrix(const Rows& rows, int64_t split, const Unit& unit, void* scores) const override {
    cuda::score_matrix<Forward>(context_, rows, split, unit, static_cast<Real*>(scores));
  }
  void topk(const Rows& queries, const Rows& gallery, int64_t k, const Unit& unit, void* scores,
            int64_t* indices) const override {
    cuda::topk<Forward>(context_, queries, gallery, k, unit, static_cast<Real*>(scores), indices);
  }
  void largest(const void* values, int64_t rows, int64_t columns, const int64_t* own, const int64_t* classes,
               int64_t count, int64_t* indices) const override {
    cuda::largest(context_, static_cast<const Real*>(values), rows, columns, own, classes, count, indices);
  }
  void convert(const Conversion* conversions, int count) const override { cuda::convert(context_, conversions, count); }
  void candidate_rows(const Rows& rows, int64_t dim, const int64_t* labels, void* to, void* weights,
                      const Classes& classes) const override {
    cuda::candidate_rows<Real, Stored>(context_, rows, dim, labels, to, static_cast<Real*>(weights), classes);
  }
  void candidates(const void* products, int64_t rows, int64_t n, int64_t first, const void* weights,
                  const Classes& classes, int64_t count, int64_t* lists) const override {
    cuda::candidates(context_, static_cast<const Real*>(products), rows, n, first, static_cast<const Real*>(weights),
                     classes, count, lists);
  }
  int64_t count_asked(const Asked& asked, int64_t* begins, int64_t* places) const override {
    return cuda::count_asked(context_, asked, begins, places);
  }
  void write_asked(const Asked& asked, const int64_t* begins, int64_t* i, int64_t* j, int64_t* places) const override {
    cuda::write_asked(context_, asked, begins, i, j, places);
  }
  void best_asked(const Asked& asked, bool second, const int64_t* places, const void* scores, int64_t count,
                  bool lowest, const BestAsked& best) const override {
    cuda::best_asked(context_, asked, second, places, static_cast<const Real*>(scores), count, lowest, best);
  }
  void join_best(int64_t n, const BestAsked& positive, const BestAsked& negative,
                 const Quadruplets& out) const override {
    cuda::join_best<Real>(context_, n, positive, negative, out);
  }
  void score_pairs_backward(const Rows& rows, const Pairs& pairs, const void* weight, const Unit& unit,
                            void* rows_gradient, const UnitGradient& gradient) const override {
    Source<Real> source{pairs.i, pairs.j, static_cast<const Real*>(weight), rows.count, -1, pairs.count};
    backward<Backward>(context_, rows, source, unit, static_cast<Real*>(rows_gradient), gradient);
  }
  void score_matrix_backward(const Rows& rows, int64_t split, const void* weight, const Unit& unit, void* rows_gradient,
                             const UnitGradient& gradient) const override {
    const int64_t n = rows.count, pairs = split < 0 ? n * (n + 1) / 2 : split * (n - split);
    Source<Real> source{nullptr, nullptr, static_cast<const Real*>(weight), n, split, pairs};
    backward<Backward>(context_, rows, source, unit, static_cast<Real*>(rows_gradient), gradient);
  }
  void quadruplet_loss(const Rows& rows, int64_t dim, const Picked& quads, const Margins& margins, void* loss,
                       uint8_t* open) const override {
    cuda::quadruplet_loss(context_, rows, dim, quads, margins, static_cast<Real*>(loss), open);
  }
  void quadruplet_loss_backward(const Rows& rows, int64_t dim, const Picked& quads, double embedding_weight,
                                const void* upstream, const uint8_t* open, void* d_rows, void* d_s_ij, void* d_s_ik,
                                void* d_s_jl) const override {
    const auto reals = [](void* to) { return static_cast<Real*>(to); };
    cuda::quadruplet_loss_backward(context_, rows, dim, quads, embedding_weight, static_cast<const Real*>(upstream),
                                   open, reals(d_rows), {reals(d_s_ij), reals(d_s_ik), reals(d_s_jl)});
  }

 private:
  const Context context_;
};

std::unique_ptr<const DeviceBackend> make_backend(const Caller& caller) {
  return std::make_unique<CudaBackend>(caller);
}

bool warpgroups(int device) { return Prepared<Forward>::warpgroups(device); }

int64_t read_scored() {
  unsigned long long scored = 0;
  check(cudaDeviceSynchronize(), "the device has failed");
  check(cudaMemcpyFromSymbol(&scored, scored_pairs, sizeof scored), "the counter could not be read");
  return static_cast<int64_t>(scored);
}

void reset_scored() {
  const unsigned long long none = 0;
  check(cudaDeviceSynchronize(), "the device has failed");
  check(cudaMemcpyToSymbol(scored_pairs, &none, sizeof none), "the counter could not be reset");
}

}  // namespace

Kernels PDDM_JOIN(kernels_, PDDM_ARITHMETIC)() { return {make_backend, warpgroups, read_scored, reset_scored}; }

}  // namespace pddm::cuda
