// Scratch memory that is counted, and loops that share work among the host framework's threads.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <thread>
#include <vector>

#include "../problem.h"

namespace pddm::cpu {

// Cache-line aligned memory of at least the size that was asked for. Throws std::bad_alloc.
struct Block {
  void* memory;
  int64_t size;
};

// What is left for others, in all: fresh memory costs a page fault every 4 KiB, which a small batch would feel.
constexpr int64_t kKeptBytes = 32 << 20;

// One that was left, if one has at most so many bytes.
Block take_block(int64_t bytes, int64_t most);
void leave_block(const Block& block);

// Memory, freed together: small arrays lie in blocks that they share.
class Arena {
 public:
  Arena() = default;
  Arena(const Arena&) = delete;
  Arena& operator=(const Arena&) = delete;
  ~Arena();

  template <class T>
  T* take(int64_t count) {
    return static_cast<T*>(take_bytes(count * int64_t(sizeof(T))));
  }
  template <class T>
  T* take_zeroed(int64_t count) {
    return static_cast<T*>(zeroed(take<T>(count), count * int64_t(sizeof(T))));
  }
  void* take_bytes(int64_t bytes);

 private:
  static void* zeroed(void* memory, int64_t bytes);

  std::vector<Block> blocks_;
  char* next_ = nullptr;  // what is left of one of them
  int64_t left_ = 0;
  int64_t asked_ = 0;
};

void count_pairs(int64_t pairs);
Counters read_counters();
void reset_counters();

// body(worker, index) for every index, each once, in any order, with worker < workers(parallel, count). What body
// computes must not depend on the worker or the order.
inline int64_t workers(const Parallel& parallel, int64_t count) {
  return parallel.threads < count ? parallel.threads : count < 1 ? 1 : count;
}

constexpr int kMostStages = 12;

// body(worker, stage, part) for parts(stage) parts of at most so many stages, a stage when all of the one before is
// done. To gather the threads for every stage would cost more than small stages do: here a thread waits for parts that
// another has taken, and for nothing else, and does all of them if no other comes.
template <class Parts, class Body>
void share_in_turn(const Parallel& parallel, int stages, const Parts& parts, const Body& body) {
  constexpr int kSpins = 2000;
  struct alignas(64) Stage {
    std::atomic<int64_t> next{0}, done{0};
    int64_t count = 0;
  };
  struct Done {  // also of what throws, or the others would wait for ever
    std::atomic<int64_t>& parts;
    ~Done() { parts.fetch_add(1, std::memory_order_release); }
  };
  struct Shared {
    Stage stage[kMostStages];
    int stages;
    const Body* body;
  } shared;
  shared.stages = stages, shared.body = &body;
  int64_t most = 0;
  for (int s = 0; s < stages; ++s) most = std::max(most, shared.stage[s].count = parts(s));
  const auto work = [](void* context, int64_t worker) {
    auto& own = *static_cast<Shared*>(context);
    for (int s = 0; s < own.stages; ++s) {
      Stage& stage = own.stage[s];
      for (int64_t part; (part = stage.next.fetch_add(1, std::memory_order_relaxed)) < stage.count;) {
        const Done counted{stage.done};
        (*own.body)(worker, s, part);
      }
      for (int spins = 0; s + 1 < own.stages && stage.done.load(std::memory_order_acquire) < stage.count;)
        if (++spins > kSpins) std::this_thread::yield();
    }
  };
  const int64_t n = workers(parallel, most);
  if (n <= 1) return work(&shared, 0);
  parallel.run(n, work, &shared);
}

// The same for one stage: body(worker, index).
template <class Body>
void share(const Parallel& parallel, int64_t count, const Body& body) {
  share_in_turn(
      parallel, 1, [&](int) { return count; }, [&](int64_t worker, int, int64_t index) { body(worker, index); });
}

}  // namespace pddm::cpu
