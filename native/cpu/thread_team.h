#pragma once
#include <atomic>
#include <cstdint>
#include <exception>
#include <mutex>
#include <thread>
#include <type_traits>
#include <vector>

namespace tpla::cpu {

// A fixed group of threads that runs one parallel region at a time: the calling thread and size() - 1 helpers.
class ThreadTeam {
 public:
  explicit ThreadTeam(int size);
  ~ThreadTeam();
  ThreadTeam(const ThreadTeam&) = delete;
  ThreadTeam& operator=(const ThreadTeam&) = delete;

  int size() const { return int(helpers_.size()) + 1; }

  // Runs task(index, thread) for every index in [0, count), handed out dynamically. Rethrows the first exception.
  template <typename Task>
  void run(int64_t count, Task&& task) {
    run_erased(count, [](void* context, int64_t index, int thread) { (*static_cast<std::remove_reference_t<Task>*>(context))(index, thread); },
               const_cast<void*>(static_cast<const void*>(&task)));
  }

  // Splits [0, count) into ranges of at least `grain` and runs task(begin, end, thread) on each.
  template <typename Task>
  void run_ranges(int64_t count, int64_t grain, Task&& task) {
    const int64_t most = grain > 0 ? (count + grain - 1) / grain : count;
    const int64_t parts = most < int64_t(size()) * 4 ? most : int64_t(size()) * 4;
    run(parts, [&](int64_t part, int thread) { task(count * part / parts, count * (part + 1) / parts, thread); });
  }

 private:
  using Erased = void (*)(void* context, int64_t index, int thread);

  void run_erased(int64_t count, Erased task, void* context);
  void help(int thread);
  bool join();
  void leave();
  void work(int thread);

  std::vector<std::thread> helpers_;
  Erased task_ = nullptr;
  void* context_ = nullptr;
  int64_t count_ = 0;
  std::atomic<int64_t> next_{0};
  // Region number, whether it is open, and how many helpers are inside. A helper that wakes after the region has closed is not
  // waited for, so a busy machine costs only the work itself.
  std::atomic<uint32_t> state_{0};
  std::atomic<bool> stop_{false};
  std::mutex error_mutex_;
  std::exception_ptr error_;
};

}  // namespace tpla::cpu
