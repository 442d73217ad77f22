#include "core/decode.h"

#include "core/attention_decode.h"

namespace tpla {

DecodeRank::DecodeRank(const Model& model, const KvRegion& kv, Backend& backend, Communicator& group, bool exact_softmax)
    : model_(model),
      kv_(kv),
      backend_(backend),
      group_(group),
      attention_(make_decode_attention(model, kv, backend, group, exact_softmax)),
      vocabulary_(share_of(model.spec().vocab_size, group.rank(), group.size(), 16)) {
  for (const LayerWeights& layer : model.layers()) feed_forward_.push_back(shard_feed_forward(layer, group.rank(), group.size()));
}

DecodeRank::~DecodeRank() = default;

void DecodeRank::run(const std::vector<DecodeItem>& items, float* logits) {
  const ModelSpec& spec = model_.spec();
  const int64_t n = int64_t(items.size());
  const int64_t hidden = spec.hidden_size;
  const Backend::Scope scope(backend_);

  std::vector<int32_t> tokens;
  for (const DecodeItem& item : items) tokens.push_back(item.token);
  float* x = backend_.allocate(size_t(n * hidden));
  float* partial = backend_.allocate(size_t(n * hidden));
  float* h = backend_.allocate(size_t(n * hidden));
  backend_.embed(model_.embedding(), tokens, x);
  attention_->begin(items);
  for (int layer = 0; layer < spec.layers; ++layer) {
    const LayerWeights& weights = model_.layers()[size_t(layer)];
    backend_.rms_norm(x, hidden, n, hidden, weights.input_norm.data(), spec.rms_norm_eps, h, hidden);
    backend_.zero(partial, n * hidden);
    attention_->run(layer, h, partial);
    group_.all_reduce(partial, size_t(n * hidden));
    backend_.add(x, partial, n * hidden);

    backend_.rms_norm(x, hidden, n, hidden, weights.post_attention_norm.data(), spec.rms_norm_eps, h, hidden);
    backend_.zero(partial, n * hidden);
    feed_forward(backend_, spec, feed_forward_[size_t(layer)], h, n, partial);
    group_.all_reduce(partial, size_t(n * hidden));
    backend_.add(x, partial, n * hidden);
  }
  backend_.rms_norm(x, hidden, n, hidden, model_.final_norm().data(), spec.rms_norm_eps, h, hidden);
  const int64_t columns = vocabulary_.size();
  if (columns == 0) return;
  float* shard = backend_.allocate(size_t(n * columns));
  backend_.linear({.y = shard, .ldy = columns, .x = h, .ldx = hidden, .m = n, .w = model_.lm_head().row_slice(vocabulary_.begin, vocabulary_.end)});
  backend_.download(shard, columns, n, columns, logits + vocabulary_.begin, spec.vocab_size);
}

}  // namespace tpla
