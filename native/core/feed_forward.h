#pragma once
#include <vector>

#include "core/backend.h"
#include "core/model.h"

namespace tpla {

// The MLP half of one layer as one rank of a tensor-parallel group computes it: every matrix is cut along the intermediate width, so that
// the ranks' results add up. With one rank it is the whole layer.
struct FeedForwardShard {
  MlpWeights mlp;     // dense layer
  MlpWeights shared;  // MoE layer
  WeightView gate;    // whole: routing is replicated
  const float* gate_bias = nullptr;
  std::vector<ExpertWeights> experts;
};

FeedForwardShard shard_feed_forward(const LayerWeights& layer, int rank, int ranks);

// out[m, hidden] += feed_forward(x[m, hidden])
void feed_forward(Backend& backend, const ModelSpec& spec, const FeedForwardShard& shard, const float* x, int64_t m, float* out);

}  // namespace tpla
