#include "transfer/messages/messenger.h"

#include <cerrno>
#include <cstring>
#include <future>
#include <pthread.h>
#include <random>
#include <sys/eventfd.h>
#include <unistd.h>

#include "core/error.h"

namespace tpla {

namespace {

// Rounds without an event before the thread sleeps: the next message of a busy link comes sooner than a wake-up.
constexpr int kIdleRounds = 200;

uint64_t random_number() {
  static thread_local std::random_device device;
  uint64_t number;
  do {
    number = uint64_t(device()) << 32 | device();
  } while (number == 0);
  return number;
}

}  // namespace

Messenger::Messenger(const char* name) : name_(name), wake_(eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK)) {
  if (!wake_) throw Error("IO_FAILED", std::string("cannot make an event descriptor: ") + std::strerror(errno));
}

void Messenger::destroy_elsewhere(Messenger* last, std::function<void()> destroy) {
  if (last->thread_.get_id() == std::this_thread::get_id()) {
    std::thread([last, destroy = std::move(destroy)] {
      last->stop();
      destroy();
    }).detach();
    return;
  }
  last->stop();
  destroy();
}

void Messenger::launch() {
  std::promise<void> ready;
  thread_ = std::thread([this, &ready] {
    pthread_setname_np(pthread_self(), (std::string("tpla-") + name_).c_str());
    try {
      create();
    } catch (...) {
      ready.set_exception(std::current_exception());
      return;
    }
    ready.set_value();
    drive();
  });
  try {
    ready.get_future().get();
  } catch (...) {
    thread_.join();
    throw;
  }
}

void Messenger::wake() {
  const uint64_t one = 1;
  static_cast<void>(!write(wake_.get(), &one, sizeof(one)));
}

void Messenger::woken() {
  uint64_t count;
  static_cast<void>(!read(wake_.get(), &count, sizeof(count)));
}

void Messenger::post(std::function<void()> task) {
  const std::lock_guard lock(mutex_);
  if (is_stopping_) return;
  tasks_.push_back(std::move(task));
  wake();
}

void Messenger::run(std::function<void()> task) {
  auto done = std::make_shared<std::packaged_task<void()>>(std::move(task));
  std::future<void> result = done->get_future();
  post([done = std::move(done)] { (*done)(); });
  try {
    result.get();
  } catch (const std::future_error&) {
    throw Error("IO_FAILED", std::string(name_) + " was stopped");
  }
}

void Messenger::stop() {
  if (!thread_.joinable()) return;
  {
    const std::lock_guard lock(mutex_);
    is_stopping_ = true;
  }
  wake();
  thread_.join();
}

void Messenger::drive() {
  for (int idle = 0;;) {
    if (!run_tasks()) break;
    idle = progress() != 0 ? 0 : idle + 1;
    if (idle < kIdleRounds) continue;
    idle = sleep() ? 0 : kIdleRounds - 1;
  }
  destroy();
}

// False once the messenger is to stop and nothing is left to do.
bool Messenger::run_tasks() {
  std::vector<std::function<void()>> tasks;
  {
    const std::lock_guard lock(mutex_);
    if (tasks_.empty()) return !is_stopping_;
    tasks.swap(tasks_);
  }
  for (const auto& task : tasks) task();
  return true;
}

uint64_t Messenger::add_link(std::weak_ptr<MessageLink> link) {
  uint64_t number;
  do {
    number = random_number();
  } while (links_.contains(number));
  links_[number] = std::move(link);
  return number;
}

void Messenger::dispatch(const Incoming& message) {
  const auto found = links_.find(message.head.link);
  const auto link = found == links_.end() ? nullptr : found->second.lock();
  if (link) link->on_message(message);
}

}  // namespace tpla
