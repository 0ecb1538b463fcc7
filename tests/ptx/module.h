// What nvcc makes of a kernel, as text, decoded so that the emulation's threads (tests/emulation) can run it.
//
//   parse        text → Module: of each kernel its instructions, with operands as slots and labels as places
//   share_slots  one slot for several registers, each of which is needed at other times than the others
//   find_form    opcode, all of it → what runs it and which operands it takes; none: the instruction is refused
//   launch       each thread interprets the kernel over slots of its own
//
// A slot holds 8 bytes: a register, a constant, a special register or a variable's address; so every operand is one.
// Registers hold ones only, a NaN, before a thread writes to them. (nvcc writes to nearly every register once and has
// thousands of them. With a slot for each a warp's would be megabytes, and fetching them most of what a test takes.)
//
// Shared, local and parameter memory have addresses of their own, which no host address equals; global memory has the
// host's. An access in a state space that is not its address's is refused, and so is one that is not aligned.
#pragma once

#include <cstdint>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <stdexcept>
#include <string>
#include <unordered_map>
#include <vector>

#include "../emulation/emulation.h"

namespace pddm::ptx {

enum class Space { generic, global, shared, local, parameter };

// Addresses in the spaces start here; a generic one has the window's number above it. Shared and local memory are at
// addresses of 32 bits.
constexpr uint64_t kSharedFirst = emulation::kSharedAddress, kLocalFirst = 0x40000000, kParameterFirst = 0x60000000;
constexpr uint64_t kSharedWindow = uint64_t(1) << 60, kLocalWindow = uint64_t(2) << 60;
constexpr uint64_t kGlobalFirst = 0x80000000, kGlobalEnd = uint64_t(1) << 56;  // a host's, of a program anywhere

// An instruction cannot do what it should. The loop that runs it adds which one it was.
struct Fault : std::runtime_error {
  using std::runtime_error::runtime_error;
};

struct Thread;
struct Instruction;
using Handler = void (*)(Thread& thread, const Instruction& instruction);

// Where a thread goes on: at the next instruction, at the place that the operand is, or nowhere.
enum class Flow : uint8_t { on, jump, end };

struct Instruction {
  Handler run;
  const uint32_t* operands;
  uint32_t guard;  // a slot; kNoGuard: always
  bool unless;     // the guard holds
  Flow flow;
  uint8_t alike = 1;              // so many instructions are run by one call: this one and those after it
  mutable bool executed = false;  // by whichever thread
  // Slots that it reads or writes, from kernel.touched[touched] on; none of a matrix instruction of Hopper's, which
  // looks after its own.
  uint32_t touched = 0, touched_count = 0;
};
constexpr uint32_t kNoGuard = ~0u;

// Operands one after the other:
//   p h w l f d   predicate; integer or bits of 2, 4, 8 bytes; float32, float64: a slot
//   x             integer of at least `bytes` bytes: a slot and how many it has
//   m             [address]: slot, offset, whether it has 4 bytes
//   n             an integer that is no register: itself
//   L             label: place
//   _             a result that nobody wants: nothing
// with { } around those of a vector, and | between two that are written at once.
struct Form {
  Handler run;
  std::string operands;
  size_t bytes = 0;
  Flow flow = Flow::on;
  bool many = false;  // it runs all that are `alike`
};
const Form* find_form(const std::string& opcode);
using Forms = std::unordered_map<std::string, Form>;
void add_arithmetic(Forms& forms);
void add_memory(Forms& forms);
void add_warp(Forms& forms);
void add_warpgroup(Forms& forms);
void add_control(Forms& forms);

enum class Special {
  tid_x,
  tid_y,
  tid_z,
  ntid_x,
  ntid_y,
  ntid_z,
  ctaid_x,
  ctaid_y,
  ctaid_z,
  nctaid_x,
  cluster_ctarank
};

struct Kernel {
  struct Parameter {
    std::string name;
    size_t offset, bytes, alignment;
  };
  std::string name;
  std::vector<Parameter> parameters;
  size_t parameter_bytes = 0, with_calls_bytes = 0, local_bytes = 0;  // the second: parameters of calls follow
  unsigned max_threads = 1024, cluster = 0;                           // blocks that it is for; 0: any
  bool shows_stores = false;  // some instruction shows shared memory to the asynchronous units
  std::vector<Instruction> code;
  std::vector<std::string> text;  // of every instruction, with its line
  std::vector<uint32_t> operands, touched;
  std::vector<uint64_t> initial;  // slots
  std::vector<std::pair<uint32_t, Special>> specials;
};

// A slot among an instruction's operands. Kept: in use for longer than the instruction runs, and watched by itself.
enum class Access : uint8_t { read, written, kept };
struct Use {
  uint32_t operand;
  Access access;
};
// Of instruction i the uses first_use[i] to first_use[i + 1] − 1; `registers`: which of the slots are.
void share_slots(Kernel& kernel, const std::vector<Use>& uses, const std::vector<size_t>& first_use,
                 std::vector<bool> registers);

struct Module {
  std::string target;  // the device's, as in sm_80
  std::map<std::string, Kernel> kernels;
  std::vector<std::unique_ptr<uint64_t[]>> variables;

