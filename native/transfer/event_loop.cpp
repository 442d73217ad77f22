#include "transfer/event_loop.h"

#include <algorithm>
#include <cerrno>
#include <csignal>
#include <cstring>
#include <pthread.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <thread>
#include <unistd.h>

#include "core/error.h"
#include "transfer/busy_poll.h"

namespace tpla {

EventLoop& EventLoop::shared() {
  // Never destroyed: its thread may run until the process ends.
  static EventLoop* loop = new EventLoop();
  return *loop;
}

EventLoop::EventLoop() {
  epoll_ = epoll_create1(EPOLL_CLOEXEC);
  wake_ = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
  if (epoll_ < 0 || wake_ < 0) throw Error("IO_FAILED", std::string("cannot start the channel thread: ") + std::strerror(errno));
  epoll_event event{};
  event.events = EPOLLIN;
  event.data.fd = wake_;
  epoll_ctl(epoll_, EPOLL_CTL_ADD, wake_, &event);
  std::thread([this] { run(); }).detach();
}

void EventLoop::post(std::function<void()> task, std::chrono::milliseconds delay) {
  {
    const std::lock_guard lock(mutex_);
    tasks_.push_back({std::chrono::steady_clock::now() + delay, std::move(task)});
  }
  const uint64_t one = 1;
  [[maybe_unused]] const ssize_t written = write(wake_, &one, sizeof(one));
}

void EventLoop::add(int fd, uint32_t events, std::shared_ptr<Source> source) {
  epoll_event event{};
  event.events = events;
  event.data.fd = fd;
  sources_[fd] = std::move(source);
  epoll_ctl(epoll_, EPOLL_CTL_ADD, fd, &event);
}

void EventLoop::modify(int fd, uint32_t events) {
  epoll_event event{};
  event.events = events;
  event.data.fd = fd;
  epoll_ctl(epoll_, EPOLL_CTL_MOD, fd, &event);
}

void EventLoop::remove(int fd) {
  epoll_ctl(epoll_, EPOLL_CTL_DEL, fd, nullptr);
  sources_.erase(fd);
}

void EventLoop::run() {
  pthread_setname_np(pthread_self(), "tpla-channels");
  sigset_t all;
  sigfillset(&all);
  pthread_sigmask(SIG_BLOCK, &all, nullptr);
  constexpr int kBatch = 64;
  epoll_event events[kBatch];
  std::chrono::steady_clock::time_point busy_until{};
  while (true) {
    const bool is_busy = std::chrono::steady_clock::now() < busy_until;
    const int count = epoll_wait(epoll_, events, kBatch, is_busy ? 0 : milliseconds_to_next_task());
    if (count == 0 && is_busy ) continue;
    if (count > 0 && polls_busily()) busy_until = std::chrono::steady_clock::now() + kBusyPoll;
    for (int i = 0; i < count; i++) {
      if (events[i].data.fd == wake_) {
        uint64_t drained;
        [[maybe_unused]] const ssize_t read_bytes = read(wake_, &drained, sizeof(drained));
        continue;
      }
      const auto found = sources_.find(events[i].data.fd);
      if (found == sources_.end()) continue;
      const std::shared_ptr<Source> source = found->second;
      source->on_ready(events[i].events);
    }
    // After the batch, never inside: a task may open a descriptor whose number an event of this batch still names.
    run_due_tasks();
  }
}

void EventLoop::run_due_tasks() {
  std::vector<Task> due;
  {
    const std::lock_guard lock(mutex_);
    const Time now = std::chrono::steady_clock::now();
    const auto later = std::stable_partition(tasks_.begin(), tasks_.end(), [now](const Task& task) { return task.due <= now; });
    due.assign(std::make_move_iterator(tasks_.begin()), std::make_move_iterator(later));
    tasks_.erase(tasks_.begin(), later);
  }
  std::stable_sort(due.begin(), due.end(), [](const Task& a, const Task& b) { return a.due < b.due; });
  for (const Task& task : due) task.run();
}

int EventLoop::milliseconds_to_next_task() {
  const std::lock_guard lock(mutex_);
  if (tasks_.empty()) return -1;
  const Time next = std::min_element(tasks_.begin(), tasks_.end(), [](const Task& a, const Task& b) { return a.due < b.due; })->due;
  const auto wait = std::chrono::ceil<std::chrono::milliseconds>(next - std::chrono::steady_clock::now());
  return static_cast<int>(std::clamp<int64_t>(wait.count(), 0, 60000));
}

}  // namespace tpla
