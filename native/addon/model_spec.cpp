#include "addon/model_spec.h"

#include "addon/arguments.h"
#include "addon/kv_object.h"

namespace tpla::addon {

namespace {

// Keeps products of two sizes far from overflow.
constexpr int64_t kLargestSize = 1 << 24;

bool absent(const Napi::Value& value) { return value.IsNull() || value.IsUndefined(); }

class Fields {
 public:
  Fields(const Napi::Value& value, std::string at) : object_(to_object(value, at)), at_(std::move(at)) {}

  Napi::Value get(const char* name) const { return object_.Get(name); }
  std::string path(const char* name) const { return at_ + "." + name; }
  int size(const char* name, int64_t low = 1, int64_t high = kLargestSize) const { return int(to_integer(get(name), path(name), low, high)); }
  double number(const char* name) const { return to_number(get(name), path(name)); }
  double positive(const char* name) const {
    const double value = number(name);
    if (!(value > 0)) refuse(path(name), "a positive number");
    return value;
  }
  bool flag(const char* name) const { return to_bool(get(name), path(name)); }
  std::string text(const char* name) const { return to_text(get(name), path(name)); }

 private:
  Napi::Object object_;
  std::string at_;
};

MoeSpec moe_from_js(const Napi::Value& value) {
  const Fields f(value, "spec.moe");
  MoeSpec moe;
  moe.experts = f.size("experts");
  moe.shared_experts = f.size("sharedExperts", 0);
  moe.top_k = f.size("topK", 1, moe.experts);
  moe.intermediate_size = f.size("intermediateSize");
  moe.first_dense_layers = f.size("firstDenseLayers", 0);
  moe.layer_freq = f.size("layerFreq");
  moe.groups = f.size("groups", 1, moe.experts);
  moe.top_groups = f.size("topGroups", 1, moe.groups);
  moe.norm_top_k = f.flag("normTopK");
  moe.routed_scale = float(f.number("routedScale"));
  const std::string scoring = f.text("scoring");
  if (scoring != "softmax" && scoring != "sigmoid") refuse(f.path("scoring"), "softmax or sigmoid");
  moe.scoring = scoring == "softmax" ? MoeSpec::Scoring::softmax : MoeSpec::Scoring::sigmoid;
  const std::string selection = f.text("selection");
  if (selection == "greedy") {
    moe.selection = MoeSpec::Selection::greedy;
  } else if (selection == "group_limited_greedy") {
    moe.selection = MoeSpec::Selection::group_limited_greedy;
  } else if (selection == "noaux_tc") {
    moe.selection = MoeSpec::Selection::noaux_tc;
  } else {
    refuse(f.path("selection"), "greedy, group_limited_greedy or noaux_tc");
  }
  if (moe.experts % moe.groups != 0) refuse(f.path("groups"), "a divisor of " + std::to_string(moe.experts) + " experts");
  return moe;
}

RopeSpec rope_from_js(const Napi::Value& value) {
  const Fields f(value, "spec.rope");
  RopeSpec rope;
  rope.theta = f.positive("theta");
  rope.interleaved = f.flag("interleaved");
  if (!absent(f.get("yarn"))) {
    const Fields y(f.get("yarn"), "spec.rope.yarn");
    rope.yarn = YarnSpec{y.positive("factor"), y.positive("originalContext"), y.positive("betaFast"), y.positive("betaSlow"), y.number("cosScale")};
  }
  return rope;
}

TplaSpec tpla_from_js(const Napi::Value& value, int layers, int latent) {
  const Fields f(value, "spec.tpla");
  TplaSpec tpla;
  tpla.groups = f.size("groups", 1, latent);
  tpla.shared = parse_shared_widths(f.get("shared"));
  if (!tpla.shared.is_uniform() && int(tpla.shared.by_layer().size()) != layers) refuse(f.path("shared"), "a width, or one for each of " + std::to_string(layers) + " layers");
  for (int layer = 0; layer < layers; ++layer) {
    const int shared = tpla.shared[layer];
    if (shared < 0 || shared > latent) refuse(f.path("shared"), "widths from 0 to " + std::to_string(latent));
    if ((latent - shared) % tpla.groups != 0) refuse(f.path("groups"), "a divisor of kvLoraRank - shared = " + std::to_string(latent - shared));
  }
  const std::string norm = f.text("norm");
  if (norm != "exact" && norm != "sliced") refuse(f.path("norm"), "exact or sliced");
  tpla.sliced_norm = norm == "sliced";
  tpla.transform = f.flag("transform");
  tpla.rank_weights = f.flag("rankWeights");
  const Napi::Array scale_rows = to_array(f.get("normScale"), f.path("normScale"));
  for (uint32_t l = 0; l < scale_rows.Length(); ++l) {
    const Napi::Array ranks = to_array(scale_rows.Get(l), f.path("normScale[]"));
    std::vector<float> scales;
    for (uint32_t r = 0; r < ranks.Length(); ++r) scales.push_back(float(to_number(ranks.Get(r), f.path("normScale[][]"))));
    tpla.norm_scale.push_back(std::move(scales));
  }
  return tpla;
}

}  // namespace

ModelSpec spec_from_js(const Napi::Value& value) {
  const Fields f(value, "spec");
  ModelSpec spec;
  spec.vocab_size = f.size("vocabSize");
  spec.hidden_size = f.size("hiddenSize");
  spec.layers = f.size("layers");
  spec.heads = f.size("heads");
  if (!absent(f.get("qLoraRank"))) spec.q_lora_rank = f.size("qLoraRank");
  spec.kv_lora_rank = f.size("kvLoraRank");
  spec.qk_nope_head_dim = f.size("qkNopeHeadDim");
  spec.qk_rope_head_dim = f.size("qkRopeHeadDim", 2);
  if (spec.qk_rope_head_dim % 2 != 0) refuse("spec.qkRopeHeadDim", "an even number");
  spec.v_head_dim = f.size("vHeadDim");
  spec.intermediate_size = f.size("intermediateSize");
  if (!absent(f.get("moe"))) spec.moe = moe_from_js(f.get("moe"));
  spec.rope = rope_from_js(f.get("rope"));
  spec.softmax_scale = float(f.positive("softmaxScale"));
  spec.rms_norm_eps = float(f.number("rmsNormEps"));
  spec.tied_embeddings = f.flag("tiedEmbeddings");
  spec.context_length = f.size("contextLength", 1, std::numeric_limits<int32_t>::max());
  if (!absent(f.get("weightBlock"))) {
    const Napi::Array block = to_array(f.get("weightBlock"), "spec.weightBlock");
    spec.weight_block_rows = int(to_integer(block.Get(0u), "spec.weightBlock[0]", 1, kLargestSize));
    spec.weight_block_cols = int(to_integer(block.Get(1u), "spec.weightBlock[1]", 1, kLargestSize));
  }
  if (!absent(f.get("tpla"))) spec.tpla = tpla_from_js(f.get("tpla"), spec.layers, spec.kv_lora_rank);
  return spec;
}

}  // namespace tpla::addon
