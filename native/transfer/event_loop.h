#pragma once
#include <chrono>
#include <cstdint>
#include <functional>
#include <memory>
#include <mutex>
#include <unordered_map>
#include <vector>

namespace tpla {

// One epoll thread for all channels of the process, so that a peer's death is seen while the JavaScript thread is busy.
// It is started on first use and lives as long as the process; idle, it sleeps in the kernel.
class EventLoop {
 public:
  class Source {
   public:
    virtual ~Source() = default;
    // On the loop's thread, with the epoll events that are ready.
    virtual void on_ready(uint32_t events) = 0;
  };

  static EventLoop& shared();

  // Runs `task` on the loop's thread, soon or after `delay`; from any thread. Tasks posted by one thread run in order.
  void post(std::function<void()> task, std::chrono::milliseconds delay = std::chrono::milliseconds(0));

  // The rest is for the loop's thread, but for modify, which any thread may call while the source is registered.
  void add(int fd, uint32_t events, std::shared_ptr<Source> source);
  void modify(int fd, uint32_t events);
  // Events of `fd` already fetched from the kernel are dropped too.
  void remove(int fd);

 private:
  using Time = std::chrono::steady_clock::time_point;
  struct Task {
    Time due;
    std::function<void()> run;
  };

  EventLoop();
  void run();
  void run_due_tasks();
  int milliseconds_to_next_task();

  int epoll_ = -1;
  int wake_ = -1;
  std::mutex mutex_;
  std::vector<Task> tasks_;
  std::unordered_map<int, std::shared_ptr<Source>> sources_;
};

}  // namespace tpla
