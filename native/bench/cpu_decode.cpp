#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

#include "bench/cpu_latents.h"
#include "bench/cpu_problem.h"
#include "bench/logit_rule.h"
#include "bench/random.h"

namespace tpla::bench {

namespace {

// The variants as the engine applies them, in fp32; one engine sequence per query token.
class CpuLogits : public LogitTransform {
 public:
  struct Query {
    int sequence;
    int position;
  };

  CpuLogits(const LogitRule& rule, std::vector<Query> queries) : rule_(rule), queries_(std::move(queries)) {}

  void apply(int64_t sequence, int64_t token0, int64_t keys, int head0, int64_t heads, float* products, int64_t ld) const override {
    const Query& query = queries_[size_t(sequence)];
    const float cap = float(rule_.softcap), scale = float(kDecodeScale);
    for (int64_t i = 0; i < keys; ++i) {
      const int t = int(token0 + i);
      const bool visible = rule_.sees(query.sequence, query.position, t);
      for (int64_t h = 0; h < heads; ++h) {
        float& logit = products[i * ld + h];
        logit *= scale;
        if (cap > 0) logit = cap * std::tanh(logit / cap);
        if (rule_.slopes) logit -= rule_.slopes[head0 + h] * std::fabs(float(query.position - t));
        if (!visible) logit = -std::numeric_limits<float>::infinity();
      }
    }
  }

 private:
  const LogitRule rule_;
  const std::vector<Query> queries_;
};

// Decode as the engine computes it, every query token a sequence of its own that sees the tokens up to it.
class CpuDecode : public CpuProblem {
 public:
  CpuDecode(const DecodeShape& shape, uint64_t seed, bool timed)
      : shape_(shape),
        slopes_(shape.variants.alibi ? alibi_slopes(shape.heads) : std::vector<float>{}),
        visible_stride_(visible_stride(shape.variants, shape.kv_lens)),
        visible_(visible_blocks(shape.variants, visible_stride_)),
        logits_(rule(), queries_of(shape)),
        latents_(rows_of(shape), shape.kv_lens, timed ? CpuLatents::sets_that_outgrow_the_cache(rows_of(shape), shape.kv_lens) : 1, seed) {
    draw_queries(seed);
    for (size_t s = 0; s < shape.q_lens.size(); ++s) {
      for (int i = 0; i < shape.q_lens[s]; ++i) rows_.push_back({int(s), visible(int(s), i)});
    }
    outputs.out.resize(rows_.size() * size_t(shape.heads * shape.latent));
    outputs.lse.resize(rows_.size() * size_t(shape.heads));
  }

  int sets() const override { return latents_.sets(); }

  void launch(cpu::CpuBackend& backend, int set) override {
    std::vector<KvSequence> sequences;
    for (const Row& row : rows_) sequences.push_back({latents_.table(set, row.sequence), row.tokens});
    LatentAttention attention;
    attention.kv = &latents_.region();
    attention.heads = shape_.heads;
    attention.sequences = sequences;
    attention.q_latent = q_latent_.data();
    attention.q_rope = q_rope_.data();
    attention.scale = float(kDecodeScale);
    attention.transform = shape_.variants.any() ? &logits_ : nullptr;
    attention.out = outputs.out.data();
    attention.lse = outputs.lse.data();
    backend.attend(attention);
  }

  Check check() const override {
    const size_t width = size_t(shape_.latent + shape_.rope);
    const std::vector<int32_t> offsets = prefix_sums(shape_.kv_lens);
    std::vector<float> widened(size_t(offsets.back()) * width);
    const auto at = [&](int sequence, int t) { return widened.data() + (size_t(offsets[size_t(sequence)]) + size_t(t)) * width; };
    for (size_t s = 0; s < shape_.kv_lens.size(); ++s) {
      for (int t = 0; t < shape_.kv_lens[s]; ++t) latents_.read(int(s), t, at(int(s), t));
    }
    HostAttention problem;
    problem.q_lens = shape_.q_lens;
    problem.kv_lens = shape_.kv_lens;
    problem.heads = shape_.heads;
    problem.key_dim = int(width);
    problem.value_dim = shape_.latent;
    problem.causal = shape_.causal;
    problem.scale = double(float(kDecodeScale));
    problem.rule = rule();
    problem.q = queries_.data();
    problem.key = problem.value = [&](int sequence, int t, int) { return at(sequence, t); };
    return compare_with_reference(problem, token_major());
  }

