// The scoring kernel for Hopper, of the half precisions: what score.cuh computes, by matrix instructions of four warps.
//
// A cluster of two blocks reads every weight once for both. In a block, two or three warpgroups multiply, each a tile
// of 64 pairs; one warp copies weights for all of them, and one for each lists its pairs and takes their scores. They
// wait for nobody but these warps, so that one's epilogue is hidden by the others' products. A thread has the sums of
// two pairs, row lane / 4 of its warp's 16 and the one 8 below, of a quarter of the outputs. Shared memory:
//
//     | barriers, pairs, biases | weights: `stages` tiles of kOutputs rows | u': hidden_tiles tiles of kPairs rows |
//
//     what                    written by                     read by                   between
//     weights                 bulk copies of both blocks     matrix instructions       full[stage], empty[stage]
//     u'                      the warpgroup of the pairs     its matrix instructions   its barrier, its last wait
//     pairs                   the warp that lists them       their warpgroup           listed, scored; twice, in turn
//     scores                  a lane of four of these        that warp                 scored, listed; likewise
//     biases and w_s, twice   copies, block after block      the warpgroup             its barrier, once a block
//
// |f_i − f_j| and v' = σ(a_i + a_j) never are in shared memory: a thread makes its part of the instruction's left
// operand in registers, while the instruction before runs, of numbers that were asked for some instructions ago.
#pragma once

#include "score.cuh"
#include "warpgroup.cuh"

namespace pddm::cuda {

// Tiles of weights in shared memory.
constexpr int kLeastStages = 4, kMostStages = 10;

// Pairs of a warpgroup's tile; tiles of inputs that it multiplies at once, where it can.
constexpr int kTilePairs = 64, kTilesAtOnce = 2;

// How the kernel cuts its work: Consumers warpgroups by Outputs outputs; kWorth is comparable with that of a Shape.
template <int Outputs, int Consumers, int Worth>
struct ClusterShape {
  static constexpr int kOutputs = Outputs, kConsumers = Consumers, kWorth = Worth;
  static constexpr int kPairs = Consumers * kTilePairs, kThreads = (1 + Consumers) * kWarpgroup;
  // Of 64 K, which are shared out anew when the roles are.
  static constexpr int kOwnRegisters = Consumers == 2 ? 232 : 160, kOtherRegisters = Consumers == 2 ? 40 : 32;
  static_assert((Consumers * kOwnRegisters + kOtherRegisters) * kWarpgroup <= 64 << 10, "registers of a block");
};

// How a walk's tiles are shared out.
struct ClusterPlan {
  int64_t groups;                          // of kConsumers tiles each; of positive pairs only the device knows
  int64_t step;                            // in tiles, from a block's group to its next
  int64_t across, step_down, step_across;  // of a rectangle: tiles side by side, and the step in these
  int stages;                              // tiles of weights in shared memory
  Pair partner;                            // the hardest positive pair, for Walk::partners
};

template <class S>
struct ClusterLayout {
  // What is small, at the start.
  struct Small {
    uint64_t full[kMostStages], empty[kMostStages];
    ClusterPlan plan;
    // A warpgroup's, and the warp's that serves it; twice, for this tile and the next.
    struct Desk {
      uint64_t listed[2], scored[2];
      int2 pairs[2][kTilePairs];
      float scores[2][kTilePairs];
      alignas(16) float vectors[2][2][S::kOutputs];  // of a block of outputs: its bias, and w_s
    } desks[S::kConsumers];
  };
  static constexpr int kWeights = S::kOutputs * kRowBytes, kU = S::kPairs * kRowBytes;  // of one tile
  static constexpr int kWeightsAt = (int(sizeof(Small)) + 1023) / 1024 * 1024;
  static_assert(Hardest::kBytes <= kWeights, "what finds the hardest pair is there before the weights");

