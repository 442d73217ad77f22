#include "cpu/thread_team.h"

#include <pthread.h>

namespace tpla::cpu {

namespace {

// Regions follow one another within microseconds while a model computes, so a waiter looks a while before it sleeps.
constexpr int kSpins = 400;

inline void pause() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  __asm__ volatile("yield");
#endif
}

constexpr uint32_t kOpen = 1u << 15;
constexpr uint32_t kInside = kOpen - 1;
constexpr uint32_t kRegion = 1u << 16;

// Returns the first value for which ready(value) holds.
template <typename Ready>
uint32_t wait_until(const std::atomic<uint32_t>& state, Ready&& ready) {
  uint32_t value = state.load(std::memory_order_acquire);
  for (int i = 0; i < kSpins && !ready(value); ++i) {
    pause();
    value = state.load(std::memory_order_acquire);
  }
  while (!ready(value)) {
    state.wait(value, std::memory_order_acquire);
    value = state.load(std::memory_order_acquire);
  }
  return value;
}

}  // namespace

ThreadTeam::ThreadTeam(int size) {
  for (int thread = 1; thread < size; ++thread) {
    helpers_.emplace_back([this, thread] {
      pthread_setname_np(pthread_self(), "tpla-compute");
      help(thread);
    });
  }
}

ThreadTeam::~ThreadTeam() {
  stop_.store(true, std::memory_order_relaxed);
  state_.fetch_add(kRegion, std::memory_order_release);
  state_.notify_all();
  for (std::thread& helper : helpers_) helper.join();
}

void ThreadTeam::run_erased(int64_t count, Erased task, void* context) {
  if (count <= 0) return;
  if (helpers_.empty() || count == 1) {
    for (int64_t i = 0; i < count; ++i) task(context, i, 0);
    return;
  }
  task_ = task;
  context_ = context;
  count_ = count;
  error_ = nullptr;
  next_.store(0, std::memory_order_relaxed);
  state_.fetch_add(kRegion + kOpen, std::memory_order_release);
  state_.notify_all();
  work(0);
  state_.fetch_sub(kOpen, std::memory_order_acq_rel);
  wait_until(state_, [](uint32_t value) { return (value & kInside) == 0; });
  if (error_) std::rethrow_exception(error_);
}

void ThreadTeam::help(int thread) {
  for (uint32_t seen = 0;;) {
    const uint32_t value = wait_until(state_, [seen](uint32_t now) { return now / kRegion != seen; });
    if (stop_.load(std::memory_order_relaxed)) return;
    seen = value / kRegion;
    if (!join()) continue;
    work(thread);
    leave();
  }
}

bool ThreadTeam::join() {
  uint32_t value = state_.load(std::memory_order_acquire);
  while (value & kOpen) {
    if (state_.compare_exchange_weak(value, value + 1, std::memory_order_acq_rel, std::memory_order_acquire)) return true;
  }
  return false;
}

void ThreadTeam::leave() {
  const uint32_t before = state_.fetch_sub(1, std::memory_order_acq_rel);
  if ((before & (kOpen | kInside)) == 1) state_.notify_all();
}

void ThreadTeam::work(int thread) {
  for (int64_t index = next_.fetch_add(1, std::memory_order_relaxed); index < count_; index = next_.fetch_add(1, std::memory_order_relaxed)) {
    try {
      task_(context_, index, thread);
    } catch (...) {
      const std::lock_guard<std::mutex> lock(error_mutex_);
      if (!error_) error_ = std::current_exception();
      next_.store(count_, std::memory_order_relaxed);
    }
  }
}

}  // namespace tpla::cpu
