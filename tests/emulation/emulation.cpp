#undef _FORTIFY_SOURCE  // its longjmp takes another stack for a broken one
#include "emulation.h"

#include <signal.h>
#include <unistd.h>

#include <algorithm>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <memory>
#include <mutex>
#include <numeric>
#include <random>
#include <stdexcept>
#include <utility>
#include <vector>

#include "fiber.h"

__thread uint3 threadIdx, blockIdx;
__thread dim3 blockDim, gridDim;

#if !defined(PDDM_PORTABLE_FIBERS)
asm(R"(
.text
.globl pddm_emulation_switch
.hidden pddm_emulation_switch
.type pddm_emulation_switch, @function
pddm_emulation_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size pddm_emulation_switch, .-pddm_emulation_switch
)");
#endif

namespace pddm::emulation {
namespace {

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

 private:
  enum { ascending, descending, shuffled } kind_;
  std::minstd_rand random_;
};

// The block's memory ends, but for alignment, at a page that faults.
class Shared {
 public:
  explicit Shared(size_t bytes) : bytes_(bytes) {
    const size_t aligned = (bytes + 127) / 128 * 128;
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
  int groups;  // committed
};

// Lanes as bits.
struct Warp {
  uint32_t exist = 0, ready = 0, meeting = 0, at_barrier = 0;  // none of the last three: ended
  const char* where[kLanes];                                   // a lane waits
  uint32_t mask[kLanes];                                       // of lanes that it waits for
  void* argument[kLanes];
};

class Machine {
 public:
  void run(const Launch& launch);
  void meet(const char* where, unsigned mask, Work work, void* argument);
  bool barrier(const char* where, bool vote);
  Thread& thread() { return threads_[warp_ * kLanes + lane_]; }
  unsigned lane() const { return lane_; }
  const Shared& shared() const { return *shared_; }

 private:
  void run_block(const uint3& index);
  void run_thread();
  void release();
  void go_on(bool leaving = false);
  std::string stuck() const;

  void wait(Warp& w) {
    w.ready &= ~(1u << lane_);
    if (!w.ready) ready_warps_ &= ~(1u << warp_);
  }

