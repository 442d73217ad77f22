// Exact causal attention with keys and values expanded from cached latents, a bounded segment of tokens at a time: the softmax is
// carried from segment to segment, so memory does not grow with the context.
#include <algorithm>
#include <cmath>
#include <cstring>

#include "cpu/cpu_backend.h"

namespace tpla::cpu {

namespace {

constexpr int64_t kKeyBlock = 64;
constexpr int64_t kQueryBlock = 64;
// Expanded keys and values of one segment.
constexpr int64_t kSegmentBytes = int64_t(64) << 20;
constexpr int64_t kLongestSegment = 4096;

}  // namespace

// Tokens [begin, end) of one sequence, expanded at row `row` of the segment.
struct CpuBackend::PrefillPiece {
  const PrefillSequence* sequence;
  int64_t begin, end;
  int64_t row;
};

void CpuBackend::attend(const PrefillAttention& a) {
  const Scope scope(*this);
  const KvLayout& layout = a.kv->layout;
  const int64_t expanded_width = int64_t(a.heads) * (a.nope + a.v);
  const int64_t row_width = layout.latent + layout.rope;
  const int64_t segment = std::clamp<int64_t>(kSegmentBytes / ((expanded_width + row_width) * int64_t(sizeof(float))) / kKeyBlock * kKeyBlock, kKeyBlock, kLongestSegment);
  int64_t queries = 0;
  int64_t tokens = 0;
  for (const PrefillSequence& s : a.sequences) {
    queries = std::max(queries, s.query + s.count);
    tokens += s.kv.tokens;
  }
  const int64_t rows = std::min(segment, tokens);
  float* latents = allocate(size_t(rows * row_width));
  float* expanded = allocate(size_t(rows * expanded_width));
  float* max = allocate(size_t(queries * a.heads));
  float* sum = allocate(size_t(queries * a.heads));
  std::fill_n(max, queries * a.heads, -INFINITY);
  std::fill_n(sum, queries * a.heads, 0.0f);
  for (const PrefillSequence& s : a.sequences) zero(a.out + s.query * a.heads * a.v, s.count * a.heads * a.v);

  struct Task {
    size_t piece;
    int head;
    int64_t query0, query1;
  };
  std::vector<PrefillPiece> pieces;
  std::vector<Task> tasks;
  size_t next = 0;      // sequence
  int64_t at = 0;       // its first token not yet covered
  while (next < a.sequences.size()) {
    pieces.clear();
    int64_t filled = 0;
    while (next < a.sequences.size() && filled < segment) {
      const PrefillSequence& s = a.sequences[next];
      const int64_t end = std::min(s.kv.tokens, at + segment - filled);
      pieces.push_back({&s, at, end, filled});
      filled += end - at;
      at = end;
      if (at == s.kv.tokens) {
        ++next;
        at = 0;
      }
    }
    expand_latents(a, pieces, filled, latents, expanded);
    tasks.clear();
    for (size_t p = 0; p < pieces.size(); ++p) {
      const PrefillSequence& s = *pieces[p].sequence;
      // The last queries see the most keys: they go first, so that the shortest tasks even out the end.
      for (int64_t block = (s.count + kQueryBlock - 1) / kQueryBlock; block-- > 0;) {
        const int64_t query1 = std::min(s.count, (block + 1) * kQueryBlock);
        if (s.position + query1 - 1 < pieces[p].begin) continue;
        for (int head = 0; head < a.heads; ++head) tasks.push_back({p, head, block * kQueryBlock, query1});
      }
    }
    team_.run(int64_t(tasks.size()), [&](int64_t index, int thread) {
      const Task& t = tasks[size_t(index)];
      prefill_attention_task(a, pieces[t.piece], t.head, t.query0, t.query1, latents, expanded, max, sum, thread);
    });
  }

  team_.run_ranges(queries, 16, [&](int64_t begin, int64_t end, int) {
    for (int64_t i = begin; i < end; ++i) {
      for (int head = 0; head < a.heads; ++head) {
        const float denominator = sum[head * queries + i];
        if (denominator > 0) kernels_.scale(a.out + (i * a.heads + head) * a.v, 1.0f / denominator, a.v);
      }
    }
  });
}

void CpuBackend::expand_latents(const PrefillAttention& a, std::span<const PrefillPiece> pieces, int64_t tokens, float* latents, float* expanded) {
  const KvLayout& layout = a.kv->layout;
  const int64_t row_width = layout.latent + layout.rope;
  const int64_t expanded_width = int64_t(a.heads) * (a.nope + a.v);
  team_.run_ranges(tokens, 16, [&](int64_t begin, int64_t end, int) {
    for (const PrefillPiece& piece : pieces) {
      const int64_t first = std::max(begin, piece.row);
      const int64_t last = std::min(end, piece.row + piece.end - piece.begin);
      if (first >= last) continue;
      const int64_t token0 = piece.begin + first - piece.row;
      widen_rows(*a.kv, 0, a.layer, piece.sequence->kv.pages, token0, token0 + last - first, latents + first * row_width, row_width);
    }
  });
  linear({.y = expanded, .ldy = expanded_width, .x = latents, .ldx = row_width, .m = tokens, .w = a.kv_b});
}

void CpuBackend::prefill_attention_task(const PrefillAttention& a, const PrefillPiece& piece, int head, int64_t query0, int64_t query1,
                                        const float* latents, const float* expanded, float* max, float* sum, int thread) {
  const KvLayout& layout = a.kv->layout;
  const PrefillSequence& s = *piece.sequence;
  const int64_t qk = a.nope + layout.rope;
  const int64_t row_width = layout.latent + layout.rope;
  const int64_t expanded_width = int64_t(a.heads) * (a.nope + a.v);
  int64_t queries = 0;
  for (const PrefillSequence& other : a.sequences) queries = std::max(queries, other.query + other.count);
  const int64_t count = query1 - query0;
  const int64_t padded = panels(count) * kernels_.panel;
  float* scratch = scratch_[size_t(thread)].reserve(size_t(padded * qk + kKeyBlock * padded + 3 * padded));
  float* q_packed = scratch;
  float* logits = q_packed + padded * qk;
  float* column_max = logits + kKeyBlock * padded;
  float* column_sum = column_max + padded;
  float* correction = column_sum + padded;

  const float* q = a.q + ((s.query + query0) * a.heads + head) * qk;
  kernels_.pack_transposed(view_f32(q, count, qk, a.heads * qk), 0, count, 0, qk, q_packed);
  float* state_max = max + head * queries + s.query + query0;
  float* state_sum = sum + head * queries + s.query + query0;
  std::fill_n(column_max, padded, -INFINITY);
  std::fill_n(column_sum, padded, 0.0f);
  std::memcpy(column_max, state_max, size_t(count) * sizeof(float));
  std::memcpy(column_sum, state_sum, size_t(count) * sizeof(float));

  float* out = a.out + ((s.query + query0) * a.heads + head) * a.v;
  const int64_t ldo = int64_t(a.heads) * a.v;
  const int64_t visible = std::min(piece.end, s.position + query1);
  for (int64_t t = piece.begin; t < visible; t += kKeyBlock) {
    const int64_t keys = std::min(kKeyBlock, visible - t);
    const int64_t row = piece.row + t - piece.begin;
    const float* kv = expanded + row * expanded_width + int64_t(head) * (a.nope + a.v);
    Gemm gemm{.m = keys, .n = count, .k = a.nope, .a = kv, .a_row = expanded_width, .a_col = 1, .b = q_packed, .b_panel = qk * kernels_.panel,
              .b_row = kernels_.panel, .c = logits, .ldc = padded, .accumulate = false};
    kernels_.gemm(gemm);
    gemm.k = layout.rope;
    gemm.a = latents + row * row_width + layout.latent;
    gemm.a_row = row_width;
    gemm.b = q_packed + int64_t(a.nope) * kernels_.panel;
    gemm.accumulate = true;
    kernels_.gemm(gemm);
    // Key t + k is hidden from queries before it.
    for (int64_t k = 0; k < keys; ++k) {
      const int64_t hidden = std::min(count, t + k - (s.position + query0));
      if (hidden > 0) std::fill_n(logits + k * padded, hidden, -INFINITY);
    }
    kernels_.softmax_columns(logits, keys, count, padded, a.scale, column_max, column_sum, correction);
    for (int64_t i = 0; i < count; ++i) {
      if (correction[i] != 1.0f) kernels_.scale(out + i * ldo, correction[i], a.v);
    }
    kernels_.gemm({.m = count, .n = a.v, .k = keys, .a = logits, .a_row = 1, .a_col = padded, .b = kv + a.nope, .b_panel = kernels_.panel,
                   .b_row = expanded_width, .c = out, .ldc = ldo, .accumulate = true});
  }
  std::memcpy(state_max, column_max, size_t(count) * sizeof(float));
  std::memcpy(state_sum, column_sum, size_t(count) * sizeof(float));
}

}  // namespace tpla::cpu
