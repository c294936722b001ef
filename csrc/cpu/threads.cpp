#include "threads.h"

#include <atomic>
#include <cfenv>
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

std::atomic<bool> g_split_finely{false};

namespace {

std::atomic<int> g_most_threads{1};

// A call's tasks, on the stack of the thread that called.
struct Job {
  Task run;
  const void* context;
  int64_t tasks;
  int wanted;  // helpers
  bool last_first;
  std::atomic<int64_t> next{0};
  std::fenv_t arithmetic{};  // rounding and denormals as in the thread that called
  // guarded by the pool's mutex
  int joined = 0, busy = 0;
  std::exception_ptr failed{};
  std::condition_variable idle{};
  Job* behind = nullptr;
};

class Pool {
 public:
  void share(Job& job) {
    std::fegetenv(&job.arithmetic);
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      hire(job.wanted);
      Job** at = &first_;
      while (*at) at = &(*at)->behind;
      *at = &job;
    }
    for (int i = 0; i < job.wanted; ++i) work_.notify_one();
    run(job, 0);
    std::unique_lock<std::mutex> lock(mutex_);
    remove(job);
    job.idle.wait(lock, [&] { return job.busy == 0; });
    if (job.failed) std::rethrow_exception(job.failed);
  }

 private:
  void run(Job& job, int worker) {
    try {
      for (int64_t task; (task = job.next++) < job.tasks;) {
        job.run(job.context, job.last_first ? job.tasks - 1 - task : task, worker);
      }
    } catch (...) {
      const std::lock_guard<std::mutex> lock(mutex_);
      if (!job.failed) job.failed = std::current_exception();
      job.next = job.tasks;
    }
  }

  // With the mutex held: starts threads up to `count`, or as many as the system allows.
  void hire(int count) {
    try {
      for (; hired_ < count; ++hired_) std::thread(&Pool::help, this).detach();
    } catch (const std::exception&) {
      // the caller does their share
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
      run(job, worker);
      lock.lock();
      // while the mutex is held, since the job ends with its caller's next step
      if (--job.busy == 0) job.idle.notify_one();
    }
  }

  void remove(Job& job) {
    Job** at = &first_;
    while (*at && *at != &job) at = &(*at)->behind;
    if (*at) *at = job.behind;
  }

  // A thread inherits the one processor that OpenMP may have bound its creator to (OMP_PROC_BIND): it moves to all of
  // OpenMP's places.
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
  Job* first_ = nullptr;  // that wants helpers still
  int hired_ = 0;
};

// Never destroyed: its threads sleep in it until the process ends.
alignas(Pool) char g_memory[sizeof(Pool)];

Pool& pool() {
  static Pool* const made = [] {
#ifdef __linux__
    // a forked process has none of the threads, and must not wait for them
    pthread_atfork(nullptr, nullptr, [] { new (g_memory) Pool; });
#endif
    return new (g_memory) Pool;
  }();
  return *made;
}

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
  pool().share(job);
}

int split_finely(bool on) {
  g_split_finely = on;
  return g_most_threads.exchange(1);
}

}  // namespace fastfilm
