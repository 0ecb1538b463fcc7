#include <signal.h>
#include <unistd.h>

#include <cstdarg>
#include <cstdio>
#include <mutex>
#include <utility>

#include "machine.h"

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

__thread Machine* machine;  // while it runs a kernel

std::string this_block() { return name_of(blockIdx); }

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

}  // namespace

Machine& running() {
  if (!machine) throw std::logic_error("pddm emulation: device code runs outside of a kernel");
  return *machine;
}

std::string text(const char* format, ...) {
  char buffer[400];
  va_list arguments;
  va_start(arguments, format);
  std::vsnprintf(buffer, sizeof buffer, format, arguments);
  va_end(arguments);
  return buffer;
}

std::string name_of(const uint3& block) {
  return text("pddm emulation: block (%u, %u, %u)", block.x, block.y, block.z);
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
  cluster_ = std::max(launch.cluster, 1u);
  for (unsigned rank = 0; rank < cluster_; ++rank)
    blocks_[rank].shared = std::make_unique<Shared>(launch.shared_bytes, launch.cluster ? 1024 : 128);
  blockDim = launch.block, gridDim = launch.grid;
  threads_.resize(size_t(cluster_) * kMaxThreads);
  for (unsigned number : order_->permutation(launch.grid.x * launch.grid.y * launch.grid.z / cluster_))
    run_cluster(number);
}

// Blocks of a cluster are neighbours along x.
void Machine::run_cluster(unsigned number) {
  ready_warps_ = 0, anew_ = false;
  cluster_arrived_ = cluster_phase_ = 0;
  copies_.clear(), unread_.clear();
  const dim3& grid = launch_->grid;
  for (unsigned rank = 0; rank < cluster_; ++rank) {
    const unsigned block = number * cluster_ + rank;
    begin_block(rank, {block % grid.x, block / grid.x % grid.y, block / grid.x / grid.y});
  }
  go_to(ready_warps_);
  Fiber::change(scheduler_, thread().fiber);

  if (error_) std::rethrow_exception(std::exchange(error_, nullptr));
  if (live()) throw std::runtime_error(stuck());
  for (unsigned rank = 0; rank < cluster_; ++rank)
    if (blocks_[rank].shared->trespassed())
      throw std::runtime_error(name_of(blocks_[rank].index) + " has written outside of its shared memory");
}

void Machine::begin_block(unsigned rank, const uint3& index) {
  const dim3& size = launch_->block;
  Block& b = blocks_[rank];
  b.index = index, b.rank = rank;
  b.shared->clear();
  b.live = size.x * size.y * size.z, b.arrived = 0, b.vote = false;
  b.warp_count = (b.live + kLanes - 1) / kLanes;
  for (unsigned w = 0; w < b.warp_count; ++w) {
    const unsigned lanes = std::min(kLanes, b.live - w * kLanes);
    b.warps[w].exist = lanes == kLanes ? kAllLanes : (1u << lanes) - 1;
    b.warps[w].ready = b.warps[w].meeting = b.warps[w].at_barrier = b.warps[w].asleep = 0;
    make_ready(b, w, b.warps[w].exist);
  }
  begin_asynchronous(b);
  for (unsigned t = 0; t < b.live; ++t) {
    Thread& thread = threads_[size_t(rank) * kMaxThreads + t];
    thread.index = {t % size.x, t / size.x % size.y, t / size.x / size.y};
    thread.copies.clear(), thread.groups = 0;
    thread.gave_up_on = -1, thread.at_cluster = false, thread.initialised.clear();
    thread.fiber.start(stacks_[rank * kMaxThreads + t], t, [] { machine->run_thread(); });
  }
}

unsigned Machine::live() const {
  unsigned live = 0;
  for (unsigned rank = 0; rank < cluster_; ++rank) live += blocks_[rank].live;
  return live;
}

