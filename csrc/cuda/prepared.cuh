// One call's workspace on the device, and its walks over pairs.
#pragma once

#include <algorithm>
#include <type_traits>

#include "hopper.cuh"
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

// Those of hopper.cuh, where it is built and serves the arithmetic.
template <class A>
struct ClusterShapesOf {
  using List = Shapes<>;
};
#if defined(PDDM_WARPGROUPS)
// Worths as measured on an H100, beside those of the portable shapes.
using HalfClusterShapes =
    Shapes<ClusterShape<256, 2, 195>, ClusterShape<192, 2, 177>, ClusterShape<128, 3, 180>, ClusterShape<64, 3, 105>>;
template <>
struct ClusterShapesOf<ArithmeticBf16> {
  using List = HalfClusterShapes;
};
template <>
struct ClusterShapesOf<ArithmeticF16> {
  using List = HalfClusterShapes;
};
#endif

template <class A>
class Prepared {
 public:
  using Real = typename A::Real;
  Workspace<Real> w{};
  Ranks ranks{};
  Word* words = nullptr;

  // Plans and takes memory. `pairs` is how many will be walked at once, as far as the host knows; `labels` are to be
  // ranked if `ranked`.
  Prepared(const Context& context, int64_t n, const Unit& unit, int64_t pairs, const int64_t* labels = nullptr,
           bool ranked = false, int64_t word_count = 0)
      : context_(context), word_count_(word_count) {
    if (n > 0x7fffffff) throw std::runtime_error("pddm: more than 2^31 rows");
    for (int64_t size : {unit.dim, unit.hidden, unit.combined})
      if (size > 1 << 24) throw std::runtime_error("pddm: a unit's dimension is above 2^24");
    w.n = n, w.dim = int(unit.dim), w.hidden = int(unit.hidden), w.combined = int(unit.combined);
    w.normalize_input = unit.normalize_input;
    multiprocessors_ = context.attribute(cudaDevAttrMultiProcessorCount);
    shared_ = context_.attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin);
    choose(typename ShapesOf<A>::List{}, typename ClusterShapesOf<A>::List{}, pairs);
    const int at_once = w.warpgroups ? kTilesAtOnce : 1;
    w.dim_tiles = int(divided_up(w.dim, at_once * kDepth<A>)) * at_once;
    w.hidden_tiles = int(divided_up(w.hidden, at_once * kDepth<A>)) * at_once;
    w.f_stride = w.dim_tiles * kDepth<A>, w.a_stride = w.hidden_tiles * kDepth<A>;

