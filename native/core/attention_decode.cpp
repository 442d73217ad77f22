#include "core/attention_decode.h"

namespace tpla {

namespace {

std::vector<size_t> head_offsets(int heads, int ranks, int64_t per_head) {
  std::vector<size_t> offsets;
  for (int r = 0; r <= ranks; ++r) offsets.push_back(r == ranks ? size_t(heads * per_head) : size_t(share_of(heads, r, ranks).begin * per_head));
  return offsets;
}

// What the four forms share. `heads` are those whose queries and outputs this rank computes; rows are the sequences it works on.
class AttentionBase : public DecodeAttention {
 public:
  AttentionBase(const Model& model, const KvRegion& kv, Backend& backend, Communicator& group, Share heads)
      : model_(model), spec_(model.spec()), kv_(kv), backend_(backend), group_(group), heads_(heads) {}

  void begin(const std::vector<DecodeItem>& items) override {
    slots_.clear();
    sequences_.clear();
    positions_.clear();
    select_rows(items);
    tables_.resize(positions_.size() * size_t(spec_.qk_rope_head_dim));
    model_.rope().tables(positions_.data(), int(positions_.size()), tables_.data());
    rope_ = backend_.allocate(tables_.size());
    backend_.upload(tables_.data(), int64_t(tables_.size()), rope_);
  }

 protected:
  // Fills positions_ and sequences_ (one per row), and slots_ with written_ (rows whose KV this rank stores).
  virtual void select_rows(const std::vector<DecodeItem>& items) = 0;

  int64_t rows() const { return int64_t(positions_.size()); }
  int memory() const { return kv_.layout.memories() == 1 ? 0 : group_.rank(); }

  // A sequence whose tokens all lie in one table.
  void add_row(const DecodeItem& item, const std::vector<int32_t>& pages, bool write) {
    const int page_tokens = kv_.layout.page_tokens;
    if (write) {
      written_.push_back(rows());
      slots_.push_back({pages[size_t(item.position / page_tokens)], item.position % page_tokens});
    }
    positions_.push_back(item.position);
    sequences_.push_back({pages.data(), int64_t(item.position) + 1});
  }

  // Queries of own heads: q_nope [heads][rows][nope] and rotated q_rope [heads][rows][rope].
  void queries(const LayerWeights& w, const WeightView& q_b, const float* hidden, float* q_nope, float* q_rope) {
    const Backend::Scope scope(backend_);
    const int64_t n = rows();
    const int64_t width = int64_t(heads_.size()) * spec_.q_head_dim();
    const float* in = hidden;
    int64_t in_width = spec_.hidden_size;
    if (w.q_a.rows > 0) {
      in_width = w.q_a.rows;
      float* compressed = backend_.allocate(size_t(n * in_width));
      backend_.linear({.y = compressed, .ldy = in_width, .x = hidden, .ldx = spec_.hidden_size, .m = n, .w = w.q_a});
      backend_.rms_norm(compressed, in_width, n, in_width, w.q_a_norm.data(), kLatentNormEps, compressed, in_width);
      in = compressed;
    }
    float* q = backend_.allocate(size_t(n * width));
    backend_.linear({.y = q, .ldy = width, .x = in, .ldx = in_width, .m = n, .w = q_b});
    backend_.rotate(model_.rope(), rope_, q + spec_.qk_nope_head_dim, n, width, heads_.size(), spec_.q_head_dim());
    backend_.split_groups(q, width, spec_.q_head_dim(), n, heads_.size(), spec_.qk_nope_head_dim, q_nope);
    backend_.split_groups(q + spec_.qk_nope_head_dim, width, spec_.q_head_dim(), n, heads_.size(), spec_.qk_rope_head_dim, q_rope);
  }

