#pragma once
#include <memory>
#include <vector>

#include "core/backend.h"
#include "core/collectives.h"
#include "core/feed_forward.h"
#include "core/model.h"

namespace tpla {

// One token of one sequence. `pages` as in DecodeItem of src/native/types.ts; `rank` is dp's.
struct DecodeItem {
  int32_t token = 0;
  int32_t position = 0;
  std::vector<std::vector<int32_t>> pages;
  int rank = 0;
};

// Weights of one layer that one rank reads in attention.
struct AttentionShard {
  WeightView q_b;  // this rank's heads
  WeightView o;    // columns of this rank's heads
  // Absorbed projections per head this rank applies them to: q_latent = q_nope · w_uk, v = latent · w_uvᵀ. A rank of the tpla form
  // has two column ranges (shared, slice) unless the checkpoint brings matrices of its own.
  struct Part {
    std::vector<WeightView> w_uk;  // [nope, columns]
    std::vector<WeightView> w_uv;  // [v, columns]
    int64_t column;                // where the range begins in the rank's row
    float value_scale;             // what this range's values count in the sum over ranks
  };
  std::vector<Part> parts;
};

// How one layer's attention is spread over ranks. One implementation per KV form; every rank runs the same program.
class DecodeAttention;

// Forward pass of one token per sequence on one rank.
class DecodeRank {
 public:
  DecodeRank(const Model& model, const KvRegion& kv, Backend& backend, Communicator& group, bool exact_softmax);
  ~DecodeRank();

  // Every rank is called with the same items; each writes its columns of logits[items, vocab], host memory.
  void run(const std::vector<DecodeItem>& items, float* logits);

 private:
  const Model& model_;
  const KvRegion& kv_;
  Backend& backend_;
  Communicator& group_;
  std::unique_ptr<DecodeAttention> attention_;
  std::vector<FeedForwardShard> feed_forward_;
  Share vocabulary_;
};

}  // namespace tpla
