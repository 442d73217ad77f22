#include "bench/cpu_attention.h"

#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstring>
#include <limits>

#include "bench/host_reference.h"
#include "bench/page_tables.h"
#include "bench/random.h"
#include "core/error.h"
#include "core/kv_row.h"
#include "cpu/cpu_backend.h"
#include "cpu/cpu_features.h"

namespace tpla::bench {

namespace {

using Clock = std::chrono::steady_clock;

constexpr int kMostBuffers = 64;
constexpr size_t kMostBytes = size_t(8) << 30;

double milliseconds_since(Clock::time_point begin) { return std::chrono::duration<double, std::milli>(Clock::now() - begin).count(); }

int count_or_all(int threads) { return threads > 0 ? threads : cpu::usable_cores(); }

size_t cache_bytes() {
  const long bytes = sysconf(_SC_LEVEL3_CACHE_SIZE);
  return bytes > 0 ? size_t(bytes) : size_t(32) << 20;
}

KvLayout layout_of(const DecodeShape& shape) {
  KvLayout layout;
  layout.form = KvForm::mla;
  layout.ranks = 1;
  layout.layers = 1;
  layout.latent = shape.latent;
  layout.rope = shape.rope;
  layout.dtype = shape.kv == KvType::fp8 ? KvDType::fp8 : shape.kv == KvType::bf16 ? KvDType::bf16 : KvDType::f32;
  layout.page_tokens = shape.page_tokens;
  return layout;
}

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

// Tensors of one problem. Rows that no sequence holds are NaN in every dtype.
class CpuProblem {
 public:
  CpuProblem(const DecodeShape& shape, uint64_t seed, int sets)
      : shape_(shape),
        layout_(layout_of(shape)),
        slopes_(shape.variants.alibi ? alibi_slopes(shape.heads) : std::vector<float>{}),
        visible_stride_(visible_stride(shape.variants, shape.kv_lens)),
        visible_(visible_blocks(shape.variants, visible_stride_)),
        logits_(rule(), queries_of(shape)),
        tables_(draw_page_tables(shape.kv_lens, shape.page_tokens, sets, stream_seed(seed, 0))),
        region_(layout_, tables_.pages) {
    const size_t bytes = layout_.page_bytes(0) * size_t(tables_.pages);
    if (bytes > kMostBytes) throw Error("OUT_OF_MEMORY", "this shape takes " + std::to_string(bytes >> 20) + " MiB of KV; on the CPU it may take " + std::to_string(kMostBytes >> 20));
    pages_.assign(bytes, std::byte{0xff});
    region_.base[0] = pages_.data();
    draw_tokens(stream_seed(seed, 1));
    draw_queries(seed);
    // One engine sequence per query token: it sees the tokens up to its own.
    for (size_t s = 0; s < shape.q_lens.size(); ++s) {
      for (int i = 0; i < shape.q_lens[s]; ++i) rows_.push_back({int(s), visible(int(s), i)});
    }
    out_.resize(rows_.size() * size_t(shape.heads * shape.latent));
    lse_.resize(rows_.size() * size_t(shape.heads));
  }

  int sets() const { return tables_.sets; }

  void launch(cpu::CpuBackend& backend, int set) {
    std::vector<KvSequence> sequences;
    for (const Row& row : rows_) sequences.push_back({table(set, row.sequence), row.tokens});
    LatentAttention attention;
    attention.kv = &region_;
    attention.heads = shape_.heads;
    attention.sequences = sequences;
    attention.q_latent = q_latent_.data();
    attention.q_rope = q_rope_.data();
    attention.scale = float(kDecodeScale);
    attention.transform = shape_.variants.any() ? &logits_ : nullptr;
    attention.out = out_.data();
    attention.lse = lse_.data();
    backend.attend(attention);
  }

  void poison_outputs() {
    std::fill(out_.begin(), out_.end(), std::numeric_limits<float>::quiet_NaN());
    std::fill(lse_.begin(), lse_.end(), std::numeric_limits<float>::quiet_NaN());
  }