  // Normalised latents [rows, latent] and rotated rope keys (ld latent + rope) of the new tokens; `raw` keeps the latents before the norm.
  struct NewTokens {
    const float* latent;
    const float* rope;
    int64_t ld_rope;
    const float* raw;
  };
  NewTokens compress(const LayerWeights& w, const float* hidden) {
    const int64_t n = rows();
    const int64_t latent = spec_.kv_lora_rank;
    const int64_t width = latent + spec_.qk_rope_head_dim;
    float* compressed = backend_.allocate(size_t(n * width));
    float* normed = backend_.allocate(size_t(n * latent));
    backend_.linear({.y = compressed, .ldy = width, .x = hidden, .ldx = spec_.hidden_size, .m = n, .w = w.kv_a});
    backend_.rms_norm(compressed, width, n, latent, w.kv_a_norm.data(), kLatentNormEps, normed, latent);
    if (w.transform.rows > 0) {
      float* transformed = backend_.allocate(size_t(n * latent));
      backend_.linear({.y = transformed, .ldy = latent, .x = normed, .ldx = latent, .m = n, .w = w.transform});
      normed = transformed;
    }
    backend_.rotate(model_.rope(), rope_, compressed + latent, n, width, 1, 0);
    return {normed, compressed + latent, width, compressed};
  }

  // Stores the KV of written_ rows; `latent` has `ld` columns, of which the first as many as the layer's row has are stored.
  void store(int layer, const float* latent, int64_t ld, const float* rope, int64_t ld_rope) {
    if (slots_.empty()) return;
    if (int64_t(slots_.size()) == rows()) return backend_.write_kv(kv_, memory(), layer, slots_, latent, ld, rope, ld_rope);
    for (size_t i = 0; i < slots_.size(); ++i) {
      backend_.write_kv(kv_, memory(), layer, {&slots_[i], 1}, latent + written_[i] * ld, ld, rope + written_[i] * ld_rope, ld_rope);
    }
  }

  // Latent columns of the layer on this rank.
  int64_t latent_columns(int layer) const { return kv_.layout.row(layer).width(); }

  // q_latent[heads][rows][width] = q_nope · W_UK, for as many heads as the parts have.
  void absorb(const std::vector<AttentionShard::Part>& parts, const float* q_nope, int64_t width, float* q_latent) {
    const int64_t n = rows();
    std::vector<Linear> batch;
    for (const AttentionShard::Part& part : parts) {
      for (size_t h = 0; h < part.w_uk.size(); ++h) {
        batch.push_back({.y = q_latent + int64_t(h) * n * width + part.column, .ldy = width, .x = q_nope + int64_t(h) * n * spec_.qk_nope_head_dim,
                         .ldx = spec_.qk_nope_head_dim, .m = n, .w = part.w_uk[h], .transposed = true});
      }
    }
    backend_.linear(batch);
  }

  // values[heads][rows][v] = Σ_parts value_scale · latent · W_UVᵀ; `latents` [heads][rows][width] is overwritten where a scale is not 1.
  void expand(const std::vector<AttentionShard::Part>& parts, float* latents, int64_t width, float* values) {
    const int64_t n = rows();
    bool first = true;
    for (const AttentionShard::Part& part : parts) {
      std::vector<Linear> batch;
      if (part.value_scale != 1.0f) backend_.scale(latents + part.column, width, int64_t(part.w_uv.size()) * n, part.w_uv[0].cols, part.value_scale);
      for (size_t h = 0; h < part.w_uv.size(); ++h) {
        batch.push_back({.y = values + int64_t(h) * n * spec_.v_head_dim, .ldy = spec_.v_head_dim, .x = latents + int64_t(h) * n * width + part.column,
                         .ldx = width, .m = n, .w = part.w_uv[h], .accumulate = !first});
      }
      backend_.linear(batch);
      first = false;
    }
  }