  const Kernel& kernel(const std::string& name) const;
};

// Where the host keeps a variable that the module leaves without a value; null: the module's own, zeroed.
using HostVariable = std::function<void*(const std::string& name)>;
Module parse(const std::string& text, const HostVariable& host_variable = {});

// `where` has the launch's sizes. Throws what emulation::run throws, and std::runtime_error where `parameters` are not
// what the kernel declares.
void launch(const Kernel& kernel, const emulation::Launch& where, const emulation::Parameters& parameters);

// --- For what runs instructions --------------------------------------------------------------------------------------

struct Thread {
  const Kernel* kernel;
  const Instruction* here;  // what it runs
  std::vector<uint64_t> slots;
  std::vector<unsigned char> parameters, local;
  unsigned char* shared;  // of its block
  size_t shared_bytes;
  std::string printed;
  int jumps;

  // For Hopper: stores to shared memory that were not shown yet, as offsets and sizes; registers as they were at the
  // last wgmma.fence; and matrix instructions that were not waited for, with the registers that they have.
  struct Product {
    const Instruction* instruction;  // whose operands are the sums, and then what is in registers of a
    int group, sums, left;
  };
  std::vector<std::pair<uint32_t, uint32_t>> stored;
  // The same of copies, which store when they are waited for, by the group that they belong to.
  struct Copied {
    std::pair<uint32_t, uint32_t> stores;
    int group;
  };
  std::vector<Copied> copied;
  int copy_groups;
  std::vector<uint64_t> fenced;
  std::vector<Product> products;
  std::vector<uint8_t> busy;  // slots, while there are products: kSum, kLeft
  int groups;
  static constexpr uint8_t kSum = 1, kLeft = 2;
  void refuse_busy(const Instruction& instruction) const;

  // Nobody reads more bytes of a slot than were written to it: the parser sees to that.
  template <class T>
  T get(uint32_t slot) const {
    T x;
    std::memcpy(&x, slots.data() + slot, sizeof x);
    return x;
  }
  template <class T>
  void put(uint32_t slot, T x) {
    static_assert(sizeof x <= 8, "a slot's");
    std::memcpy(slots.data() + slot, &x, sizeof x);
  }
  // Where the memory is that an operand m names.
  uint64_t address(const uint32_t* operand) const {
    const int64_t offset = int32_t(operand[1]);
    return operand[2] ? uint32_t(get<uint32_t>(operand[0]) + offset) : get<uint64_t>(operand[0]) + uint64_t(offset);
  }
  // Of a power of two of bytes.
  unsigned char* memory(Space space, uint64_t address, size_t bytes, bool writes);
  [[noreturn]] static void refuse_alignment(uint64_t address, size_t bytes);
  [[noreturn]] static void refuse_address(uint64_t address, const char* memory);
  static __thread const Thread* at_memory;  // the last one that was at global memory
  // For messages, and for the emulation to tell waiting lanes apart.
  const char* text(const Instruction& instruction) const {
    return kernel->text[size_t(&instruction - kernel->code.data())].c_str();
  }
};

std::string hexadecimal(uint64_t x);

// Here so that of the space and the bytes, which every caller knows beforehand, nothing is left to look at.
inline unsigned char* Thread::memory(Space space, uint64_t address, size_t bytes, bool writes) {
  if (address & (bytes - 1)) refuse_alignment(address, bytes);
  if (space == Space::generic) {
    space = address >> 60 == kSharedWindow >> 60  ? Space::shared
            : address >> 60 == kLocalWindow >> 60 ? Space::local
                                                  : Space::global;
    if (space != Space::global) address &= (uint64_t(1) << 60) - 1;
  }
  // Below `first` an offset is a very large one.
  const auto within = [&](uint64_t first, size_t size) {
    return address - first < size && size - (address - first) >= bytes;
  };
  switch (space) {
    case Space::shared: {
      if (!within(kSharedFirst, shared_bytes)) refuse_address(address, "the block's shared memory");
      const uint64_t offset = address - kSharedFirst;
      if (writes && kernel->shows_stores) stored.emplace_back(uint32_t(offset), uint32_t(bytes));
      return shared + offset;
    }
    case Space::local:
      if (!within(kLocalFirst, local.size())) refuse_address(address, "the thread's local memory");
      return local.data() + (address - kLocalFirst);
    case Space::parameter:
      if (!within(kParameterFirst, parameters.size())) refuse_address(address, "the kernel's parameters");
      if (writes && address < kParameterFirst + kernel->parameter_bytes) throw Fault("the kernel's own parameters");
      return parameters.data() + (address - kParameterFirst);
    default:
      if (address - kGlobalFirst >= kGlobalEnd - kGlobalFirst ||
          within(reinterpret_cast<uint64_t>(shared), shared_bytes))
        refuse_address(address, "global memory");
      at_memory = this;
      return reinterpret_cast<unsigned char*>(address);
  }
}

// Of f16, exactly. Its exponents are 112 less than a float's.
inline float number_of_f16(uint32_t bits) {
  const uint32_t size = (bits & 0x7fff) << 13, special = (bits & 0x7c00) == 0x7c00 ? 0x7f800000 : 0;
  float x;
  std::memcpy(&x, &size, sizeof x);
  x *= 0x1p112f;
  uint32_t all;
  std::memcpy(&all, &x, sizeof all);
  all = (special ? special | size : all) | (bits & 0x8000) << 16;
  std::memcpy(&x, &all, sizeof x);
  return x;
}

}  // namespace pddm::ptx
