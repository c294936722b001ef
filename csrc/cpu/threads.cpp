// The threads that share the work of one call: a pool, and OpenMP's team; threads.h has the interface.
#include "threads.h"

#include <atomic>
#include <cfenv>
#include <chrono>
#include <condition_variable>
#include <exception>
#include <mutex>
#include <new>
#include <thread>

#ifdef __linux__
#include <pthread.h>
#include <sched.h>
#endif
#ifdef _OPENMP
#include <omp.h>
#endif

namespace fastfilm {

std::atomic<bool> g_split_finely{false}, g_openmp{true};

namespace {

std::atomic<int> g_most_threads{1};

using Clock = std::chrono::steady_clock;

// The tasks of one call. A job is on the stack of the calling thread.
struct Job {
  Task run;
  const void* context;
  int64_t tasks;
  int wanted;  // threads beside the caller
  bool last_first;
  std::atomic<int64_t> next{0};
  std::fenv_t arithmetic{};  // rounding and denormals of the calling thread
  std::mutex mutex{};
  std::exception_ptr failed{};  // guarded by the mutex
  // guarded by the pool's mutex
  int joined = 0, busy = 0;
  std::condition_variable idle{};
  Job* behind = nullptr;
};

// Runs tasks of the job until none is left; returns the time of the longest.
Clock::duration work(Job& job, int worker) {
  Clock::duration longest{};
  try {
    Clock::time_point begin = Clock::now();
    for (int64_t task; (task = job.next++) < job.tasks;) {
      job.run(job.context, job.last_first ? job.tasks - 1 - task : task, worker);
      const Clock::time_point end = Clock::now();
      longest = std::max(longest, end - begin);
      begin = end;
    }
  } catch (...) {
    const std::lock_guard<std::mutex> lock(job.mutex);
    if (!job.failed) job.failed = std::current_exception();
    job.next = job.tasks;
  }
  return longest;
}

class Pool {
 public:
  void share(Job& job) {
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      hire(job.wanted);
      Job** at = &first_;
      while (*at) at = &(*at)->behind;
      *at = &job;
    }
    for (int i = 0; i < job.wanted; ++i) work_.notify_one();
    work(job, 0);
    std::unique_lock<std::mutex> lock(mutex_);
    remove(job);
    job.idle.wait(lock, [&] { return job.busy == 0; });
  }

 private:
  // Starts threads up to `count`, or as many as the system allows. The mutex must be held.
  void hire(int count) {
    try {
      for (; hired_ < count; ++hired_) std::thread(&Pool::help, this).detach();
    } catch (const std::exception&) {
      // the caller runs the tasks of missing threads
    }
  }

  void help() {
    leave_place();
    std::unique_lock<std::mutex> lock(mutex_);
    for (;;) {
      work_.wait(lock, [&] { return first_ != nullptr; });
      Job& job = *first_;
      const int worker = ++job.joined;
      if (worker == job.wanted) remove(job);
      ++job.busy;
      lock.unlock();
      std::fesetenv(&job.arithmetic);
      work(job, worker);
      lock.lock();
      // the mutex is held, since the caller ends the job as soon as it sees that no thread is busy
      if (--job.busy == 0) job.idle.notify_one();
    }
  }

  void remove(Job& job) {
    Job** at = &first_;
    while (*at && *at != &job) at = &(*at)->behind;
    if (*at) *at = job.behind;
  }

  // Allows the calling thread all processors of OpenMP's places. It inherits the one processor to which OpenMP may have
  // bound its creator (OMP_PROC_BIND).
  static void leave_place() {
#if defined(__linux__) && defined(_OPENMP)
    if (omp_get_proc_bind() == omp_proc_bind_false) return;
    cpu_set_t all;
    CPU_ZERO(&all);
    for (int place = 0; place < omp_get_num_places(); ++place) {
      int ids[CPU_SETSIZE];
      if (omp_get_place_num_procs(place) > CPU_SETSIZE) return;
      omp_get_place_proc_ids(place, ids);
      for (int i = 0; i < omp_get_place_num_procs(place); ++i) {
        if (ids[i] < CPU_SETSIZE) CPU_SET(ids[i], &all);
      }
    }
    if (CPU_COUNT(&all)) pthread_setaffinity_np(pthread_self(), sizeof all, &all);
#endif
  }

  std::mutex mutex_;
  std::condition_variable work_;
  Job* first_ = nullptr;  // the first job that still wants threads
  int hired_ = 0;
};

// OpenMP's threads, which run PyTorch's own work. After that work they wait actively for some milliseconds: they start
// at once then, and the pool's threads would have to share the processors with them. A parallel region waits for each
// thread of the team, though, and threads start late where other processes use the processors.
class Team {
 public:
  // Runs the job and returns true, unless another thread uses the team or the team was late not long ago.
  bool share(Job& job) {
#ifdef _OPENMP
    if (!g_openmp || taken_.test_and_set(std::memory_order_acquire)) return false;
    Clock::time_point now = Clock::now();
    const bool prompt = now >= late_until_;
    if (prompt) {
      Clock::duration longest{};
#pragma omp parallel num_threads(job.wanted + 1)
      {
        if (const int worker = omp_get_thread_num()) {
          std::fenv_t own;
          std::fegetenv(&own);
          std::fesetenv(&job.arithmetic);
          work(job, worker);
          std::fesetenv(&own);
        } else {
          longest = work(job, 0);
          now = Clock::now();
        }
      }
      const Clock::time_point end = Clock::now();
      if (end - now > longest + kLate) late_until_ = end + kRest * (end - now);
    }
    taken_.clear(std::memory_order_release);
    return prompt;
#else
    return false;
#endif
  }

 private:
  static constexpr Clock::duration kLate = std::chrono::milliseconds(1);
  static constexpr int kRest = 16;  // after a late region the team rests for this many times the time lost
  std::atomic_flag taken_ = ATOMIC_FLAG_INIT;
  Clock::time_point late_until_{};  // guarded by taken_
};

Team g_team;

// The pool is never destroyed, since its threads sleep in it until the process ends.
alignas(Pool) char g_memory[sizeof(Pool)];

Pool* const g_pool = [] {
#ifdef __linux__
  // a forked process has none of the threads and must not wait for them
  pthread_atfork(nullptr, nullptr, [] {
    new (g_memory) Pool;
    g_openmp = false;  // OpenMP does not notice that its threads are gone
  });
#endif
  return new (g_memory) Pool;
}();

}  // namespace

void share(int64_t tasks, int threads, Task run, const void* context) {
  const auto helpers = static_cast<int>(std::min<int64_t>(threads, tasks)) - 1;
  if (helpers < 1) {
    for (int64_t task = 0; task < tasks; ++task) run(context, task, 0);
    return;
  }
  for (int most = g_most_threads; most < helpers + 1 && !g_most_threads.compare_exchange_weak(most, helpers + 1);) {
  }
  Job job{run, context, tasks, helpers, g_split_finely};
  std::fegetenv(&job.arithmetic);
  if (!g_team.share(job)) g_pool->share(job);
  if (job.failed) std::rethrow_exception(job.failed);
}

int split_finely(bool on) {
  g_split_finely = on;
  return g_most_threads.exchange(1);
}

}  // namespace fastfilm