  // out[rows, hidden] += values[own heads][rows][v] · W_Oᵀ
  void project(const WeightView& o, const float* values, float* out, int64_t ld_out) {
    const Backend::Scope scope(backend_);
    const int64_t n = rows();
    const int64_t width = int64_t(heads_.size()) * spec_.v_head_dim;
    if (width == 0 || n == 0) return;
    float* merged = backend_.allocate(size_t(n * width));
    backend_.merge_groups(values, n, heads_.size(), spec_.v_head_dim, merged, width, spec_.v_head_dim);
    backend_.linear({.y = out, .ldy = ld_out, .x = merged, .ldx = width, .m = n, .w = o, .accumulate = true});
  }

  LatentAttention attention(int layer, int heads, const float* q_latent, const float* q_rope, float* out, float* lse) const {
    return {.kv = &kv_, .memory = memory(), .layer = layer, .heads = heads, .sequences = sequences_, .q_latent = q_latent, .q_rope = q_rope,
            .scale = spec_.softmax_scale, .out = out, .lse = lse};
  }

  // Own heads' rows of q_b and columns of o.
  AttentionShard own_heads(const LayerWeights& w) const {
    AttentionShard shard;
    shard.q_b = w.q_b.row_slice(int64_t(heads_.begin) * spec_.q_head_dim(), int64_t(heads_.end) * spec_.q_head_dim());
    shard.o = w.o.col_slice(int64_t(heads_.begin) * spec_.v_head_dim, int64_t(heads_.end) * spec_.v_head_dim);
    return shard;
  }

  // Columns [begin, end) of kv_b for a range of heads, to lie at `column` of the rank's row.
  AttentionShard::Part kv_b_part(const LayerWeights& w, Share heads, int64_t begin, int64_t end, int64_t column, float value_scale) const {
    AttentionShard::Part part{.w_uk = {}, .w_uv = {}, .column = column, .value_scale = value_scale};
    for (int64_t h = heads.begin; h < heads.end; ++h) {
      const int64_t row = h * (spec_.qk_nope_head_dim + spec_.v_head_dim);
      part.w_uk.push_back(w.kv_b.slice(row, row + spec_.qk_nope_head_dim, begin, end));
      part.w_uv.push_back(w.kv_b.slice(row + spec_.qk_nope_head_dim, row + spec_.qk_nope_head_dim + spec_.v_head_dim, begin, end));
    }
    return part;
  }

  float* take(int64_t heads, int64_t per_row) { return backend_.allocate(size_t(heads * rows() * per_row)); }

  const Model& model_;
  const ModelSpec& spec_;
  const KvRegion& kv_;
  Backend& backend_;
  Communicator& group_;
  const Share heads_;

  std::vector<int32_t> positions_;
  std::vector<KvSequence> sequences_;
  std::vector<KvSlot> slots_;
  std::vector<int64_t> written_;
  std::vector<float> tables_;
  float* rope_ = nullptr;
};

// Heads are divided, KV is replicated (one copy where ranks share memory). No collective but the layer's all-reduce.
class MlaAttention : public AttentionBase {
 public:
  MlaAttention(const Model& model, const KvRegion& kv, Backend& backend, Communicator& group)
      : AttentionBase(model, kv, backend, group, share_of(model.spec().heads, group.rank(), group.size())) {
    for (const LayerWeights& w : model.layers()) {
      AttentionShard shard = own_heads(w);
      shard.parts.push_back(kv_b_part(w, heads_, 0, spec_.kv_lora_rank, 0, 1.0f));
      shards_.push_back(std::move(shard));
    }
  }

