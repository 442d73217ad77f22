#include "transfer/parallel.h"

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <deque>
#include <exception>
#include <memory>
#include <mutex>
#include <pthread.h>
#include <sched.h>
#include <thread>

namespace tpla {

namespace {

struct Job {
  const std::function<void(size_t)>& body;
  const size_t count;
  std::atomic<size_t> next{0};
  std::atomic<size_t> done{0};
  std::mutex mutex{};
  std::condition_variable finished{};
  std::exception_ptr failure{};
  std::atomic<bool> failed{false};

  void work() {
    for (size_t i; (i = next.fetch_add(1)) < count;) {
      try {
        if (!failed) body(i);
      } catch (...) {
        const std::lock_guard lock(mutex);
        if (!failure) failure = std::current_exception();
        failed = true;
      }
      if (done.fetch_add(1) + 1 == count) {
        const std::lock_guard lock(mutex);
        finished.notify_all();
      }
    }
  }
};

// Each entry of the queue asks for one more thread on a job.
class Pool {
 public:
  static Pool& shared() {
    // Never destroyed: its threads may outlive static objects.
    static Pool* pool = new Pool();
    return *pool;
  }

  void help(const std::shared_ptr<Job>& job, int threads) {
    {
      const std::lock_guard lock(mutex_);
      for (int i = 0; i < threads; i++) wanted_.push_back(job);
    }
    if (threads > 1) work_.notify_all();
    else work_.notify_one();
  }

 private:
  Pool() {
    for (int i = 1; i < transfer_threads(); i++) std::thread([this] { run(); }).detach();
  }

  [[noreturn]] void run() {
    pthread_setname_np(pthread_self(), "tpla-copy");
    while (true) {
      std::shared_ptr<Job> job;
      {
        std::unique_lock lock(mutex_);
        work_.wait(lock, [this] { return !wanted_.empty(); });
        job = std::move(wanted_.front());
        wanted_.pop_front();
      }
      job->work();
    }
  }

  std::mutex mutex_;
  std::condition_variable work_;
  std::deque<std::shared_ptr<Job>> wanted_;
};

}  // namespace

int transfer_threads() {
  static const int threads = [] {
    cpu_set_t allowed;
    const int cpus = sched_getaffinity(0, sizeof(allowed), &allowed) == 0 ? CPU_COUNT(&allowed) : 1;
    return std::clamp(cpus, 1, 16);
  }();
  return threads;
}

bool shares_few_cpus(int pid) {
  constexpr int kFewCpus = 4;
  if (transfer_threads() >= kFewCpus || pid <= 0) return false;
  cpu_set_t own, other, common, all;
  if (sched_getaffinity(0, sizeof(own), &own) != 0 || sched_getaffinity(pid, sizeof(other), &other) != 0) return false;
  CPU_AND(&common, &own, &other);
  CPU_OR(&all, &own, &other);
  return CPU_COUNT(&common) > 0 && CPU_COUNT(&all) < kFewCpus;
}

void parallel_for(size_t count, int threads, const std::function<void(size_t)>& body) {
  threads = static_cast<int>(std::min<size_t>({count, static_cast<size_t>(std::max(threads, 1)), static_cast<size_t>(transfer_threads())}));
  if (threads <= 1) {
    for (size_t i = 0; i < count; i++) body(i);
    return;
  }
  const auto job = std::make_shared<Job>(body, count);
  Pool::shared().help(job, threads - 1);
  job->work();
  std::unique_lock lock(job->mutex);
  job->finished.wait(lock, [&] { return job->done == job->count; });
  if (job->failure) std::rethrow_exception(job->failure);
}

}  // namespace tpla
