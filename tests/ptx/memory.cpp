// Loads, stores, atomics, asynchronous copies, and addresses from one space to another.
#include <cstdio>

#include "module.h"

namespace pddm::ptx {

std::string hexadecimal(uint64_t x) {
  char buffer[24];
  std::snprintf(buffer, sizeof buffer, "0x%llx", static_cast<unsigned long long>(x));
  return buffer;
}

unsigned char* Thread::memory(Space space, uint64_t address, size_t bytes, bool writes) {
  if (address % bytes != 0)
    throw Fault("the address " + hexadecimal(address) + " is not aligned to " + std::to_string(bytes) + " bytes");
  if (space == Space::generic) {
    space = address >> 60 == kSharedWindow >> 60  ? Space::shared
            : address >> 60 == kLocalWindow >> 60 ? Space::local
                                                  : Space::global;
    if (space != Space::global) address &= (uint64_t(1) << 60) - 1;
  }
  const auto outside = [&](const char* of) {
    return Fault("the address " + hexadecimal(address) + " is not in " + of);
  };
  switch (space) {
    case Space::shared: {
      unsigned char* const at = emulation::shared_memory() + (address - kSharedFirst);
      if (address < kSharedFirst || address >= kLocalFirst || !emulation::is_shared(at, bytes))
        throw outside("the block's shared memory");
      if (writes && kernel->shows_stores) stored.emplace_back(uint32_t(address - kSharedFirst), uint32_t(bytes));
      return at;
    }
    case Space::local:
      if (address < kLocalFirst || address + bytes > kLocalFirst + kernel->local_bytes)
        throw outside("the thread's local memory");
      return local.data() + (address - kLocalFirst);
    case Space::parameter:
      if (address < kParameterFirst || address + bytes > kParameterFirst + kernel->with_calls_bytes)
        throw outside("the kernel's parameters");
      if (writes && address < kParameterFirst + kernel->parameter_bytes) throw Fault("the kernel's own parameters");
      return parameters.data() + (address - kParameterFirst);
    default: {
      auto* const at = reinterpret_cast<unsigned char*>(address);
      if (address < kGlobalFirst || address >= kGlobalEnd || emulation::is_shared(at, bytes))
        throw outside("global memory");
      at_memory = this;
      return at;
    }
  }
}

namespace {

// Memory's type T, `Count` of them side by side, against registers that may be wider.
template <Space space, class T, int Count>
void load(Thread& thread, const Instruction& i) {
  constexpr bool kWidens = std::is_integral_v<T>;
  constexpr int kStride = kWidens ? 2 : 1;
  const unsigned char* const from =
      thread.memory(space, thread.address(i.operands + Count * kStride), sizeof(T) * Count, false);
  for (int e = 0; e < Count; ++e) {
    T x;
    std::memcpy(&x, from + e * sizeof(T), sizeof x);
    const uint32_t* const to = i.operands + e * kStride;
    if constexpr (!kWidens)
      thread.put(to[0], x);
    else if (to[1] == 8)
      thread.put(to[0], uint64_t(x));
    else if (to[1] == 4)
      thread.put(to[0], uint32_t(x));
    else
      thread.put(to[0], uint16_t(x));
  }
}
template <Space space, class T, int Count>
void store(Thread& thread, const Instruction& i) {
  constexpr int kStride = std::is_integral_v<T> ? 2 : 1;
  unsigned char* const to = thread.memory(space, thread.address(i.operands), sizeof(T) * Count, true);
  for (int e = 0; e < Count; ++e) {
    const T x = thread.get<T>(i.operands[3 + e * kStride]);
    std::memcpy(to + e * sizeof(T), &x, sizeof x);
  }
}

using Forms = std::map<std::string, Form>;

template <Space space, class T, int Count>
void add_accesses(Forms& f, const std::string& where, const std::string& type) {
  const char letter = std::is_same_v<T, float> ? 'f' : std::is_same_v<T, double> ? 'd' : 'x';
  const std::string vector = Count == 1 ? "" : ".v" + std::to_string(Count);
  const std::string registers = Count == 1 ? std::string(1, letter) : "{" + std::string(Count, letter) + "}";
  f["ld" + where + vector + type] = {load<space, T, Count>, registers + "m", sizeof(T)};
  if (space == Space::global) f["ld" + where + ".nc" + vector + type] = f["ld" + where + vector + type];
  f["st" + where + vector + type] = {store<space, T, Count>, "m" + registers, sizeof(T)};
}
template <Space space, class T>
void add_vectors(Forms& f, const std::string& where, const std::string& type) {
  add_accesses<space, T, 1>(f, where, type), add_accesses<space, T, 2>(f, where, type);
  if constexpr (sizeof(T) <= 4) add_accesses<space, T, 4>(f, where, type);
}
template <Space space>
void add_space(Forms& f, const std::string& where) {
  add_vectors<space, uint8_t>(f, where, ".u8"), add_vectors<space, uint8_t>(f, where, ".b8");
  add_vectors<space, int8_t>(f, where, ".s8");
  add_vectors<space, uint16_t>(f, where, ".u16"), add_vectors<space, uint16_t>(f, where, ".b16");
  add_vectors<space, int16_t>(f, where, ".s16");
  add_vectors<space, uint32_t>(f, where, ".u32"), add_vectors<space, uint32_t>(f, where, ".b32");
  add_vectors<space, int32_t>(f, where, ".s32");
  add_vectors<space, uint64_t>(f, where, ".u64"), add_vectors<space, uint64_t>(f, where, ".b64");
  add_vectors<space, int64_t>(f, where, ".s64");
  add_vectors<space, float>(f, where, ".f32"), add_vectors<space, double>(f, where, ".f64");
}

uint64_t* atomic(Thread& thread, const Instruction& i) {
  return reinterpret_cast<uint64_t*>(thread.memory(Space::global, thread.address(i.operands + 1), 8, true));
}
void atomic_add(Thread& thread, const Instruction& i) {
  thread.put(i.operands[0],
             __atomic_fetch_add(atomic(thread, i), thread.get<uint64_t>(i.operands[4]), __ATOMIC_RELAXED));
}
void atomic_max(Thread& thread, const Instruction& i) {
  uint64_t *const at = atomic(thread, i), old = __atomic_load_n(at, __ATOMIC_RELAXED);
  const uint64_t x = thread.get<uint64_t>(i.operands[4]);
  while (old < x && !__atomic_compare_exchange_n(at, &old, x, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED)) {
  }
  thread.put(i.operands[0], old);
}

void copy(Thread& thread, const Instruction& i) {
  if (i.operands[6] != 16) throw Fault("a copy of " + std::to_string(i.operands[6]) + " bytes; accepted is 16");
  unsigned char* const to = thread.memory(Space::shared, thread.address(i.operands), 16, true);
  emulation::copy_async(to, thread.memory(Space::global, thread.address(i.operands + 3), 16, false));
}
void commit(Thread&, const Instruction&) { emulation::commit_copies(); }
void wait(Thread&, const Instruction& i) { emulation::wait_copies(int(i.operands[0])); }

template <uint64_t window>
void to_generic(Thread& thread, const Instruction& i) {
  const auto address = thread.get<uint64_t>(i.operands[1]);
  if (address >> 32) throw Fault(hexadecimal(address) + " is no address in that space");
  thread.put(i.operands[0], address | window);
}
void global_to_generic(Thread& thread, const Instruction& i) {
  const auto address = thread.get<uint64_t>(i.operands[1]);
  if (address >> 60) throw Fault(hexadecimal(address) + " is no address in global memory");
  thread.put(i.operands[0], address);
}

}  // namespace

void add_memory(Forms& f) {
  add_space<Space::generic>(f, ""), add_space<Space::global>(f, ".global"), add_space<Space::shared>(f, ".shared");
  add_space<Space::local>(f, ".local"), add_space<Space::parameter>(f, ".param");
  f["atom.global.add.u64"] = {atomic_add, "lml"};
  f["atom.global.max.u64"] = {atomic_max, "lml"};
  f["cp.async.cg.shared.global"] = {copy, "mmn"};
  f["cp.async.commit_group"] = {commit, ""};
  f["cp.async.wait_group"] = {wait, "n"};
  f["cvta.shared.u64"] = {to_generic<kSharedWindow>, "ll"};
  f["cvta.local.u64"] = {to_generic<kLocalWindow>, "ll"};
  f["cvta.global.u64"] = f["cvta.to.global.u64"] = {global_to_generic, "ll"};
}

}  // namespace pddm::ptx
