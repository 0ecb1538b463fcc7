// What lanes do together. Fragments are as the PTX manual draws them, element by element.
#include <cmath>

#include "module.h"

namespace pddm::ptx {
namespace {

using emulation::kLanes;

struct Lane {
  Thread* thread;
  const Instruction* instruction;
};
const Lane& lane(void* const* lanes, unsigned l) { return *static_cast<const Lane*>(lanes[l]); }

// .aligned: all lanes of the warp at one instruction.
void meet_all(Thread& thread, const Instruction& i, emulation::Work work) {
  Lane own{&thread, &i};
  emulation::meet(thread.text(i), emulation::kAllLanes, work, &own);
}

// --- Matrices --------------------------------------------------------------------------------------------------------

// d[Count], [row]: lanes 8 m to 8 m + 7 name the rows of matrix m, of which lane l gets, in register m, the numbers
// (l / 4, 2 (l % 4)) and the next in the row; with .trans (2 (l % 4), l / 4) and the next in the column.
template <int Count, bool Transposed>
void load_matrices(Thread& thread, const Instruction& i) {
  meet_all(thread, i, [](void* const* lanes, unsigned) {
    for (int m = 0; m < Count; ++m) {
      uint16_t matrix[8][8];
      for (int row = 0; row < 8; ++row) {
        const Lane& from = lane(lanes, unsigned(8 * m + row));
        const uint64_t address = from.thread->address(from.instruction->operands + Count);
        std::memcpy(matrix[row], from.thread->memory(Space::shared, address, 16, false), 16);
      }
      for (unsigned l = 0; l < kLanes; ++l) {
        const unsigned line = l / 4, first = l % 4 * 2;
        const uint32_t low = Transposed ? matrix[first][line] : matrix[line][first];
        const uint32_t high = Transposed ? matrix[first + 1][line] : matrix[line][first + 1];
        const Lane& to = lane(lanes, l);
        to.thread->put<uint32_t>(to.instruction->operands[m], low | high << 16);
      }
    }
  });
}

float float_of(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}
double number_of_bf16(uint32_t bits) { return float_of(bits << 16); }
double number_of_half(uint32_t bits) { return number_of_f16(bits); }
// Numbers that were never rounded to tf32 are none.
double number_of_tf32(uint32_t bits) {
  const float x = float_of(bits);
  if ((bits & 0x1fff) != 0 && x == x) throw Fault("an operand of " + hexadecimal(bits) + ", which is not in tf32");
  return x;
}

// d[4], a[4], b[2], c[4]: d (16 × 8) = a (16 × Depth) · b (Depth × 8) + c. Products are exact and so, but for the last
// digits of a double, are sums before they are rounded once: the manual leaves order and precision of sums open.
template <int Depth, double (*number)(uint32_t)>
void multiply_warp(void* const* lanes, unsigned which) {
  constexpr int kPerRegister = Depth / 8, kBits = 32 / kPerRegister;
  double a[16][Depth], b[Depth][8];
  for (unsigned l = 0; l < kLanes; ++l) {
    Thread& from = *lane(lanes, l).thread;
    from.here = lane(lanes, l).instruction + which;
    const int group = int(l / 4), column = int(l % 4) * kPerRegister;
    const auto numbers = [&](int operand, const auto& put) {
      const uint32_t bits = from.get<uint32_t>(from.here->operands[operand]);
      for (int e = 0; e < kPerRegister; ++e) put(e, number(bits >> e * kBits & (~0u >> (32 - kBits))));
    };
    for (int r = 0; r < 4; ++r)
      numbers(4 + r, [&](int e, double x) { a[group + r % 2 * 8][column + e + r / 2 * (Depth / 2)] = x; });
    for (int r = 0; r < 2; ++r) numbers(8 + r, [&](int e, double x) { b[column + e + r * (Depth / 2)][group] = x; });
  }
  double sums[16][8] = {};
  for (int row = 0; row < 16; ++row)
    for (int k = 0; k < Depth; ++k)
      for (int column = 0; column < 8; ++column) sums[row][column] += a[row][k] * b[k][column];
  for (unsigned l = 0; l < kLanes; ++l) {
    Thread& to = *lane(lanes, l).thread;
    const uint32_t* const operands = to.here->operands;
    for (int e = 0; e < 4; ++e) {
      const double sum = sums[l / 4 + (e < 2 ? 0 : 8)][l % 4 * 2 + e % 2];
      const float x = float(sum + double(to.get<float>(operands[10 + e])));
      to.put<float>(operands[e], x == x ? x : float_of(0x7fffffff));
    }
  }
}

// Those that follow each other at one meeting: nothing but the registers is theirs, and a meeting takes longer.
template <int Depth, double (*number)(uint32_t)>
Form multiply() {
  const Handler run = [](Thread& thread, const Instruction& i) {
    meet_all(thread, i, [](void* const* lanes, unsigned) {
      const unsigned count = lane(lanes, 0).instruction->alike;
      for (unsigned which = 0; which < count; ++which) multiply_warp<Depth, number>(lanes, which);
    });
  };
  return {run, "{ffff}{wwww}{ww}{ffff}", 0, Flow::on, true};
}

// --- Registers of other lanes ----------------------------------------------------------------------------------------

enum class Shuffle { up, down, butterfly, index };

// d|p, a, b, c, mask. c has the last lane of a segment in bits 0 to 4 and which bits of a lane's number name its
// segment in bits 8 to 12; p says whether the lane asked for is in reach, and if it is not, d is the lane's own.
template <Shuffle how>
void shuffle(Thread& thread, const Instruction& i) {
  static const char* const kName[] = {"shfl.sync.up.b32", "shfl.sync.down.b32", "shfl.sync.bfly.b32",
                                      "shfl.sync.idx.b32"};
  Lane own{&thread, &i};
  emulation::meet(
      kName[int(how)], thread.get<uint32_t>(i.operands[5]),
      [](void* const* lanes, unsigned mask) {
        uint32_t results[kLanes] = {};
        bool reached[kLanes] = {};
        for (int l = 0; l < int(kLanes); ++l) {
          if (!(mask >> l & 1)) continue;
          const Lane& to = lane(lanes, unsigned(l));
          const uint32_t* const operands = to.instruction->operands;
          const int by = to.thread->get<uint32_t>(operands[3]) & 31;
          const uint32_t c = to.thread->get<uint32_t>(operands[4]);
          const int segment = c >> 8 & 31, first = l & segment, last = first | (int(c & 31) & ~segment);
          int source = 0;
          switch (how) {
            case Shuffle::up: source = l - by, reached[l] = source >= last; break;
            case Shuffle::down: source = l + by, reached[l] = source <= last; break;
            case Shuffle::butterfly: source = l ^ by, reached[l] = source <= last; break;
            case Shuffle::index: source = first | (by & ~segment), reached[l] = source <= last; break;
          }
          if (!reached[l]) source = l;
          // What a lane outside of the mask has is nothing to rely on.
          const bool there = mask >> source & 1;
          const Lane& from = lane(lanes, unsigned(there ? source : l));
          results[l] = there ? from.thread->get<uint32_t>(from.instruction->operands[2]) : ~0u;
        }
        for (unsigned l = 0; l < kLanes; ++l) {
          if (!(mask >> l & 1)) continue;
          const Lane& to = lane(lanes, l);
          to.thread->put<uint32_t>(to.instruction->operands[0], results[l]);
          to.thread->put<bool>(to.instruction->operands[1], reached[l]);
        }
      },
      &own);
}

void ballot(Thread& thread, const Instruction& i) {
  Lane own{&thread, &i};
  emulation::meet(
      "vote.sync.ballot.b32", thread.get<uint32_t>(i.operands[2]),
      [](void* const* lanes, unsigned mask) {
        uint32_t votes = 0;
        for (unsigned l = 0; l < kLanes; ++l) {
          if (!(mask >> l & 1)) continue;
          const Lane& from = lane(lanes, l);
          votes |= uint32_t(from.thread->get<bool>(from.instruction->operands[1])) << l;
        }
        for (unsigned l = 0; l < kLanes; ++l) {
          if (!(mask >> l & 1)) continue;
          const Lane& to = lane(lanes, l);
          to.thread->put<uint32_t>(to.instruction->operands[0], votes);
        }
      },
      &own);
}

void meet_lanes(Thread& thread, const Instruction& i) {
  emulation::meet("bar.warp.sync", thread.get<uint32_t>(i.operands[0]), nullptr, nullptr);
}

void barrier(Thread& thread, const Instruction& i) {
  if (i.operands[0] != 0) throw Fault("the barrier " + std::to_string(i.operands[0]) + "; accepted is 0");
  emulation::barrier(thread.text(i), false);
}

}  // namespace

void add_warp(Forms& f) {
  f["ldmatrix.sync.aligned.m8n8.x1.shared.b16"] = {load_matrices<1, false>, "{w}m"};
  f["ldmatrix.sync.aligned.m8n8.x2.shared.b16"] = {load_matrices<2, false>, "{ww}m"};
  f["ldmatrix.sync.aligned.m8n8.x4.shared.b16"] = {load_matrices<4, false>, "{wwww}m"};
  f["ldmatrix.sync.aligned.m8n8.x1.trans.shared.b16"] = {load_matrices<1, true>, "{w}m"};
  f["ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16"] = {load_matrices<2, true>, "{ww}m"};
  f["ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16"] = {load_matrices<4, true>, "{wwww}m"};
  f["mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32"] = multiply<16, number_of_bf16>();
  f["mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32"] = multiply<16, number_of_half>();
  f["mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32"] = multiply<8, number_of_tf32>();
  f["shfl.sync.up.b32"] = {shuffle<Shuffle::up>, "w|pwwww"};
  f["shfl.sync.down.b32"] = {shuffle<Shuffle::down>, "w|pwwww"};
  f["shfl.sync.bfly.b32"] = {shuffle<Shuffle::butterfly>, "w|pwwww"};
  f["shfl.sync.idx.b32"] = {shuffle<Shuffle::index>, "w|pwwww"};
  f["vote.sync.ballot.b32"] = {ballot, "wpw"};
  f["bar.sync"] = {barrier, "n"};
  f["bar.warp.sync"] = {meet_lanes, "w"};
}

}  // namespace pddm::ptx
