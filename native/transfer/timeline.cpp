#include "transfer/timeline.h"

#include <atomic>
#include <chrono>
#include <mutex>

namespace tpla {

namespace {

constexpr size_t kMostMarks = 4096;

std::atomic<bool> keeps{false};
std::mutex mutex;
std::vector<TimelineMark> marks;

}  // namespace

int64_t monotonic_ns() {
  return std::chrono::duration_cast<std::chrono::nanoseconds>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

void keep_timeline(bool keep) {
  const std::lock_guard lock(mutex);
  keeps = keep;
  marks.clear();
  marks.reserve(keep ? kMostMarks : 0);
}

void mark_step(std::string_view step) {
  if (!keeps.load(std::memory_order_relaxed)) return;
  const int64_t now = monotonic_ns();
  const std::lock_guard lock(mutex);
  if (marks.size() < kMostMarks) marks.push_back({std::string(step), now});
}

std::vector<TimelineMark> take_timeline() {
  const std::lock_guard lock(mutex);
  std::vector<TimelineMark> taken;
  taken.swap(marks);
  return taken;
}

}  // namespace tpla
