#include "core/prefill.h"

#include "core/error.h"

namespace tpla {

// The batch flattened to rows, one per token.
struct Prefill::Rows {
  int64_t count = 0;
  std::vector<KvSlot> slots;
  std::vector<PrefillSequence> sequences;
  const float* rope = nullptr;  // [count][rope]
};

Prefill::Prefill(const Model& model, const KvRegion& kv, Backend& backend) : model_(model), kv_(kv), backend_(backend) {
  for (const LayerWeights& layer : model.layers()) feed_forward_.push_back(shard_feed_forward(layer, 0, 1));
}

std::vector<std::vector<float>> Prefill::run(const std::vector<PrefillItem>& items, const PrefillHooks& hooks) {
  const ModelSpec& spec = model_.spec();
  const int64_t hidden = spec.hidden_size;
  const int page_tokens = kv_.layout.page_tokens;
  const Backend::Scope scope(backend_);

  std::vector<int32_t> tokens;
  std::vector<int32_t> positions;
  Rows rows;
  for (const PrefillItem& item : items) {
    const int64_t count = int64_t(item.tokens.size());
    rows.sequences.push_back({.kv = {item.pages.data(), item.position + count}, .query = rows.count, .count = count, .position = item.position});
    for (int64_t i = 0; i < count; ++i) {
      const int32_t position = item.position + int32_t(i);
      tokens.push_back(item.tokens[size_t(i)]);
      positions.push_back(position);
      rows.slots.push_back({item.pages[size_t(position / page_tokens)], position % page_tokens});
    }
    rows.count += count;
  }
  std::vector<float> tables(positions.size() * size_t(spec.qk_rope_head_dim));
  model_.rope().tables(positions.data(), int(positions.size()), tables.data());
  float* rope = backend_.allocate(tables.size());
  backend_.upload(tables.data(), int64_t(tables.size()), rope);
  rows.rope = rope;

  float* x = backend_.allocate(size_t(rows.count * hidden));
  float* h = backend_.allocate(size_t(rows.count * hidden));
  backend_.embed(model_.embedding(), tokens, x);
  Rows wanted;
  for (int layer = 0; layer < spec.layers; ++layer) {
    if (hooks.cancelled && hooks.cancelled()) throw Error("CANCELLED", "prefill was cancelled before layer " + std::to_string(layer));
    const LayerWeights& weights = model_.layers()[size_t(layer)];
    backend_.rms_norm(x, hidden, rows.count, hidden, weights.input_norm.data(), spec.rms_norm_eps, h, hidden);
    write_latents(layer, rows, h);
    if (hooks.on_layer) hooks.on_layer(layer);
    const Rows* active = &rows;
    if (layer + 1 == spec.layers && hooks.on_queries) {
      const Backend::Scope query_scope(backend_);
      hand_out(layer, queries(layer, rows, h), hooks);
    }
    if (layer + 1 == spec.layers) {
      // All KV is written: what remains is only for rows whose logits somebody wants.
      float* wanted_x = backend_.allocate(size_t(rows.count * hidden));
      float* wanted_h = backend_.allocate(size_t(rows.count * hidden));
      float* wanted_rope = backend_.allocate(tables.size());
      for (size_t i = 0; i < items.size(); ++i) {
        PrefillSequence s = rows.sequences[i];
        const int64_t keep = items[i].logits == LogitsWanted::all ? s.count : items[i].logits == LogitsWanted::last ? 1 : 0;
        const int64_t from = s.query + s.count - keep;
        s.position += s.count - keep;
        s.query = wanted.count;
        s.count = keep;
        if (keep == 0) continue;
        backend_.copy_rows(x + from * hidden, hidden, keep, hidden, wanted_x + s.query * hidden, hidden);
        backend_.copy_rows(h + from * hidden, hidden, keep, hidden, wanted_h + s.query * hidden, hidden);
        backend_.copy_rows(rope + from * spec.qk_rope_head_dim, spec.qk_rope_head_dim, keep, spec.qk_rope_head_dim,
                           wanted_rope + s.query * spec.qk_rope_head_dim, spec.qk_rope_head_dim);
        wanted.sequences.push_back(s);
        wanted.count += keep;
      }
      wanted.rope = wanted_rope;
      x = wanted_x;
      h = wanted_h;
      active = &wanted;
    }
    if (active->count == 0) break;
    attention(layer, *active, h, x, layer + 1 == spec.layers ? PrefillHooks{} : hooks);
    backend_.rms_norm(x, hidden, active->count, hidden, weights.post_attention_norm.data(), spec.rms_norm_eps, h, hidden);
    feed_forward(backend_, spec, feed_forward_[size_t(layer)], h, active->count, x);
  }

  std::vector<std::vector<float>> results(items.size());
  if (wanted.count == 0) return results;
  backend_.rms_norm(x, hidden, wanted.count, hidden, model_.final_norm().data(), spec.rms_norm_eps, h, hidden);
  int64_t row = 0;
  for (size_t i = 0; i < items.size(); ++i) {
    const int64_t count = items[i].logits == LogitsWanted::all ? int64_t(items[i].tokens.size()) : items[i].logits == LogitsWanted::last ? 1 : 0;
    if (count == 0) continue;
    const Backend::Scope item_scope(backend_);
    float* logits = backend_.allocate(size_t(count * spec.vocab_size));
    backend_.linear({.y = logits, .ldy = spec.vocab_size, .x = h + row * hidden, .ldx = hidden, .m = count, .w = model_.lm_head()});
    results[i].resize(size_t(count * spec.vocab_size));
    backend_.download(logits, spec.vocab_size, count, spec.vocab_size, results[i].data(), spec.vocab_size);
    row += count;
  }
  return results;
}

void Prefill::write_latents(int layer, const Rows& rows, const float* hidden) {
  const ModelSpec& spec = model_.spec();
  const LayerWeights& w = model_.layers()[size_t(layer)];
  const int64_t latent = spec.kv_lora_rank;
  const int64_t width = latent + spec.qk_rope_head_dim;
  const Backend::Scope scope(backend_);
  float* compressed = backend_.allocate(size_t(rows.count * width));
  float* normed = backend_.allocate(size_t(rows.count * latent));
  backend_.linear({.y = compressed, .ldy = width, .x = hidden, .ldx = spec.hidden_size, .m = rows.count, .w = w.kv_a});
  backend_.rms_norm(compressed, width, rows.count, latent, w.kv_a_norm.data(), kLatentNormEps, normed, latent);
  if (w.transform.rows > 0) {
    float* transformed = backend_.allocate(size_t(rows.count * latent));
    backend_.linear({.y = transformed, .ldy = latent, .x = normed, .ldx = latent, .m = rows.count, .w = w.transform});
    normed = transformed;
  }
  backend_.rotate(model_.rope(), rows.rope, compressed + latent, rows.count, width, 1, 0);
  backend_.write_kv(kv_, 0, layer, rows.slots, normed, latent, compressed + latent, width);
}

float* Prefill::queries(int layer, const Rows& rows, const float* hidden) {
  const ModelSpec& spec = model_.spec();
  const LayerWeights& w = model_.layers()[size_t(layer)];
  const int64_t q_width = int64_t(spec.heads) * spec.q_head_dim();
  const float* q_in = hidden;
  int64_t q_in_width = spec.hidden_size;
  if (w.q_a.rows > 0) {
    q_in_width = w.q_a.rows;
    float* compressed = backend_.allocate(size_t(rows.count * q_in_width));
    backend_.linear({.y = compressed, .ldy = q_in_width, .x = hidden, .ldx = spec.hidden_size, .m = rows.count, .w = w.q_a});
    backend_.rms_norm(compressed, q_in_width, rows.count, q_in_width, w.q_a_norm.data(), kLatentNormEps, compressed, q_in_width);
    q_in = compressed;
  }
  float* q = backend_.allocate(size_t(rows.count * q_width));
  backend_.linear({.y = q, .ldy = q_width, .x = q_in, .ldx = q_in_width, .m = rows.count, .w = w.q_b});
  backend_.rotate(model_.rope(), rows.rope, q + spec.qk_nope_head_dim, rows.count, q_width, spec.heads, spec.q_head_dim());
  return q;
}

void Prefill::hand_out(int layer, const float* queries, const PrefillHooks& hooks) {
  const int64_t width = int64_t(model_.spec().heads) * model_.spec().q_head_dim();
  std::vector<float> chosen(hooks.query_rows.size() * size_t(width));
  for (size_t i = 0; i < hooks.query_rows.size(); ++i) {
    backend_.download(queries + hooks.query_rows[i] * width, width, 1, width, chosen.data() + i * size_t(width), width);
  }
  hooks.on_queries(layer, std::move(chosen));
}

void Prefill::attention(int layer, const Rows& rows, const float* hidden, float* out, const PrefillHooks& hooks) {
  const ModelSpec& spec = model_.spec();
  const LayerWeights& w = model_.layers()[size_t(layer)];
  const int64_t v_width = int64_t(spec.heads) * spec.v_head_dim;
  const Backend::Scope scope(backend_);
  const float* q = queries(layer, rows, hidden);
  if (hooks.on_queries) hand_out(layer, q, hooks);
  float* heads = backend_.allocate(size_t(rows.count * v_width));
  backend_.attend(PrefillAttention{.kv = &kv_,
                                   .layer = layer,
                                   .heads = spec.heads,
                                   .nope = spec.qk_nope_head_dim,
                                   .v = spec.v_head_dim,
                                   .kv_b = w.kv_b,
                                   .sequences = rows.sequences,
                                   .q = q,
                                   .scale = spec.softmax_scale,
                                   .out = heads});
  backend_.linear({.y = out, .ldy = spec.hidden_size, .x = heads, .ldx = v_width, .m = rows.count, .w = w.o, .accumulate = true});
}

}  // namespace tpla
