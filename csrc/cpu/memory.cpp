#include "memory.h"

#include <cstring>
#include <new>

namespace pddm {
namespace {

std::atomic<int64_t> pairs_scored{0}, bytes_alive{0}, bytes_peak{0};
constexpr std::align_val_t kAlignment{64};

}  // namespace

Counters read_counters() { return {pairs_scored.load(), bytes_peak.load()}; }

void reset_counters() {
  pairs_scored = 0;
  bytes_peak = bytes_alive.load();
}

namespace cpu {

void count_pairs(int64_t pairs) { pairs_scored.fetch_add(pairs, std::memory_order_relaxed); }

Arena::~Arena() {
  for (const auto& [memory, bytes] : blocks_) {
    ::operator delete(memory, kAlignment);
    bytes_alive -= bytes;
  }
}

void* Arena::take_bytes(int64_t bytes) {
  blocks_.reserve(blocks_.size() + 1);
  void* memory = ::operator new(static_cast<size_t>(bytes > 0 ? bytes : 1), kAlignment);
  blocks_.emplace_back(memory, bytes);
  const int64_t alive = bytes_alive += bytes;
  for (int64_t peak = bytes_peak; alive > peak && !bytes_peak.compare_exchange_weak(peak, alive);) {
  }
  return memory;
}

void* Arena::zeroed(void* memory, int64_t bytes) { return std::memset(memory, 0, static_cast<size_t>(bytes)); }

}  // namespace cpu
}  // namespace pddm
