#pragma once
#include <condition_variable>
#include <deque>
#include <exception>
#include <functional>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#include "core/decode.h"
#include "core/kv_memory.h"
#include "core/prefill.h"
#include "core/thread_communicator.h"

namespace tpla {

struct EngineOptions {
  ModelSpec spec;
  std::shared_ptr<const Weights> weights;
  std::shared_ptr<KvMemory> arena;
  int threads = 0;  // over all ranks; 0: as many as the process may use
  bool exact_softmax = false;
  std::string isa;  // empty: the best this CPU runs
  int activation_parts = 3;  // 1 to 3, see cpu/bf16_tiles.h
};

// A model on its KV arena, computing on threads of its own. Calls queue and run one after another; `done` is called on the engine's
// thread with either an error or a result. What comes from outside is checked before it is queued: REQUEST_INVALID,
// CONTEXT_LENGTH_EXCEEDED.
class Engine {
 public:
  using PrefillDone = std::function<void(std::exception_ptr, std::vector<std::vector<float>>)>;
  using DecodeDone = std::function<void(std::exception_ptr, std::vector<float>)>;

  explicit Engine(EngineOptions options);
  // Finishes the running call (a prefill at its next layer) and fails queued ones.
  ~Engine();

  void prefill(std::vector<PrefillItem> items, PrefillHooks hooks, PrefillDone done);
  // Logits [items, vocab].
  void decode(std::vector<DecodeItem> items, DecodeDone done);
  // Fails what is queued, and a running prefill at its next layer, with CANCELLED. Returns at once.
  void close();

 private:
  class Ranks;
  struct Job {
    std::function<void()> run;
    std::function<void(std::exception_ptr)> fail;
  };

  void enqueue(Job job);
  void work();
  void check(const PrefillItem& item) const;
  void check(const DecodeItem& item) const;
  void check_pages(const std::vector<int32_t>& pages, int64_t used) const;
  void check_token(int32_t token) const;
  void check_positions(int64_t first, int64_t count) const;

  const EngineOptions options_;
  const KvRegion& kv_;
  const Model model_;
  std::unique_ptr<Ranks> ranks_;

  std::mutex mutex_;
  std::condition_variable wake_;
  std::deque<Job> queue_;
  std::atomic<bool> closed_{false};
  std::thread worker_;
};

}  // namespace tpla