  void run(int layer, const float* hidden, float* partial) override {
    const Backend::Scope scope(backend_);
    const LayerWeights& w = model_.layers()[size_t(layer)];
    const AttentionShard& shard = shards_[size_t(layer)];
    const NewTokens fresh = compress(w, hidden);
    store(layer, fresh.latent, spec_.kv_lora_rank, fresh.rope, fresh.ld_rope);
    // The first rank has written for all.
    group_.barrier();
    if (heads_.size() == 0) return;
    float* q_nope = take(heads_.size(), spec_.qk_nope_head_dim);
    float* q_rope = take(heads_.size(), spec_.qk_rope_head_dim);
    float* q_latent = take(heads_.size(), spec_.kv_lora_rank);
    float* latents = take(heads_.size(), spec_.kv_lora_rank);
    float* values = take(heads_.size(), spec_.v_head_dim);
    queries(w, shard.q_b, hidden, q_nope, q_rope);
    absorb(shard.parts, q_nope, spec_.kv_lora_rank, q_latent);
    backend_.attend(attention(layer, heads_.size(), q_latent, q_rope, latents, nullptr));
    expand(shard.parts, latents, spec_.kv_lora_rank, values);
    project(shard.o, values, partial, spec_.hidden_size);
  }

 private:
  void select_rows(const std::vector<DecodeItem>& items) override {
    written_.clear();
    for (const DecodeItem& item : items) add_row(item, item.pages[0], group_.rank() == 0);
  }

  std::vector<AttentionShard> shards_;
};

// Tensor-parallel latent attention: every rank attends with all heads over its columns of the latent (shared ∪ slice) and the whole
// rope key. Projections stay divided by heads, which costs an all-gather of queries and a reduce-scatter of values.
class TplaAttention : public AttentionBase {
 public:
  TplaAttention(const Model& model, const KvRegion& kv, Backend& backend, Communicator& group, bool exact_softmax)
      : AttentionBase(model, kv, backend, group, share_of(model.spec().heads, group.rank(), group.size())), exact_softmax_(exact_softmax) {
    const Share all{0, spec_.heads};
    for (int layer = 0; layer < spec_.layers; ++layer) {
      const LayerWeights& w = model.layers()[size_t(layer)];
      const RowLayout layout = kv.layout.row(layer);
      const int64_t begin = layout.slice_begin(group.rank());
      AttentionShard shard = own_heads(w);
      if (layout.ranks > 1 && !w.rank_w_uk.empty()) {
        shard.parts.push_back(own_matrices(w, group.rank()));
      } else {
        if (layout.shared > 0) shard.parts.push_back(kv_b_part(w, all, 0, layout.shared, 0, 1.0f / float(layout.ranks)));
        if (layout.slice() > 0) shard.parts.push_back(kv_b_part(w, all, begin, begin + layout.slice(), layout.shared, 1.0f));
      }
      shards_.push_back(std::move(shard));
    }
    // The norm is sliced only where ranks really hold slices.
    sliced_norm_ = kv.layout.ranks > 1 && spec_.tpla && spec_.tpla->sliced_norm;
    if (sliced_norm_) {
      for (int layer = 0; layer < spec_.layers; ++layer) {
        const LayerWeights& w = model.layers()[size_t(layer)];
        const RowLayout layout = kv.layout.row(layer);
        const int64_t begin = layout.slice_begin(group.rank());
        std::vector<float> gamma(w.kv_a_norm.begin(), w.kv_a_norm.begin() + layout.shared);
        gamma.insert(gamma.end(), w.kv_a_norm.begin() + begin, w.kv_a_norm.begin() + begin + layout.slice());
        own_gamma_.push_back(std::move(gamma));
      }
    }
  }

