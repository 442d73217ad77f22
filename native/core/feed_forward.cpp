#include "core/feed_forward.h"

#include <cstring>

#include "core/collectives.h"

namespace tpla {

namespace {

// Columns of a shard come in whole cache lines of every dtype.
constexpr int kShardUnit = 64;

MlpWeights shard_mlp(const MlpWeights& mlp, int rank, int ranks) {
  const Share inner = share_of(int(mlp.gate.rows), rank, ranks, kShardUnit);
  return {mlp.gate.row_slice(inner.begin, inner.end), mlp.up.row_slice(inner.begin, inner.end), mlp.down.col_slice(inner.begin, inner.end)};
}

void gated_mlp(Backend& backend, const MlpWeights& mlp, const float* x, int64_t m, float* out) {
  const int64_t inner = mlp.gate.rows;
  if (inner == 0) return;
  const Backend::Scope scope(backend);
  float* gate = backend.allocate(size_t(m * inner));
  float* up = backend.allocate(size_t(m * inner));
  const Linear both[] = {{.y = gate, .ldy = inner, .x = x, .ldx = mlp.gate.cols, .m = m, .w = mlp.gate},
                         {.y = up, .ldy = inner, .x = x, .ldx = mlp.up.cols, .m = m, .w = mlp.up}};
  backend.linear(both);
  backend.silu_mul(gate, up, m * inner, gate);
  backend.linear({.y = out, .ldy = mlp.down.rows, .x = gate, .ldx = inner, .m = m, .w = mlp.down, .accumulate = true});
}

}  // namespace

FeedForwardShard shard_feed_forward(const LayerWeights& layer, int rank, int ranks) {
  FeedForwardShard shard;
  if (layer.experts.empty()) {
    shard.mlp = shard_mlp(layer.mlp, rank, ranks);
    return shard;
  }
  if (layer.shared.gate.rows > 0) shard.shared = shard_mlp(layer.shared, rank, ranks);
  shard.gate = layer.gate;
  shard.gate_bias = layer.gate_bias.empty() ? nullptr : layer.gate_bias.data();
  for (const MlpWeights& expert : layer.experts) {
    const MlpWeights part = shard_mlp(expert, rank, ranks);
    shard.experts.push_back({part.gate, part.up, part.down});
  }
  return shard;
}

void feed_forward(Backend& backend, const ModelSpec& spec, const FeedForwardShard& shard, const float* x, int64_t m, float* out) {
  if (shard.experts.empty()) return gated_mlp(backend, shard.mlp, x, m, out);
  gated_mlp(backend, shard.shared, x, m, out);
  if (shard.experts[0].gate.rows == 0) return;
  const Backend::Scope scope(backend);
  const MoeSpec& moe = *spec.moe;
  float* logits = backend.allocate(size_t(m * moe.experts));
  backend.linear({.y = logits, .ldy = moe.experts, .x = x, .ldx = spec.hidden_size, .m = m, .w = shard.gate});
  static_assert(sizeof(int32_t) == sizeof(float));
  auto* chosen = reinterpret_cast<int32_t*>(backend.allocate(size_t(m * moe.top_k)));
  float* weights = backend.allocate(size_t(m * moe.top_k));
  backend.route(moe, logits, m, shard.gate_bias, chosen, weights);
  backend.moe_ffn({.x = x, .m = m, .top_k = moe.top_k, .experts = chosen, .weights = weights, .table = shard.experts, .out = out});
}

}  // namespace tpla
