#include "memory.h"

#include <algorithm>
#include <cstring>
#include <map>
#include <mutex>
#include <new>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace pddm {
namespace {

std::atomic<int64_t> pairs_scored{0}, bytes_alive{0}, bytes_peak{0};

// Of a block that arrays share: most of what a small batch asks for. Under GCC's sanitizer each array has its own,
// whose ends are watched.
#if defined(__SANITIZE_ADDRESS__)
constexpr int64_t kSharedBytes = 0;
#else
constexpr int64_t kSharedBytes = 256 << 10;
#endif

// From this size on a block lies in huge pages where the system has them: the rows of a large batch are read in any
// order, and each would need a look at tables that no processor holds in full.
constexpr int64_t kHugeBytes = 4 << 20;

std::align_val_t alignment(int64_t size) { return std::align_val_t(size < kHugeBytes ? 64 : 2 << 20); }

void* fresh(int64_t size) {
  void* memory = ::operator new(static_cast<size_t>(size), alignment(size));
#if defined(MADV_HUGEPAGE)
  if (size >= kHugeBytes) madvise(memory, static_cast<size_t>(size), MADV_HUGEPAGE);  // refused: as good as without
#endif
  return memory;
}

class Idle {
 public:
  // A block of `bytes` to `most`, or none.
  cpu::Block take(int64_t bytes, int64_t most) {
    const std::lock_guard<std::mutex> guard(mutex_);
    const auto found = blocks_.lower_bound(bytes);
    if (found == blocks_.end() || found->first > most) return {nullptr, 0};
    const cpu::Block block{found->second, found->first};
    kept_ -= block.size;
    blocks_.erase(found);
    return block;
  }
  bool keep(const cpu::Block& block) {
    const std::lock_guard<std::mutex> guard(mutex_);
    if (kept_ + block.size > cpu::kKeptBytes) return false;
    blocks_.emplace(block.size, block.memory);
    kept_ += block.size;
    return true;
  }

 private:
  std::mutex mutex_;
  std::multimap<int64_t, void*> blocks_;
  int64_t kept_ = 0;
};

Idle& idle() {
  static auto* blocks = new Idle;  // outlives every thread that may still be in a call at exit
  return *blocks;
}

}  // namespace

namespace cpu {

Counters read_counters() { return {pairs_scored.load(), bytes_peak.load(), 0, 0}; }

void reset_counters() {
  pairs_scored = 0;
  bytes_peak = bytes_alive.load();
}

void count_pairs(int64_t pairs) { pairs_scored.fetch_add(pairs, std::memory_order_relaxed); }

Block take_block(int64_t bytes, int64_t most) {
  const Block block = idle().take(bytes, most);
  return block.memory ? block : Block{fresh(bytes), bytes};
}

void leave_block(const Block& block) {
  if (!idle().keep(block)) ::operator delete(block.memory, alignment(block.size));
}

Arena::~Arena() {
  for (const Block& block : blocks_) leave_block(block);
  bytes_alive -= asked_;
}

void* Arena::take_bytes(int64_t bytes) {
  // A line lies between two arrays, or those of a power of two would all want the same sets of the cache.
  const int64_t room = (std::max<int64_t>(bytes, 1) + 63) / 64 * 64 + 64;
  void* memory = next_;
  if (room <= left_) {
    next_ += room, left_ -= room;
  } else {
    blocks_.reserve(blocks_.size() + 1);
    const int64_t size = std::max(room, kSharedBytes);
    blocks_.push_back(take_block(size, 2 * size));
    const Block& block = blocks_.back();
    memory = block.memory;
    if (block.size - room > left_) next_ = static_cast<char*>(memory) + room, left_ = block.size - room;
  }
  asked_ += bytes;
  const int64_t alive = bytes_alive += bytes;
  for (int64_t peak = bytes_peak; alive > peak && !bytes_peak.compare_exchange_weak(peak, alive);) {
  }
  return memory;
}

void* Arena::zeroed(void* memory, int64_t bytes) { return std::memset(memory, 0, static_cast<size_t>(bytes)); }

}  // namespace cpu
}  // namespace pddm
