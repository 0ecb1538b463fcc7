// Scratch memory that is counted, and loops that share work among the host framework's threads.
#pragma once

#include <atomic>
#include <cstdint>
#include <vector>

#include "../problem.h"

namespace pddm::cpu {

// Cache-line aligned memory, freed together. Throws std::bad_alloc.
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

  struct Taken {
    void* memory;
    int64_t size, bytes;  // of the block, and asked for
  };
  std::vector<Taken> blocks_;
};

void count_pairs(int64_t pairs);
Counters read_counters();
void reset_counters();

// body(worker, index) for every index, each once, in any order, with worker < workers(parallel, count). What body
// computes must not depend on the worker or the order.
inline int64_t workers(const Parallel& parallel, int64_t count) {
  return parallel.threads < count ? parallel.threads : count < 1 ? 1 : count;
}

template <class Body>
void share(const Parallel& parallel, int64_t count, const Body& body) {
  struct Shared {
    std::atomic<int64_t> next{0};
    int64_t count;
    const Body* body;
  } shared;
  shared.count = count;
  shared.body = &body;
  const auto work = [](void* context, int64_t worker) {
    auto& s = *static_cast<Shared*>(context);
    for (int64_t index; (index = s.next.fetch_add(1, std::memory_order_relaxed)) < s.count;) (*s.body)(worker, index);
  };
  const int64_t n = workers(parallel, count);
  if (n <= 1) return work(&shared, 0);
  parallel.run(n, work, &shared);
}

}  // namespace pddm::cpu
