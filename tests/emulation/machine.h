// What runs the blocks of a launch, for emulation.cpp and asynchronous.cpp alone.
#pragma once

#undef _FORTIFY_SOURCE  // its longjmp takes another stack for a broken one
#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <exception>
#include <map>
#include <memory>
#include <numeric>
#include <random>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "emulation.h"
#include "fiber.h"

namespace pddm::emulation {

std::string text(const char* format, ...) __attribute__((format(printf, 1, 2)));
std::string name_of(const uint3& block);

// Which of those who could goes next.
class Order {
 public:
  Order() {
    const char* const set = std::getenv("PDDM_EMULATION_ORDER");
    const std::string name = set ? set : "ascending";
    if (name == "ascending") {
      kind_ = ascending;
    } else if (name == "descending") {
      kind_ = descending;
    } else if (name.rfind("shuffled", 0) == 0 && (name.size() == 8 || name[8] == ':')) {
      kind_ = shuffled;
      if (name.size() > 9) random_.seed(unsigned(std::strtoul(name.c_str() + 9, nullptr, 10)));
    } else {
      throw std::invalid_argument("PDDM_EMULATION_ORDER is '" + name + "'; accepted are ascending, descending, " +
                                  "shuffled and shuffled:SEED");
    }
    for (const char c : name) moments_.seed(unsigned(moments_()) + unsigned(c));
  }
  int pick(uint32_t ready) {
    if (kind_ == ascending) return __builtin_ctz(ready);
    if (kind_ == descending) return 31 - __builtin_clz(ready);
    const unsigned turn = random_() >> 8 & 31;
    return int((__builtin_ctz(ready >> turn | ready << (-turn & 31)) + turn) & 31);
  }
  // Whether a warp is left though it could go on.
  bool leave_warp() { return kind_ == shuffled && (random_() >> 8 & 15) == 0; }

  std::vector<unsigned> permutation(unsigned count) {
    std::vector<unsigned> all(count);
    std::iota(all.begin(), all.end(), 0u);
    if (kind_ == descending) std::reverse(all.begin(), all.end());
    if (kind_ == shuffled) std::shuffle(all.begin(), all.end(), random_);
    return all;
  }

  // Below `count`, for what happens at a moment of its own: by chance in every order.
  unsigned moment(unsigned count) { return unsigned(moments_() >> 8) % count; }

 private:
  enum { ascending, descending, shuffled } kind_;
  std::minstd_rand random_, moments_;
};

// The block's memory ends, but for alignment, at a page that faults.
class Shared {
 public:
  Shared(size_t bytes, size_t alignment) : bytes_(bytes) {
    const size_t aligned = (bytes + alignment - 1) / alignment * alignment;
    inner_ = (aligned + kPage - 1) / kPage * kPage;
    void* const memory = mmap(nullptr, inner_ + 2 * kPage, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED) throw std::bad_alloc();
    first_ = static_cast<unsigned char*>(memory) + kPage;
    if (inner_ && mprotect(first_, inner_, PROT_READ | PROT_WRITE) != 0) throw std::bad_alloc();
    data_ = first_ + inner_ - aligned;
  }
  Shared(const Shared&) = delete;
  ~Shared() { munmap(first_ - kPage, inner_ + 2 * kPage); }

  unsigned char* data() const { return data_; }
  size_t bytes() const { return bytes_; }
  void clear() { std::memset(first_, 0xFF, inner_); }
  bool contains(const void* address, size_t bytes) const {
    const auto at = reinterpret_cast<uintptr_t>(address), begin = reinterpret_cast<uintptr_t>(data_);
    return at >= begin && at + bytes <= begin + bytes_;
  }
  bool trespassed() const {
    const auto written = [](unsigned char byte) { return byte != 0xFF; };
    return std::any_of(first_, data_, written) || std::any_of(data_ + bytes_, first_ + inner_, written);
  }
  bool guards(const void* address) const { return address >= first_ - kPage && address < first_ + inner_ + kPage; }

 private:
  unsigned char *first_, *data_;
  size_t bytes_, inner_;
};

struct Copy {
  void* to;
  const void* from;
  int group;
};

struct Thread {
  Fiber fiber;
  uint3 index;
  std::vector<Copy> copies;
  int groups;                         // committed
  int64_t gave_up_on = -1;            // barrier and phase of the last try that did not wait
  unsigned cluster_phase = 0;         // that it has arrived in
  bool at_cluster = false;            // has arrived, and not waited
  std::vector<uint32_t> initialised;  // barriers that it has not published
};

// What a lane sleeps for, besides the lanes of its warp and the whole block.
enum class Sleep : unsigned char { barrier, cluster, some, registers, products };

// --- Products on their way -------------------------------------------------------------------------------------------

// The registers of 32 lanes that sums will be in, and what will be in them.
struct Sums {
  Registers lanes[kLanes];
  unsigned columns;
  int in_flight = 0;
  std::vector<float> values;  // 16 × columns
};

// A warp's part of one matrix instruction.
struct Product {
  MatrixInstruction what;
  std::shared_ptr<Sums> sums;
  Registers a_lanes[kLanes];
  uint32_t a[kLanes][4];
  unsigned warp, block;  // the latter's rank
  size_t number;         // among those of its warpgroup
  int group;
  bool has_read = false, late;
  uint64_t operands;  // a mark of what they were when it was issued
  std::vector<float> values;
};

// Lanes as bits.
struct Warp {
  uint32_t exist = 0, ready = 0, meeting = 0, at_barrier = 0, asleep = 0;  // none of the last four: ended
  const char* where[kLanes];                                               // a lane waits
  uint32_t mask[kLanes];                                                   // of lanes that it waits for
  void* argument[kLanes];
  Sleep sleep[kLanes];
  uint32_t key[kLanes], detail[kLanes];  // which one it sleeps for, and what of it

