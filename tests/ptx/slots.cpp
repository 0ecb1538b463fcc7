// Which registers have one slot together: those of which no instruction can find what another has left there. What is
// read before it is written to, on some way through the kernel, is needed from the kernel's first instruction on, and
// so has a slot of its own with the ones that it begins with.
#include <algorithm>

#include "module.h"

namespace pddm::ptx {
namespace {

constexpr uint32_t kNone = ~0u;

// A set of registers.
using Bits = std::vector<uint64_t>;
bool has(const Bits& bits, uint32_t which) { return bits[which / 64] >> which % 64 & 1; }
void add(Bits& bits, uint32_t which) { bits[which / 64] |= uint64_t(1) << which % 64; }

// Instructions that run one after the other: no other than the first is jumped to, no other than the last jumps.
struct Stretch {
  size_t first, end;
  std::vector<size_t> after;
  Bits needed, written;  // before it; in it, before anything of it is read
};

std::vector<Stretch> stretches_of(const Kernel& kernel) {
  const size_t count = kernel.code.size();
  std::vector<bool> begins(count + 1);
  begins[0] = true;
  for (size_t i = 0; i < count; ++i) {
    const Instruction& instruction = kernel.code[i];
    if (instruction.flow != Flow::on) begins[i + 1] = true;
    if (instruction.flow == Flow::jump) begins[instruction.operands[0]] = true;
  }
  std::vector<Stretch> all;
  std::vector<size_t> with(count);
  for (size_t i = 0; i < count; ++i) {
    if (begins[i]) all.push_back({i, i, {}, {}, {}});
    with[i] = all.size() - 1, all.back().end = i + 1;
  }
  for (Stretch& s : all) {
    const Instruction& last = kernel.code[s.end - 1];
    if (last.flow == Flow::jump && last.operands[0] < count) s.after.push_back(with[last.operands[0]]);
    if ((last.flow == Flow::on || last.guard != kNoGuard) && s.end < count) s.after.push_back(with[s.end]);
  }
  return all;
}

}  // namespace

void share_slots(Kernel& kernel, const std::vector<Use>& uses, const std::vector<size_t>& first_use,
                 std::vector<bool> registers) {
  const size_t count = kernel.code.size(), slots = kernel.initial.size(), words = (slots + 63) / 64;
  for (const Use& use : uses)
    if (use.access == Access::kept) registers[kernel.operands[use.operand]] = false;

  // f(slot, whether it is written to for certain)
  const auto for_slots = [&](size_t i, const auto& f) {
    const uint32_t guard = kernel.code[i].guard;
    if (guard != kNoGuard) f(guard, false);
    for (size_t u = first_use[i]; u < first_use[i + 1]; ++u)
      f(kernel.operands[uses[u].operand], uses[u].access == Access::written && guard == kNoGuard);
  };

  // What is needed before a stretch, from the ends on until nothing is added.
  std::vector<Stretch> stretches = stretches_of(kernel);
  for (Stretch& s : stretches) {
    s.needed.resize(words), s.written.resize(words);
    for (size_t i = s.first; i < s.end; ++i) {
      for_slots(i, [&](uint32_t slot, bool written) {
        if (!written && !has(s.written, slot)) add(s.needed, slot);
      });
      for_slots(i, [&](uint32_t slot, bool written) {
        if (written && !has(s.needed, slot)) add(s.written, slot);
      });
    }
  }
  for (bool more = true; more;) {
    more = false;
    for (auto s = stretches.rbegin(); s != stretches.rend(); ++s) {
      for (size_t other : s->after) {
        const Bits& after = stretches[other].needed;
        for (size_t w = 0; w < words; ++w) {
          const uint64_t new_ones = after[w] & ~s->written[w] & ~s->needed[w];
          s->needed[w] |= new_ones, more |= new_ones != 0;
        }
      }
    }
  }

  // From the first instruction to the last that a register is needed at or written to, whatever is between them.
  struct Range {
    uint32_t first = kNone, last = 0;
  };
  std::vector<Range> ranges(slots);
  const auto extend = [&](uint32_t slot, size_t i) {
    ranges[slot] = {std::min(ranges[slot].first, uint32_t(i)), std::max(ranges[slot].last, uint32_t(i))};
  };
  const auto extend_all = [&](const Bits& bits, size_t i) {
    for (size_t w = 0; w < words; ++w)
      for (uint64_t left = bits[w]; left; left &= left - 1) extend(uint32_t(w * 64) + __builtin_ctzll(left), i);
  };
  for (const Stretch& s : stretches) {
    extend_all(s.needed, s.first);
    for (size_t other : s.after) extend_all(stretches[other].needed, s.end - 1);
    for (size_t i = s.first; i < s.end; ++i) for_slots(i, [&](uint32_t slot, bool) { extend(slot, i); });
  }

  // Slots anew: first those of their own, then, from instruction to instruction, those that are free.
  std::vector<uint32_t> now(slots, kNone);
  std::vector<uint64_t> initial;
  const auto begin = [&](uint32_t slot) {
    now[slot] = uint32_t(initial.size());
    initial.push_back(kernel.initial[slot]);
  };
  for (uint32_t slot = 0; slot < slots; ++slot)
    if (!registers[slot] || has(stretches[0].needed, slot)) begin(slot);
  std::vector<std::vector<uint32_t>> ending(count);
  std::vector<uint32_t> free;
  for (size_t i = 0; i < count; ++i) {
    for_slots(i, [&](uint32_t slot, bool) {
      if (now[slot] != kNone) return;
      // Needed before it is first spoken of, by a jump back: a slot of its own.
      if (ranges[slot].first < i) return begin(slot);
      if (free.empty())
        begin(slot);
      else
        now[slot] = free.back(), free.pop_back();
      ending[ranges[slot].last].push_back(now[slot]);
    });
    free.insert(free.end(), ending[i].begin(), ending[i].end());
  }

  for (const Use& use : uses) kernel.operands[use.operand] = now[kernel.operands[use.operand]];
  for (auto& special : kernel.specials) special.first = now[special.first];
  kernel.initial = std::move(initial);
  for (size_t i = 0; i < count; ++i) {
    Instruction& instruction = kernel.code[i];
    instruction.touched = uint32_t(kernel.touched.size());
    if (instruction.guard != kNoGuard) kernel.touched.push_back(instruction.guard = now[instruction.guard]);
    for (size_t u = first_use[i]; u < first_use[i + 1]; ++u)
      if (uses[u].access != Access::kept) kernel.touched.push_back(kernel.operands[uses[u].operand]);
    instruction.touched_count = uint32_t(kernel.touched.size()) - instruction.touched;
  }
}

}  // namespace pddm::ptx
