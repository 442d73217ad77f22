#pragma once
#include <atomic>
#include <memory>
#include <vector>

#include "core/collectives.h"

namespace tpla {

// Ranks that are threads of one process: a collective reads the peers' buffers in place, between barriers.
class ThreadGroup {
 public:
  explicit ThreadGroup(int size);

  Communicator& communicator(int rank) { return *communicators_[rank]; }

  // Releases ranks that wait for one that failed: they throw Aborted. The group stays unusable until reset(), which needs all ranks idle.
  void abort();
  void reset();

  struct Aborted {};

 private:
  class Rank;
  void barrier();

  int size_;
  std::atomic<int> arrived_{0};
  std::atomic<uint32_t> phase_{0};
  std::atomic<bool> aborted_{false};
  // What each rank offers to the others during a collective.
  std::vector<const float*> published_;
  std::vector<std::unique_ptr<Communicator>> communicators_;

 public:
  ~ThreadGroup();
};

}  // namespace tpla