    w.hidden_blocks = int(divided_up(w.hidden, outputs_)), w.combined_blocks = int(divided_up(w.combined, outputs_));
    w.f = context.take<Real>(w.n * w.f_stride), w.norm = context.take<Real>(w.n);
    w.a = context.take<Real>(w.n * w.a_stride);
    w.weights = context.take<unsigned char>(weight_pieces() * kPieceBytes);
    w.b_u = context.take<Real>(padded_hidden()), w.b_v = context.take<Real>(w.a_stride);
    w.b_c = context.take<Real>(padded_combined()), w.w_s = context.take<Real>(padded_combined());
    w.b_s = static_cast<const Real*>(unit.b_s);
    words = context.take<Word>(word_count);
    if (ranked) {
      ranks = {labels, context.take<int>(w.n), context.take<int>(w.n), context.take<int>(w.n), context.take<int>(w.n)};
    }
  }

  // Fills it all, and clears the words. `listed` are the pairs of Walk::pairs, which are looked at here.
  void prepare(const Rows& rows, const Unit& unit, const Pairs& listed = {}) const {
    const auto given = [](const void* p) { return static_cast<const Real*>(p); };
    const Given<Real> parameters{given(rows.data), given(unit.w_u), given(unit.b_u), given(unit.b_v),
                                 given(unit.w_c),  given(unit.b_c), given(unit.w_s)};
    const int64_t small = padded_hidden() + w.a_stride + 2 * padded_combined() + word_count_ + listed.count;
    context_.launch(prepare_kernel<A>,
                    divided_up(w.n, kPrepareWarps) + divided_up(weight_pieces() + small, kPrepareThreads),
                    kPrepareThreads, 0, w, parameters, ranks, outputs_, words, word_count_, listed);
    project(unit);
  }

  static bool warpgroups(int device) {
    return !std::is_same<typename ClusterShapesOf<A>::List, Shapes<>>::value && has_warpgroups(device);
  }

  // Positive pairs before every rank, and before every row; n + 1 sums each.
  void prefix(int64_t* before, int64_t* slot) const {
    const Scan by_rank{ranks.later_by_rank, before}, by_row{ranks.later, slot};
    context_.launch(prefix_kernel, slot ? 2 : 1, kScanThreads, kScanBytes, by_rank, by_row, w.n);
  }

  // `positives` bounds the pairs of a walk whose number only the device knows.
  void score(Job<Real> job, int64_t positives = 0) {
    for (job.pass = 0; job.pass < (job.far.best || job.near.best ? Bests<Real>::kPasses : 1); ++job.pass)
      run(typename ShapesOf<A>::List{}, typename ClusterShapesOf<A>::List{}, job, positives);
  }

 private:
  int64_t padded_hidden() const { return int64_t(w.hidden_blocks) * outputs_; }
  int64_t padded_combined() const { return int64_t(w.combined_blocks) * outputs_; }
  int64_t weight_pieces() const { return int64_t(w.weight_tiles()) * outputs_ * kPieces; }

  // The shape that should take the least time for so many pairs: in waves of as many tiles as there are blocks at once,
  // of every tile all outputs, those too that only fill it up. With u' in shared memory if that costs no block.
  template <class... S, class... C>
  void choose(Shapes<S...>, Shapes<C...>, int64_t pairs) {
    struct Fit {
      int64_t tiles, resident, streamed;
      int pairs, outputs, blocks, worth;
    };
    constexpr int kClusterDepth = kTilesAtOnce * kDepth<A>;
    const int64_t portable_tiles = divided_up(w.hidden, kDepth<A>);
    [[maybe_unused]] const int64_t cluster_tiles = divided_up(w.hidden, kClusterDepth) * kTilesAtOnce;
    const int64_t never = int64_t(1) << 62;
    const Fit fits[] = {{tiles_of<S::kPairs>(pairs), Layout<A, S>::resident(portable_tiles), Layout<A, S>::streamed(),
                         S::kPairs, S::kOutputs, S::kBlocks, S::kWorth}...,
                        {divided_up(tiles_of<C::kPairs>(pairs), kClusterBlocks) * kClusterBlocks,
                         cluster_bytes<C>(cluster_tiles), never, C::kPairs, C::kOutputs, 1, C::kWorth}...};
    const bool clusters = !w.normalize_input && multiprocessors_ >= kClusterBlocks && warpgroups(context_.device());
    const int64_t at_once = context_.attribute(cudaDevAttrMaxSharedMemoryPerMultiprocessor);
    const int64_t reserved = at_once - shared_;  // of every block, by the driver
    double least = 0;
    for (int at = 0; at < int(sizeof...(S) + (clusters ? sizeof...(C) : 0)); ++at) {
      const Fit& f = fits[at];
      const auto blocks = [&](int64_t used) { return std::min<int64_t>(f.blocks, at_once / (used + reserved)); };
      const int64_t most = f.streamed == never ? 0 : blocks(f.streamed),
                    resident = f.resident <= shared_ ? blocks(f.resident) : 0;
      if (most == 0 && resident == 0) continue;
      const bool keeps = resident >= most;
      const int64_t beside = keeps ? resident : most;
      const int64_t waves = divided_up(f.tiles, beside * multiprocessors_);
      const int depth = at < int(sizeof...(S)) ? kDepth<A> : kClusterDepth;
      const double outputs = double(divided_up(w.hidden, f.outputs) * divided_up(w.dim, depth) * depth) +
                             2.0 * double(divided_up(w.combined, f.outputs) * divided_up(w.hidden, depth) * depth);
      // A multiprocessor with fewer blocks than it could have does less at once, and u' from elsewhere takes longer.
      const double took = double(waves) * f.blocks * f.pairs * f.outputs * outputs / f.worth * (keeps ? 1 : 1.1);
      if (shape_ >= 0 && took >= least) continue;
      least = took, shape_ = at, outputs_ = f.outputs, resident_ = keeps, used_ = keeps ? f.resident : f.streamed;
      w.warpgroups = at >= int(sizeof...(S));
    }
    if (shape_ < 0)
      throw std::runtime_error("pddm: the device has too little shared memory for any shape of the kernels");
  }

  template <class... S, class... C>
  void run(Shapes<S...>, Shapes<C...>, const Job<Real>& job, int64_t positives) {
    int at = 0;
    ((at++ == shape_ ? run_shape<S>(job, positives) : void()), ...);
    ((at++ == shape_ ? run_clusters<C>(job, positives) : void()), ...);
  }

  // Shared memory of a block; more than there is where no stages fit.
  template <class C>
  int64_t cluster_bytes(int64_t hidden_tiles) const {
    const int64_t stages = ClusterLayout<C>::stages(shared_, hidden_tiles);
    return stages ? ClusterLayout<C>::bytes(stages, hidden_tiles) : shared_ + 1;
  }

  template <class S>
  void run_clusters(const Job<Real>& job, int64_t positives) {
    // A warp has pairs of one row.
    const bool grid = job.walk == Walk::triangle || job.walk == Walk::rectangle;
    const auto kernel = grid ? hopper_score_kernel<A, S, true> : hopper_score_kernel<A, S, false>;
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(shared_)),
          "shared memory was refused");
    const int64_t groups = divided_up(count_tiles<kTilePairs>(job, positives), S::kConsumers);
    const int64_t clusters = std::min<int64_t>(multiprocessors_ / kClusterBlocks, divided_up(groups, kClusterBlocks));
    const int64_t blocks = clusters * kClusterBlocks;
    ClusterPlan plan{};
    plan.groups = groups, plan.step = blocks * S::kConsumers;
    plan.across = job.walk == Walk::rectangle ? rectangle_across<kTilePairs>(job) : 1;
    plan.step_down = plan.step / plan.across, plan.step_across = plan.step % plan.across;
    plan.stages = int(ClusterLayout<S>::stages(shared_, w.hidden_tiles));
    context_.launch_clusters(kClusterBlocks, kernel, blocks, S::kThreads, used_, w, job, plan);
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
  void project(const Unit& unit) const {
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
  const int64_t word_count_;
  int shape_ = -1, outputs_ = 0, multiprocessors_ = 0;
  bool resident_ = true;
  int64_t shared_ = 0, used_ = 0, blocks_ = 0;  // shared memory that may be and is used; blocks at once
  int64_t u_blocks_ = 0;                        // for which there is room in w.u
};

}  // namespace pddm::cuda
