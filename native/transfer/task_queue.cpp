#include "transfer/task_queue.h"

#include <pthread.h>
#include <thread>

#include "transfer/busy_poll.h"

namespace tpla {

TaskQueue::TaskQueue(std::string name) : name_(std::move(name)) {
  std::thread([this] { run(); }).detach();
}

void TaskQueue::post(std::function<void()> task) {
  {
    const std::lock_guard lock(mutex_);
    tasks_.push_back(std::move(task));
    waiting_++;
  }
  work_.notify_one();
}

void TaskQueue::await_task() {
  if (!polls_busily()) return;
  for (const auto until = std::chrono::steady_clock::now() + kBusyPoll; waiting_ == 0 && std::chrono::steady_clock::now() < until;) relax();
}

void TaskQueue::run() {
  pthread_setname_np(pthread_self(), name_.c_str());
  while (true) {
    std::function<void()> task;
    {
      std::unique_lock lock(mutex_);
      work_.wait(lock, [this] { return !tasks_.empty(); });
      task = std::move(tasks_.front());
      tasks_.pop_front();
      waiting_--;
    }
    task();
    task = nullptr;
    await_task();
  }
}

}  // namespace tpla