  void run(int layer, const float* hidden, float* partial) override {
    const Backend::Scope scope(backend_);
    const LayerWeights& w = model_.layers()[size_t(layer)];
    const AttentionShard& shard = shards_[size_t(layer)];
    store_own_columns(layer, compress(w, hidden));

    const int64_t n = rows();
    float* q_nope = take(spec_.heads, spec_.qk_nope_head_dim);
    float* q_rope = take(spec_.heads, spec_.qk_rope_head_dim);
    float* q_latent = take(spec_.heads, latent_columns(layer));
    float* latents = take(spec_.heads, latent_columns(layer));
    float* values = take(spec_.heads, spec_.v_head_dim);
    float* own_nope = q_nope + int64_t(heads_.begin) * n * spec_.qk_nope_head_dim;
    float* own_rope = q_rope + int64_t(heads_.begin) * n * spec_.qk_rope_head_dim;
    queries(w, shard.q_b, hidden, own_nope, own_rope);
    group_.all_gather(own_nope, q_nope, head_offsets(spec_.heads, group_.size(), n * spec_.qk_nope_head_dim));
    group_.all_gather(own_rope, q_rope, head_offsets(spec_.heads, group_.size(), n * spec_.qk_rope_head_dim));
    absorb(shard.parts, q_nope, latent_columns(layer), q_latent);
    if (exact_softmax_) {
      attend_exactly(layer, q_latent, q_rope, latents);
    } else {
      backend_.attend(attention(layer, spec_.heads, q_latent, q_rope, latents, nullptr));
    }
    expand(shard.parts, latents, latent_columns(layer), values);
    float* own_values = take(heads_.size(), spec_.v_head_dim);
    group_.reduce_scatter(values, own_values, head_offsets(spec_.heads, group_.size(), n * spec_.v_head_dim));
    project(shard.o, own_values, partial, spec_.hidden_size);
  }

 private:
  void select_rows(const std::vector<DecodeItem>& items) override {
    written_.clear();
    for (const DecodeItem& item : items) add_row(item, item.pages[0], true);
  }

  // Matrices that the checkpoint brings for this rank: [heads * nope, width] and [heads * v, width].
  AttentionShard::Part own_matrices(const LayerWeights& w, int rank) const {
    AttentionShard::Part part{.w_uk = {}, .w_uv = {}, .column = 0, .value_scale = 1.0f};
    for (int64_t h = 0; h < spec_.heads; ++h) {
      part.w_uk.push_back(w.rank_w_uk[size_t(rank)].row_slice(h * spec_.qk_nope_head_dim, (h + 1) * spec_.qk_nope_head_dim));
      part.w_uv.push_back(w.rank_w_uv[size_t(rank)].row_slice(h * spec_.v_head_dim, (h + 1) * spec_.v_head_dim));
    }
    return part;
  }

  void store_own_columns(int layer, const NewTokens& fresh) {
    const RowLayout layout = kv_.layout.row(layer);
    const int64_t width = layout.width();
    const float* from = sliced_norm_ ? fresh.raw : fresh.latent;
    const int64_t ld = sliced_norm_ ? fresh.ld_rope : spec_.kv_lora_rank;
    float* own = take(1, width);
    if (layout.shared > 0) backend_.copy_rows(from, ld, rows(), layout.shared, own, width);
    if (layout.slice() > 0) backend_.copy_rows(from + layout.slice_begin(group_.rank()), ld, rows(), layout.slice(), own + layout.shared, width);
    if (sliced_norm_) {
      // RMS(c) is estimated from the rank's own columns.
      backend_.rms_norm(own, width, rows(), width, own_gamma_[size_t(layer)].data(), kLatentNormEps, own, width);
      backend_.scale(own, width, rows(), width, 1.0f / spec_.tpla->norm_scale[size_t(layer)][size_t(group_.rank())]);
    }
    store(layer, own, width, fresh.rope, fresh.ld_rope);
  }

  // One softmax for all ranks: each contributes the logits of columns that only it holds, the first rank also shared columns and rope.
  void attend_exactly(int layer, float* q_latent, const float* q_rope, float* latents) {
    const RowLayout layout = kv_.layout.row(layer);
    const bool first = group_.rank() == 0;
    if (!first && layout.shared > 0) backend_.scale(q_latent, layout.width(), int64_t(spec_.heads) * rows(), layout.shared, 0.0f);
    const LatentAttention a = attention(layer, spec_.heads, q_latent, first ? q_rope : nullptr, latents, nullptr);
    for (int64_t i = 0; i < rows(); ++i) {
      const Backend::Scope scope(backend_);
      const size_t count = size_t(spec_.heads) * size_t(sequences_[size_t(i)].tokens);
      float* logits = backend_.allocate(count);
      backend_.latent_logits(a, i, logits);
      group_.all_reduce(logits, count);
      backend_.latent_values(a, i, logits);
    }
  }

