// Absorbed attention over paged latents: all heads share a row, so a block of rows is unpacked once and used as keys and as values.
#include <algorithm>
#include <cmath>
#include <cstring>

#include "cpu/cpu_backend.h"

namespace tpla::cpu {

namespace {

constexpr int64_t kKeyBlock = 64;
constexpr int kHeadBlock = 64;
// A split of a sequence shorter than this is not worth the merge.
constexpr int64_t kSmallestSplit = 128;

}  // namespace

void CpuBackend::attend(const LatentAttention& a) {
  const Scope scope(*this);
  const int64_t n = int64_t(a.sequences.size());
  const int width = a.kv->layout.row(a.layer).width();
  const int head_blocks = (a.heads + kHeadBlock - 1) / kHeadBlock;
  struct Task {
    int64_t sequence;
    int head0, head1;
    int64_t token0, token1;
    int64_t state;  // first row of its partial results
  };
  // Long sequences are split so that the longest task is about a third of a thread's fair share.
  int64_t total = 0;
  for (const KvSequence& s : a.sequences) total += s.tokens;
  const int64_t share = team_.size() == 1 ? total : std::max(kSmallestSplit, total * head_blocks / (3 * team_.size()));
  std::vector<Task> tasks;
  int64_t states = 0;
  for (int64_t i = 0; i < n; ++i) {
    const int64_t tokens = a.sequences[size_t(i)].tokens;
    const int64_t splits = std::max<int64_t>(1, (tokens + share - 1) / std::max<int64_t>(1, share));
    for (int b = 0; b < head_blocks; ++b) {
      const int head0 = a.heads * b / head_blocks;
      const int head1 = a.heads * (b + 1) / head_blocks;
      for (int64_t s = 0; s < splits; ++s) {
        tasks.push_back({i, head0, head1, tokens * s / splits, tokens * (s + 1) / splits, states});
        states += head1 - head0;
      }
    }
  }
  float* partial = allocate(size_t(states * width));
  float* max = allocate(size_t(states));
  float* sum = allocate(size_t(states));
  team_.run(int64_t(tasks.size()), [&](int64_t index, int thread) {
    const Task& t = tasks[size_t(index)];
    latent_attention_task(a, t.sequence, t.head0, t.head1, t.token0, t.token1, partial + t.state * width, width, max + t.state, sum + t.state, thread);
  });

  // Merges the splits of each (sequence, head): tasks of one sequence and head block follow one another.
  std::vector<size_t> groups;
  for (size_t t = 0; t < tasks.size(); ++t) {
    if (t == 0 || tasks[t].sequence != tasks[t - 1].sequence || tasks[t].head0 != tasks[t - 1].head0) groups.push_back(t);
  }
  groups.push_back(tasks.size());
  team_.run(int64_t(groups.size()) - 1, [&](int64_t g, int) {
    const size_t begin = groups[size_t(g)];
    const size_t end = groups[size_t(g) + 1];
    const Task& first = tasks[begin];
    for (int head = first.head0; head < first.head1; ++head) {
      const int64_t out_row = int64_t(head) * n + first.sequence;
      float* out = a.out + out_row * width;
      float top = -INFINITY;
      for (size_t t = begin; t < end; ++t) top = std::max(top, max[tasks[t].state + head - first.head0]);
      std::memset(out, 0, size_t(width) * sizeof(float));
      float denominator = 0;
      for (size_t t = begin; t < end; ++t) {
        const int64_t state = tasks[t].state + head - first.head0;
        if (max[state] == -INFINITY) continue;
        const float weight = std::exp(max[state] - top);
        denominator += weight * sum[state];
        kernels_.axpy(weight, partial + state * width, width, out);
      }
      if (denominator > 0) kernels_.scale(out, 1.0f / denominator, width);
      if (a.lse) a.lse[out_row] = denominator > 0 ? top + std::log(denominator) : -INFINITY;
    }
  });
}

// Unnormalised: out[head] = Σ_t exp(logit_t - max) row_t, sum[head] = Σ_t exp(logit_t - max).
void CpuBackend::latent_attention_task(const LatentAttention& a, int64_t sequence, int head0, int head1, int64_t token0, int64_t token1, float* out,
                                       int64_t ldo, float* max, float* sum, int thread) {
  const RowLayout layout = a.kv->layout.row(a.layer);
  const int64_t n = int64_t(a.sequences.size());
  const int64_t width = layout.width();
  const int64_t row = width + layout.rope;
  const int64_t heads = head1 - head0;
  const int64_t padded = panels(heads) * kernels_.panel;
  float* scratch = scratch_[size_t(thread)].reserve(size_t(padded * row * 2 + kKeyBlock * (row + padded) + 3 * padded + kernels_.panel));
  float* q_packed = scratch;
  float* q = q_packed + padded * row;
  float* rows = q + padded * row;
  float* logits = rows + kKeyBlock * row + kernels_.panel;
  float* column_max = logits + kKeyBlock * padded;
  float* column_sum = column_max + padded;
  float* correction = column_sum + padded;

  for (int64_t h = 0; h < heads; ++h) {
    const int64_t from = (head0 + h) * n + sequence;
    std::memcpy(q + h * row, a.q_latent + from * width, size_t(width) * sizeof(float));
    std::memcpy(q + h * row + width, a.q_rope + from * layout.rope, size_t(layout.rope) * sizeof(float));
    std::memset(out + h * ldo, 0, size_t(width) * sizeof(float));
  }
  kernels_.pack_transposed(view_f32(q, heads, row, row), 0, heads, 0, row, q_packed);
  std::fill_n(column_max, padded, -INFINITY);
  std::fill_n(column_sum, padded, 0.0f);

  for (int64_t t = token0; t < token1; t += kKeyBlock) {
    const int64_t keys = std::min(kKeyBlock, token1 - t);
    widen_rows(*a.kv, a.memory, a.layer, a.sequences[size_t(sequence)].pages, t, t + keys, rows, row);
    kernels_.gemm({.m = keys, .n = heads, .k = row, .a = rows, .a_row = row, .a_col = 1, .b = q_packed, .b_panel = row * kernels_.panel,
                   .b_row = kernels_.panel, .c = logits, .ldc = padded, .accumulate = false});
    if (a.transform) a.transform->apply(sequence, t, keys, head0, heads, logits, padded);
    kernels_.softmax_columns(logits, keys, heads, padded, a.transform ? 1.0f : a.scale, column_max, column_sum, correction);
    if (t > token0) {
      for (int64_t h = 0; h < heads; ++h) {
        if (correction[h] != 1.0f) kernels_.scale(out + h * ldo, correction[h], width);
      }
    }
    kernels_.gemm({.m = heads, .n = width, .k = keys, .a = logits, .a_row = 1, .a_col = padded, .b = rows, .b_panel = kernels_.panel, .b_row = row,
                   .c = out, .ldc = ldo, .accumulate = true});
  }
  std::memcpy(max, column_max, size_t(heads) * sizeof(float));
  std::memcpy(sum, column_sum, size_t(heads) * sizeof(float));
}

// ---------------------------------------------------------------- logits that several ranks hold in part

void CpuBackend::latent_logits(const LatentAttention& a, int64_t sequence, float* logits) {
  const RowLayout layout = a.kv->layout.row(a.layer);
  const KvSequence& s = a.sequences[size_t(sequence)];
  const int64_t n = int64_t(a.sequences.size());
  const int64_t width = layout.width();
  team_.run_ranges(s.tokens, kSmallestSplit, [&](int64_t begin, int64_t end, int thread) {
    float* row = scratch_[size_t(thread)].reserve(size_t(width + layout.rope));
    for (int64_t t = begin; t < end; ++t) {
      widen_rows(*a.kv, a.memory, a.layer, s.pages, t, t + 1, row, 0);
      for (int h = 0; h < a.heads; ++h) {
        const int64_t from = int64_t(h) * n + sequence;
        float& logit = logits[int64_t(h) * s.tokens + t];
        kernels_.dot_rows(view_f32(row, 1, width, width), 0, 1, a.q_latent + from * width, width, 1, &logit, 1, false);
        if (a.q_rope) kernels_.dot_rows(view_f32(row + width, 1, layout.rope, layout.rope), 0, 1, a.q_rope + from * layout.rope, layout.rope, 1, &logit, 1, true);
      }
    }
  });
}

void CpuBackend::latent_values(const LatentAttention& a, int64_t sequence, float* logits) {
  const RowLayout layout = a.kv->layout.row(a.layer);
  const KvSequence& s = a.sequences[size_t(sequence)];
  const int64_t n = int64_t(a.sequences.size());
  const int64_t width = layout.width();
  team_.run(a.heads, [&](int64_t head, int thread) {
    float* p = logits + head * s.tokens;
    float* row = scratch_[size_t(thread)].reserve(size_t(width + layout.rope));
    float* out = a.out + (head * n + sequence) * width;
    const float top = *std::max_element(p, p + s.tokens);
    float sum = 0;
    std::memset(out, 0, size_t(width) * sizeof(float));
    for (int64_t t = 0; t < s.tokens; ++t) {
      const float weight = std::exp(a.scale * (p[t] - top));
      sum += weight;
      widen_rows(*a.kv, a.memory, a.layer, s.pages, t, t + 1, row, 0);
      kernels_.axpy(weight, row, width, out);
    }
    kernels_.scale(out, 1.0f / sum, width);
  });
}

}  // namespace tpla::cpu
