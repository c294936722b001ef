// The emulation of a GPU on the host: fibers, barriers, copies and matrix instructions; emulation.h has the interface.
#include "state.h"

#include <algorithm>
#include <utility>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#define FF_ASAN 1
#endif

namespace fastfilm::cuda::emulated {

Block* block = nullptr;
uint64_t seed = 0;

namespace {

int64_t block_limit = 0;
Device the_device{2, 163 * 1024, 80};
std::string reason;
std::vector<std::string> launched_kernels;

void to_scheduler(bool last) {
  Fiber& f = block->fibers[block->current];
#ifdef FF_ASAN
  __sanitizer_start_switch_fiber(last ? nullptr : &f.fake_stack, block->scheduler_stack, block->scheduler_size);
#endif
  (void)last;
  if (!_setjmp(f.state)) _longjmp(block->scheduler_state, 1);
#ifdef FF_ASAN
  __sanitizer_finish_switch_fiber(f.fake_stack, nullptr, nullptr);
#endif
}

void fiber_main() {
#ifdef FF_ASAN
  __sanitizer_finish_switch_fiber(nullptr, &block->scheduler_stack, &block->scheduler_size);
#endif
  {
    Fiber& f = block->fibers[block->current];
    try {
      block->request.body(block->request.params);
      if (!f.groups.empty() || !f.issued.empty()) f.error = "an asynchronous copy was never waited for";
      if (f.fenced >= 0 && f.fenced != block->arrivals) f.error = "no fence follows an arrival";
      end_products();
    } catch (const Stop& stop) {
      f.error = stop.what();
    }
    f.done = true;
    ++block->events;
    --block->running;
    // the others may have waited for this thread alone
    release_barrier_if_complete();
  }
  to_scheduler(true);
}

void resume(int i) {
  block->current = i;
  Fiber& f = block->fibers[i];
  f.watched = nullptr;
  f.waiting = Waiting::kNothing;
#ifdef FF_ASAN
  __sanitizer_start_switch_fiber(&block->scheduler_fake, f.stack.get(), kStack);
#endif
  // swapcontext would ask the kernel for the signal mask at every switch
  if (!_setjmp(block->scheduler_state)) {
    if (f.started) _longjmp(f.state, 1);
    f.started = true;
    setcontext(&f.context);
  }
#ifdef FF_ASAN
  __sanitizer_finish_switch_fiber(block->scheduler_fake, nullptr, nullptr);
#endif
  if (f.done && !f.error.empty()) throw Stop(f.error);
}

// What a waiting thread waits for; `several` says whether the subject is more than one.
std::string waiting_text(const Fiber& f, int thread, bool several) {
  const std::string wait = several ? " wait for " : " waits for ";
  switch (f.waiting) {
    case Waiting::kBarrier:
      return wait + "the barrier of all threads (" + std::to_string(block->running - block->at_barrier) + " missing)";
    case Waiting::kWarp:
      return wait + "the rest of the warp";
    case Waiting::kNamed: {
      const NamedBarrier& b = block->named[f.waits_at];
      return wait + "barrier " + std::to_string(f.waits_at) + " (" + std::to_string(b.threads - b.arrived) + " of " +
             std::to_string(b.threads) + " threads missing)";
    }
    case Waiting::kMbarrier:
      return wait + mbarrier_text(f.waits_at, f.waits_parity);
    case Waiting::kPoll:
      return (several ? " poll " : " polls ") + mbarrier_text(f.waits_at, f.waits_parity);
    case Waiting::kRegisters:
      return wait + registers_text(thread / kWarp);
    case Waiting::kRound:
    case Waiting::kNothing:
      break;
  }
  return several ? " run" : " runs";
}

// Who waits for what: runs of threads that wait for the same, as warps where they are whole ones.
std::string deadlock_text() {
  std::string text;
  const int count = block->request.threads;
  const auto alike = [](const Fiber& f, const Fiber& other) {
    return f.done == other.done && f.waiting == other.waiting && f.waits_at == other.waits_at &&
           f.waits_parity == other.waits_parity;
  };
  for (int first = 0, last = 0; first < count; first = last) {
    const Fiber& f = block->fibers[first];
    while (last < count && alike(f, block->fibers[last])) ++last;
    if (first % kWarp == 0 && last - first > kWarp) last -= last % kWarp;
    if (f.done) continue;
    const int unit = first % kWarp || last % kWarp ? 1 : kWarp;
    const int from = first / unit, to = last / unit - 1;
    std::string who = unit == kWarp ? "warp" : "thread";
    who += (from == to ? " " : "s ") + std::to_string(from);
    if (from != to) who += "-" + std::to_string(to);
    text += (text.empty() ? "deadlock: " : "; ") + who + waiting_text(f, first, from != to);
  }
  return text;
}

void run_block() {
  std::mt19937_64& random = block->random;
  const int count = block->request.threads;
  for (int i = 0; i < count; ++i) {
    Fiber& f = block->fibers[i];
    f.done = f.started = false;
    f.watched = nullptr;
    f.waiting = Waiting::kNothing;
    f.began = false;
    f.issued.clear();
    f.groups.clear();
    f.fenced = -1;
    f.error.clear();
    f.fake_stack = nullptr;
#ifdef FF_ASAN
    // the block that ran before left frames on this stack without returning from them
    ASAN_UNPOISON_MEMORY_REGION(f.stack.get(), kStack);
#endif
    getcontext(&f.context);
    f.context.uc_stack.ss_sp = f.stack.get();
    f.context.uc_stack.ss_size = kStack;
    f.context.uc_link = nullptr;
    makecontext(&f.context, fiber_main, 0);
  }
  // bytes of 0xff are a NaN in every floating point type
  if (block->shared) std::memset(block->shared.get(), 0xff, block->request.shared_bytes);
  for (Rendezvous& w : block->warps) w.arrived = 0;
  block->at_barrier = 0;
  block->running = count;
  block->late = 0;
  block->arrivals = 0;
  begin_sm90();
  std::vector<int> warps(count / kWarp), lanes(kWarp);
  for (size_t i = 0; i < warps.size(); ++i) warps[i] = static_cast<int>(i);
  for (int i = 0; i < kWarp; ++i) lanes[i] = i;
  // Runs one thread; false if all it did was to ask again and be told no.
  const auto moves = [](int thread) {
    const Fiber& f = block->fibers[thread];
    const bool polled = f.waiting == Waiting::kPoll;
    const uint64_t events = block->events;
    resume(thread);
    return f.done || !polled || f.waiting != Waiting::kPoll || events != block->events;
  };
  // a warp that asks in one of so many rounds does nothing but ask; if the others only wait, it is asked no longer
  constexpr uint64_t kAsks = 16, kPatience = 1000;
  std::vector<uint64_t> asked(warps.size(), 0);
  uint64_t progress = block->rounds += kAsks;
  while (block->running > 0) {
    const uint64_t events = block->events, round = ++block->rounds;
    bool moved = complete_copies(false) || block->late > 0;
    bool asks = false;  // a thread that asks may work on silently between two questions
    if (seed) std::shuffle(warps.begin(), warps.end(), random);
    for (int w : warps) {
      // with a seed a warp runs as far as it can, so that warps are as far apart as barriers allow
      for (bool again = true; again;) {
        again = false;
        bool polls = false;
        if (seed) std::shuffle(lanes.begin(), lanes.end(), random);
        for (int lane : lanes) {
          Fiber& f = block->fibers[w * kWarp + lane];
          if (f.done || (f.watched && *f.watched == f.seen)) continue;
          if (moves(w * kWarp + lane)) moved = again = true;
          polls |= f.waiting == Waiting::kPoll;
        }
        asks |= polls;
        if (polls) asked[w] = round;
        if (again && asked[w] + kAsks < round) progress = round;
        again = again && seed && !polls;
      }
    }
    if (events != block->events) progress = round;
    const bool stuck = (!moved && !asks) || progress + kPatience < round;
    if (stuck && block->running && !complete_copies(true)) throw Stop(deadlock_text());
  }
  end_block_sm90();
}

}  // namespace

void wait_for(const uint64_t* counter, uint64_t seen, Waiting what, int at, int parity) {
  Fiber& f = fiber();
  f.watched = counter;
  f.seen = seen;
  f.waiting = what;
  f.waits_at = at;
  f.waits_parity = parity;
  to_scheduler(false);
}

void poll(int at, int parity) {
  Fiber& f = fiber();
  f.waiting = Waiting::kPoll;
  f.waits_at = at;
  f.waits_parity = parity;
  to_scheduler(false);
}

void wait_for_round() {
  ++block->late;
  wait_for(&block->rounds, block->rounds, Waiting::kRound);
  --block->late;
}

void note(const char* kernel) { launched_kernels.push_back(kernel); }
std::vector<std::string> launches() { return std::exchange(launched_kernels, {}); }
void fail(const char* why) { throw Stop(why); }

const char* run(const Request& request) {
  if (request.threads % kWarp) return "the number of threads is not a multiple of 32";
  static std::vector<Fiber> pool;
  if (static_cast<int>(pool.size()) < request.threads) pool = std::vector<Fiber>(request.threads);
  Block b(pool);
  b.request = request;
  b.warps.resize(request.threads / kWarp);
  b.products.resize(request.threads / kWarp);
  // of the exact size, so that a sanitizer sees accesses behind the end
  void* shared = nullptr;
  if (request.shared_bytes && posix_memalign(&shared, 1024, request.shared_bytes)) return "out of memory";
  b.shared.reset(static_cast<unsigned char*>(shared));
  block = &b;
  b.random.seed(seed);
  const char* result = nullptr;
  const int64_t blocks = int64_t{1} * request.grid.x * request.grid.y * request.grid.z;
  const Grid first = block_limit && blocks > block_limit
                         ? Grid{request.grid.x - 1, request.grid.y - 1, request.grid.z - 1}
                         : Grid{0, 0, 0};
  std::vector<Grid> order;
  for (int z = first.z; z < request.grid.z; ++z)
    for (int y = first.y; y < request.grid.y; ++y)
      for (int x = first.x; x < request.grid.x; ++x) order.push_back({x, y, z});
  if (seed) std::shuffle(order.begin(), order.end(), b.random);
  try {
    for (const Grid& index : order) {
      b.index = index;
      run_block();
    }
  } catch (const Stop& stop) {
    reason = stop.what();
    result = reason.c_str();
  }
  block = nullptr;
  return result;
}

void set_seed(uint64_t value) { seed = value; }
void set_block_limit(int64_t value) { block_limit = value; }
void set_device(int capability, int shared_bytes, int multiprocessors) {
  the_device = {multiprocessors, shared_bytes, capability};
}
Device current_device() { return the_device; }
int thread_index() { return block->current; }
Grid block_index() { return block->index; }
Grid grid_size() { return block->request.grid; }
unsigned char* shared_memory() { return block->shared.get(); }

void release_barrier_if_complete() {
  if (block->at_barrier == 0 || block->at_barrier < block->running) return;
  block->at_barrier = 0;
  ++block->barrier_generation;
  ++block->events;
  for (uint32_t& barriers : block->warp_barriers) ++barriers;
}

void barrier() {
  const uint64_t generation = block->barrier_generation;
  ++block->at_barrier;
  release_barrier_if_complete();
  if (block->barrier_generation == generation) wait_for(&block->barrier_generation, generation, Waiting::kBarrier);
}

void warp_barrier() {
  meet([](Rendezvous&) { ++block->warp_barriers[block->current / kWarp]; });
}

void fence() {
  Fiber& f = fiber();
  if (f.fenced < 0 && block->arrivals) fail("a thread comes to its first fence behind an arrival");
  f.fenced = block->arrivals;
}

unsigned arrive(unsigned* counter) {
  if (fiber().fenced != block->arrivals) fail("arrive: the thread has not come to a fence");
  for (int i = 0; i < block->request.threads; ++i) {
    const Fiber& f = block->fibers[i];
    if (!f.done && f.fenced >= 0 && f.fenced != block->arrivals) fail("arrive: not every thread has come to a fence");
  }
  ++block->arrivals;
  return (*counter)++;
}

float shuffle_xor(float value, int mask) {
  const int lane = block->current % kWarp;
  Rendezvous& w = warp();
  std::memcpy(&w.in[lane][0], &value, 4);
  meet([](Rendezvous& all) {
    for (int i = 0; i < kWarp; ++i) all.out[i][0] = all.in[i][0];
  });
  float other;
  std::memcpy(&other, &w.out[lane ^ mask][0], 4);
  return other;
}

namespace {

unsigned char* place(const char* who, int at, int bytes) {
  if (at % bytes || at < 0 || at + bytes > block->request.shared_bytes) {
    throw Stop(std::string(who) + ": shared memory has no " + std::to_string(bytes) + " bytes at " +
               std::to_string(at));
  }
  return block->shared.get() + at;
}

}  // namespace

unsigned char* shared16(const char* who, int at) { return place(who, at, 16); }
unsigned char* shared8(const char* who, int at) { return place(who, at, 8); }
unsigned char* read16(const char* who, int at) {
  unsigned char* shared = place(who, at, 16);
  note_load(at, 16, block->current % kWarp);
  return shared;
}
unsigned char* read8(const char* who, int at) {
  unsigned char* shared = place(who, at, 8);
  note_load(at, 8, block->current % kWarp);
  return shared;
}
unsigned char* write16(const char* who, int at) {
  unsigned char* shared = place(who, at, 16);
  note_write(block->current, at, 16);
  note_store(at, 16, block->current % kWarp);
  return shared;
}
unsigned char* write8(const char* who, int at) {
  unsigned char* shared = place(who, at, 8);
  note_write(block->current, at, 8);
  note_store(at, 8, block->current % kWarp);
  return shared;
}

void copy_async16(int at, const void* global, int bytes) {
  if (reinterpret_cast<uintptr_t>(global) % 16) fail("copy_async16: misaligned address");
  std::memset(shared16("copy_async16", at), 0xff, 16);
  note_write(block->current, at, 16, true);
  note_store(at, 16, block->current % kWarp);
  fiber().issued.push_back({at, global, bytes});
}

void commit_copies() {
  Fiber& f = fiber();
  f.groups.push_back(std::move(f.issued));
  f.issued.clear();
}

void wait_copies(int pending) {
  Fiber& f = fiber();
  while (static_cast<int>(f.groups.size()) > pending) {
    for (const Copy& c : f.groups.front()) {
      unsigned char* shared = write16("copy_async16", c.at);
      std::memset(shared, 0, 16);
      if (c.bytes) std::memcpy(shared, c.global, c.bytes);
    }
    f.groups.pop_front();
  }
}

namespace {

template <class Compute>
void load_matrices(uint32_t (&r)[4], int row, Compute compute) {
  const int lane = block->current % kWarp;
  Rendezvous& w = warp();
  w.rows[lane] = shared16("load_matrix4", row);
  note_load(row, 16, Access::kAllLanes);
  meet(compute);
  for (int m = 0; m < 4; ++m) r[m] = w.out[lane][m];
}

}  // namespace

void load_matrix4(uint32_t (&r)[4], int row) {
  load_matrices(r, row, [](Rendezvous& all) {
    for (int i = 0; i < kWarp; ++i)
      for (int m = 0; m < 4; ++m)
        std::memcpy(&all.out[i][m], static_cast<const char*>(all.rows[8 * m + i / 4]) + 4 * (i % 4), 4);
  });
}

void load_matrix4_transposed(uint32_t (&r)[4], int row) {
  load_matrices(r, row, [](Rendezvous& all) {
    for (int i = 0; i < kWarp; ++i)
      for (int m = 0; m < 4; ++m) {
        uint16_t pair[2];
        for (int h = 0; h < 2; ++h)
          std::memcpy(&pair[h], static_cast<const char*>(all.rows[8 * m + i % 4 * 2 + h]) + 2 * (i / 4), 2);
        all.out[i][m] = pair[0] | static_cast<uint32_t>(pair[1]) << 16;
      }
  });
}

namespace {

// d += A B for the fragments of a warp: A [16][8 * H], B [8 * H][8]. Each register has H values, which `read` returns.
template <int H, class Read>
void multiply_fragments(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, Read read) {
  constexpr int K = 8 * H;
  const int lane = block->current % kWarp;
  Rendezvous& w = warp();
  for (int i = 0; i < 4; ++i) w.in[lane][i] = a[i];
  w.in[lane][4] = b0;
  w.in[lane][5] = b1;
  meet([read](Rendezvous& all) {
    float left[16][K], right[K][8];
    for (int i = 0; i < kWarp; ++i) {
      for (int r = 0; r < 6; ++r) {
        for (int h = 0; h < H; ++h) {
          const float v = read(all.in[i][r], h);
          const int k = i % 4 * H + h;
          if (r < 4) {
            left[i / 4 + r % 2 * 8][k + r / 2 * 4 * H] = v;
          } else {
            right[k + (r - 4) * 4 * H][i / 4] = v;
          }
        }
      }
    }
    for (int i = 0; i < kWarp; ++i) {
      for (int e = 0; e < 4; ++e) {
        float sum = 0;
        for (int k = 0; k < K; ++k) sum += left[i / 4 + e / 2 * 8][k] * right[k][i % 4 * 2 + e % 2];
        all.sums[i][e] = sum;
      }
    }
  });
  for (int e = 0; e < 4; ++e) d[e] += w.sums[lane][e];
}

}  // namespace

void multiply_add(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, float (*widen)(uint16_t)) {
  multiply_fragments<2>(d, a, b0, b1,
                        [widen](uint32_t bits, int h) { return widen(static_cast<uint16_t>(bits >> 16 * h)); });
}

void multiply_add_tf32(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  multiply_fragments<1>(d, a, b0, b1, [](uint32_t bits, int) {
    bits &= ~0x1fffu;
    float v;
    std::memcpy(&v, &bits, 4);
    return v;
  });
}

uint32_t round_to_tf32(uint32_t bits) {
  const bool finite = (bits & 0x7f800000u) != 0x7f800000u;
  return finite ? (bits + 0x1000u) & ~0x1fffu : bits;
}

float widen_bfloat16(uint16_t bits) {
  const uint32_t wide = static_cast<uint32_t>(bits) << 16;
  float f;
  std::memcpy(&f, &wide, 4);
  return f;
}

float widen_float16(uint16_t bits) {
  const int exponent = bits >> 10 & 31, fraction = bits & 1023;
  float f = exponent == 31  ? (fraction ? std::nanf("") : INFINITY)
            : exponent == 0 ? std::ldexp(static_cast<float>(fraction), -24)
                            : std::ldexp(static_cast<float>(fraction + 1024), exponent - 25);
  return bits >> 15 ? -f : f;
}

uint16_t narrow_bfloat16(float f) {
  uint32_t bits;
  std::memcpy(&bits, &f, 4);
  if (std::isnan(f)) return 0x7fff;
  return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

uint16_t narrow_float16(float f) {
  const uint16_t sign = std::signbit(f) ? 0x8000 : 0;
  if (std::isnan(f)) return 0x7fff;
  f = std::fabs(f);
  if (f == 0) return sign;
  if (f >= 65520.0f) return sign | 0x7c00;
  int exponent;
  std::frexp(f, &exponent);
  const int step = std::max(exponent - 11, -24);
  // nearbyint rounds half to even; a carry of the mantissa increases the exponent
  const int units = static_cast<int>(std::nearbyint(std::ldexp(f, -step)));
  const int biased = step + 24;
  return sign | static_cast<uint16_t>(units + (biased << 10));
}

}  // namespace fastfilm::cuda::emulated