  const bool exact_softmax_;
  bool sliced_norm_ = false;
  std::vector<std::vector<float>> own_gamma_;
  std::vector<AttentionShard> shards_;
};

// Decode context parallelism: logical page j of a sequence lives on rank j mod ranks. Queries are gathered, every rank attends with all
// heads over its pages, and partial outputs are merged by their log-sum-exp, exactly.
class DcpAttention : public AttentionBase {
 public:
  DcpAttention(const Model& model, const KvRegion& kv, Backend& backend, Communicator& group)
      : AttentionBase(model, kv, backend, group, share_of(model.spec().heads, group.rank(), group.size())) {
    for (const LayerWeights& w : model.layers()) {
      AttentionShard shard = own_heads(w);
      shard.parts.push_back(kv_b_part(w, heads_, 0, spec_.kv_lora_rank, 0, 1.0f));
      shards_.push_back(std::move(shard));
    }
  }

  void run(int layer, const float* hidden, float* partial) override {
    const Backend::Scope scope(backend_);
    const LayerWeights& w = model_.layers()[size_t(layer)];
    const AttentionShard& shard = shards_[size_t(layer)];
    const NewTokens fresh = compress(w, hidden);
    store(layer, fresh.latent, spec_.kv_lora_rank, fresh.rope, fresh.ld_rope);

    const int64_t n = rows();
    const int64_t latent = spec_.kv_lora_rank;
    float* own_nope = take(heads_.size(), spec_.qk_nope_head_dim);
    float* q_latent = take(spec_.heads, latent);
    float* q_rope = take(spec_.heads, spec_.qk_rope_head_dim);
    float* own_latent = q_latent + int64_t(heads_.begin) * n * latent;
    float* own_rope = q_rope + int64_t(heads_.begin) * n * spec_.qk_rope_head_dim;
    queries(w, shard.q_b, hidden, own_nope, own_rope);
    absorb(shard.parts, own_nope, latent, own_latent);
    group_.all_gather(own_latent, q_latent, head_offsets(spec_.heads, group_.size(), n * latent));
    group_.all_gather(own_rope, q_rope, head_offsets(spec_.heads, group_.size(), n * spec_.qk_rope_head_dim));

    float* latents = take(spec_.heads, latent);
    float* lse = take(spec_.heads, 1);
    backend_.attend(attention(layer, spec_.heads, q_latent, q_rope, latents, lse));
    float* lse_all = take(int64_t(spec_.heads) * group_.size(), 1);
    std::vector<size_t> ranks;
    for (int r = 0; r <= group_.size(); ++r) ranks.push_back(size_t(r) * size_t(spec_.heads) * size_t(n));
    group_.all_gather(lse, lse_all, ranks);
    backend_.scale_by_lse(latents, int64_t(spec_.heads) * n, latent, lse_all, group_.size(), group_.rank());
    float* own = take(heads_.size(), latent);
    float* values = take(heads_.size(), spec_.v_head_dim);
    group_.reduce_scatter(latents, own, head_offsets(spec_.heads, group_.size(), n * latent));
    expand(shard.parts, own, latent, values);
    project(shard.o, values, partial, spec_.hidden_size);
  }

 private:
  void select_rows(const std::vector<DecodeItem>& items) override {
    written_.clear();
    const int page_tokens = kv_.layout.page_tokens;
    const int rank = group_.rank();
    const int ranks = group_.size();
    for (const DecodeItem& item : items) {
      const std::vector<int32_t>& pages = item.pages[size_t(rank)];
      const int last = item.position / page_tokens;
      const int own_pages = last >= rank ? (last - rank) / ranks + 1 : 0;
      int64_t tokens = int64_t(own_pages) * page_tokens;
      if (last % ranks == rank) {
        tokens -= page_tokens - 1 - item.position % page_tokens;
        written_.push_back(rows());
        slots_.push_back({pages[size_t(last / ranks)], item.position % page_tokens});
      }
      positions_.push_back(item.position);
      sequences_.push_back({pages.data(), tokens});
    }
  }