  const Launch* launch_;
  std::unique_ptr<Order> order_;
  std::unique_ptr<Shared> shared_;
  Stacks stacks_;
  Fiber scheduler_;
  std::vector<Thread> threads_;
  Warp warps_[kMaxThreads / kLanes];
  unsigned warp_count_, warp_, lane_;  // the last two: who runs
  uint32_t ready_warps_;
  unsigned live_, arrived_;
  bool vote_, result_, anew_;  // the last one: the block has come through a barrier
  std::exception_ptr error_;
};

__thread Machine* machine;  // while it runs a kernel

Machine& running() {
  if (!machine) throw std::logic_error("pddm emulation: device code runs outside of a kernel");
  return *machine;
}

std::string text(const char* format, ...) __attribute__((format(printf, 1, 2)));
std::string text(const char* format, ...) {
  char buffer[400];
  va_list arguments;
  va_start(arguments, format);
  std::vsnprintf(buffer, sizeof buffer, format, arguments);
  va_end(arguments);
  return buffer;
}

std::string this_block() { return text("pddm emulation: block (%u, %u, %u)", blockIdx.x, blockIdx.y, blockIdx.z); }

// Says which thread it was that left its memory, and lets whoever came before handle it.
struct sigaction previous_action;
void on_fault(int, siginfo_t* info, void*) {
  if (machine) {
    const std::string message =
        this_block() + text(", thread (%u, %u, %u) touches %p%s\n", threadIdx.x, threadIdx.y, threadIdx.z,
                            info->si_addr,
                            machine->shared().guards(info->si_addr) ? ", outside of its shared memory" : "");
    if (write(STDERR_FILENO, message.data(), message.size()) < 0) {
    }
  }
  sigaction(SIGSEGV, &previous_action, nullptr);
}

void Machine::run(const Launch& launch) {
  static std::once_flag once;
  std::call_once(once, [] {
    struct sigaction action = {};
    action.sa_sigaction = on_fault, action.sa_flags = SA_SIGINFO | SA_ONSTACK;
    sigaction(SIGSEGV, &action, &previous_action);
  });
  launch_ = &launch;
  order_ = std::make_unique<Order>();
  shared_ = std::make_unique<Shared>(launch.shared_bytes);
  blockDim = launch.block, gridDim = launch.grid;
  threads_.resize(kMaxThreads);
  for (unsigned block : order_->permutation(launch.grid.x * launch.grid.y * launch.grid.z)) {
    run_block({block % launch.grid.x, block / launch.grid.x % launch.grid.y, block / launch.grid.x / launch.grid.y});
  }
}

void Machine::run_block(const uint3& index) {
  const dim3& size = launch_->block;
  blockIdx = index;
  shared_->clear();
  live_ = size.x * size.y * size.z, arrived_ = 0, vote_ = anew_ = false;
  warp_count_ = (live_ + kLanes - 1) / kLanes;
  for (unsigned w = 0; w < warp_count_; ++w) {
    const unsigned lanes = std::min(kLanes, live_ - w * kLanes);
    warps_[w].exist = warps_[w].ready = lanes == kLanes ? kAllLanes : (1u << lanes) - 1;
    warps_[w].meeting = warps_[w].at_barrier = 0;
  }
  ready_warps_ = warp_count_ == 32 ? ~0u : (1u << warp_count_) - 1;
  for (unsigned t = 0; t < live_; ++t) {
    Thread& thread = threads_[t];
    thread.index = {t % size.x, t / size.x % size.y, t / size.x / size.y};
    thread.copies.clear(), thread.groups = 0;
    thread.fiber.start(stacks_[t], t, [] { machine->run_thread(); });
  }
  warp_ = unsigned(order_->pick(ready_warps_)), lane_ = unsigned(order_->pick(warps_[warp_].ready));
  threadIdx = thread().index;
  Fiber::change(scheduler_, thread().fiber);

  if (error_) std::rethrow_exception(std::exchange(error_, nullptr));
  if (live_) throw std::runtime_error(stuck());
  if (shared_->trespassed()) throw std::runtime_error(this_block() + " has written outside of its shared memory");
}

void Machine::run_thread() {
  Fiber::entered();
  try {
    launch_->body(launch_->context);
    wait(warps_[warp_]);
    if (--live_ == arrived_ && live_) release();
  } catch (...) {
    error_ = std::current_exception();
  }
  go_on(true);
}

// To the next thread that can, and back when it is this one's turn again.
void Machine::go_on(bool leaving) {
  Thread& from = thread();
  if (error_ || !ready_warps_) {
    Fiber::change(from.fiber, scheduler_, leaving);
    return;
  }
  if (anew_ || !warps_[warp_].ready || order_->leave_warp()) warp_ = unsigned(order_->pick(ready_warps_));
  anew_ = false;
  lane_ = unsigned(order_->pick(warps_[warp_].ready));
  Thread& to = thread();
  if (&to == &from) return;
  threadIdx = to.index;
  Fiber::change(from.fiber, to.fiber, leaving);
}

bool same(const char* a, const char* b) { return a == b || std::strcmp(a, b) == 0; }

void Machine::meet(const char* where, unsigned mask, Work work, void* argument) {
  Warp& w = warps_[warp_];
  const uint32_t bit = 1u << lane_;
  if (!(mask & bit)) fail(text("%s with the mask 0x%08x, in which this lane is not", where, mask));
  w.where[lane_] = where, w.mask[lane_] = mask, w.argument[lane_] = argument;
  w.meeting |= bit;
  wait(w);
  if ((w.meeting & mask) == mask) {
    bool together = true;
    for (unsigned l = 0; l < kLanes; ++l)
      if (mask >> l & 1) together = together && w.mask[l] == mask && same(w.where[l], where);
    if (together) {
      if (work) work(w.argument, mask);
      w.meeting &= ~mask, w.ready |= mask, ready_warps_ |= 1u << warp_;
    }
  }
  go_on();
}

bool Machine::barrier(const char* where, bool vote) {
  Warp& w = warps_[warp_];
  w.where[lane_] = where;
  w.at_barrier |= 1u << lane_;
  wait(w);
  vote_ |= vote;
  if (++arrived_ == live_) release();
  go_on();
  return result_;
}

void Machine::release() {
  const char* where = nullptr;
  for (unsigned w = 0; w < warp_count_; ++w) {
    for (uint32_t left = warps_[w].at_barrier; left; left &= left - 1) {
      const char* const here = warps_[w].where[__builtin_ctz(left)];
      if (where && !same(where, here)) throw std::runtime_error(stuck());
      where = here;
    }
  }
  for (unsigned w = 0; w < warp_count_; ++w) {
    warps_[w].ready = warps_[w].at_barrier, warps_[w].at_barrier = 0;
    if (warps_[w].ready) ready_warps_ |= 1u << w;
  }
  result_ = vote_, vote_ = false, arrived_ = 0, anew_ = true;
}

// Runs of threads that wait for the same thing.
std::string Machine::stuck() const {
  const auto state = [&](unsigned t) -> std::string {
    const Warp& w = warps_[t / kLanes];
    const unsigned l = t % kLanes;
    if (!(w.exist >> l & 1)) return "not in the block";
    if (w.at_barrier >> l & 1) return w.where[l];
    if (!(w.meeting >> l & 1)) return w.ready >> l & 1 ? "able to go on" : "ended";
    return w.where[l] + (w.mask[l] == kAllLanes ? "" : text(" with the mask 0x%08x", w.mask[l]));
  };
  std::string message = this_block() + " is stuck; its threads are";
  const unsigned count = warp_count_ * kLanes;
  for (unsigned first = 0, last; first < count; first = last + 1) {
    const std::string here = state(first);
    for (last = first; last + 1 < count && state(last + 1) == here;) ++last;
    message += text("%s %u to %u: ", first ? ";" : "", first, last) + here;
  }
  return message;
}

}  // namespace

void run(const Launch& launch) {
  if (machine) throw std::logic_error("pddm emulation: a kernel launches a kernel");
  thread_local Machine own;
  struct Running {
    explicit Running(Machine* m) { machine = m; }
    ~Running() { machine = nullptr; }
  } running(&own);
  own.run(launch);
}

void fail(const std::string& what) {
  throw std::runtime_error(this_block() + text(", thread (%u, %u, %u): ", threadIdx.x, threadIdx.y, threadIdx.z) +
                           what);
}

unsigned lane() { return running().lane(); }
unsigned char* shared_memory() { return running().shared().data(); }
bool is_shared(const void* address, size_t bytes) { return running().shared().contains(address, bytes); }
void meet(const char* where, unsigned mask, Work work, void* argument) { running().meet(where, mask, work, argument); }
bool barrier(const char* where, bool vote) { return running().barrier(where, vote); }

void copy_async(void* shared, const void* global) {
  if ((reinterpret_cast<uintptr_t>(shared) | reinterpret_cast<uintptr_t>(global)) % 16 != 0)
    fail(text("an asynchronous copy from %p to %p, which is not aligned to 16 bytes", global, shared));
  if (!is_shared(shared, 16)) fail(text("an asynchronous copy to %p, outside of shared memory", shared));
  if (is_shared(global, 16)) fail("an asynchronous copy from shared memory");
  std::memset(shared, 0xFF, 16);
  Thread& thread = running().thread();
  thread.copies.push_back({shared, global, thread.groups});
}

void commit_copies() { ++running().thread().groups; }

void wait_copies(int pending) {
  Thread& thread = running().thread();
  const auto covered = [&](const Copy& copy) { return copy.group < thread.groups - pending; };
  const auto end = std::find_if_not(thread.copies.begin(), thread.copies.end(), covered);
  for (auto copy = thread.copies.begin(); copy != end; ++copy) std::memcpy(copy->to, copy->from, 16);
  thread.copies.erase(thread.copies.begin(), end);
}

}  // namespace pddm::emulation