 private:
  struct Row {
    int sequence;
    int64_t tokens;
  };

  static LatentRows rows_of(const DecodeShape& shape) { return {shape.latent, shape.rope, shape.kv, shape.page_tokens}; }

  LogitRule rule() const {
    const LogitVariantShape& variants = shape_.variants;
    return {variants.softcap, variants.window, variants.alibi ? slopes_.data() : nullptr, variants.mask_block, visible_.data(), visible_stride_};
  }

  static std::vector<CpuLogits::Query> queries_of(const DecodeShape& shape) {
    std::vector<CpuLogits::Query> queries;
    for (size_t s = 0; s < shape.q_lens.size(); ++s) {
      for (int i = 0; i < shape.q_lens[s]; ++i) queries.push_back({int(s), shape.kv_lens[s] - shape.q_lens[s] + i});
    }
    return queries;
  }

  int64_t visible(int sequence, int token) const {
    const int kv_len = shape_.kv_lens[size_t(sequence)];
    return shape_.causal ? std::max(0, kv_len - shape_.q_lens[size_t(sequence)] + token + 1) : kv_len;
  }

  // Kept twice: [token][head][latent + rope] for the reference, [head][token][...] for the engine.
  void draw_queries(uint64_t seed) {
    const int64_t tokens = prefix_sums(shape_.q_lens).back();
    const int64_t width = shape_.latent + shape_.rope;
    queries_.resize(size_t(tokens * shape_.heads * width));
    q_latent_.resize(size_t(tokens * shape_.heads * shape_.latent));
    q_rope_.resize(size_t(tokens * shape_.heads * shape_.rope));
    for (int64_t t = 0; t < tokens; ++t) {
      for (int64_t h = 0; h < shape_.heads; ++h) {
        float* row = queries_.data() + (t * shape_.heads + h) * width;
        const float mu = shape_.latent_scale ? random_latent_scale(stream_seed(seed, 3), int(h)) : 1.0f;
        for (int64_t c = 0; c < width; ++c) {
          row[c] = shape_.query_scale * random_normal(stream_seed(seed, 2), uint64_t((t * shape_.heads + h) * width + c)) * (c < shape_.latent ? mu : 1.0f);
        }
        std::memcpy(q_latent_.data() + (h * tokens + t) * shape_.latent, row, size_t(shape_.latent) * 4);
        std::memcpy(q_rope_.data() + (h * tokens + t) * shape_.rope, row + shape_.latent, size_t(shape_.rope) * 4);
      }
    }
  }

  HostResult token_major() const {
    HostResult result{std::vector<float>(outputs.out.size()), std::vector<float>(outputs.lse.size())};
    const size_t tokens = rows_.size(), heads = size_t(shape_.heads), latent = size_t(shape_.latent);
    for (size_t h = 0; h < heads; ++h) {
      for (size_t t = 0; t < tokens; ++t) {
        std::memcpy(result.out.data() + (t * heads + h) * latent, outputs.out.data() + (h * tokens + t) * latent, latent * 4);
        result.lse[t * heads + h] = outputs.lse[h * tokens + t];
      }
    }
    return result;
  }

  const DecodeShape& shape_;
  const std::vector<float> slopes_;
  const int64_t visible_stride_;
  const std::vector<uint8_t> visible_;
  const CpuLogits logits_;
  const CpuLatents latents_;
  std::vector<float> queries_, q_latent_, q_rope_;
  std::vector<Row> rows_;
};

}  // namespace

std::unique_ptr<CpuProblem> make_cpu_decode(const DecodeShape& shape, uint64_t seed, bool timed) { return std::make_unique<CpuDecode>(shape, seed, timed); }

}  // namespace tpla::bench