  // Matrix instructions.
  std::deque<std::unique_ptr<Product>> products;
  int groups;
  bool begun;
  size_t issued;
  unsigned registers, wanted;  // of a thread
};

struct Mbarrier {
  int count, pending;
  int64_t bytes;  // announced and not there yet; less than none: there and not announced yet
  unsigned phase;
  bool published;
};

// What all four warps of a warpgroup must have in common, and how many have come to it: none of it is done before the
// last of them has, nor is the wait of any.
struct Issued {
  const char* where;
  uint64_t a, b;
  bool add;
  unsigned warps = 0;
  Product* parts[4] = {};  // until the first of them is waited for
};

struct Block {
  uint3 index;
  unsigned rank;
  std::unique_ptr<Shared> shared;
  Warp warps[kMaxThreads / kLanes];
  unsigned warp_count, live, arrived;
  bool vote, result;

  std::vector<unsigned char> shown;  // shared memory as the asynchronous units see it; empty: none has been in use
  std::map<uint32_t, Mbarrier> barriers;
  struct {
    unsigned arrived, count;
  } some[16];
  unsigned free_registers;
  std::vector<Issued> issued[kMaxThreads / kLanes / 4];
};

struct BulkCopy {
  const unsigned char* from;
  uint32_t to, barrier;
  bool late;
  struct {
    uint32_t first, last;  // bytes that are missing
  } left[kMaxCluster];
};

class Machine {
 public:
  void run(const Launch& launch);
  void meet(const char* where, unsigned mask, Work work, void* argument);
  bool barrier(const char* where, bool vote);
  Thread& thread() { return threads_[(block_->rank * kWarps + warp_) * kLanes + lane_]; }
  unsigned lane() const { return lane_; }
  const Shared& shared() const { return *block_->shared; }

  // asynchronous.cpp
  Block& block() { return *block_; }
  Block& block(unsigned rank, const char* what);
  Warp& warp() { return block_->warps[warp_]; }
  unsigned cluster() const { return cluster_; }
  void need_hopper(const char* what) const;
  void cluster_arrive();
  void cluster_wait();
  void some_barrier(unsigned which, unsigned count);
  void init_barrier(uint32_t at, int count);
  void publish_barriers();
  void arrive(uint32_t at, unsigned rank, int bytes);
  bool try_wait(uint32_t at, unsigned parity);
  void copy(uint32_t to, const void* from, size_t bytes, uint32_t barrier, unsigned mask);
  void show(uint32_t first, size_t bytes);
  void change_registers(unsigned count, bool more);
  void wait_for_registers();
  void issue(void* const* lanes);
  void commit();
  bool retire_products(int pending);
  void wait_for_products(int pending);

 private:
  static constexpr unsigned kWarps = kMaxThreads / kLanes;

  void run_cluster(unsigned number);
  void begin_block(unsigned rank, const uint3& index);
  void run_thread();
  void release(Block& block);
  void go_on(bool leaving = false);
  void go_to(uint64_t ready);
  std::string stuck() const;
  std::string state(const Block& block, unsigned thread) const;

  void wait(Warp& w) {
    w.ready &= ~(1u << lane_);
    if (!w.ready) ready_warps_ &= ~bit(*block_, warp_);
  }
  static uint64_t bit(const Block& block, unsigned warp) { return uint64_t(1) << (block.rank * kWarps + warp); }
  void make_ready(Block& block, unsigned warp, uint32_t lanes) {
    block.warps[warp].ready |= lanes;
    if (lanes) ready_warps_ |= bit(block, warp);
  }

  // asynchronous.cpp
  void begin_asynchronous(Block& block);
  void end_of_thread();
  void advance();
  void step(bool forced);
  void land(BulkCopy& copy, unsigned rank);
  void read_operands(Product& product);
  void retire(Product& product);
  uint64_t look_at_operands(const Product& product) const;
  void need_same_operands(const Product& product) const;
  void sleep(Sleep kind, uint32_t key, uint32_t detail);  // from the next go_on
  void wake(Block& block, Sleep kind, uint32_t key);
  Mbarrier& find_barrier(Block& block, uint32_t at, const char* what);
  void end_phase(Block& block, uint32_t at, Mbarrier& barrier);
  void end_cluster_phase();
  unsigned live() const;
  std::string asleep(const Block& block, const Warp& warp, unsigned lane) const;

  const Launch* launch_;
  std::unique_ptr<Order> order_;
  Stacks stacks_;
  Fiber scheduler_;
  std::vector<Thread> threads_;
  Block blocks_[kMaxCluster];
  unsigned cluster_;
  Block* block_;  // these three: who runs
  unsigned warp_, lane_;
  uint64_t ready_warps_;
  bool anew_;  // a block has come through a barrier
  std::exception_ptr error_;

  unsigned cluster_arrived_, cluster_phase_;
  std::vector<BulkCopy> copies_;
  std::vector<Product*> unread_;
};

Machine& running();

}  // namespace pddm::emulation