  __host__ __device__ static constexpr int64_t bytes(int64_t stages, int64_t hidden_tiles) {
    return kWeightsAt + stages * kWeights + hidden_tiles * kU;
  }
  // For which there is room; fewer than kLeastStages are not enough.
  static constexpr int64_t stages(int64_t room, int64_t hidden_tiles) {
    const int64_t left = room - bytes(0, hidden_tiles), fit = left / kWeights;
    return left < 0 || fit < kLeastStages ? 0 : fit < kMostStages ? fit : kMostStages;
  }
};

// Which of `count` stages is next, and the parity of its phase.
struct Turn {
  const int count;
  int stage = 0, parity = 0;

  __device__ __forceinline__ explicit Turn(int stages) : count(stages) {}
  __device__ __forceinline__ void next() {
    if (++stage == count) stage = 0, parity ^= 1;
  }
};

// Calls f(group) for every group of this block. Both blocks of a cluster have as many: one past the last has no pairs.
template <class F>
__device__ __forceinline__ void each_group(int64_t groups, int rank, const F& f) {
  for (int64_t group = blockIdx.x; group - rank < groups; group += gridDim.x) f(group);
}

// By one thread: the weights of group after group of tiles. A block copies half of each tile, to both.
template <class S>
__device__ __forceinline__ void stream_weights(const Workspace<float>& w, unsigned char* shared, int stages, int rank) {
  using L = ClusterLayout<S>;
  constexpr int kHalf = L::kWeights / kClusterBlocks;
  auto& small = *reinterpret_cast<typename L::Small*>(shared);
  const int length = w.weight_tiles();
  Turn turn(stages);
  each_group(small.plan.groups, rank, [&](int64_t) {
    const unsigned char* from = w.weights + rank * kHalf;
    for (int copied = 0; copied < length; ++copied, from += L::kWeights, turn.next()) {
      await(&small.empty[turn.stage], turn.parity ^ 1);
      arrive_expecting(&small.full[turn.stage], L::kWeights);
      copy_to_cluster(shared + L::kWeightsAt + turn.stage * L::kWeights + rank * kHalf, from, kHalf,
                      &small.full[turn.stage]);
    }
  });
}

// pair_at of a block's tiles, which come in order: nothing is divided, for a function that is called would stop the
// matrix instructions of the whole kernel.
class TileWalk {
 public:
  __device__ __forceinline__ TileWalk(const Job<float>& job, const ClusterPlan& plan) : job_(job), plan_(plan) {}

  // Pair `p` of the tile that has been reached.
  __device__ __forceinline__ Pair operator()(int p) const {
    switch (job_.walk) {
      case Walk::triangle: return triangle_pair<kTilePairs>(job_, row_, column_, cut_, p);
      case Walk::rectangle: return rectangle_pair<kTilePairs>(job_, row_, column_, p);
      default: return pair_at<kTilePairs>(job_, tile_, p, plan_.partner);
    }
  }
  // To this warpgroup's tile of the block's next group.
  __device__ __forceinline__ void next() {
    if (job_.walk != Walk::rectangle) return advance(plan_.step);
    row_ += plan_.step_down, column_ += plan_.step_across;
    if (column_ >= plan_.across) column_ -= plan_.across, ++row_;
    tile_ += plan_.step;
  }
  __device__ __forceinline__ void advance(int64_t tiles) {
    tile_ += tiles;
    if (job_.walk == Walk::triangle) {
      // Entry (row, column) of the triangle, row <= column, is the block.
      const int64_t cuts = cut_ + tiles;
      cut_ = int(cuts % kCuts), row_ += cuts / kCuts;
      while (row_ > column_) row_ -= ++column_;
    } else if (job_.walk == Walk::rectangle) {
      column_ += tiles;
      while (column_ >= plan_.across) column_ -= plan_.across, ++row_;
    }
  }

 private:
  static constexpr int kCuts = kTileColumns * kTileColumns / kTilePairs;

