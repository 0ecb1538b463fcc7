// Loads, stores, atomics, asynchronous copies, and addresses from one space to another.
#include <algorithm>
#include <cstdio>

#include "module.h"

namespace pddm::ptx {

std::string hexadecimal(uint64_t x) {
  char buffer[24];
  std::snprintf(buffer, sizeof buffer, "0x%llx", static_cast<unsigned long long>(x));
  return buffer;
}

void Thread::refuse_alignment(uint64_t address, size_t bytes) {
  throw Fault("the address " + hexadecimal(address) + " is not aligned to " + std::to_string(bytes) + " bytes");
}
void Thread::refuse_address(uint64_t address, const char* memory) {
  throw Fault("the address " + hexadecimal(address) + " is not in " + memory);
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

void add_access(Forms& f, const char* space, const std::string& type, int count, char letter, size_t bytes,
                Handler load, Handler store) {
  const std::string vector = count == 1 ? "" : ".v" + std::to_string(count), where = space;
  const std::string registers = count == 1 ? std::string(1, letter) : "{" + std::string(size_t(count), letter) + "}";
  f["ld" + where + vector + type] = {load, registers + "m", bytes};
  if (where == ".global") f["ld.global.nc" + vector + type] = {load, registers + "m", bytes};
  f["st" + where + vector + type] = {store, "m" + registers, bytes};
}
template <Space space, class T>
void add_accesses(Forms& f, const char* where, const char* type) {
  const char letter = std::is_same_v<T, float> ? 'f' : std::is_same_v<T, double> ? 'd' : 'x';
  const auto add = [&](int count, Handler load, Handler store) {
    add_access(f, where, type, count, letter, sizeof(T), load, store);
  };
  add(1, load<space, T, 1>, store<space, T, 1>), add(2, load<space, T, 2>, store<space, T, 2>);
  if constexpr (sizeof(T) <= 4) add(4, load<space, T, 4>, store<space, T, 4>);
}
template <Space space>
void add_space(Forms& f, const char* where) {
  for (const char* type : {".u8", ".b8"}) add_accesses<space, uint8_t>(f, where, type);
  for (const char* type : {".u16", ".b16"}) add_accesses<space, uint16_t>(f, where, type);
  for (const char* type : {".u32", ".b32"}) add_accesses<space, uint32_t>(f, where, type);
  for (const char* type : {".u64", ".b64"}) add_accesses<space, uint64_t>(f, where, type);
  add_accesses<space, int8_t>(f, where, ".s8"), add_accesses<space, int16_t>(f, where, ".s16");
  add_accesses<space, int32_t>(f, where, ".s32"), add_accesses<space, int64_t>(f, where, ".s64");
  add_accesses<space, float>(f, where, ".f32"), add_accesses<space, double>(f, where, ".f64");
}

template <Space space, class T>
T* atomic(Thread& thread, const Instruction& i) {
  return reinterpret_cast<T*>(thread.memory(space, thread.address(i.operands + 1), sizeof(T), true));
}
template <Space space, class T>
void atomic_add(Thread& thread, const Instruction& i) {
  T* const at = atomic<space, T>(thread, i);
  thread.put(i.operands[0], __atomic_fetch_add(at, thread.get<T>(i.operands[4]), __ATOMIC_RELAXED));
}
void atomic_max(Thread& thread, const Instruction& i) {
  uint64_t *const at = atomic<Space::global, uint64_t>(thread, i), old = __atomic_load_n(at, __ATOMIC_RELAXED);
  const uint64_t x = thread.get<uint64_t>(i.operands[4]);
  while (old < x && !__atomic_compare_exchange_n(at, &old, x, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED)) {
  }
  thread.put(i.operands[0], old);
}

void copy(Thread& thread, const Instruction& i) {
  if (i.operands[6] != 16) throw Fault("a copy of " + std::to_string(i.operands[6]) + " bytes; accepted is 16");
  const size_t before = thread.stored.size();
  unsigned char* const to = thread.memory(Space::shared, thread.address(i.operands), 16, true);
  for (; thread.stored.size() > before; thread.stored.pop_back())
    thread.copied.push_back({thread.stored.back(), thread.copy_groups});
  emulation::copy_async(to, thread.memory(Space::global, thread.address(i.operands + 3), 16, false));
}
void commit(Thread& thread, const Instruction&) {
  ++thread.copy_groups;
  emulation::commit_copies();
}
void wait(Thread& thread, const Instruction& i) {
  const int pending = int(i.operands[0]);
  const auto end = std::find_if(thread.copied.begin(), thread.copied.end(),
                                [&](const Thread::Copied& copy) { return copy.group >= thread.copy_groups - pending; });
  for (auto copy = thread.copied.begin(); copy != end; ++copy) thread.stored.push_back(copy->stores);
  thread.copied.erase(thread.copied.begin(), end);
  emulation::wait_copies(pending);
}

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
  f["atom.global.add.u64"] = {atomic_add<Space::global, uint64_t>, "lml"};
  f["atom.shared.add.u32"] = {atomic_add<Space::shared, uint32_t>, "wmw"};
  f["atom.global.max.u64"] = {atomic_max, "lml"};
  f["cp.async.cg.shared.global"] = {copy, "mmn"};
  f["cp.async.commit_group"] = {commit, ""};
  f["cp.async.wait_group"] = {wait, "n"};
  f["cvta.shared.u64"] = {to_generic<kSharedWindow>, "ll"};
  f["cvta.local.u64"] = {to_generic<kLocalWindow>, "ll"};
  f["cvta.global.u64"] = f["cvta.to.global.u64"] = {global_to_generic, "ll"};
}

}  // namespace pddm::ptx
