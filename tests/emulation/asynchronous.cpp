// Clusters, barriers that count bytes, bulk copies and the matrix unit: what goes on beside a block's threads.
#include "machine.h"

namespace pddm::emulation {
namespace {

constexpr unsigned kRegisters = 64 << 10, kMostOfThread = 256;  // of a multiprocessor
constexpr int64_t kMostBytes = (1 << 20) - 1;                   // that a barrier counts
constexpr uint64_t kBarrierMark = 0xba22ed1e00000000;           // what its memory holds, with its place

uint64_t mark(uint32_t at) { return kBarrierMark | at; }

// At once, by chance, or as late as can be.
enum class Moment { now, between, late };
Moment moment(Order& order) { return Moment(order.moment(3)); }

std::string of_parity(unsigned parity) { return text("the phase of parity %u of ", parity); }

}  // namespace

void Machine::need_hopper(const char* what) const {
  if (launch_->major && launch_->major != 9)
    fail(text("%s, on a device of compute capability %d; it is of 9.0 alone", what, launch_->major));
}

Block& Machine::block(unsigned rank, const char* what) {
  if (rank >= cluster_) fail(text("%s block %u of a cluster of %u", what, rank, cluster_));
  if (!blocks_[rank].live) fail(text("%s block %u of the cluster, which has ended", what, rank));
  return blocks_[rank];
}

void Machine::begin_asynchronous(Block& b) {
  b.shown.clear(), b.barriers.clear();
  for (auto& some : b.some) some.arrived = 0;
  for (auto& issued : b.issued) issued.clear();
  b.free_registers = 0;
  for (unsigned w = 0; w < b.warp_count; ++w) {
    Warp& warp = b.warps[w];
    warp.products.clear();
    warp.groups = 0, warp.begun = false, warp.issued = 0;
    warp.registers = std::min(kMostOfThread, kRegisters / (b.warp_count * kLanes) / 8 * 8);
  }
}

void Machine::end_of_thread() {
  Block& b = *block_;
  if (thread().at_cluster) fail("the thread ends before it has waited at the cluster's barrier");
  if (!warp().products.empty()) fail("the thread ends, and has not waited for its products");
  if (cluster_arrived_ && cluster_arrived_ == live()) end_cluster_phase();
  if (b.live) return;
  for (const BulkCopy& copy : copies_)
    if (copy.left[b.rank].first < copy.left[b.rank].last)
      fail(text("the block ends while a copy to byte %u of its shared memory is on its way", copy.to));
  for (unsigned w = 0; w < b.warp_count; ++w) {
    if (b.warps[w].issued != b.issued[w / 4].size())
      fail(text("warps of warpgroup %u have issued %zu and %zu matrix instructions", w / 4, b.warps[w].issued,
                b.issued[w / 4].size()));
    if (b.warps[w].registers != b.warps[w / 4 * 4].registers)
      fail(text("warps of warpgroup %u have %u and %u registers", w / 4, b.warps[w / 4 * 4].registers,
                b.warps[w].registers));
  }
}

// --- Sleep -----------------------------------------------------------------------------------------------------------

void Machine::sleep(Sleep kind, uint32_t key, uint32_t detail) {
  Warp& w = warp();
  w.sleep[lane_] = kind, w.key[lane_] = key, w.detail[lane_] = detail;
  w.asleep |= 1u << lane_;
  wait(w);
}

void Machine::wake(Block& b, Sleep kind, uint32_t key) {
  for (unsigned w = 0; w < b.warp_count; ++w) {
    Warp& warp = b.warps[w];
    uint32_t awake = 0;
    for (uint32_t left = warp.asleep; left; left &= left - 1) {
      const int l = __builtin_ctz(left);
      if (warp.sleep[l] == kind && warp.key[l] == key) awake |= 1u << l;
    }
    warp.asleep &= ~awake;
    make_ready(b, w, awake);
  }
}

std::string Machine::asleep(const Block& b, const Warp& w, unsigned lane) const {
  const uint32_t key = w.key[lane];
  switch (w.sleep[lane]) {
    case Sleep::cluster: return text("the cluster's barrier, at which %u of %u are", cluster_arrived_, live());
    case Sleep::some: return text("barrier %u, at which %u of %u are", key, b.some[key].arrived, b.some[key].count);
    case Sleep::registers:
      return text("%u registers instead of %u, and %u are free", w.wanted, w.registers, b.free_registers / kLanes);
    case Sleep::products: return "a matrix instruction that some warp of the warpgroup has not come to";
    case Sleep::barrier: break;
  }
  const auto found = b.barriers.find(key);
  if (found == b.barriers.end()) return "a barrier that is gone";
  const Mbarrier& m = found->second;
  std::string missing = text("%d of %d arrivals are missing", m.pending, m.count);
  if (m.bytes > 0) missing += text(", and %lld bytes of those announced", static_cast<long long>(m.bytes));
  if (m.bytes < 0) missing += text(", and %lld bytes came that nobody announced", static_cast<long long>(-m.bytes));
  return of_parity(w.detail[lane]) + text("the barrier at byte %u, which is in phase %u: ", key, m.phase) + missing;
}

// --- The cluster and its barrier, and barriers of some threads -------------------------------------------------------

void Machine::cluster_arrive() {
  Thread& t = thread();
  if (t.at_cluster) fail("a second arrival at the cluster's barrier, without a wait between them");
  t.at_cluster = true, t.cluster_phase = cluster_phase_;
  if (++cluster_arrived_ == live()) end_cluster_phase();
}

void Machine::cluster_wait() {
  Thread& t = thread();
  if (!t.at_cluster) fail("a wait at the cluster's barrier, without an arrival");
  t.at_cluster = false;
  while (cluster_phase_ == t.cluster_phase) sleep(Sleep::cluster, 0, 0), go_on();
}

void Machine::end_cluster_phase() {
  cluster_arrived_ = 0, ++cluster_phase_, anew_ = true;
  for (unsigned rank = 0; rank < cluster_; ++rank) wake(blocks_[rank], Sleep::cluster, 0);
}

void Machine::some_barrier(unsigned which, unsigned count) {
  if (which >= 16) fail(text("the barrier %u; there are 16", which));
  if (which == 0) fail("the barrier 0 with a count: it is __syncthreads'");
  if (count == 0 || count % kLanes) fail(text("a barrier of %u threads, which are no whole warps", count));
  auto& some = block_->some[which];
  if (some.arrived && some.count != count)
    fail(text("the barrier %u of %u threads and of %u", which, some.count, count));
  some.count = count;
  sleep(Sleep::some, which, 0);
  if (++some.arrived == count) some.arrived = 0, anew_ = true, wake(*block_, Sleep::some, which);
  go_on();
}

// --- Barriers that count bytes ---------------------------------------------------------------------------------------

Mbarrier& Machine::find_barrier(Block& b, uint32_t at, const char* what) {
  const auto found = b.barriers.find(at);
  if (found == b.barriers.end()) fail(text("%s the barrier at byte %u, where none was initialised", what, at));
  const uint64_t expected = mark(at);
  if (std::memcmp(b.shared->data() + at, &expected, sizeof expected) != 0)
    fail(text("%s the barrier at byte %u, which was overwritten", what, at));
  return found->second;
}

void Machine::init_barrier(uint32_t at, int count) {
  Block& b = *block_;
  if (at % 8 || count < 1 || count > kMostBytes) fail(text("a barrier at byte %u, of %d arrivals", at, count));
  if (!b.barriers.emplace(at, Mbarrier{count, count, 0, 0, false}).second)
    fail(text("the barrier at byte %u is initialised again", at));
  const uint64_t is = mark(at);
  std::memcpy(b.shared->data() + at, &is, sizeof is);
  show(at, sizeof is);
  thread().initialised.push_back(at);
}

// This thread's.
void Machine::publish_barriers() {
  for (uint32_t at : thread().initialised) find_barrier(*block_, at, "the publishing of").published = true;
  thread().initialised.clear();
}

void Machine::end_phase(Block& b, uint32_t at, Mbarrier& m) {
  if (m.pending || m.bytes) return;
  m.pending = m.count, ++m.phase;
  wake(b, Sleep::barrier, at);
}

void Machine::arrive(uint32_t at, unsigned rank, int bytes) {
  Block& b = block(rank, "an arrival at");
  Mbarrier& m = find_barrier(b, at, "an arrival at");
  if (&b != block_ && !m.published) fail(text("an arrival at the other block's barrier at byte %u, not published", at));
  if (bytes < 0 || bytes > kMostBytes) fail(text("%d bytes are announced", bytes));
  if (!m.pending) fail(text("an arrival at the barrier at byte %u beyond its %d", at, m.count));
  m.bytes += bytes, --m.pending;
  end_phase(b, at, m);
}

bool Machine::try_wait(uint32_t at, unsigned parity) {
  if (parity > 1) fail(text("a wait for the parity %u", parity));
  const Mbarrier& m = find_barrier(*block_, at, "a wait for");
  const auto ended = [&] { return (m.phase & 1) != parity; };
  if (ended()) return true;
  // A thread that does not try again must not get away with it.
  const int64_t here = int64_t(m.phase) << 32 | at;
  if (std::exchange(thread().gave_up_on, here) != here) return false;
  sleep(Sleep::barrier, at, parity);
  go_on();
  return ended();
}

// --- Copies ----------------------------------------------------------------------------------------------------------

void Machine::show(uint32_t first, size_t bytes) {
  Block& b = *block_;
  if (b.shown.empty()) b.shown.assign(b.shared->bytes(), 0xFF);
  std::memcpy(b.shown.data() + first, b.shared->data() + first, bytes);
}

void Machine::copy(uint32_t to, const void* from, size_t bytes, uint32_t barrier, unsigned mask) {
  need_hopper("a bulk copy");
  if (to % 16 || reinterpret_cast<uintptr_t>(from) % 16 || bytes % 16 || bytes == 0 || int64_t(bytes) > kMostBytes)
    fail(text("a bulk copy of %zu bytes from %p to byte %u: all are to be multiples of 16", bytes, from, to));
  if (mask == 0 || mask >> cluster_) fail(text("a bulk copy to the blocks 0x%x of a cluster of %u", mask, cluster_));
  BulkCopy copy{static_cast<const unsigned char*>(from), to, barrier, false, {}};
  for (unsigned rank = 0; rank < cluster_; ++rank) {
    if (!(mask >> rank & 1)) continue;
    Block& b = block(rank, "a copy to");
    if (b.shared->contains(from, 1)) fail("a bulk copy from shared memory");
    if (!find_barrier(b, barrier, "a copy that counts at").published)
      fail(text("a copy that counts at the barrier at byte %u, not published", barrier));
    if (b.shown.empty()) b.shown.assign(b.shared->bytes(), 0xFF);
    if (std::memcmp(b.shared->data() + to, b.shown.data() + to, bytes) != 0)
      fail(text("a bulk copy to byte %u of block %u, over what was stored and not shown", to, rank));
    std::memset(b.shared->data() + to, 0xFF, bytes), std::memset(b.shown.data() + to, 0xFF, bytes);
    copy.left[rank] = {0, uint32_t(bytes)};
  }
  const Moment when = moment(*order_);
  copy.late = when == Moment::late;
  if (when == Moment::now) {
    for (unsigned rank = 0; rank < cluster_; ++rank)
      while (copy.left[rank].first < copy.left[rank].last) land(copy, rank);
  } else {
    copies_.push_back(copy);
  }
}

// Some 16 bytes of what is left, at one end or the other.
void Machine::land(BulkCopy& copy, unsigned rank) {
  Block& b = blocks_[rank];
  auto& left = copy.left[rank];
  const unsigned pieces = (left.last - left.first) / 16;
  const uint32_t bytes = (order_->moment(4) ? 1 + order_->moment(pieces) : pieces) * 16;
  const uint32_t first = order_->moment(2) ? left.first : left.last - bytes;
  (first == left.first ? left.first : left.last) = first == left.first ? first + bytes : first;
  std::memcpy(b.shared->data() + copy.to + first, copy.from + first, bytes);
  std::memcpy(b.shown.data() + copy.to + first, copy.from + first, bytes);
  Mbarrier& m = find_barrier(b, copy.barrier, "a copy that counts at");
  m.bytes -= bytes;
  end_phase(b, copy.barrier, m);
}

// Now and then something of what is on its way; if nobody can go on, until somebody can.
void Machine::advance() {
  if (ready_warps_ && order_->moment(8) == 0) step(false);
  while (!ready_warps_ && !(copies_.empty() && unread_.empty())) step(true);
}

void Machine::step(bool forced) {
  const size_t which = order_->moment(unsigned(copies_.size() + unread_.size()));
  if (which >= copies_.size()) {
    Product& product = *unread_[which - copies_.size()];
    if (forced || !product.late) read_operands(product);
    return;
  }
  BulkCopy& copy = copies_[which];
  if (copy.late && !forced) return;
  const auto lacks = [&](unsigned rank) { return copy.left[rank].first < copy.left[rank].last; };
  unsigned rank = order_->moment(cluster_);
  if (!lacks(rank)) rank = cluster_ - 1 - rank;
  land(copy, rank);
  if (lacks(0) || (cluster_ > 1 && lacks(1))) return;
  std::swap(copy, copies_.back());
  copies_.pop_back();
}

// --- The matrix unit -------------------------------------------------------------------------------------------------

uint32_t tile_address(uint64_t descriptor, unsigned row, unsigned piece) {
  const auto field = [&](int first, int bits) { return uint32_t(descriptor >> first & ((uint64_t(1) << bits) - 1)); };
  const uint32_t start = field(0, 14) << 4, eight_rows = field(32, 14) << 4;
  const auto refuse = [&](const char* what) {
    throw std::invalid_argument(text("the descriptor 0x%016llx: ", static_cast<unsigned long long>(descriptor)) + what);
  };
  const uint32_t swizzle = field(62, 2), row_bytes = swizzle == 1 ? 128 : 64, mask = row_bytes / 16 - 1;
  if (swizzle != 1 && swizzle != 2) refuse("its swizzle is neither that of 128 bytes nor that of 64");
  if (field(14, 2) || field(30, 2) || field(46, 3) || field(52, 10)) refuse("a bit that has no meaning is set");
  if (field(49, 3) || start >> 7 & mask) refuse("its rows do not start where the swizzle does");
  if (start % row_bytes + 32 > row_bytes) refuse("it leaves its rows");
  const uint32_t address = start + row / 8 * eight_rows + row % 8 * row_bytes + piece * 16;
  return address ^ (address >> 7 & mask) << 4;
}

namespace {

// Calls f(offset in shared memory, row, piece) for what a warp reads of an operand.
template <class F>
void for_pieces(uint64_t descriptor, unsigned first_row, unsigned rows, const F& f) {
  for (unsigned row = 0; row < rows; ++row)
    for (unsigned piece = 0; piece < 2; ++piece)
      f(tile_address(descriptor, first_row + row, piece) - kSharedAddress, row, piece);
}

}  // namespace

// A mark of what the matrix unit sees there, which must be what threads see.
uint64_t Machine::look_at_operands(const Product& product) const {
  const Block& b = blocks_[product.block];
  uint64_t mark = 0;
  const auto look = [&](const char* operand) {
    return [&, operand](uint32_t at, unsigned row, unsigned) {
      if (at > b.shared->bytes() || at + 16 > b.shared->bytes())
        throw std::runtime_error(name_of(b.index) + text(": %s reads outside of shared memory", product.what.where));
      uint64_t seen[2], real[2];
      std::memcpy(seen, b.shown.data() + at, 16), std::memcpy(real, b.shared->data() + at, 16);
      if (seen[0] != real[0] || seen[1] != real[1])
        throw std::runtime_error(
            name_of(b.index) + ": " + product.what.where +
            text(": row %u of %s, at byte %u, was stored and not shown to the matrix unit", row, operand, at));
      mark = ((mark ^ seen[0]) * 0x9e3779b97f4a7c15 ^ seen[1]) * 0x9e3779b97f4a7c15;
      mark ^= mark >> 32;
    };
  };
  if (!product.what.a.base) for_pieces(product.what.a_tile, product.warp % 4 * 16, 16, look("a"));
  for_pieces(product.what.b_tile, 0, product.what.columns, look("b"));
  return mark;
}

void Machine::need_same_operands(const Product& product) const {
  if (look_at_operands(product) != product.operands)
    throw std::runtime_error(name_of(blocks_[product.block].index) + ": " + product.what.where +
                             ": its operands in shared memory were written to after it was issued");
}

void Machine::read_operands(Product& product) {
  const Block& b = blocks_[product.block];
  need_same_operands(product);
  uint16_t left[16 * 16];
  std::vector<uint16_t> right(product.what.columns * 16);
  const auto into = [&](uint16_t* to) {
    return [&b, to](uint32_t at, unsigned row, unsigned piece) {
      std::memcpy(to + row * 16 + piece * 8, b.shown.data() + at, 16);
    };
  };
  if (product.what.a.base) {
    for (unsigned l = 0; l < kLanes; ++l)
      for (unsigned r = 0; r < 4; ++r)
        std::memcpy(left + (l / 4 + r % 2 * 8) * 16 + l % 4 * 2 + r / 2 * 8, &product.a[l][r], 4);
  } else {
    for_pieces(product.what.a_tile, product.warp % 4 * 16, 16, into(left));
  }
  for_pieces(product.what.b_tile, 0, product.what.columns, into(right.data()));
  product.values.resize(16 * size_t(product.what.columns));
  product.what.multiply(product.values.data(), left, right.data(), product.what.columns);
  product.has_read = true;
  unread_.erase(std::remove(unread_.begin(), unread_.end(), &product), unread_.end());
}

namespace {

// f(register of this lane's, place among 16 × columns)
template <class F>
void for_sums(const Sums& sums, const F& f) {
  for (unsigned l = 0; l < kLanes; ++l)
    for (unsigned i = 0; i < sums.columns / 2; ++i)
      f(sums.lanes[l].at(i), (l / 4 + i / 2 % 2 * 8) * sums.columns + i / 4 * 8 + l % 4 * 2 + i % 2);
}

}  // namespace

void Machine::issue(void* const* lanes) {
  Block& b = *block_;
  Warp& w = warp();
  const auto of = [&](unsigned l) -> const MatrixInstruction& { return *static_cast<MatrixInstruction*>(lanes[l]); };
  const MatrixInstruction& first = of(0);
  need_hopper(first.where);
  if (b.warp_count < warp_ / 4 * 4 + 4) fail(text("%s by a warp that is of no warpgroup", first.where));
  for (unsigned l = 1; l < kLanes; ++l)
    if (of(l).a_tile != first.a_tile || of(l).b_tile != first.b_tile || of(l).add != first.add)
      fail(text("%s, for which the lanes have several descriptors or predicates", first.where));

  std::vector<Issued>& issued = b.issued[warp_ / 4];
  if (w.issued == issued.size()) issued.push_back({first.where, first.a_tile, first.b_tile, first.add});
  Issued& all = issued[w.issued++];
  if (std::strcmp(all.where, first.where) != 0 || all.a != first.a_tile || all.b != first.b_tile ||
      all.add != first.add)
    fail(text("%s is not what another warp of the warpgroup has issued: %s", first.where, all.where));
  const unsigned needed = first.columns / 2 + (first.a.base ? 4 : 0);
  if (needed >= w.registers)
    fail(text("%s has %u operands in registers, of which the thread has %u", first.where, needed, w.registers));

  auto product = std::make_unique<Product>();
  Product& p = *product;
  p.what = first, p.warp = warp_, p.block = b.rank, p.group = w.groups, p.number = w.issued - 1;
  for (const auto& other : w.products) {
    const Registers &theirs = other->sums->lanes[0], &ours = first.sums;
    const unsigned char* const end = theirs.at(0) + 4 * other->sums->columns / 2;
    if (theirs.at(0) == ours.at(0) && other->sums->columns == first.columns)
      p.sums = other->sums;
    else if (!ours.slots && ours.at(0) < end && theirs.at(0) < ours.at(0) + 4 * first.columns / 2)
      fail(text("%s adds to part of the sums of one that is on its way", first.where));
  }
  if (!w.begun && (!p.sums || first.a.base))
    fail(text("%s, and no wgmma.fence since its registers were last another's", first.where));
  for (unsigned l = 0; l < kLanes; ++l) {
    p.a_lanes[l] = of(l).a;
    for (unsigned r = 0; r < 4 && first.a.base; ++r) std::memcpy(&p.a[l][r], of(l).a.at(r), 4);
  }
  if (!p.sums) {
    p.sums = std::make_shared<Sums>();
    for (unsigned l = 0; l < kLanes; ++l) p.sums->lanes[l] = of(l).sums;
    p.sums->columns = first.columns;
    p.sums->values.assign(16 * size_t(first.columns), 0);
    for_sums(*p.sums, [&](unsigned char* at, size_t place) {
      if (first.add) std::memcpy(&p.sums->values[place], at, 4);
      std::memcpy(at, &kNoSum, 4);
    });
  }
  ++p.sums->in_flight;
  if (b.shown.empty()) b.shown.assign(b.shared->bytes(), 0xFF);
  try {
    p.operands = look_at_operands(p);
  } catch (const std::invalid_argument& error) {
    fail(text("%s: %s", first.where, error.what()));
  }
  all.parts[warp_ % 4] = &p;
  w.products.push_back(std::move(product));
  if (++all.warps < 4) return;
  for (Product* part : all.parts) {
    const Moment when = moment(*order_);
    part->late = when == Moment::late;
    unread_.push_back(part);
    if (when == Moment::now) read_operands(*part);
  }
  wake(b, Sleep::products, warp_ / 4);
}

void Machine::commit() { ++warp().groups; }

// Whether all that the wait covers is done, and then it is no longer on its way.
bool Machine::retire_products(int pending) {
  Warp& w = warp();
  std::vector<Issued>& issued = block_->issued[warp_ / 4];
  const auto covered = [&](const std::unique_ptr<Product>& product) { return product->group < w.groups - pending; };
  for (const auto& product : w.products)
    if (covered(product) && issued[product->number].warps < 4) return false;
  while (!w.products.empty() && covered(w.products.front())) {
    Product& product = *w.products.front();
    for (Product*& part : issued[product.number].parts) {
      if (!part) continue;
      need_same_operands(*part);
      if (!part->has_read) read_operands(*part);
      part = nullptr;
    }
    retire(product);
    w.products.pop_front();
    w.begun = false;
  }
  return true;
}

// Every lane of the warp; the first for which it is so does it for all.
void Machine::wait_for_products(int pending) {
  while (!retire_products(pending)) sleep(Sleep::products, warp_ / 4, 0), go_on();
}

void Machine::retire(Product& p) {
  for (unsigned l = 0; l < kLanes; ++l)
    for (unsigned r = 0; r < 4 && p.what.a.base; ++r)
      if (std::memcmp(p.a_lanes[l].at(r), &p.a[l][r], 4) != 0)
        fail(text("%s: lane %u has changed a's register %u before it waited", p.what.where, l, r));
  Sums& sums = *p.sums;
  for_sums(sums, [&](const unsigned char* at, size_t place) {
    if (std::memcmp(at, &kNoSum, 4) != 0)
      fail(text("%s: the sum of row %zu, column %zu was written to before the wait", p.what.where, place / sums.columns,
                place % sums.columns));
    sums.values[place] = (p.what.add ? sums.values[place] : 0) + p.values[place];
  });
  if (--sums.in_flight) return;
  for_sums(sums, [&](unsigned char* at, size_t place) { std::memcpy(at, &sums.values[place], 4); });
}

// --- For the threads -------------------------------------------------------------------------------------------------

uint32_t shared_offset(const void* address, size_t bytes, const char* what) {
  const Shared& shared = running().shared();
  if (!shared.contains(address, bytes)) fail(text("%s %p, outside of shared memory", what, address));
  return uint32_t(static_cast<const unsigned char*>(address) - shared.data());
}

unsigned char* aligned_shared_memory() {
  unsigned char* const data = running().shared().data();
  if (reinterpret_cast<uintptr_t>(data) % 1024)
    fail("shared memory aligned to 1024 bytes, in a launch without clusters");
  return data;
}

unsigned cluster_rank() { return running().block().rank; }
unsigned cluster_blocks() { return running().cluster(); }
void cluster_arrive() { running().cluster_arrive(); }
void cluster_wait() { running().cluster_wait(); }
void some_barrier(unsigned which, unsigned count) { running().some_barrier(which, count); }

void init_barrier(uint32_t at, int count) { running().init_barrier(at, count); }
void publish_barriers() { running().publish_barriers(); }
void arrive(uint32_t at, unsigned rank, int announced_bytes) { running().arrive(at, rank, announced_bytes); }
bool try_wait(uint32_t at, unsigned parity) { return running().try_wait(at, parity); }

void copy_to_cluster(uint32_t to, const void* from, size_t bytes, uint32_t barrier, unsigned mask) {
  running().copy(to, from, bytes, barrier, mask);
}
void show(uint32_t first, size_t bytes) { running().show(first, bytes); }
void show_all() { running().show(0, running().shared().bytes()); }

void Machine::change_registers(unsigned count, bool more) {
  Block& b = *block_;
  Warp& w = warp();
  need_hopper("setmaxnreg");
  if (count % 8 || count < 24 || count > kMostOfThread)
    fail(text("setmaxnreg to %u; accepted are multiples of 8 from 24 to %u", count, kMostOfThread));
  if (more ? count < w.registers : count > w.registers)
    fail(text("setmaxnreg.%s from %u to %u registers", more ? "inc" : "dec", w.registers, count));
  w.wanted = count;
  if (more) return;
  b.free_registers += (w.registers - count) * kLanes;
  w.registers = count;
  wake(b, Sleep::registers, 0);
}

// Every lane of the warp, until one finds that there are enough.
void Machine::wait_for_registers() {
  Block& b = *block_;
  Warp& w = warp();
  while (w.registers != w.wanted) {
    const unsigned needed = (w.wanted - w.registers) * kLanes;
    if (needed <= b.free_registers) {
      b.free_registers -= needed, w.registers = w.wanted;
      wake(b, Sleep::registers, 0);
    } else {
      sleep(Sleep::registers, 0, 0);
      go_on();
    }
  }
}

void change_registers(const char* where, unsigned count, bool more) {
  struct Lane {
    unsigned count;
    bool more;
  } lane{count, more};
  meet(
      where, kAllLanes,
      [](void* const* lanes, unsigned) {
        const Lane& first = *static_cast<const Lane*>(lanes[0]);
        running().change_registers(first.count, first.more);
      },
      &lane);
  running().wait_for_registers();
}

void begin_products() {
  meet("wgmma.fence", kAllLanes, [](void* const*, unsigned) { running().warp().begun = true; }, nullptr);
}
void multiply_async(MatrixInstruction instruction) {
  meet(instruction.where, kAllLanes, [](void* const* lanes, unsigned) { running().issue(lanes); }, &instruction);
}
void commit_products() {
  meet("wgmma.commit_group", kAllLanes, [](void* const*, unsigned) { running().commit(); }, nullptr);
}
void wait_products(int pending) {
  meet("wgmma.wait_group", kAllLanes, nullptr, nullptr);
  running().wait_for_products(pending);
}

}  // namespace pddm::emulation
