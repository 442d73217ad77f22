#pragma once

#include <functional>
#include <memory>

namespace tpla::bench {

// What prefill of one prompt does with a GPU while its KV is handed over: un-absorbed causal attention (192/128), layer after layer. Throws
// GPU_UNAVAILABLE, OUT_OF_MEMORY, GPU_FAILED.
class PrefillLoad {
 public:
  PrefillLoad(int device, int tokens, int heads);
  ~PrefillLoad();

  // Enqueues layers behind those of earlier calls; what it returns waits for their end, on any thread.
  std::function<void()> compute(int layers);

 private:
  struct State;
  const std::shared_ptr<State> state_;
};

}  // namespace tpla::bench
