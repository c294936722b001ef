// What the files of the emulation share: the block that runs, its fibers, and how these wait for each other.
#pragma once

#include "../cuda/primitives.h"

#include <setjmp.h>
#include <ucontext.h>

#include <cstdlib>
#include <deque>
#include <map>
#include <memory>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

namespace fastfilm::cuda::emulated {

constexpr int kWarp = 32;
constexpr int kGroup = 4;  // warps of a warpgroup
constexpr size_t kStack = 256 * 1024;

struct Copy {
  int at;
  const void* global;
  int bytes;
};

// What a fiber waits for, for the message of a deadlock.
enum class Waiting { kNothing, kBarrier, kWarp, kNamed, kMbarrier, kPoll, kRegisters, kRound };

struct Fiber {
  ucontext_t context;
  jmp_buf state;
  bool started = false;
  std::unique_ptr<char[]> stack{new char[kStack]};
  void* fake_stack = nullptr;
  const uint64_t* watched = nullptr;  // the fiber runs again once this counter differs from `seen`
  uint64_t seen = 0;
  bool done = false;
  Waiting waiting = Waiting::kNothing;
  int waits_at = 0, waits_parity = 0;  // the place of an mbarrier, or the number of a barrier
  std::vector<Copy> issued;
  std::deque<std::vector<Copy>> groups;
  int64_t fenced = -1;  // arrivals of the block at this thread's last fence
  bool began = false;   // products may be issued
  std::string error;
};

// A meeting of a warp's lanes: each leaves its operands, and the last to arrive computes the results of all.
struct Rendezvous {
  int arrived = 0;
  uint64_t generation = 0;
  uint32_t in[kWarp][6];
  const void* rows[kWarp];
  int places[kWarp];
  uint32_t out[kWarp][4];
  float sums[kWarp][4];
};

struct Mbarrier {
  int count = 0, pending = 0;
  int64_t bytes = 0;         // announced and not yet there
  uint64_t phase = 0;        // phases that have ended
  int thread = 0;            // that initialised it,
  uint64_t initialised = 0;  // and the barriers of the block at that time
  bool brings = false;       // bytes come in the current phase,
  bool awaited = false;      // and a thread waits for its end
  bool unseen = false;       // bytes came in a phase that no thread has waited for yet
};

struct NamedBarrier {
  int arrived = 0, threads = 0;
  uint64_t generation = 0;
  std::vector<int> lanes;  // that have arrived, of each warp
};

struct BulkCopy {
  int to;
  const void* from;
  int bytes, mbarrier;
};

// Who wrote eight bytes of shared memory, and after how many of its fences: they are there for the asynchronous proxy
// once the thread has come to another one.
struct Written {
  static constexpr int kNobody = -1, kEveryone = -2;
  int thread = kNobody;
  uint32_t fences = 0;
};

// Who of a warp last stored or loaded eight bytes of shared memory, and how often the warp had come to a barrier by then.
// Another lane may load or store them behind one more.
struct Access {
  static constexpr int kAllLanes = -1;  // matrices are loaded and stored by all of them
  int warp = -1, lane = kAllLanes;
  uint32_t barriers = 0;
};

struct Products;  // of a warp: products.cpp
struct FreeProducts {
  void operator()(Products* products) const;
};

struct Block {
  explicit Block(std::vector<Fiber>& pool) : fibers(pool) {}

  std::vector<Fiber>& fibers;
  Request request;
  Grid index;
  std::vector<Rendezvous> warps;
  std::unique_ptr<unsigned char, void (*)(void*)> shared{nullptr, std::free};
  int at_barrier = 0, running = 0;
  uint64_t barrier_generation = 0;
  int64_t arrivals = 0;
  int current = 0;
  uint64_t events = 0;  // grows when something happens that a thread may wait for
  uint64_t rounds = 0;  // of the scheduler, in each of which every thread may run
  int late = 0;         // threads that wait for another round
  std::mt19937_64 random;
  jmp_buf scheduler_state;
  void* scheduler_fake = nullptr;
  const void* scheduler_stack = nullptr;
  size_t scheduler_size = 0;

  std::vector<Written> written;         // of each eight bytes of shared memory
  std::vector<Access> stored, loaded;   // likewise
  std::vector<uint32_t> warp_barriers;  // to which each warp has come
  std::vector<uint32_t> fences;  // fence_async, of each thread
  std::map<int, Mbarrier> mbarriers;
  NamedBarrier named[16];
  std::vector<BulkCopy> bulk;
  std::vector<int> registers, wanted;            // of each warp's threads; 0: none wanted
  std::vector<std::vector<int>> register_calls;  // of each warp
  uint64_t shared_out = 0;                       // registers to a warp, times
  std::vector<std::unique_ptr<Products, FreeProducts>> products;  // of each warp
};

extern Block* block;
extern uint64_t seed;

struct Stop : std::runtime_error {
  using std::runtime_error::runtime_error;
};

inline Fiber& fiber() { return block->fibers[block->current]; }
inline Rendezvous& warp() { return block->warps[block->current / kWarp]; }

// Lets others run until the counter differs from `seen`.
void wait_for(const uint64_t* counter, uint64_t seen, Waiting what, int at = 0, int parity = 0);
// Lets others run once, behind a question that had no for an answer.
void poll(int at, int parity);
// Lets all others run before the current thread goes on.
void wait_for_round();

// Calls `compute` in the lane that arrives last; returns in every lane after that.
template <class Compute>
void meet(Compute compute) {
  Rendezvous& w = warp();
  const uint64_t generation = w.generation;
  if (++w.arrived == kWarp) {
    compute(w);
    w.arrived = 0;
    ++w.generation;
  } else {
    wait_for(&w.generation, generation, Waiting::kWarp);
  }
}

// Notes that a thread writes to shared memory, `at` and `bytes` multiples of eight. What is `in_flight` has yet to be
// noted once more.
inline void note_write(int thread, int at, int bytes, bool in_flight = false) {
  const uint32_t fences = in_flight || thread < 0 ? UINT32_MAX : block->fences[thread];
  for (int i = at / 8; i < (at + bytes) / 8; ++i) block->written[i] = {thread, fences};
}

// A lane of the current thread's warp, or all, stores or loads bytes. An error if another lane did so without a barrier since:
// the order in which they come to shared memory is not that of the emulation.
void note_store(int at, int bytes, int lane);
void note_load(int at, int bytes, int lane);

// Whether the asynchronous proxy finds what was last written to these eight bytes.
inline bool visible_to_products(int at) {
  const Written& w = block->written[at / 8];
  return w.thread == Written::kEveryone || (w.thread >= 0 && block->fences[w.thread] > w.fences);
}

// sm90.cpp: the beginning of a block, a round of the scheduler, the end of a thread and of a block, and what a thread
// waits for.
void begin_sm90();
bool complete_copies(bool all_else_waits);
void release_barrier_if_complete();
void end_block_sm90();
std::string mbarrier_text(int at, int parity);
std::string registers_text(int warp);

// products.cpp: the end of a thread; an error if it leaves products behind.
void end_products();

}  // namespace fastfilm::cuda::emulated