  bool same_bits(const HostResult& other) const {
    return std::memcmp(out_.data(), other.out.data(), out_.size() * 4) == 0 && std::memcmp(lse_.data(), other.lse.data(), lse_.size() * 4) == 0;
  }
  HostResult raw() const { return {out_, lse_}; }

  Check check() const {
    const int64_t width = shape_.latent + shape_.rope;
    std::vector<float> widened(size_t(tables_.pages) * size_t(shape_.page_tokens) * size_t(width));
    for (int page = 0; page < tables_.pages; ++page) {
      for (int t = 0; t < shape_.page_tokens; ++t) {
        decode_row(layout_.row(0), region_.row(0, 0, page, t), widened.data() + (int64_t(page) * shape_.page_tokens + t) * width);
      }
    }
    const auto row = [&](int sequence, int t, int) {
      const int64_t page = table(0, sequence)[t / shape_.page_tokens];
      return widened.data() + (page * shape_.page_tokens + t % shape_.page_tokens) * width;
    };
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
    problem.key = row;
    problem.value = row;
    return compare_with_reference(problem, token_major());
  }

 private:
  struct Row {
    int sequence;
    int64_t tokens;
  };

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

  const int32_t* table(int set, int sequence) const {
    return tables_.table.data() + (size_t(set) * shape_.kv_lens.size() + size_t(sequence)) * size_t(tables_.stride);
  }

  void draw_tokens(uint64_t seed) {
    std::vector<float> values(size_t(shape_.latent + shape_.rope));
    for (int set = 0; set < tables_.sets; ++set) {
      for (size_t s = 0; s < shape_.kv_lens.size(); ++s) {
        for (int t = 0; t < shape_.kv_lens[s]; ++t) {
          const int page = table(set, int(s))[t / shape_.page_tokens];
          const uint64_t first = (uint64_t(page) * uint64_t(shape_.page_tokens) + uint64_t(t % shape_.page_tokens)) * values.size();
          for (size_t c = 0; c < values.size(); ++c) values[c] = random_normal(seed, first + c);
          encode_row(layout_.row(0), values.data(), values.data() + shape_.latent, region_.row(0, 0, page, t % shape_.page_tokens));
        }
      }
    }
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
    HostResult result{std::vector<float>(out_.size()), std::vector<float>(lse_.size())};
    const size_t tokens = rows_.size(), heads = size_t(shape_.heads), latent = size_t(shape_.latent);
    for (size_t h = 0; h < heads; ++h) {
      for (size_t t = 0; t < tokens; ++t) {
        std::memcpy(result.out.data() + (t * heads + h) * latent, out_.data() + (h * tokens + t) * latent, latent * 4);
        result.lse[t * heads + h] = lse_[h * tokens + t];
      }
    }
    return result;
  }

