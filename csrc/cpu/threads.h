// Threads that share the work of one call: OpenMP's where they start at once, else those of a pool, which sleep without
// work.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>

namespace fastfilm {

// For tests: small maps are split as large ones are, and tasks are handed out last first.
extern std::atomic<bool> g_split_finely;
// Switches g_split_finely; returns the most threads that one call had since the last switch.
int split_finely(bool on);
// Whether OpenMP's threads may be used: not in forked processes, which have none of them, nor in tests of the pool.
extern std::atomic<bool> g_openmp;
// The elements, products or positions that are worth a thread or a chunk: `usual`, or fewer with g_split_finely.
inline int64_t grain(int64_t usual) { return g_split_finely ? usual >> 10 : usual; }

using Task = void (*)(const void* context, int64_t task, int worker);
void share(int64_t tasks, int threads, Task run, const void* context);

// Calls f(task, worker) once for every task in [0, tasks), 0 <= worker < threads; no two calls of one worker run at a
// time. The caller is worker 0. It does not wait for threads of the pool that have not begun: where no other processor
// is free, it runs all tasks. The first exception of a task is thrown again after all calls have ended.
template <class F>
void parallel_for(int64_t tasks, int threads, const F& f) {
  share(tasks, threads, [](const void* c, int64_t task, int worker) { (*static_cast<const F*>(c))(task, worker); }, &f);
}

// Calls f(from, to) for consecutive ranges that make up [0, total): a few for each thread, since one of them may come
// late.
template <class F>
void parallel_ranges(int64_t total, int threads, const F& f) {
  constexpr int64_t kRanges = 4;
  const int64_t ranges = threads > 1 ? std::clamp<int64_t>(total, 1, kRanges * threads) : 1;
  parallel_for(ranges, threads, [&](int64_t i, int) { f(i * total / ranges, (i + 1) * total / ranges); });
}

}  // namespace fastfilm
