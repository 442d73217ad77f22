#pragma once
#include <optional>
#include <string>
#include <vector>

#include "core/kv_layout.h"

namespace tpla {

// ModelSpec of src/model/spec.ts, field by field; see there for meanings.

struct MoeSpec {
  enum class Scoring { softmax, sigmoid };
  enum class Selection { greedy, group_limited_greedy, noaux_tc };

  int experts = 0;
  int shared_experts = 0;
  int top_k = 0;
  int intermediate_size = 0;
  int first_dense_layers = 0;
  int layer_freq = 1;
  Scoring scoring = Scoring::softmax;
  Selection selection = Selection::greedy;
  int groups = 1;
  int top_groups = 1;
  bool norm_top_k = false;
  float routed_scale = 1;
};

struct YarnSpec {
  double factor = 1;
  double original_context = 0;
  double beta_fast = 32;
  double beta_slow = 1;
  double cos_scale = 1;
};

struct RopeSpec {
  double theta = 10000;
  bool interleaved = true;
  std::optional<YarnSpec> yarn;
};

struct TplaSpec {
  int groups = 1;
  SharedWidths shared;
  bool sliced_norm = false;
  // [layer][rank]: what RMS(own columns) is multiplied by to estimate RMS of the whole latent.
  std::vector<std::vector<float>> norm_scale;
  bool transform = false;
  bool rank_weights = false;
};

struct ModelSpec {
  int vocab_size = 0;
  int hidden_size = 0;
  int layers = 0;
  int heads = 0;
  std::optional<int> q_lora_rank;
  int kv_lora_rank = 0;
  int qk_nope_head_dim = 0;
  int qk_rope_head_dim = 0;
  int v_head_dim = 0;
  int intermediate_size = 0;
  std::optional<MoeSpec> moe;
  RopeSpec rope;
  float softmax_scale = 1;
  float rms_norm_eps = 1e-6f;
  bool tied_embeddings = false;
  int context_length = 0;
  int weight_block_rows = 0;  // 0: no fp8 weights
  int weight_block_cols = 0;
  std::optional<TplaSpec> tpla;

  int q_head_dim() const { return qk_nope_head_dim + qk_rope_head_dim; }
  bool is_moe_layer(int layer) const { return moe && layer >= moe->first_dense_layers && layer % moe->layer_freq == 0; }
};

// RMSNorm of the query and KV latents: the published code never passes the config's epsilon to them.
inline constexpr float kLatentNormEps = 1e-6f;

}  // namespace tpla