  const DecodeShape& shape_;
  const KvLayout layout_;
  const std::vector<float> slopes_;
  const int64_t visible_stride_;
  const std::vector<uint8_t> visible_;
  const CpuLogits logits_;
  const PageTables tables_;
  std::vector<std::byte> pages_;
  KvRegion region_;
  std::vector<float> queries_, q_latent_, q_rope_;
  std::vector<Row> rows_;
  std::vector<float> out_, lse_;
};

int sets_that_outgrow_the_cache(const DecodeShape& shape) {
  const size_t bytes = std::max<size_t>(1, layout_of(shape).page_bytes(0) * size_t(pages_needed(shape.kv_lens, shape.page_tokens)));
  const size_t wanted = std::clamp<size_t>((2 * cache_bytes() + bytes - 1) / bytes, 1, kMostBuffers);
  return int(std::min(wanted, std::max<size_t>(1, kMostBytes / 2 / bytes)));
}

Timing time_calls(CpuProblem& problem, cpu::CpuBackend& backend, int runs) {
  problem.launch(backend, 0);
  std::vector<double> times;
  for (int i = 0; i < runs; ++i) {
    const auto begin = Clock::now();
    problem.launch(backend, i % problem.sets());
    times.push_back(milliseconds_since(begin));
  }
  std::sort(times.begin(), times.end());
  return {times[times.size() / 2], times.front(), times.back(), runs, 1, problem.sets()};
}

constexpr int kRateRepeats = 5;

double copy_bytes_per_s(cpu::ThreadTeam& team) {
  constexpr size_t kBytes = size_t(128) << 20;
  const std::vector<std::byte> from(kBytes, std::byte{1});
  std::vector<std::byte> to(kBytes);
  double best = std::numeric_limits<double>::infinity();
  for (int i = 0; i < kRateRepeats; ++i) {
    const auto begin = Clock::now();
    team.run_ranges(int64_t(kBytes), int64_t(1) << 20, [&](int64_t first, int64_t last, int) { std::memcpy(to.data() + first, from.data() + first, size_t(last - first)); });
    best = std::min(best, milliseconds_since(begin));
  }
  return 2.0 * double(kBytes) / best * 1e3;
}

// Each thread multiplies a few small matrices of its own again and again.
double matrix_flops_per_s(cpu::ThreadTeam& team) {
  constexpr int64_t kRows = 64, kDepth = 256, kPanels = 4, kProducts = 64;
  const cpu::Kernels& kernels = cpu::select_kernels(nullptr);
  const int64_t columns = kPanels * kernels.panel;
  std::vector<float> a(size_t(kRows * kDepth)), b(size_t(columns * kDepth));
  for (size_t i = 0; i < a.size(); ++i) a[i] = random_normal(1, i);
  for (size_t i = 0; i < b.size(); ++i) b[i] = random_normal(2, i);
  std::vector<std::vector<float>> results(size_t(team.size()), std::vector<float>(size_t(kRows * columns)));
  const int64_t tasks = int64_t(team.size()) * 4;
  double best = std::numeric_limits<double>::infinity();
  for (int i = 0; i < kRateRepeats; ++i) {
    const auto begin = Clock::now();
    team.run(tasks, [&](int64_t, int thread) {
      for (int64_t product = 0; product < kProducts; ++product) {
        kernels.gemm({.m = kRows, .n = columns, .k = kDepth, .a = a.data(), .a_row = kDepth, .a_col = 1, .b = b.data(), .b_panel = kDepth * kernels.panel,
                      .b_row = kernels.panel, .c = results[size_t(thread)].data(), .ldc = columns, .accumulate = false});
      }
    });
    best = std::min(best, milliseconds_since(begin));
  }
  return 2.0 * double(kRows * columns * kDepth * kProducts * tasks) / best * 1e3;
}

}  // namespace

const char* cpu_kernel() { return cpu::select_kernels(nullptr).name; }

Outcome run_on_cpu(int threads, const DecodeShape& shape, const RunOptions& options) {
  cpu::CpuBackend backend(cpu::select_instruction_set(nullptr), count_or_all(threads), 3);
  CpuProblem problem(shape, options.seed, options.runs > 0 ? sets_that_outgrow_the_cache(shape) : 1);
  Outcome outcome;
  outcome.kernel = cpu_kernel();
  if (options.repeats > 0) {
    bool same = true;
    HostResult first;
    for (int i = 0; i < options.repeats; ++i) {
      problem.poison_outputs();
      problem.launch(backend, 0);
      if (i == 0) first = problem.raw();
      else same = same && problem.same_bits(first);
    }
    outcome.check = problem.check();
    outcome.check->same_bits = same;
    outcome.check->repeats = options.repeats;
  }
  if (options.runs > 0) outcome.timing = time_calls(problem, backend, options.runs);
  return outcome;
}

Rates cpu_rates(int threads) {
  cpu::ThreadTeam team(count_or_all(threads));
  Rates rates;
  rates.copy_bytes_per_s = copy_bytes_per_s(team);
  rates.matrix_flops_per_s = matrix_flops_per_s(team);
  rates.matrix_source = std::string("fp32 products in cache, ") + cpu_kernel();
  return rates;
}

}  // namespace tpla::bench
