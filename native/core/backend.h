#pragma once
#include <cstdint>
#include <memory>
#include <span>
#include <utility>

#include "core/kv_layout.h"
#include "core/model_spec.h"
#include "core/rope.h"
#include "core/weight_view.h"

namespace tpla {

// y[m, out] (+)= x[m, in] · Wᵀ with W [out, in], or x · W with W [in, out] when `transposed`.
struct Linear {
  float* y = nullptr;
  int64_t ldy = 0;
  const float* x = nullptr;
  int64_t ldx = 0;
  int64_t m = 0;
  WeightView w;
  bool transposed = false;
  bool accumulate = false;
};

// Where one token's KV of a layer goes.
struct KvSlot {
  int32_t page;
  int32_t offset;  // token inside the page
};

// Tokens of one sequence in one memory, for attention: token t lies in pages[t / page_tokens].
struct KvSequence {
  const int32_t* pages = nullptr;
  int64_t tokens = 0;
};

// What attention does to its logits where it does more than scale them (softcap, bias, masks).
class LogitTransform {
 public:
  virtual ~LogitTransform() = default;
  // Products q · k of `keys` tokens from token0 on with heads head0 and up, [keys][heads], row stride `ld`, become logits in place; -inf hides a token.
  virtual void apply(int64_t sequence, int64_t token0, int64_t keys, int head0, int64_t heads, float* products, int64_t ld) const = 0;
};

// Absorbed attention of one layer over latent KV: one query vector per head and sequence, all heads share the row.
// logit = scale * (q_latent · latent + q_rope · rope), out = softmax(logit) · latent.
struct LatentAttention {
  const KvRegion* kv = nullptr;
  int memory = 0;
  int layer = 0;
  int heads = 0;
  std::span<const KvSequence> sequences;
  const float* q_latent = nullptr;  // [heads][sequences][width]
  const float* q_rope = nullptr;    // [heads][sequences][rope]
  float scale = 1;
  const LogitTransform* transform = nullptr;  // in place of the scale
  float* out = nullptr;  // [heads][sequences][width]; zero for a sequence without tokens here
  float* lse = nullptr;  // [heads][sequences], natural log of the softmax denominator; -inf without tokens. May be null.
};

// Queries of one sequence's chunk and the cached tokens they see.
struct PrefillSequence {
  KvSequence kv;      // everything up to and including the chunk
  int64_t query = 0;  // first row of the chunk's queries in q and out
  int64_t count = 0;
  int64_t position = 0;  // of the first query; query i sees tokens [0, position + i]
};

// Exact un-absorbed causal attention of one layer: keys and values of every head are expanded from the cached latents.
struct PrefillAttention {
  const KvRegion* kv = nullptr;
  int layer = 0;
  int heads = 0;
  int nope = 0;
  int v = 0;
  WeightView kv_b;  // [heads * (nope + v), latent]
  std::span<const PrefillSequence> sequences;
  const float* q = nullptr;  // [queries, heads * (nope + rope)], rope part rotated
  float scale = 1;
  float* out = nullptr;  // [queries, heads * v]
};

struct ExpertWeights {
  WeightView gate, up, down;
};

// out[i] += Σ_k weights[i, k] · down_e(silu(gate_e(x_i)) * up_e(x_i)), e = experts[i, k].
struct MoeFfn {
  const float* x = nullptr;  // [m, hidden]
  int64_t m = 0;
  int top_k = 0;
  const int32_t* experts = nullptr;  // [m, top_k]
  const float* weights = nullptr;    // [m, top_k]
  std::span<const ExpertWeights> table;
  float* out = nullptr;  // [m, hidden]
};

// The operations that the forward passes are written against: one instance per rank, on one device. Tensors are fp32, row-major, in the
// device's memory, from allocate(). Weights, norms and page tables are given as they lie in host memory; the CPU reads them in place, a
// device keeps its own copies by address.
class Backend {
 public:
  virtual ~Backend() = default;