  const Job<float>& job_;
  const ClusterPlan& plan_;
  int64_t tile_ = 0, row_ = 0, column_ = 0;
  int cut_ = 0;
};

// By one warp for one warpgroup: the pairs of its tiles, one tile ahead, and what becomes of their scores.
template <class S>
__device__ __forceinline__ void serve(const Job<float>& job, const float* b_s, unsigned char* shared, int rank,
                                      int consumer) {
  auto& small = *reinterpret_cast<typename ClusterLayout<S>::Small*>(shared);
  auto& desk = small.desks[consumer];
  TileWalk list(job, small.plan);
  list.advance(int64_t(blockIdx.x) * S::kConsumers + consumer);
  const auto write = [&](int which) {
#pragma unroll
    for (int p = lane_index(); p < kTilePairs; p += kWarp) {
      const Pair at = list(p);
      desk.pairs[which][p] = {at.i, at.j};
      const unsigned scored = __ballot_sync(~0u, at.i >= 0);
      if (lane_index() == 0 && scored) atomicAdd(&scored_pairs, static_cast<unsigned long long>(__popc(scored)));
    }
    arrive_at(&desk.listed[which], rank);
    list.next();
  };
  const float bias = __ldg(b_s);
  Turn turn(2);
  write(0);
  each_group(small.plan.groups, rank, [&](int64_t group) {
    write(1 - turn.stage);  // the one after the last has no pairs
    await(&desk.scored[turn.stage], turn.parity);
#pragma unroll
    for (int p = lane_index(); p < kTilePairs; p += kWarp) {
      const int2 at = desk.pairs[turn.stage][p];
      take_score<kTilePairs>(job, group * S::kConsumers + consumer, p, Pair{at.x, at.y},
                             desk.scores[turn.stage][p] + bias);
    }
    turn.next();
  });
}

// A norm's square, no less than that of what is divided by at least.
__device__ __forceinline__ float floored_square(float squares) {
  constexpr float kFloor = float(kNormFloor) * float(kNormFloor);
  return squares > kFloor ? squares : kFloor;
}

// A warpgroup's products with the weights, tile after tile. In a Grid the 16 pairs of a warp have one i.
template <class A, class S, bool Grid>
class Products {
 public:
  using L = ClusterLayout<S>;
  using Operand = typename A::Operand;
  static constexpr int kSteps = kDepth<A> / 16;
  float sums[S::kOutputs / 2];
  float squares[2];  // of what the last `made` has made of either pair, this thread's part

  __device__ Products(unsigned char* shared, int stages, int consumer)
      : small_(*reinterpret_cast<typename L::Small*>(shared)),
        weights_(descriptor(shared + L::kWeightsAt)),
        u_(descriptor(shared + L::bytes(stages, 0) + consumer * kTilePairs * kRowBytes)),
        turn_(stages) {}

  // Has numbers of two pairs' rows on their way for the first products of `made`.
  template <class Row>
  __device__ __forceinline__ void begin_rows(const Row& row) {
    aim(row);
    ask(0);
    if (kBuffers == 2) go_on(), ask(1);
  }

  // sums = made tiles by their weights. With the last of them come the first numbers of the rows that `next` gives. The
  // fragments of a tile are made while the products of the one before are on their way; those come to an end before the
  // next begin, for ptxas lets nothing else define a fragment meanwhile, and another warpgroup's fill the gap.
  template <Left What, class Row>
  __device__ __forceinline__ void made(int tiles, const Row& next) {
    squares[0] = squares[1] = 0;
    const auto make_and_ask = [&](int tile, int parity) {
      make<What>(parity);
      if (tile + kBuffers == tiles)
        aim(next);
      else
        go_on();
      ask(parity);
    };
    make_and_ask(0, 0);
    for (int first = 0; first < tiles; first += 2) {
#pragma unroll
      for (int parity = 0; parity < 2; ++parity) {
        const int tile = first + parity;
        const Descriptor right = arrived();
        begin_products();
#pragma unroll
        for (int step = 0; step < kSteps; ++step)
          multiply_add(Operand{}, sums, left_[parity][step], right + 2 * step, tile > 0 || step > 0);
        commit_products();
        if (parity == 0 || tile + 1 < tiles) make_and_ask(tile + 1, 1 - parity);
        wait_products<0>();
        release();
      }
    }
  }

  // sums += u' by its weights.
  __device__ __forceinline__ void stored(int tiles) {
    for (int tile = 0; tile < tiles; ++tile) {
      const Descriptor right = arrived(), left = u_ + tile * (L::kU / 16);
      begin_products();
#pragma unroll
      for (int step = 0; step < kSteps; ++step) multiply_add(Operand{}, sums, left + 2 * step, right + 2 * step, true);
      commit_products();
      wait_products<1>();
      if (tile > 0) release();
    }
    wait_products<0>();
    release();
  }

