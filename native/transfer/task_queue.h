#pragma once
#include <atomic>
#include <condition_variable>
#include <deque>
#include <functional>
#include <mutex>
#include <string>

namespace tpla {

// One thread that runs tasks in the order in which they came. For work that fills the machine by itself: two such tasks side by side would both
// end late. It lives as long as the process.
class TaskQueue {
 public:
  explicit TaskQueue(std::string name);
  TaskQueue(const TaskQueue&) = delete;
  // From any thread. A task must not throw.
  void post(std::function<void()> task);

 private:
  [[noreturn]] void run();
  void await_task();

  const std::string name_;
  std::mutex mutex_;
  std::condition_variable work_;
  std::deque<std::function<void()>> tasks_;
  std::atomic<size_t> waiting_{0};
};

}  // namespace tpla