  // Scratch memory until the enclosing Scope ends; throws OUT_OF_MEMORY.
  virtual float* allocate(size_t count) = 0;
  // Between host and device.
  virtual void upload(const float* host, int64_t count, float* to) = 0;
  virtual void download(const float* from, int64_t ld, int64_t rows, int64_t count, float* host, int64_t ld_host) = 0;

  // Gives back what was allocated inside it.
  class Scope {
   public:
    explicit Scope(Backend& backend) : backend_(backend), mark_(backend.mark()) {}
    ~Scope() { backend_.rewind(mark_); }
    Scope(const Scope&) = delete;
    Scope& operator=(const Scope&) = delete;

   private:
    Backend& backend_;
    const std::pair<size_t, size_t> mark_;
  };

  virtual void linear(std::span<const Linear> batch) = 0;
  void linear(const Linear& one) { linear(std::span<const Linear>(&one, 1)); }

  // out[i, :] = table[tokens[i], :]
  virtual void embed(const WeightView& table, std::span<const int32_t> tokens, float* out) = 0;
  // Rows of `count` values with leading dimensions.
  virtual void rms_norm(const float* x, int64_t ldx, int64_t rows, int64_t count, const float* gamma, float eps, float* out, int64_t ldo) = 0;
  virtual void add(float* x, const float* y, int64_t count) = 0;
  virtual void scale(float* x, int64_t ldx, int64_t rows, int64_t count, float factor) = 0;
  virtual void zero(float* x, int64_t count) = 0;
  // out[i] = silu(gate[i]) * up[i]
  virtual void silu_mul(const float* gate, const float* up, int64_t count, float* out) = 0;
  // x + row * ldx + group * stride, for `groups` groups per row, rotated in place; tables of Rope::tables, one per row.
  virtual void rotate(const Rope& rope, const float* tables, float* x, int64_t rows, int64_t ldx, int groups, int64_t stride) = 0;
  virtual void copy_rows(const float* from, int64_t ld_from, int64_t rows, int64_t count, float* to, int64_t ld_to) = 0;
  // Copies blocks: to[g][i][0:count] = from[i * ld + g * stride + 0:count], and back.
  virtual void split_groups(const float* from, int64_t ld, int64_t stride, int64_t rows, int groups, int64_t count, float* to) = 0;
  virtual void merge_groups(const float* from, int64_t rows, int groups, int64_t count, float* to, int64_t ld, int64_t stride) = 0;

  // Row i: latent[i * ld], width columns in the region's layout (already this memory's columns), rope[i * ld_rope].
  virtual void write_kv(const KvRegion& kv, int memory, int layer, std::span<const KvSlot> slots, const float* latent, int64_t ld, const float* rope,
                        int64_t ld_rope) = 0;
  virtual void attend(const LatentAttention& attention) = 0;
  virtual void attend(const PrefillAttention& attention) = 0;
  // The two halves of attend(LatentAttention), for a softmax over logits that several ranks hold in part:
  // logits[heads][sequence's tokens...] for one sequence, without rope where q_rope is null.
  virtual void latent_logits(const LatentAttention& attention, int64_t sequence, float* logits) = 0;
  virtual void latent_values(const LatentAttention& attention, int64_t sequence, float* logits) = 0;
  // Combines partial results over disjoint tokens: scales out[heads][n][width] by exp(lse_rank - log Σ exp(lse)), lse_all[ranks][heads * n].
  virtual void scale_by_lse(float* out, int64_t rows, int64_t width, const float* lse_all, int ranks, int rank) = 0;

  virtual void route(const MoeSpec& moe, const float* logits, int64_t m, const float* bias, int32_t* experts, float* weights) = 0;
  virtual void moe_ffn(const MoeFfn& ffn) = 0;

 protected:
  // Block and offset of the next allocation.
  virtual std::pair<size_t, size_t> mark() const = 0;
  virtual void rewind(std::pair<size_t, size_t> mark) = 0;
};

}  // namespace tpla