 private:
  // Waits for the next weights.
  __device__ __forceinline__ Descriptor arrived() {
    await(&small_.full[turn_.stage], turn_.parity);
    const Descriptor right = weights_ + turn_.stage * (L::kWeights / 16);
    turn_.next();
    return right;
  }
  // The oldest weights that are not given back yet: no product reads them any more. One thread tells each block.
  __device__ __forceinline__ void release() {
    if (tells_ >= 0) arrive_at(&small_.empty[free_], tells_);
    free_ = free_ + 1 == turn_.count ? 0 : free_ + 1;
  }

  // row(pair, of_i) is where a row begins. First the rows of j.
  template <class Row>
  __device__ __forceinline__ void aim(const Row& row) {
#pragma unroll
    for (int which = 0; which < kRowsRead; ++which) rows_[which] = row(which % 2, which / 2) + lane_index() % 4 * 4;
  }
  __device__ __forceinline__ void go_on() {
#pragma unroll
    for (const float*& row : rows_) row += kDepth<A>;
  }
  // Numbers of the tile that has been reached.
  __device__ __forceinline__ void ask(int parity) {
#pragma unroll
    for (int step = 0; step < kSteps; ++step)
#pragma unroll
      for (int which = 0; which < kRowsRead; ++which)
        load(rows_[which] + step * 16, numbers_[parity % kBuffers][step][which]);
  }
  // Fragments of them.
  template <Left What>
  __device__ __forceinline__ void make(int parity) {
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      const float (&numbers)[kRowsRead][4] = numbers_[parity % kBuffers][step];
#pragma unroll
      for (int pair = 0; pair < 2; ++pair) {
        const float (&x)[4] = numbers[Grid ? 2 : 2 + pair], (&y)[4] = numbers[pair];
        float made[4];
#pragma unroll
        for (int k = 0; k < 4; ++k) {
          made[k] = What == Left::difference ? x[k] - y[k] : relu(x[k] + y[k]);
          if (What != Left::difference) squares[pair] += made[k] * made[k];
        }
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const uint32_t both = pack(Operand{}, made[2 * half], made[2 * half + 1]);
          left_[parity][step][2 * half + pair] = What == Left::difference ? absolute_of_both(both) : both;
        }
      }
    }
  }

  typename L::Small& small_;
  const Descriptor weights_, u_;
  // Which block of the cluster this thread tells that weights are free, if any.
  const int tells_ = warp_index() % 4 < kClusterBlocks && lane_index() == 0 ? warp_index() % 4 : -1;
  Turn turn_;
  int free_ = 0;
  // Numbers of so many tiles are what there are registers for.
  static constexpr int kRowsRead = Grid ? 3 : 4, kBuffers = Grid && S::kConsumers == 2 ? 2 : 1;
  const float* rows_[kRowsRead];
  float numbers_[kBuffers][kSteps][kRowsRead][4];
  uint32_t left_[2][kSteps][4];
};

