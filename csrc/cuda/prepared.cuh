// One call's workspace on the device, and its walks over pairs.
#pragma once

#include <algorithm>
#include <type_traits>

#include "multiply.cuh"
#include "prepare.cuh"

namespace pddm::cuda {

template <class... S>
struct Shapes {};

// Larger ones read the weights less often and take fewer steps with each barrier; those of few outputs waste less where
// a unit has few. What one is worth: products per cycle of a full multiprocessor, the half precisions' as looked at on
// an H200; the others' are estimates.
template <class A>
struct ShapesOf {
  using List = Shapes<Shape<128, 256, 2, 4, 4, 1, 100>, Shape<64, 256, 2, 4, 4, 1, 72>, Shape<64, 128, 2, 4, 3, 2, 70>,
                      Shape<32, 64, 2, 2, 3, 4, 46>>;
};
template <>
struct ShapesOf<ArithmeticF32> {
  using List = Shapes<Shape<64, 256, 2, 4, 3, 1, 100>, Shape<64, 128, 2, 4, 3, 1, 90>, Shape<32, 64, 2, 2, 3, 2, 80>>;
};
template <>
struct ShapesOf<ArithmeticF64> {
  using List = Shapes<Shape<32, 64, 2, 2, 3, 2, 100>>;
};

template <class A>
class Prepared {
 public:
  using Real = typename A::Real;
  Workspace<Real> w{};
  Ranks ranks{};
  Word* words = nullptr;  // zeroed

  // `pairs` is how many will be walked at once, as far as the host knows; `labels` are ranked if `ranked`.
  Prepared(const Context& context, const Rows& rows, const Unit& unit, int64_t pairs, const int64_t* labels = nullptr,
           bool ranked = false, int64_t word_count = 0)
      : context_(context) {
    if (rows.count > 0x7fffffff) throw std::runtime_error("pddm: more than 2^31 rows");
    for (int64_t size : {unit.dim, unit.hidden, unit.combined})
      if (size > 1 << 24) throw std::runtime_error("pddm: a unit's dimension is above 2^24");
    w.n = rows.count, w.dim = int(unit.dim), w.hidden = int(unit.hidden), w.combined = int(unit.combined);
    w.normalize_input = unit.normalize_input;
    w.dim_tiles = int(divided_up(w.dim, kDepth<A>)), w.hidden_tiles = int(divided_up(w.hidden, kDepth<A>));
    w.f_stride = w.dim_tiles * kDepth<A>, w.a_stride = w.hidden_tiles * kDepth<A>;
    multiprocessors_ = context.attribute(cudaDevAttrMultiProcessorCount);
    choose(typename ShapesOf<A>::List{}, pairs);

    w.hidden_blocks = int(divided_up(w.hidden, outputs_)), w.combined_blocks = int(divided_up(w.combined, outputs_));
    w.f = context.take<Real>(w.n * w.f_stride), w.norm = context.take<Real>(w.n);
    w.a = context.take<Real>(w.n * w.a_stride);
    const int64_t weight_pieces = int64_t(w.weight_tiles()) * outputs_ * kPieces;
    w.weights = context.take<unsigned char>(weight_pieces * kPieceBytes);
    const int64_t hidden = int64_t(w.hidden_blocks) * outputs_, combined = int64_t(w.combined_blocks) * outputs_;
    w.b_u = context.take<Real>(hidden), w.b_v = context.take<Real>(w.a_stride);
    w.b_c = context.take<Real>(combined), w.w_s = context.take<Real>(combined);
    w.b_s = static_cast<const Real*>(unit.b_s);
    words = context.take<Word>(word_count);
    if (ranked) {
      ranks = {labels, context.take<int>(w.n), context.take<int>(w.n), context.take<int>(w.n), context.take<int>(w.n)};
    }
    const auto given = [](const void* p) { return static_cast<const Real*>(p); };
    const Given<Real> parameters{given(rows.data), given(unit.w_u), given(unit.b_u), given(unit.b_v),
                                 given(unit.w_c),  given(unit.b_c), given(unit.w_s)};
    const int64_t small = hidden + w.a_stride + 2 * combined + word_count;
    context.launch(prepare_kernel<A>,
                   divided_up(w.n, kPrepareWarps) + divided_up(weight_pieces + small, kPrepareThreads), kPrepareThreads,
                   0, w, parameters, ranks, outputs_, words, word_count);
    project(unit);
  }

  // Positive pairs before every rank, and before every row; n + 1 sums each.
  void prefix(int64_t* before, int64_t* slot) const {
    const Scan by_rank{ranks.later_by_rank, before}, by_row{ranks.later, slot};
    context_.launch(prefix_kernel, slot ? 2 : 1, kScanThreads, kScanBytes, by_rank, by_row, w.n);
  }