  std::vector<AttentionShard> shards_;
};

// Data-parallel attention: a sequence lives on one rank, which computes all its heads. The layer's all-reduce gathers the rows.
class DpAttention : public AttentionBase {
 public:
  DpAttention(const Model& model, const KvRegion& kv, Backend& backend, Communicator& group)
      : AttentionBase(model, kv, backend, group, Share{0, model.spec().heads}) {
    for (const LayerWeights& w : model.layers()) {
      AttentionShard shard = own_heads(w);
      shard.parts.push_back(kv_b_part(w, heads_, 0, spec_.kv_lora_rank, 0, 1.0f));
      shards_.push_back(std::move(shard));
    }
  }

  void run(int layer, const float* hidden, float* partial) override {
    const int64_t n = rows();
    if (n == 0) return;
    const Backend::Scope scope(backend_);
    const LayerWeights& w = model_.layers()[size_t(layer)];
    const AttentionShard& shard = shards_[size_t(layer)];
    const int64_t width = spec_.hidden_size;
    float* in = backend_.allocate(size_t(n * width));
    float* out = backend_.allocate(size_t(n * width));
    for (int64_t i = 0; i < n; ++i) backend_.copy_rows(hidden + own_items_[size_t(i)] * width, width, 1, width, in + i * width, width);
    const NewTokens fresh = compress(w, in);
    store(layer, fresh.latent, spec_.kv_lora_rank, fresh.rope, fresh.ld_rope);

    float* q_nope = take(spec_.heads, spec_.qk_nope_head_dim);
    float* q_rope = take(spec_.heads, spec_.qk_rope_head_dim);
    float* q_latent = take(spec_.heads, spec_.kv_lora_rank);
    float* latents = take(spec_.heads, spec_.kv_lora_rank);
    float* values = take(spec_.heads, spec_.v_head_dim);
    queries(w, shard.q_b, in, q_nope, q_rope);
    absorb(shard.parts, q_nope, spec_.kv_lora_rank, q_latent);
    backend_.attend(attention(layer, spec_.heads, q_latent, q_rope, latents, nullptr));
    expand(shard.parts, latents, spec_.kv_lora_rank, values);
    backend_.zero(out, n * width);
    project(shard.o, values, out, width);
    for (int64_t i = 0; i < n; ++i) backend_.copy_rows(out + i * width, width, 1, width, partial + own_items_[size_t(i)] * width, width);
  }

 private:
  void select_rows(const std::vector<DecodeItem>& items) override {
    written_.clear();
    own_items_.clear();
    for (size_t i = 0; i < items.size(); ++i) {
      if (items[i].rank != group_.rank()) continue;
      own_items_.push_back(int64_t(i));
      add_row(items[i], items[i].pages[0], true);
    }
  }

  std::vector<int64_t> own_items_;
  std::vector<AttentionShard> shards_;
};

}  // namespace

std::unique_ptr<DecodeAttention> make_decode_attention(const Model& model, const KvRegion& kv, Backend& backend, Communicator& group, bool exact_softmax) {
  switch (kv.layout.form) {
    case KvForm::mla: return std::make_unique<MlaAttention>(model, kv, backend, group);
    case KvForm::tpla: return std::make_unique<TplaAttention>(model, kv, backend, group, exact_softmax);
    case KvForm::dcp: return std::make_unique<DcpAttention>(model, kv, backend, group);
    case KvForm::dp: return std::make_unique<DpAttention>(model, kv, backend, group);
  }
  return nullptr;
}

}  // namespace tpla