// By a warpgroup: its tile of every group of this block.
template <class A, class S, bool Grid>
__device__ __forceinline__ void score_tiles(const Workspace<float>& w, unsigned char* shared, int stages, int rank) {
  using L = ClusterLayout<S>;
  constexpr int kOutputs = S::kOutputs;
  const int consumer = warp_index() / 4 - 1, thread = int(threadIdx.x) % kWarpgroup, lane = lane_index();
  auto& small = *reinterpret_cast<typename L::Small*>(shared);
  auto& desk = small.desks[consumer];
  const int own = warp_index() % 4 * 16 + lane / 4;  // this thread's first of the tile's pairs
  // Where its first two outputs of u' go. Those of the other pieces of 16 bytes are elsewhere in the same 64.
  unsigned char* const u = shared + L::bytes(stages, 0) + consumer * kTilePairs * kRowBytes;
  const int u_at = piece_offset(own, 0) + lane % 4 * 4;
  int now = 0;  // of its vectors
  Products<A, S, Grid> products(shared, stages, consumer);
  float (&sums)[kOutputs / 2] = products.sums;
  // f(column, entries, sums) of every 8 outputs: this thread's two entries of each of the first vectors, and its sums.
  const auto each = [&](auto count, const auto& f) {
    constexpr int kVectors = decltype(count)::value, kAhead = 4 / kVectors, kEights = kOutputs / 8;
    float2 entries[2][kAhead][kVectors];
    const float2* const vectors = reinterpret_cast<const float2*>(desk.vectors[now]) + lane % 4;
    const auto read = [&](int group) {
#pragma unroll
      for (int of = 0; of < kAhead * kVectors; ++of)
        entries[group % 2][of / kVectors][of % kVectors] =
            vectors[of % kVectors * (kOutputs / 2) + (group * kAhead + of / kVectors) * 4];
    };
    read(0);
#pragma unroll
    for (int at = 0; at < kEights; ++at) {
      // Before stores that the compiler would not let it pass.
      if (at % kAhead == 0 && at + kAhead < kEights) read(at / kAhead + 1);
      f(8 * at, entries[at / kAhead % 2][at % kAhead], sums + 4 * at);
    }
  };
  // Vectors of a block of outputs, on their way while it is multiplied. Global memory is too far away to be read where
  // they are wanted: no registers are left for what is not there yet. Those of the block before may still be read.
  const auto fetch = [&](const float* first, const float* second) {
    now = 1 - now;
    constexpr int kEach = kOutputs / 4;
    for (int piece = thread; piece < (second ? 2 : 1) * kEach; piece += kWarpgroup)
      copy_async(desk.vectors[now][piece / kEach] + piece % kEach * 4,
                 (piece < kEach ? first : second) + piece % kEach * 4);
    commit_copies();
  };
  const auto fetched = [&] {
    wait_copies<0>();
    sync_warpgroup(1 + consumer);
  };
  Turn list(2);
  each_group(small.plan.groups, rank, [&](int64_t) {
    await(&desk.listed[list.stage], list.parity);
    // Of a pair that is not there any row will do, but that of i is the other's, too.
    int2 pairs[2] = {desk.pairs[list.stage][own], desk.pairs[list.stage][own + 8]};
    if (pairs[0].x < 0) pairs[0] = {max(pairs[1].x, 0), 0};
    if (pairs[1].x < 0) pairs[1] = {pairs[0].x, 0};
    const auto row_of = [&](const float* rows, int stride) {
      return [=](int pair, int of_i) { return rows + int64_t(of_i ? pairs[pair].x : pairs[pair].y) * stride; };
    };
    const auto f = row_of(w.f, w.f_stride), a = row_of(w.a, w.a_stride);

    products.begin_rows(f);
    float squares[2] = {}, over_u[2], rescale[2];  // sums are in units of 1 / ‖v'‖, then of 1 / ‖u'‖
    for (int block = 0; block < w.hidden_blocks; ++block) {
      const int first_output = block * kOutputs, first_tile = first_output / kDepth<A>;
      fetch(w.b_u + first_output, nullptr);
      if (block + 1 < w.hidden_blocks)
        products.template made<Left::difference>(w.dim_tiles, f);
      else
        products.template made<Left::difference>(w.dim_tiles, a);
      fetched();
      each(std::integral_constant<int, 1>{}, [&](int column, const float2(&bias)[1], const float* of) {
        const int to = first_tile + column / kDepth<A>, piece = column % kDepth<A> / 8;
#pragma unroll
        for (int pair = 0; pair < 2; ++pair) {
          const float low = relu(of[2 * pair] + bias[0].x), high = relu(of[2 * pair + 1] + bias[0].y);
          squares[pair] += low * low, squares[pair] += high * high;
          if (to < w.hidden_tiles)
            *reinterpret_cast<uint32_t*>(u + ((u_at ^ piece * kPieceBytes) + to * L::kU + pair * 8 * kRowBytes)) =
                pack(typename A::Operand{}, low, high);
        }
      });
    }
#pragma unroll
    for (int pair = 0; pair < 2; ++pair) {
      squares[pair] = floored_square(lanes_sum<4>(squares[pair]));
      over_u[pair] = rsqrtf(squares[pair]);
    }
    show_to_matrix_unit();
    sync_warpgroup(1 + consumer);

    float score[2] = {};
    for (int block = 0; block < w.combined_blocks; ++block) {
      fetch(w.b_c + block * kOutputs, w.w_s + block * kOutputs);
      products.template made<Left::mean>(w.hidden_tiles, a);
      if (block == 0) {
#pragma unroll
        for (int pair = 0; pair < 2; ++pair) {
          const float over_v = rsqrtf(floored_square(lanes_sum<4>(products.squares[pair])));
          rescale[pair] = squares[pair] * over_u[pair] * over_v;
        }
      }
#pragma unroll
      for (int at = 0; at < kOutputs / 2; ++at) sums[at] *= rescale[at / 2 % 2];
      products.stored(w.hidden_tiles);
      fetched();
      each(std::integral_constant<int, 2>{}, [&](int, const float2(&entries)[2], const float* of) {
        const float2 bias = entries[0], weight = entries[1];
#pragma unroll
        for (int pair = 0; pair < 2; ++pair) {
          score[pair] += relu(of[2 * pair] * over_u[pair] + bias.x) * weight.x;
          score[pair] += relu(of[2 * pair + 1] * over_u[pair] + bias.y) * weight.y;
        }
      });
    }
#pragma unroll
    for (int pair = 0; pair < 2; ++pair) {
      score[pair] = lanes_sum<4>(score[pair]);
      if (lane % 4 == 0) desk.scores[list.stage][own + 8 * pair] = score[pair];
    }
    // Each that has stored: of another's stores a thread may tell, but racecheck does not see it.
    if (lane % 4 == 0) arrive_at(&desk.scored[list.stage], rank);
    list.next();
  });
}

