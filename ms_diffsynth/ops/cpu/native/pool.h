// A pool of threads of our own: the caller works too, idle helpers spin for some microseconds and then sleep.
// MindSpore's own pool spins by yielding and OpenMP's keeps its cores for milliseconds; this one takes nothing while
// idle.
#pragma once
#include <sched.h>
#include <signal.h>
#include <unistd.h>

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <cstdlib>
#include <mutex>
#include <thread>
#include <vector>

namespace msd {

inline void relax() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

// While it lives, numbers too small to be normal are zero for this thread, as on MindSpore's own threads: they are slow,
// and where threads differ in this, a result depends on which of them computed it.
class Flushing {
 public:
#if defined(__x86_64__)
  Flushing() : before_(__builtin_ia32_stmxcsr()) { __builtin_ia32_ldmxcsr(before_ | 0x8040); }
  ~Flushing() { __builtin_ia32_ldmxcsr(before_); }

 private:
  unsigned before_;
#elif defined(__aarch64__)
  Flushing() {
    asm volatile("mrs %0, fpcr" : "=r"(before_));
    asm volatile("msr fpcr, %0" : : "r"(before_ | 1 << 24));
  }
  ~Flushing() { asm volatile("msr fpcr, %0" : : "r"(before_)); }

 private:
  uint64_t before_;
#else
  Flushing() {}
#endif
};

#if defined(__clang__)
#define ONE_COPY __attribute__((noinline))
#else
#define ONE_COPY __attribute__((noinline, noclone))
#endif

class Pool {
  static constexpr int SPINS = 2000;  // some 50 us

 public:
  static Pool &get() {
    // Never destroyed: helpers may still sleep in it while the process ends. A forked child starts a pool of its own.
    static Pool *pool = new Pool();
    if (pool->owner_ != getpid()) pool = new Pool();
    return *pool;
  }

  int threads() const { return static_cast<int>(helpers_) + 1; }

  // function(task, thread) for every task below `tasks`; which thread takes a task is decided as they become free.
  template <typename F>
  void run(int64_t tasks, F &&function) {
    if (tasks <= 0) return;
    if (tasks == 1 || helpers_ == 0 || !busy_.try_lock()) {  // also when two of MindSpore's threads come at once
      for (int64_t i = 0; i < tasks; i++) call<typename std::remove_reference<F>::type>(&function, i, 0);
      return;
    }
    std::lock_guard<std::mutex> hold(busy_, std::adopt_lock);
    Job job;
    job.call = call<typename std::remove_reference<F>::type>;
    job.function = &function;
    job.tasks = tasks;
    job_.store(&job, std::memory_order_release);
    generation_.fetch_add(1, std::memory_order_seq_cst);
    if (sleeping_.load(std::memory_order_seq_cst) > 0) {
      std::lock_guard<std::mutex> lock(mutex_);
      wake_.notify_all();
    }
    work(job, 0);
    job_.store(nullptr, std::memory_order_seq_cst);  // who has not come yet need not come
    for (int spins = 0; active_.load(std::memory_order_seq_cst) != 0; spins++)
      if (spins < SPINS) relax(); else sched_yield();
  }

 private:
  // One copy of the code of a task, for one thread and for several: two copies may add in another order.
  template <typename F>
  ONE_COPY static void call(void *function, int64_t task, int thread) {
    (*static_cast<F *>(function))(task, thread);
  }

  struct Job {
    void (*call)(void *, int64_t, int);
    void *function;
    int64_t tasks;
    std::atomic<int64_t> next{0};
  };

  Pool() : owner_(getpid()) {
    const char *wanted = std::getenv("MS_DIFFSYNTH_NATIVE_THREADS");
    cpu_set_t set;
    int cores = sched_getaffinity(0, sizeof(set), &set) == 0 ? CPU_COUNT(&set) : 1;
    int count = wanted ? std::atoi(wanted) : cores;
    helpers_ = count > 1 ? count - 1 : 0;
    for (size_t i = 0; i < helpers_; i++) std::thread([this, i] { help(static_cast<int>(i) + 1); }).detach();
  }

  static void work(Job &job, int thread) {
    for (int64_t i; (i = job.next.fetch_add(1, std::memory_order_relaxed)) < job.tasks;)
      job.call(job.function, i, thread);
  }

  void help(int thread) {
    sigset_t all;  // signals are for the threads of Python
    sigfillset(&all);
    pthread_sigmask(SIG_BLOCK, &all, nullptr);
    const Flushing flushing;
    uint64_t seen = 0;
    for (;;) {
      int spins = 0;
      while (generation_.load(std::memory_order_acquire) == seen) {
        if (spins++ < SPINS) { relax(); continue; }
        std::unique_lock<std::mutex> lock(mutex_);
        sleeping_.fetch_add(1, std::memory_order_seq_cst);
        wake_.wait(lock, [&] { return generation_.load(std::memory_order_seq_cst) != seen; });
        sleeping_.fetch_sub(1, std::memory_order_seq_cst);
      }
      seen = generation_.load(std::memory_order_acquire);
      active_.fetch_add(1, std::memory_order_seq_cst);
      if (Job *job = job_.load(std::memory_order_seq_cst)) work(*job, thread);
      active_.fetch_sub(1, std::memory_order_seq_cst);
    }
  }

  pid_t owner_;
  size_t helpers_ = 0;
  std::mutex busy_, mutex_;
  std::condition_variable wake_;
  std::atomic<uint64_t> generation_{0};
  std::atomic<int> sleeping_{0}, active_{0};
  std::atomic<Job *> job_{nullptr};
};

template <typename F>
void parallel(int64_t tasks, F &&function) {
  Pool::get().run(tasks, std::forward<F>(function));
}

// Memory that stays: one block per slot and thread of the process, only ever growing.
class Scratch {
 public:
  ~Scratch() { std::free(data_); }
  float *need(size_t floats) {
    if (floats > size_) {
      std::free(data_);
      data_ = nullptr;
      if (posix_memalign(reinterpret_cast<void **>(&data_), 64, floats * sizeof(float) + 256)) std::abort();
      size_ = floats;
    }
    return data_;
  }

 private:
  float *data_ = nullptr;
  size_t size_ = 0;
};

}  // namespace msd
