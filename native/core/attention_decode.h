#pragma once
#include <memory>

#include "core/decode.h"

namespace tpla {

// The attention half of a decode step on one rank: writes the new tokens' KV, attends, projects. Ranks' outputs add up to the layer's.
class DecodeAttention {
 public:
  virtual ~DecodeAttention() = default;
  // Once per step, before the first layer. `items` outlives the step.
  virtual void begin(const std::vector<DecodeItem>& items) = 0;
  // partial[items, hidden] += this rank's part of attention(hidden[items, hidden]).
  virtual void run(int layer, const float* hidden, float* partial) = 0;
};

// The form is the layout's. `exact_softmax` (tpla, for tests) sums the ranks' logits before the softmax, which makes the slicing exact.
std::unique_ptr<DecodeAttention> make_decode_attention(const Model& model, const KvRegion& kv, Backend& backend, Communicator& group, bool exact_softmax);

}  // namespace tpla