template <class A, class S, bool Grid>
__global__ void __launch_bounds__(S::kThreads, 1)
    hopper_score_kernel(const __grid_constant__ Workspace<float> w, const __grid_constant__ Job<float> job,
                        const __grid_constant__ ClusterPlan given) {
#if defined(PDDM_WARPGROUPS_HERE)
  using L = ClusterLayout<S>;
  unsigned char* const shared = aligned_shared_memory();
  auto& small = *reinterpret_cast<typename L::Small*>(shared);
  Pair partner{-1, -1};
  if (job.walk == Walk::partners) {
    partner = hardest_pair(job.far, job.n, shared + L::kWeightsAt);
    show_to_matrix_unit();  // what it has stored there, before weights are copied over it
  }
  if (threadIdx.x == 0) {
    small.plan = given;
    small.plan.partner = partner;
    if (job.walk == Walk::positives)
      small.plan.groups = tiles_of<S::kConsumers>(tiles_of<kTilePairs>(job.before[job.n]));
    for (int stage = 0; stage < given.stages; ++stage) {
      init_barrier(&small.full[stage], 1);
      init_barrier(&small.empty[stage], kClusterBlocks * S::kConsumers);
    }
    for (auto& desk : small.desks) {
      for (uint64_t& listed : desk.listed) init_barrier(&listed, kWarp);
      for (uint64_t& scored : desk.scored) init_barrier(&scored, kWarpgroup / 4);
    }
    publish_barriers();
  }
  sync_cluster();
  const int rank = cluster_rank(), stages = given.stages;
  if (warp_index() < 4) {
    give_up_registers<S::kOtherRegisters>();
    if (threadIdx.x == 0) stream_weights<S>(w, shared, stages, rank);
    const int consumer = warp_index() - 1;
    if (consumer >= 0 && consumer < S::kConsumers) serve<S>(job, w.b_s, shared, rank, consumer);
    __syncwarp();
  } else {
    take_registers<S::kOwnRegisters>();
    score_tiles<A, S, Grid>(w, shared, stages, rank);
  }
  // The other block may still be told of, or copy to, what is in this one.
  sync_cluster();
#else
  __trap();  // the host has taken a device for one that it is not
#endif
}

}  // namespace pddm::cuda