  // `pairs` bounds the pairs of a walk whose number only the device knows.
  void score(Job<Real> job, int64_t positives = 0) {
    for (job.pass = 0; job.pass < (job.far.best || job.near.best ? Bests<Real>::kWalks : 1); ++job.pass)
      run(typename ShapesOf<A>::List{}, 0, job, positives);
  }

 private:
  // The shape that should take the least time for so many pairs: in waves of as many tiles as there are blocks at once,
  // of every tile all outputs, those too that only fill it up. With u' in shared memory if that costs no block.
  template <class... S>
  void choose(Shapes<S...>, int64_t pairs) {
    struct Fit {
      int64_t tiles, resident, streamed;
      int pairs, outputs, blocks, worth;
    };
    const Fit fits[] = {{tiles_of<S::kPairs>(pairs), Layout<A, S>::resident(w.hidden_tiles), Layout<A, S>::streamed(),
                         S::kPairs, S::kOutputs, S::kBlocks, S::kWorth}...};
    shared_ = context_.attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin);
    const int64_t at_once = context_.attribute(cudaDevAttrMaxSharedMemoryPerMultiprocessor);
    const int64_t reserved = at_once - shared_;  // of every block, by the driver
    double least = 0;
    for (int at = 0; at < int(sizeof...(S)); ++at) {
      const Fit& f = fits[at];
      const auto blocks = [&](int64_t used) { return std::min<int64_t>(f.blocks, at_once / (used + reserved)); };
      const int64_t most = blocks(f.streamed), resident = f.resident <= shared_ ? blocks(f.resident) : 0;
      if (most == 0 && resident == 0) continue;
      const bool keeps = resident >= most;
      const int64_t beside = keeps ? resident : most;
      const int64_t waves = divided_up(f.tiles, beside * multiprocessors_);
      const double outputs = double(divided_up(w.hidden, f.outputs)) * w.dim_tiles +
                             2.0 * double(divided_up(w.combined, f.outputs)) * w.hidden_tiles;
      // A multiprocessor with fewer blocks than it could have does less at once, and u' from elsewhere takes longer.
      const double took = double(waves) * f.blocks * f.pairs * f.outputs * outputs / f.worth * (keeps ? 1 : 1.1);
      if (shape_ >= 0 && took >= least) continue;
      least = took, shape_ = at, outputs_ = f.outputs, resident_ = keeps, used_ = keeps ? f.resident : f.streamed;
    }
    if (shape_ < 0)
      throw std::runtime_error("pddm: the device has too little shared memory for any shape of the kernels");
  }

  template <class First, class... Rest>
  void run(Shapes<First, Rest...>, int at, const Job<Real>& job, int64_t positives) {
    if (at == shape_) return run_shape<First>(job, positives);
    if constexpr (sizeof...(Rest) > 0) run(Shapes<Rest...>{}, at + 1, job, positives);
  }

  template <class S>
  void run_shape(const Job<Real>& job, int64_t positives) {
    const auto kernel = score_kernel<A, S>;
    if (blocks_ == 0) {
      int per_multiprocessor = 0;
      check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                 int(shared_)),  // the most there is: other calls may be at the same kernel
            "shared memory was refused");
      check(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&per_multiprocessor, kernel, S::kThreads, size_t(used_)),
            "the device does not answer");
      blocks_ = int64_t(multiprocessors_) * std::max(per_multiprocessor, 1);
    }
    const int64_t blocks = std::min(blocks_, count_tiles<S::kPairs>(job, positives));
    if (!resident_ && blocks > u_blocks_) {
      w.u = context_.take<unsigned char>(blocks * w.hidden_tiles * S::kPairs * kRowBytes);
      u_blocks_ = blocks;
    }
    context_.launch(kernel, blocks, S::kThreads, used_, w, job);
  }

  // a, in the arithmetic of everything that is no product of pairs.
  void project(const Unit& unit) {
    using Exact = std::conditional_t<sizeof(Real) == 8, ArithmeticF64, ArithmeticF32>;
    const Operand<Real> rows{w.f, w.n, w.dim, w.f_stride, 1};
    // As many outputs as a row of `a` is long: those past the last are zeros.
    Operand<Real> outputs{static_cast<const Real*>(unit.w_v), w.a_stride, w.dim, w.dim, 1};
    outputs.given_rows = w.hidden;
    Output<Real> a{w.a, w.a_stride, w.normalize_input ? nullptr : w.b_v};
    a.scale = Real(0.5);
    multiply<Exact>(context_, rows, outputs, a);
  }

  const Context& context_;
  int shape_ = -1, outputs_ = 0, multiprocessors_ = 0;
  bool resident_ = true;
  int64_t shared_ = 0, used_ = 0, blocks_ = 0;  // shared memory that may be and is used; blocks at once
  int64_t u_blocks_ = 0;                        // for which there is room in w.u
};

}  // namespace pddm::cuda
