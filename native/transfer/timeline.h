#pragma once
#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

namespace tpla {

// CLOCK_MONOTONIC: the same in every process of the host, and in JavaScript's process.hrtime.
int64_t monotonic_ns();

// When the steps of hand-offs happened in this process, for benchmarks: kept only while somebody asked for it. Any thread.
struct TimelineMark {
  std::string step;
  int64_t at_ns;  // monotonic_ns()
};

void keep_timeline(bool keep);
void mark_step(std::string_view step);
// In the order in which they were marked; forgets them. The newest are lost beyond a few thousand.
std::vector<TimelineMark> take_timeline();

}  // namespace tpla
