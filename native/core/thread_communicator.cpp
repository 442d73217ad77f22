#include "core/thread_communicator.h"

#include <algorithm>
#include <cstring>

namespace tpla {

namespace {

// Ranks meet several times per layer, microseconds apart.
constexpr int kSpins = 400;

inline void pause() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  __asm__ volatile("yield");
#endif
}

}  // namespace

class ThreadGroup::Rank : public Communicator {
 public:
  Rank(ThreadGroup& group, int rank) : group_(group), rank_(rank) {}

  int rank() const override { return rank_; }
  int size() const override { return group_.size_; }
  void barrier() override { group_.barrier(); }

  void all_reduce(float* data, size_t count) override {
    if (size() == 1) return;
    publish(data);
    // Every rank sums one segment and writes it back to all buffers: nobody else touches that segment meanwhile.
    const size_t begin = count * size_t(rank_) / size_t(size());
    const size_t end = count * size_t(rank_ + 1) / size_t(size());
    constexpr size_t kChunk = 1024;
    for (size_t at = begin; at < end; at += kChunk) {
      const size_t length = std::min(kChunk, end - at);
      float sum[kChunk];
      std::memcpy(sum, group_.published_[0] + at, length * sizeof(float));
      for (int r = 1; r < size(); ++r) {
        const float* peer = group_.published_[r] + at;
        for (size_t i = 0; i < length; ++i) sum[i] += peer[i];
      }
      for (int r = 0; r < size(); ++r) std::memcpy(const_cast<float*>(group_.published_[r]) + at, sum, length * sizeof(float));
    }
    barrier();
  }

  void all_gather(const float* shard, float* out, std::span<const size_t> offsets) override {
    publish(shard);
    for (int r = 0; r < size(); ++r) {
      const size_t length = offsets[r + 1] - offsets[r];
      float* to = out + offsets[r];
      if (length > 0 && to != group_.published_[r]) std::memcpy(to, group_.published_[r], length * sizeof(float));
    }
    barrier();
  }

  void reduce_scatter(const float* in, float* shard, std::span<const size_t> offsets) override {
    publish(in);
    const size_t begin = offsets[rank_];
    const size_t length = offsets[rank_ + 1] - begin;
    if (length > 0) std::memcpy(shard, group_.published_[0] + begin, length * sizeof(float));
    for (int r = 1; r < size(); ++r) {
      const float* peer = group_.published_[r] + begin;
      for (size_t i = 0; i < length; ++i) shard[i] += peer[i];
    }
    barrier();
  }

 private:
  void publish(const float* data) {
    group_.published_[rank_] = data;
    barrier();
  }

  ThreadGroup& group_;
  const int rank_;
};

ThreadGroup::ThreadGroup(int size) : size_(size), published_(size) {
  for (int rank = 0; rank < size; ++rank) communicators_.push_back(std::make_unique<Rank>(*this, rank));
}

ThreadGroup::~ThreadGroup() = default;

void ThreadGroup::barrier() {
  if (size_ == 1) return;
  if (aborted_.load(std::memory_order_acquire)) throw Aborted{};
  const uint32_t phase = phase_.load(std::memory_order_acquire);
  if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == size_) {
    arrived_.store(0, std::memory_order_relaxed);
    phase_.fetch_add(1, std::memory_order_acq_rel);
    phase_.notify_all();
    return;
  }
  for (int i = 0; i < kSpins && phase_.load(std::memory_order_acquire) == phase; ++i) pause();
  while (phase_.load(std::memory_order_acquire) == phase) phase_.wait(phase, std::memory_order_acquire);
  if (aborted_.load(std::memory_order_acquire)) throw Aborted{};
}

void ThreadGroup::abort() {
  aborted_.store(true, std::memory_order_release);
  phase_.fetch_add(1, std::memory_order_acq_rel);
  phase_.notify_all();
}

void ThreadGroup::reset() {
  arrived_.store(0, std::memory_order_relaxed);
  aborted_.store(false, std::memory_order_release);
}

}  // namespace tpla
