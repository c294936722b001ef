// The emulation of what blocks of sm_90a have beside products: the asynchronous proxy's view of shared memory,
// mbarriers, bulk copies, barriers of a part of the threads, register budgets. sm90.h has the interface.
#include "../cuda/sm90/primitives.h"

#include <algorithm>
#include <utility>

#include "state.h"

namespace fastfilm::cuda::emulated {
namespace {

constexpr int kRegisterFile = 64 * 1024;

std::string number(int64_t value) { return std::to_string(value); }

// The registers of each thread when the block starts, and those that the block has to share out.
int first_registers() { return std::min(248, kRegisterFile / block->request.threads / 8 * 8); }
int free_registers() {
  int free = first_registers() * block->request.threads;
  for (int count : block->registers) free -= count * kWarp;
  return free;
}

bool inside(int at, int bytes) { return at >= 0 && bytes >= 0 && int64_t{at} + bytes <= block->request.shared_bytes; }

Mbarrier& mbarrier(const char* who, int at) {
  const auto found = block->mbarriers.find(at);
  if (found == block->mbarriers.end()) throw Stop(std::string(who) + ": no mbarrier was initialised at " + number(at));
  Mbarrier& m = found->second;
  if (m.thread != block->current && m.initialised == block->barrier_generation) {
    throw Stop(std::string(who) + ": no barrier follows the initialisation of the mbarrier at " + number(at));
  }
  return m;
}

void end_phase_if_complete(Mbarrier& m, int at) {
  if (m.pending || m.bytes) return;
  if (m.unseen)
    throw Stop("bytes came to the mbarrier at " + number(at) + " twice, and no thread waited for the first");
  m.unseen = m.brings && !m.awaited;
  m.brings = m.awaited = false;
  m.pending = m.count;
  ++m.phase;
  ++block->events;
}

void come(Mbarrier& m, int at) {
  if (m.pending == 0) {
    throw Stop("more than " + number(m.count) + " arrivals at the mbarrier at " + number(at) + " in phase " +
               number(m.phase));
  }
  --m.pending;
  ++block->events;
  end_phase_if_complete(m, at);
}

bool ended(const Mbarrier& m, int parity) {
  if (parity != 0 && parity != 1) fail("mbarrier: the parity of a phase is 0 or 1");
  return static_cast<int>(m.phase & 1) != parity;
}

void complete(const BulkCopy& copy) {
  std::memcpy(block->shared.get() + copy.to, copy.from, copy.bytes);
  note_write(Written::kEveryone, copy.to, copy.bytes);
  Mbarrier& m = block->mbarriers.at(copy.mbarrier);
  m.bytes -= copy.bytes;
  m.brings = true;
  ++block->events;
  end_phase_if_complete(m, copy.mbarrier);
}

}  // namespace

namespace {

void check(const Access& before, int lane, const char* what) {
  const int w = block->current / kWarp;
  if (before.warp != w || before.barriers != block->warp_barriers[w]) return;
  if (lane == before.lane && lane != Access::kAllLanes) return;
  throw Stop(std::string("a lane ") + what + ", without a warp_barrier between");
}

}  // namespace

void note_store(int at, int bytes, int lane) {
  const int w = block->current / kWarp;
  for (int i = at / 8; i < (at + bytes) / 8; ++i) {
    check(block->loaded[i], lane, "stores where another one has loaded");
    block->stored[i] = {w, lane, block->warp_barriers[w]};
    block->loaded[i] = {};
  }
}

void note_load(int at, int bytes, int lane) {
  const int w = block->current / kWarp;
  for (int i = at / 8; i < (at + bytes) / 8; ++i) {
    check(block->stored[i], lane, "loads what another one has stored");
    Access& loaded = block->loaded[i];
    const bool others = loaded.warp == w && loaded.barriers == block->warp_barriers[w] && loaded.lane != lane;
    loaded = {w, others ? Access::kAllLanes : lane, block->warp_barriers[w]};
  }
}

void begin_sm90() {
  const int threads = block->request.threads;
  block->written.assign((block->request.shared_bytes + 7) / 8, {});
  block->stored.assign(block->written.size(), {});
  block->loaded.assign(block->written.size(), {});
  block->warp_barriers.assign(threads / kWarp, 0);
  block->fences.assign(threads, 0);
  block->mbarriers.clear();
  for (NamedBarrier& b : block->named) b = {};
  block->bulk.clear();
  block->registers.assign(threads / kWarp, first_registers());
  block->wanted.assign(threads / kWarp, 0);
  block->register_calls.assign(threads / kWarp, {});
  for (auto& products : block->products) products.reset();
}

bool complete_copies(bool all_else_waits) {
  std::vector<BulkCopy>& bulk = block->bulk;
  if (bulk.empty()) return false;
  if (seed == 0) {
    for (const BulkCopy& copy : std::exchange(bulk, {})) complete(copy);
    return true;
  }
  if (!all_else_waits && block->random() % 4) return false;
  std::swap(bulk[block->random() % bulk.size()], bulk.back());
  const BulkCopy copy = bulk.back();
  bulk.pop_back();
  complete(copy);
  return true;
}

void end_block_sm90() {
  bool lost = !block->bulk.empty();
  for (const auto& [at, m] : block->mbarriers) lost |= m.unseen;
  if (lost) throw Stop("a bulk copy was never waited for");
  const auto& calls = block->register_calls;
  for (size_t w = 0; w < calls.size(); ++w) {
    if (calls[w] != calls[w / kGroup * kGroup]) {
      throw Stop("registers: the warps of warpgroup " + number(w / kGroup) + " come to different calls");
    }
  }
}

std::string mbarrier_text(int at, int parity) {
  const Mbarrier& m = block->mbarriers.at(at);
  return "the mbarrier at " + number(at) + " (parity " + number(parity) + "; its phase " + number(m.phase) +
         " misses " + number(m.pending) + " of " + number(m.count) + " arrivals and " + number(m.bytes) + " bytes)";
}

std::string registers_text(int warp) {
  return "registers: " + number(block->wanted[warp]) + " for each thread beside the " + number(block->registers[warp]) +
         " it has, of " + number(free_registers()) + " that are free";
}

int uniform(int value) {
  const int lane = block->current % kWarp;
  Rendezvous& w = warp();
  w.places[lane] = value;
  meet([](Rendezvous& all) {
    for (int other : all.places) {
      if (other != all.places[0]) fail("uniform: the lanes of a warp do not agree");
    }
  });
  return value;
}

void fence_async() { ++block->fences[block->current]; }

void mbarrier_init(int at, int count) {
  shared8("mbarrier_init", at);
  if (count < 1) fail("mbarrier_init: the count is not positive");
  if (block->mbarriers.count(at)) throw Stop("mbarrier_init: twice at " + number(at));
  Mbarrier& m = block->mbarriers[at];
  m.count = m.pending = count;
  m.thread = block->current;
  m.initialised = block->barrier_generation;
  note_write(block->current, at, 8);
}

void mbarrier_arrive(int at) { come(mbarrier("mbarrier_arrive", at), at); }

void mbarrier_expect(int at, int bytes) {
  Mbarrier& m = mbarrier("mbarrier_expect", at);
  m.bytes += bytes;
  come(m, at);
}

bool mbarrier_test(int at, int parity) {
  Mbarrier& m = mbarrier("mbarrier_test", at);
  if (ended(m, parity)) {
    m.unseen = false;
    return true;
  }
  poll(at, parity);
  return false;
}

void mbarrier_wait(int at, int parity) {
  Mbarrier& m = mbarrier("mbarrier_wait", at);
  while (!ended(m, parity)) {
    m.awaited = true;
    wait_for(&m.phase, m.phase, Waiting::kMbarrier, at, parity);
  }
  m.unseen = false;
}

void copy_bulk(int to, const void* from, int bytes, int at) {
  mbarrier("copy_bulk", at);
  if (to % 16 || bytes % 16 || reinterpret_cast<uintptr_t>(from) % 16) fail("copy_bulk: misaligned address or size");
  if (bytes == 0 || !inside(to, bytes)) fail("copy_bulk: the target is not inside shared memory");
  if (!visible_to_products(at)) fail("copy_bulk: no fence_async follows the initialisation of the mbarrier");
  std::memset(block->shared.get() + to, 0xff, bytes);
  note_write(Written::kNobody, to, bytes, true);
  block->bulk.push_back({to, from, bytes, at});
  ++block->events;
}

void barrier_of(int id, int threads) {
  if (id < 1 || id > 15) fail("barrier_of: the number is not from 1 to 15");
  if (threads < kWarp || threads % kWarp || threads > block->request.threads) {
    throw Stop("barrier_of: barrier " + number(id) + " cannot have " + number(threads) + " threads");
  }
  NamedBarrier& b = block->named[id];
  if (b.arrived && b.threads != threads) {
    throw Stop("barrier_of: barrier " + number(id) + " has " + number(b.threads) + " threads for some and " +
               number(threads) + " for others");
  }
  b.threads = threads;
  b.lanes.resize(block->warps.size());
  ++b.lanes[block->current / kWarp];
  const uint64_t generation = b.generation;
  if (++b.arrived < threads) {
    wait_for(&b.generation, generation, Waiting::kNamed, id);
    return;
  }
  for (int lanes : b.lanes) {
    if (lanes % kWarp) throw Stop("barrier_of: a part of a warp comes to barrier " + number(id));
  }
  for (size_t w = 0; w < b.lanes.size(); ++w) block->warp_barriers[w] += b.lanes[w] > 0;
  b.lanes.clear();
  b.arrived = 0;
  ++b.generation;
  ++block->events;
}

namespace {

// Gives waiting warps what they want, as far as it is there; those that want fewer come first.
void share_out() {
  for (const bool fewer : {true, false}) {
    for (size_t w = 0; w < block->wanted.size(); ++w) {
      const int more = block->wanted[w] - block->registers[w];
      if (block->wanted[w] == 0 || (more < 0) != fewer || more * kWarp > free_registers()) continue;
      block->registers[w] += more;
      block->wanted[w] = 0;
      ++block->shared_out;
      ++block->events;
    }
  }
}

void set_registers(int count, bool more) {
  const int w = block->current / kWarp;
  meet([=](Rendezvous&) {
    const int now = block->registers[w];
    if (count % 8 || count < 24 || count > 256) fail("registers: not a multiple of 8 from 24 to 256");
    if (w / kGroup * kGroup + kGroup > static_cast<int>(block->warps.size())) fail("registers: not a whole warpgroup");
    if (more ? count < now : count > now) {
      throw Stop("registers: " + number(now) + " cannot be " + (more ? "increased" : "decreased") + " to " +
                 number(count));
    }
    std::vector<int>& calls = block->register_calls[w];
    calls.push_back(count);
    for (int other = w / kGroup * kGroup; other < w / kGroup * kGroup + kGroup; ++other) {
      const std::vector<int>& theirs = block->register_calls[other];
      if (theirs.size() >= calls.size() && theirs[calls.size() - 1] != count) {
        fail("registers: the warps of a warpgroup come to different calls");
      }
    }
    block->wanted[w] = count;
    share_out();
  });
  while (block->wanted[w]) wait_for(&block->shared_out, block->shared_out, Waiting::kRegisters);
}

}  // namespace

void take_registers(int count) { set_registers(count, true); }
void give_registers(int count) { set_registers(count, false); }

void store_matrix4_transposed(int row, const uint32_t (&r)[4]) {
  const int lane = block->current % kWarp;
  shared16("store_matrix4_transposed", row);
  Rendezvous& own = warp();
  own.places[lane] = row;
  for (int m = 0; m < 4; ++m) own.in[lane][m] = r[m];
  meet([](Rendezvous& all) {
    const int first = block->current / kWarp * kWarp;
    for (int i = 0; i < kWarp; ++i) {
      note_write(first + i, all.places[i], 16);
      note_store(all.places[i], 16, Access::kAllLanes);
      for (int m = 0; m < 4; ++m) {
        for (int h = 0; h < 2; ++h) {
          const uint16_t value = static_cast<uint16_t>(all.in[i][m] >> 16 * h);
          const int column = i % 4 * 2 + h;
          std::memcpy(block->shared.get() + all.places[8 * m + column] + i / 4 * 2, &value, 2);
        }
      }
    }
  });
}

}  // namespace fastfilm::cuda::emulated
