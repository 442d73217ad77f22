#pragma once
#include <deque>
#include <memory>
#include <string>
#include <vector>

#include "core/model_spec.h"
#include "core/rope.h"
#include "core/weights.h"

namespace tpla {

// A matrix W [out, in] as the checkpoint stores it, applied as y = x Wᵀ.
struct MlpWeights {
  WeightView gate;  // [intermediate, hidden]
  WeightView up;    // [intermediate, hidden]
  WeightView down;  // [hidden, intermediate]
};

struct LayerWeights {
  std::vector<float> input_norm;
  std::vector<float> post_attention_norm;

  WeightView q_a;  // [q_lora, hidden]; no rows without q_lora
  std::vector<float> q_a_norm;
  WeightView q_b;   // [heads * (nope + rope), q_lora or hidden]
  WeightView kv_a;  // [latent + rope, hidden]
  std::vector<float> kv_a_norm;
  WeightView kv_b;       // [heads * (nope + v), latent], per head nope rows of W_UK, then v rows of W_UV
  WeightView o;          // [hidden, heads * v]
  WeightView transform;  // [latent, latent]; no rows without
  // Per rank of a reparameterised checkpoint: [heads * nope, width] and [heads * v, width].
  std::vector<WeightView> rank_w_uk;
  std::vector<WeightView> rank_w_uv;

  MlpWeights mlp;     // dense layers
  MlpWeights shared;  // MoE layers: shared experts; no rows without
  WeightView gate;    // MoE layers: [experts, hidden]
  std::vector<float> gate_bias;
  std::vector<MlpWeights> experts;
};

// A checkpoint under the names of the published DeepSeek models, every shape checked. Large matrices stay in the mapped files; what is
// copied are the norms, gate biases and fp8 block scales.
class Model {
 public:
  // Throws CHECKPOINT_INVALID naming tensor, expected and found shape.
  Model(ModelSpec spec, std::shared_ptr<const Weights> weights);

  const ModelSpec& spec() const { return spec_; }
  const Rope& rope() const { return rope_; }
  const std::vector<LayerWeights>& layers() const { return layers_; }
  const WeightView& embedding() const { return embedding_; }  // [vocab, hidden]
  const WeightView& lm_head() const { return lm_head_; }      // [vocab, hidden]
  const std::vector<float>& final_norm() const { return final_norm_; }

 private:
  WeightView matrix(const std::string& name, int64_t rows, int64_t cols);
  // A tensor [heads, rows, cols] seen as [heads * rows, cols].
  WeightView stacked(const std::string& name, int64_t heads, int64_t rows, int64_t cols) const;
  std::vector<float> vector(const std::string& name, int64_t size) const;
  MlpWeights mlp(const std::string& prefix, int intermediate);
  LayerWeights layer(int index);

  ModelSpec spec_;
  std::shared_ptr<const Weights> weights_;
  Rope rope_;
  std::vector<LayerWeights> layers_;
  WeightView embedding_;
  WeightView lm_head_;
  std::vector<float> final_norm_;
  std::deque<std::vector<float>> scales_;
};

}  // namespace tpla
