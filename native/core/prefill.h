#pragma once
#include <functional>
#include <vector>

#include "core/backend.h"
#include "core/feed_forward.h"
#include "core/model.h"

namespace tpla {

enum class LogitsWanted { none, last, all };

// A chunk of one sequence. `pages` covers [0, position + tokens.size()).
struct PrefillItem {
  std::vector<int32_t> tokens;
  int32_t position = 0;
  std::vector<int32_t> pages;
  LogitsWanted logits = LogitsWanted::none;
};

struct PrefillHooks {
  // The KV of this layer is in the arena for every item.
  std::function<void(int layer)> on_layer;
  // Gets this layer's queries of query_rows (counted over all items' tokens): [rows][heads * (nope + rope)], rope part rotated.
  std::function<void(int layer, std::vector<float> queries)> on_queries;
  std::vector<int32_t> query_rows;
  // Polled once a layer.
  std::function<bool()> cancelled;
};

// Forward pass over prompt chunks: exact, un-absorbed MLA over canonical KV, on one rank.
class Prefill {
 public:
  Prefill(const Model& model, const KvRegion& kv, Backend& backend);

  // Per item its logits: empty, [vocab] or [tokens, vocab]. Throws CANCELLED.
  std::vector<std::vector<float>> run(const std::vector<PrefillItem>& items, const PrefillHooks& hooks);

 private:
  struct Rows;
  void write_latents(int layer, const Rows& rows, const float* hidden);
  // [rows][heads * (nope + rope)], rope part rotated; lives until the caller's scope ends.
  float* queries(int layer, const Rows& rows, const float* hidden);
  void hand_out(int layer, const float* queries, const PrefillHooks& hooks);
  void attention(int layer, const Rows& rows, const float* hidden, float* out, const PrefillHooks& hooks);

  const Model& model_;
  const KvRegion& kv_;
  Backend& backend_;
  std::vector<FeedForwardShard> feed_forward_;
};

}  // namespace tpla
