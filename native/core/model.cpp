#include "core/model.h"

#include "core/error.h"

namespace tpla {

namespace {

std::string shape_text(const std::vector<int64_t>& shape) {
  std::string text = "[";
  for (size_t i = 0; i < shape.size(); ++i) text += (i ? ", " : "") + std::to_string(shape[i]);
  return text + "]";
}

void expect_shape(const std::string& name, const Tensor& tensor, const std::vector<int64_t>& expected) {
  if (tensor.shape == expected) return;
  throw Error("CHECKPOINT_INVALID", "tensor " + name + " has shape " + shape_text(tensor.shape) + ", expected " + shape_text(expected));
}

}  // namespace

Model::Model(ModelSpec spec, std::shared_ptr<const Weights> weights)
    : spec_(std::move(spec)), weights_(std::move(weights)), rope_(spec_.rope, spec_.qk_rope_head_dim) {
  embedding_ = matrix("model.embed_tokens.weight", spec_.vocab_size, spec_.hidden_size);
  lm_head_ = spec_.tied_embeddings ? embedding_ : matrix("lm_head.weight", spec_.vocab_size, spec_.hidden_size);
  final_norm_ = vector("model.norm.weight", spec_.hidden_size);
  layers_.reserve(spec_.layers);
  for (int i = 0; i < spec_.layers; ++i) layers_.push_back(layer(i));
}

WeightView Model::matrix(const std::string& name, int64_t rows, int64_t cols) {
  const Tensor& tensor = weights_->get(name);
  expect_shape(name, tensor, {rows, cols});
  WeightView view;
  view.data = tensor.data;
  view.dtype = tensor.dtype;
  view.rows = rows;
  view.cols = cols;
  view.ld = cols;
  if (tensor.dtype == WeightDType::f8_e4m3) {
    if (spec_.weight_block_rows < 1 || spec_.weight_block_cols < 1) {
      throw Error("CHECKPOINT_INVALID", "tensor " + name + " is fp8, but the config names no weight_block_size");
    }
    scales_.push_back(weights_->read_scales(name + "_scale_inv", rows, cols, spec_.weight_block_rows, spec_.weight_block_cols));
    view.scale = scales_.back().data();
    view.block_rows = spec_.weight_block_rows;
    view.block_cols = spec_.weight_block_cols;
    view.scale_ld = (cols + view.block_cols - 1) / view.block_cols;
  }
  return view;
}

WeightView Model::stacked(const std::string& name, int64_t heads, int64_t rows, int64_t cols) const {
  const Tensor& tensor = weights_->get(name);
  expect_shape(name, tensor, {heads, rows, cols});
  WeightView view;
  view.data = tensor.data;
  view.dtype = tensor.dtype;
  view.rows = heads * rows;
  view.cols = cols;
  view.ld = cols;
  return view;
}

std::vector<float> Model::vector(const std::string& name, int64_t size) const {
  const Tensor& tensor = weights_->get(name);
  expect_shape(name, tensor, {size});
  std::vector<float> values(size);
  convert_to_float(tensor.dtype, tensor.data, size, values.data());
  return values;
}

MlpWeights Model::mlp(const std::string& prefix, int intermediate) {
  return {matrix(prefix + "gate_proj.weight", intermediate, spec_.hidden_size), matrix(prefix + "up_proj.weight", intermediate, spec_.hidden_size),
          matrix(prefix + "down_proj.weight", spec_.hidden_size, intermediate)};
}

LayerWeights Model::layer(int index) {
  const ModelSpec& s = spec_;
  const std::string at = "model.layers." + std::to_string(index) + ".";
  const std::string attention = at + "self_attn.";
  LayerWeights w;
  w.input_norm = vector(at + "input_layernorm.weight", s.hidden_size);
  w.post_attention_norm = vector(at + "post_attention_layernorm.weight", s.hidden_size);

  const int64_t q_rows = int64_t(s.heads) * s.q_head_dim();
  if (s.q_lora_rank) {
    w.q_a = matrix(attention + "q_a_proj.weight", *s.q_lora_rank, s.hidden_size);
    w.q_a_norm = vector(attention + "q_a_layernorm.weight", *s.q_lora_rank);
    w.q_b = matrix(attention + "q_b_proj.weight", q_rows, *s.q_lora_rank);
  } else {
    w.q_b = matrix(attention + "q_proj.weight", q_rows, s.hidden_size);
  }
  w.kv_a = matrix(attention + "kv_a_proj_with_mqa.weight", s.kv_lora_rank + s.qk_rope_head_dim, s.hidden_size);
  w.kv_a_norm = vector(attention + "kv_a_layernorm.weight", s.kv_lora_rank);
  w.kv_b = matrix(attention + "kv_b_proj.weight", int64_t(s.heads) * (s.qk_nope_head_dim + s.v_head_dim), s.kv_lora_rank);
  w.o = matrix(attention + "o_proj.weight", s.hidden_size, int64_t(s.heads) * s.v_head_dim);
  // A layer that every rank holds whole is as published.
  const bool is_sliced = s.tpla && s.tpla->shared[index] < s.kv_lora_rank;
  if (is_sliced && s.tpla->transform) w.transform = matrix(attention + "tpla.transform.weight", s.kv_lora_rank, s.kv_lora_rank);
  if (is_sliced && s.tpla->rank_weights) {
    const int shared = s.tpla->shared[index];
    const int width = shared + (s.kv_lora_rank - shared) / s.tpla->groups;
    for (int rank = 0; rank < s.tpla->groups; ++rank) {
      const std::string prefix = attention + "tpla.rank" + std::to_string(rank) + ".";
      w.rank_w_uk.push_back(stacked(prefix + "w_uk", s.heads, s.qk_nope_head_dim, width));
      w.rank_w_uv.push_back(stacked(prefix + "w_uv", s.heads, s.v_head_dim, width));
    }
  }

  if (!s.is_moe_layer(index)) {
    w.mlp = mlp(at + "mlp.", s.intermediate_size);
    return w;
  }
  const MoeSpec& moe = *s.moe;
  w.gate = matrix(at + "mlp.gate.weight", moe.experts, s.hidden_size);
  if (moe.selection == MoeSpec::Selection::noaux_tc) w.gate_bias = vector(at + "mlp.gate.e_score_correction_bias", moe.experts);
  for (int e = 0; e < moe.experts; ++e) w.experts.push_back(mlp(at + "mlp.experts." + std::to_string(e) + ".", moe.intermediate_size));
  if (moe.shared_experts > 0) w.shared = mlp(at + "mlp.shared_experts.", moe.intermediate_size * moe.shared_experts);
  return w;
}

}  // namespace tpla