void Machine::run_thread() {
  Fiber::entered();
  try {
    launch_->body(launch_->context);
    wait(warp());
    if (--block_->live == block_->arrived && block_->live) release(*block_);
    end_of_thread();
  } catch (...) {
    error_ = std::current_exception();
  }
  go_on(true);
}

// To a lane of one of these warps.
void Machine::go_to(uint64_t ready) {
  const uint32_t high = uint32_t(ready >> kWarps), low = uint32_t(ready);
  unsigned rank = low ? 0 : 1;
  if (low && high) rank = unsigned(order_->pick(3));
  block_ = &blocks_[rank];
  warp_ = unsigned(order_->pick(rank ? high : low)), lane_ = unsigned(order_->pick(warp().ready));
  blockIdx = block_->index, threadIdx = thread().index;
}

// To the next thread that can, and back when it is this one's turn again.
void Machine::go_on(bool leaving) {
  Thread& from = thread();
  if (!error_ && !(copies_.empty() && unread_.empty())) {
    try {
      advance();
    } catch (...) {
      error_ = std::current_exception();
    }
  }
  if (error_ || !ready_warps_) {
    Fiber::change(from.fiber, scheduler_, leaving);
    return;
  }
  if (anew_ || !warp().ready || order_->leave_warp()) {
    go_to(ready_warps_);
  } else {
    lane_ = unsigned(order_->pick(warp().ready));
    threadIdx = thread().index;
  }
  anew_ = false;
  Thread& to = thread();
  if (&to == &from) return;
  Fiber::change(from.fiber, to.fiber, leaving);
}

static bool same(const char* a, const char* b) { return a == b || std::strcmp(a, b) == 0; }

void Machine::meet(const char* where, unsigned mask, Work work, void* argument) {
  Warp& w = warp();
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
      w.meeting &= ~mask, make_ready(*block_, warp_, mask);
    }
  }
  go_on();
}

bool Machine::barrier(const char* where, bool vote) {
  Block& b = *block_;
  Warp& w = warp();
  w.where[lane_] = where;
  w.at_barrier |= 1u << lane_;
  wait(w);
  b.vote |= vote;
  if (++b.arrived == b.live) release(b);
  go_on();
  return b.result;
}

void Machine::release(Block& b) {
  const char* where = nullptr;
  for (unsigned w = 0; w < b.warp_count; ++w) {
    for (uint32_t left = b.warps[w].at_barrier; left; left &= left - 1) {
      const char* const here = b.warps[w].where[__builtin_ctz(left)];
      if (where && !same(where, here)) throw std::runtime_error(stuck());
      where = here;
    }
  }
  for (unsigned w = 0; w < b.warp_count; ++w) make_ready(b, w, std::exchange(b.warps[w].at_barrier, 0));
  b.result = b.vote, b.vote = false, b.arrived = 0, anew_ = true;
}

std::string Machine::state(const Block& block, unsigned thread) const {
  const Warp& w = block.warps[thread / kLanes];
  const unsigned l = thread % kLanes;
  if (!(w.exist >> l & 1)) return "not in the block";
  if (w.at_barrier >> l & 1) return w.where[l];
  if (w.asleep >> l & 1) return asleep(block, w, l);
  if (!(w.meeting >> l & 1)) return w.ready >> l & 1 ? "able to go on" : "ended";
  return w.where[l] + (w.mask[l] == kAllLanes ? "" : text(" with the mask 0x%08x", w.mask[l]));
}

// Runs of threads that wait for the same thing.
std::string Machine::stuck() const {
  std::string message;
  for (unsigned rank = 0; rank < cluster_; ++rank) {
    const Block& b = blocks_[rank];
    message += (rank ? "; " : "") + name_of(b.index) + " is stuck; its threads are";
    const unsigned count = b.warp_count * kLanes;
    for (unsigned first = 0, last; first < count; first = last + 1) {
      const std::string here = state(b, first);
      for (last = first; last + 1 < count && state(b, last + 1) == here;) ++last;
      message += text("%s %u to %u: ", first ? ";" : "", first, last) + here;
    }
  }
  return message;
}

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
