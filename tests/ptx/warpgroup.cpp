// Hopper's: clusters, barriers that count bytes, bulk copies, and matrix instructions of four warps. What they do is
// the emulation's; who stores what, and who touches which register when, is seen here.
#include <algorithm>
#include <cmath>

#include "module.h"

namespace pddm::ptx {
namespace {

// --- Addresses -------------------------------------------------------------------------------------------------------

// In the window of the cluster a block's shared memory is at its own addresses with its rank, from 1, above them; and
// the block's own is where it always is.
constexpr int kRankFirst = 24;

struct Place {
  uint32_t offset;
  unsigned rank;
};
Place place_of(Thread& thread, const uint32_t* operand, size_t bytes, bool in_cluster) {
  uint64_t address = thread.address(operand);
  unsigned rank = emulation::cluster_rank();
  if (in_cluster && address < kLocalFirst && address >> kRankFirst) {
    rank = unsigned(address >> kRankFirst) - 1;
    address &= (uint64_t(1) << kRankFirst) - 1;
  }
  const unsigned char* const at = thread.memory(Space::shared, address, bytes, false);
  return {uint32_t(at - emulation::shared_memory()), rank};
}

// d, a, b: the address a of this block's in block b's.
void map_address(Thread& thread, const Instruction& i) {
  const auto address = thread.get<uint32_t>(i.operands[1]), rank = thread.get<uint32_t>(i.operands[2]);
  if (address < kSharedFirst || address >> kRankFirst)
    throw Fault(hexadecimal(address) + " is no address in the block's shared memory");
  if (rank >= emulation::cluster_blocks())
    throw Fault("the block " + std::to_string(rank) + " of a cluster of " +
                std::to_string(emulation::cluster_blocks()));
  thread.put(i.operands[0], address | (rank + 1) << kRankFirst);
}

// --- Barriers --------------------------------------------------------------------------------------------------------

// [barrier], count
void init_barrier(Thread& thread, const Instruction& i) {
  const Place at = place_of(thread, i.operands, 8, false);
  emulation::init_barrier(at.offset, int(thread.get<uint32_t>(i.operands[3])));
}
void publish_barriers(Thread&, const Instruction&) { emulation::publish_barriers(); }

// _, [barrier], bytes
void arrive_expecting(Thread& thread, const Instruction& i) {
  const Place at = place_of(thread, i.operands, 8, false);
  emulation::arrive(at.offset, at.rank, int(thread.get<uint32_t>(i.operands[3])));
}
// _, [barrier]
void arrive(Thread& thread, const Instruction& i) {
  const Place at = place_of(thread, i.operands, 8, true);
  emulation::arrive(at.offset, at.rank, 0);
}
// p, [barrier], parity
void try_wait(Thread& thread, const Instruction& i) {
  const Place at = place_of(thread, i.operands + 1, 8, false);
  thread.put<bool>(i.operands[0], emulation::try_wait(at.offset, thread.get<uint32_t>(i.operands[4])));
}

void cluster_arrive(Thread&, const Instruction&) { emulation::cluster_arrive(); }
void cluster_wait(Thread&, const Instruction&) { emulation::cluster_wait(); }

// which, how many threads
void some_barrier(Thread& thread, const Instruction& i) {
  emulation::some_barrier(thread.get<uint32_t>(i.operands[0]), thread.get<uint32_t>(i.operands[1]));
}

template <bool more>
void change_registers(Thread& thread, const Instruction& i) {
  emulation::change_registers(thread.text(i), i.operands[0], more);
}

// --- Copies ----------------------------------------------------------------------------------------------------------

// [to], [from], bytes, [barrier], blocks
void copy(Thread& thread, const Instruction& i) {
  const Place to = place_of(thread, i.operands, 16, true), barrier = place_of(thread, i.operands + 7, 8, true);
  const unsigned char* const from = thread.memory(Space::global, thread.address(i.operands + 3), 16, false);
  const auto bytes = thread.get<uint32_t>(i.operands[6]);
  if (bytes && !emulation::is_shared(emulation::shared_memory() + to.offset, bytes))
    throw Fault("a copy of " + std::to_string(bytes) + " bytes that ends outside of shared memory");
  emulation::copy_to_cluster(to.offset, from, bytes, barrier.offset, thread.get<uint16_t>(i.operands[10]));
}

// What this thread has stored, and nothing else.
void show(Thread& thread, const Instruction&) {
  for (const auto& [first, bytes] : thread.stored) emulation::show(first, bytes);
  thread.stored.clear();
}

// --- The matrix instruction ------------------------------------------------------------------------------------------

// Products are exact and so, but for the last digits of a double, are their sums, rounded once.
template <bool half>
void multiply(float* product, const uint16_t* a, const uint16_t* b, unsigned columns) {
  const auto number = [](uint32_t bits) -> double {
    if (half) return number_of_f16(bits);
    float x;
    bits <<= 16;
    std::memcpy(&x, &bits, sizeof x);
    return x;
  };
  double right[16][256], sums[256];
  for (unsigned column = 0; column < columns; ++column)
    for (unsigned k = 0; k < 16; ++k) right[k][column] = number(b[column * 16 + k]);
  for (unsigned row = 0; row < 16; ++row) {
    std::fill(sums, sums + columns, 0);
    for (unsigned k = 0; k < 16; ++k) {
      const double left = number(a[row * 16 + k]);
      for (unsigned column = 0; column < columns; ++column) sums[column] += left * right[k][column];
    }
    for (unsigned column = 0; column < columns; ++column) product[row * columns + column] = float(sums[column]);
  }
}

void mark_busy(Thread& thread, const Thread::Product& product) {
  const uint32_t* const slots = product.instruction->operands;
  for (int r = 0; r < product.sums + product.left; ++r)
    thread.busy[slots[r]] |= r < product.sums ? Thread::kSum : Thread::kLeft;
}

// d[Columns / 2]; a[4], or its descriptor; b's descriptor; whether d is added to; and numbers of which only these are
// accepted: neither operand is negated, and both have their inputs side by side.
template <bool half, int Columns, bool in_registers>
void multiply_async(Thread& thread, const Instruction& i) {
  constexpr int kSums = Columns / 2, kLeft = in_registers ? 4 : 0;
  const uint32_t *const sums = i.operands, *const left = sums + kSums, *const rest = left + (in_registers ? 4 : 1);
  for (int n = 2; n < (in_registers ? 5 : 6); ++n)
    if (rest[n] != (n < 4 ? 1u : 0u)) throw Fault("other numbers at the end than 1, 1 and then 0");

  // Registers that others of this thread have on their way: none but the same sums, and what they read as well.
  bool continues = false;
  for (const Thread::Product& other : thread.products)
    continues |= other.sums == kSums && std::equal(sums, sums + kSums, other.instruction->operands);
  thread.busy.resize(thread.slots.size());
  for (int r = 0; r < kSums; ++r)
    if (thread.busy[sums[r]] & (continues ? Thread::kLeft : Thread::kLeft | Thread::kSum))
      throw Fault("a sum is in a register of a product on its way");
  for (int r = 0; r < kLeft; ++r)
    if (thread.busy[left[r]] & Thread::kSum) throw Fault("a sum of a product on its way is in a");
  if (thread.fenced.empty()) throw Fault("no wgmma.fence before it");
  const bool add = thread.get<bool>(rest[1]);
  for (int r = continues ? kSums : 0; r < kSums + kLeft; ++r)  // left follows the sums
    if (thread.slots[i.operands[r]] != thread.fenced[i.operands[r]])
      throw Fault("a register was written to since the last wgmma.fence");
  thread.products.push_back({&i, thread.groups, kSums, kLeft});
  mark_busy(thread, thread.products.back());

  auto* const base = reinterpret_cast<unsigned char*>(thread.slots.data());
  emulation::multiply_async({thread.text(i),
                             multiply<half>,
                             Columns,
                             {base, sums},
                             {in_registers ? base : nullptr, left},
                             in_registers ? 0 : thread.get<uint64_t>(left[0]),
                             thread.get<uint64_t>(rest[0]),
                             add});
}

void fence(Thread& thread, const Instruction&) {
  emulation::begin_products();
  thread.fenced = thread.slots;
}
void commit(Thread& thread, const Instruction&) {
  emulation::commit_products();
  ++thread.groups;
}
void wait(Thread& thread, const Instruction& i) {
  const int pending = int(i.operands[0]);
  emulation::wait_products(pending);
  const auto covered = [&](const Thread::Product& product) { return product.group < thread.groups - pending; };
  thread.products.erase(std::remove_if(thread.products.begin(), thread.products.end(), covered), thread.products.end());
  std::fill(thread.busy.begin(), thread.busy.end(), uint8_t(0));
  for (const Thread::Product& product : thread.products) mark_busy(thread, product);
}

template <bool half, int Columns>
void add_multiply(Forms& f) {
  const std::string type = half ? ".f16" : ".bf16", sums = "{" + std::string(Columns / 2, 'f') + "}";
  const std::string opcode = "wgmma.mma_async.sync.aligned.m64n" + std::to_string(Columns) + "k16.f32" + type + type;
  f[opcode + " of {}"] = {multiply_async<half, Columns, true>, sums + "{wwww}lpnnn"};
  f[opcode] = {multiply_async<half, Columns, false>, sums + "llpnnnn"};
}

}  // namespace

void Thread::refuse_busy(const Instruction& instruction) const {
  const uint32_t* const first = kernel->touched.data() + instruction.touched;
  for (const uint32_t* slot = first; slot < first + instruction.touched_count; ++slot)
    if (busy[*slot]) throw Fault("a register of a product on its way: " + std::string(text(*products[0].instruction)));
}

void add_warpgroup(Forms& f) {
  f["mapa.shared::cluster.u32"] = {map_address, "www"};
  f["barrier.cluster.arrive.release.aligned"] = {cluster_arrive, ""};
  f["barrier.cluster.wait.acquire.aligned"] = {cluster_wait, ""};
  f["bar.sync of some"] = {some_barrier, "ww"};
  f["setmaxnreg.dec.sync.aligned.u32"] = {change_registers<false>, "n"};
  f["setmaxnreg.inc.sync.aligned.u32"] = {change_registers<true>, "n"};
  f["mbarrier.init.shared::cta.b64"] = {init_barrier, "mw"};
  f["fence.mbarrier_init.release.cluster"] = {publish_barriers, ""};
  f["mbarrier.arrive.expect_tx.shared::cta.b64"] = {arrive_expecting, "_mw"};
  // What is released and acquired, and where, is the emulation's order anyway.
  for (const char* release : {"", ".release.cta", ".release.cluster"})
    f["mbarrier.arrive" + std::string(release) + ".shared::cluster.b64"] = {arrive, "_m"};
  for (const char* acquire : {"", ".acquire.cta", ".acquire.cluster"})
    f["mbarrier.try_wait.parity" + std::string(acquire) + ".shared::cta.b64"] = {try_wait, "pmw"};
  f["cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster"] = {copy, "mmwmh"};
  f["fence.proxy.async.shared::cta"] = {show, ""};
  f["wgmma.fence.sync.aligned"] = {fence, ""};
  f["wgmma.commit_group.sync.aligned"] = {commit, ""};
  f["wgmma.wait_group.sync.aligned"] = {wait, "n"};
  add_multiply<false, 64>(f), add_multiply<false, 128>(f), add_multiply<false, 192>(f), add_multiply<false, 256>(f);
  add_multiply<true, 64>(f), add_multiply<true, 128>(f), add_multiply<true, 192>(f), add_multiply<true, 256>(f);
}

}  // namespace pddm::ptx
