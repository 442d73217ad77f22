#pragma once
#include <chrono>

#if defined(__x86_64__)
#include <emmintrin.h>
#endif

#include "transfer/parallel.h"

namespace tpla {

// Threads between which a hand-off goes to and fro look for the next step this long before they sleep: waking costs tens of microseconds a
// step, the whole of a hand-off between GPUs takes a few hundred. Where cores are few, looking would take one from who has work.
inline constexpr std::chrono::microseconds kBusyPoll{1000};
inline constexpr int kBusyPollCpus = 8;

inline bool polls_busily() {
  static const bool polls = transfer_threads() >= kBusyPollCpus;
  return polls;
}

inline void relax() {
#if defined(__x86_64__)
  _mm_pause();
#endif
}

}  // namespace tpla
