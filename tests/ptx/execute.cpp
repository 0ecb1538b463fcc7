// A thread's loop over its instructions, and the instructions that change where it goes on.
#include <signal.h>
#include <unistd.h>

#include <algorithm>
#include <mutex>

#include "module.h"

namespace pddm::ptx {
namespace {

void trap(Thread& thread, const Instruction&) {
  throw Fault("the thread gives up" + (thread.printed.empty() ? "" : ", and prints: " + thread.printed));
}

// What vprintf prints is kept for the trap that follows.
void print(Thread& thread, const Instruction& i) {
  const auto parameter = [&](int which, size_t bytes) {
    uint64_t x = 0;
    const uint64_t at = thread.get<uint64_t>(i.operands[which]);
    std::memcpy(&x, thread.memory(Space::parameter, at, bytes, false), bytes);
    return x;
  };
  const auto* format = reinterpret_cast<const char*>(parameter(1, 8));
  uint64_t argument = parameter(2, 8);
  for (; *format; ++format) {
    if (*format != '%') {
      thread.printed += *format;
      continue;
    }
    if (std::strncmp(format, "%lld", 4) != 0) throw Fault(std::string("vprintf of ") + format + "; accepted is %lld");
    int64_t x;
    std::memcpy(&x, thread.memory(Space::generic, argument, sizeof x, false), sizeof x);
    thread.printed += std::to_string(x);
    argument += sizeof x, format += 3;
  }
}

// Of a thread; the tests' kernels end after some thousands.
constexpr int kMostJumps = 1'000'000;

uint32_t value_of(Special special) {
  switch (special) {
    case Special::tid_x: return threadIdx.x;
    case Special::tid_y: return threadIdx.y;
    case Special::tid_z: return threadIdx.z;
    case Special::ntid_x: return blockDim.x;
    case Special::ntid_y: return blockDim.y;
    case Special::ntid_z: return blockDim.z;
    case Special::ctaid_x: return blockIdx.x;
    case Special::ctaid_y: return blockIdx.y;
    case Special::ctaid_z: return blockIdx.z;
    case Special::nctaid_x: return gridDim.x;
    case Special::cluster_ctarank: return emulation::cluster_rank();
  }
  throw std::logic_error("ptx: a special register without a value");
}

// What threads have is kept here, and not on their stacks: where one fails, the others never return from theirs.
struct Call {
  const Kernel* kernel;
  size_t shared_bytes;
  std::vector<unsigned char> parameters;
  std::vector<Thread> threads;
};

// After the emulation has said which thread it was.
struct sigaction previous_action;
void on_fault(int, siginfo_t*, void*) {
  if (Thread::at_memory) {
    const std::string message = Thread::at_memory->text(*Thread::at_memory->here) + std::string("\n");
    if (write(STDERR_FILENO, message.data(), message.size()) < 0) {
    }
  }
  sigaction(SIGSEGV, &previous_action, nullptr);
}

void run_thread(void* context) {
  Call& call = *static_cast<Call*>(context);
  const Kernel& kernel = *call.kernel;
  Thread& thread =
      call.threads[threadIdx.x +
                   blockDim.x * (threadIdx.y + blockDim.y * (threadIdx.z + blockDim.z * emulation::cluster_rank()))];
  thread.kernel = &kernel;
  thread.slots = kernel.initial, thread.parameters = call.parameters, thread.printed.clear();
  thread.shared = emulation::shared_memory(), thread.shared_bytes = call.shared_bytes;
  thread.copied.clear(), thread.copy_groups = 0;
  thread.stored.clear(), thread.fenced.clear(), thread.products.clear(), thread.busy.clear();
  thread.jumps = thread.groups = 0;
  thread.local.assign(kernel.local_bytes, 0xFF);
  for (const auto& [slot, special] : kernel.specials) thread.slots[slot] = value_of(special);
  try {
    for (const Instruction* here = kernel.code.data();; ++here) {
      if (here->guard != kNoGuard && thread.get<bool>(here->guard) == here->unless) continue;
      const Instruction* const last = here + here->alike - 1;
      if (!thread.products.empty())
        for (thread.here = here; thread.here <= last; ++thread.here) thread.refuse_busy(*thread.here);
      thread.here = here;
      if (!here->executed)  // only then, so that the instructions stay clean in the processor's cache
        for (const Instruction* i = here; i <= last; ++i) i->executed = true;
      if (here->flow == Flow::end) return;
      if (here->flow == Flow::jump) {
        if (++thread.jumps > kMostJumps) throw Fault("the thread does not end");
        here = kernel.code.data() + here->operands[0] - 1;
      } else {
        here->run(thread, *here);
        here = last;
      }
    }
  } catch (const Fault& fault) {
    emulation::fail(std::string(thread.text(*thread.here)) + ": " + fault.what());
  }
}

}  // namespace

__thread const Thread* Thread::at_memory = nullptr;

const Form* find_form(const std::string& opcode) {
  static const Forms all = [] {
    Forms forms;
    add_arithmetic(forms), add_memory(forms), add_warp(forms), add_warpgroup(forms);
    add_control(forms);
    return forms;
  }();
  const auto found = all.find(opcode);
  return found == all.end() ? nullptr : &found->second;
}

void add_control(Forms& forms) {
  forms["bra"] = forms["bra.uni"] = {nullptr, "L", 0, Flow::jump};
  forms["ret"] = {nullptr, "", 0, Flow::end};
  forms["trap"] = {trap, ""};
  forms["call.uni"] = {print, ""};
}

void launch(const Kernel& kernel, const emulation::Launch& where, const emulation::Parameters& parameters) {
  const unsigned threads = where.block.x * where.block.y * where.block.z;
  const auto refuse = [&](const std::string& what) { throw std::runtime_error("ptx: " + kernel.name + " " + what); };
  if (parameters.size() != kernel.parameters.size())
    refuse("declares " + std::to_string(kernel.parameters.size()) + " parameters and is given " +
           std::to_string(parameters.size()));
  if (kernel.cluster && kernel.cluster != where.cluster)
    refuse("is for clusters of " + std::to_string(kernel.cluster) + " blocks");
  if (threads > kernel.max_threads) refuse("is for blocks of up to " + std::to_string(kernel.max_threads) + " threads");
  Call call{&kernel, where.shared_bytes, std::vector<unsigned char>(kernel.with_calls_bytes, 0xFF),
            std::vector<Thread>(size_t(threads) * std::max(where.cluster, 1u))};
  for (size_t p = 0; p < parameters.size(); ++p) {
    const Kernel::Parameter& declared = kernel.parameters[p];
    if (parameters[p].bytes != declared.bytes || parameters[p].alignment != declared.alignment)
      refuse("declares " + declared.name + " of " + std::to_string(declared.bytes) + " bytes, aligned to " +
             std::to_string(declared.alignment) + ", and is given " + std::to_string(parameters[p].bytes) +
             " bytes, aligned to " + std::to_string(parameters[p].alignment));
    std::memcpy(call.parameters.data() + declared.offset, parameters[p].value, declared.bytes);
  }
  static std::once_flag once;
  std::call_once(once, [] {
    struct sigaction action = {};
    action.sa_sigaction = on_fault, action.sa_flags = SA_SIGINFO | SA_ONSTACK;
    sigaction(SIGSEGV, &action, &previous_action);
  });
  struct Forgets {
    ~Forgets() { Thread::at_memory = nullptr; }
  } at_the_end;
  emulation::run({where.grid, where.block, where.shared_bytes, run_thread, &call, where.cluster, where.major});
}

}  // namespace pddm::ptx
