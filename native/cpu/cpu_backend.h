#pragma once
#include <memory>
#include <vector>

#include "core/backend.h"
#include "cpu/bf16_tiles.h"
#include "cpu/kernels.h"
#include "cpu/thread_team.h"

namespace tpla::cpu {

// 64-byte aligned floats that only grow.
class Buffer {
 public:
  Buffer() = default;
  ~Buffer();
  Buffer(Buffer&& other) noexcept;
  Buffer& operator=(Buffer&& other) noexcept;
  // At least `count` floats; what was there is lost when it has to grow. Throws OUT_OF_MEMORY.
  float* reserve(size_t count);
  float* data() const { return data_; }
  size_t capacity() const { return capacity_; }

 private:
  float* data_ = nullptr;
  size_t capacity_ = 0;
};

// Backend over a team of threads; every call is finished when it returns.
class CpuBackend : public Backend {
 public:
  // `activation_parts`: what bf16 hardware sees of the activations (bf16_tiles.h): 3 is fp32, 1 rounds them to bf16.
  CpuBackend(const InstructionSet& isa, int threads, int activation_parts);

  float* allocate(size_t count) override;
  void upload(const float* host, int64_t count, float* to) override;
  void download(const float* from, int64_t ld, int64_t rows, int64_t count, float* host, int64_t ld_host) override;

  using Backend::linear;
  void linear(std::span<const Linear> batch) override;
  void embed(const WeightView& table, std::span<const int32_t> tokens, float* out) override;
  void rms_norm(const float* x, int64_t ldx, int64_t rows, int64_t count, const float* gamma, float eps, float* out, int64_t ldo) override;
  void add(float* x, const float* y, int64_t count) override;
  void scale(float* x, int64_t ldx, int64_t rows, int64_t count, float factor) override;
  void zero(float* x, int64_t count) override;
  void silu_mul(const float* gate, const float* up, int64_t count, float* out) override;
  void rotate(const Rope& rope, const float* tables, float* x, int64_t rows, int64_t ldx, int groups, int64_t stride) override;
  void copy_rows(const float* from, int64_t ld_from, int64_t rows, int64_t count, float* to, int64_t ld_to) override;
  void split_groups(const float* from, int64_t ld, int64_t stride, int64_t rows, int groups, int64_t count, float* to) override;
  void merge_groups(const float* from, int64_t rows, int groups, int64_t count, float* to, int64_t ld, int64_t stride) override;
  void write_kv(const KvRegion& kv, int memory, int layer, std::span<const KvSlot> slots, const float* latent, int64_t ld, const float* rope,
                int64_t ld_rope) override;
  void attend(const LatentAttention& attention) override;
  void attend(const PrefillAttention& attention) override;
  void latent_logits(const LatentAttention& attention, int64_t sequence, float* logits) override;
  void latent_values(const LatentAttention& attention, int64_t sequence, float* logits) override;
  void scale_by_lse(float* out, int64_t rows, int64_t width, const float* lse_all, int ranks, int rank) override;
  void route(const MoeSpec& moe, const float* logits, int64_t m, const float* bias, int32_t* experts, float* weights) override;
  void moe_ffn(const MoeFfn& ffn) override;

 protected:
  std::pair<size_t, size_t> mark() const override { return {block_, used_}; }
  void rewind(std::pair<size_t, size_t> mark) override;

 private:
  // Part of one Linear, the unit of parallel work.
  struct LinearTask {
    const Linear* linear;
    int64_t out_begin, out_end;
    int64_t row_begin, row_end;
    const uint16_t* x_tiles;  // of the whole x; null where fp32 arithmetic is used
  };
  bool fits_tiles(const Linear& linear) const;
  // Brings the x of every product that runs on tiles into tiles, each once; one pointer per product.
  std::vector<const uint16_t*> tile_inputs(std::span<const Linear> batch);
  void plan_linear(const Linear& linear, const uint16_t* x_tiles, std::vector<LinearTask>& tasks) const;
  void run_few_rows(const LinearTask& task) const;
  void run_packed(const LinearTask& task, int thread);
  void run_tiles(const LinearTask& task, int thread);
  void run_blas(const LinearTask& task, int thread);
  // Columns [col, col + count) of one row of W in fp32.
  void widen_weights(const WeightView& w, int64_t row, int64_t col, int64_t count, float* out) const;
  int w_parts(const WeightView& w) const { return exact_parts(w.dtype) < x_parts_ ? exact_parts(w.dtype) : x_parts_; }

  void latent_attention_task(const LatentAttention& attention, int64_t sequence, int head0, int head1, int64_t token0, int64_t token1, float* out,
                             int64_t ldo, float* max, float* sum, int thread);
  struct PrefillPiece;
  void expand_latents(const PrefillAttention& attention, std::span<const PrefillPiece> pieces, int64_t tokens, float* latents, float* expanded);
  void prefill_attention_task(const PrefillAttention& attention, const PrefillPiece& piece, int head, int64_t query0, int64_t query1,
                              const float* latents, const float* expanded, float* max, float* sum, int thread);
  void moe_ffn_tile(const MoeFfn& ffn);

  // Row of the arena in fp32, [width + rope].
  void widen_row(const RowLayout& layout, const std::byte* row, float* out) const;
  void widen_rows(const KvRegion& kv, int memory, int layer, const int32_t* pages, int64_t token0, int64_t token1, float* out, int64_t ld) const;

  int64_t panels(int64_t columns) const { return (columns + kernels_.panel - 1) / kernels_.panel; }

  const Kernels& kernels_;
  const TileKernels* const tiles_;
  const int x_parts_;
  const bool blas_;
  ThreadTeam team_;
  std::vector<Buffer> scratch_;  // per thread
  std::vector<LinearTask> linear_tasks_;
  Buffer x_tiles_;

  // A stack over blocks: allocation goes on in the next block when one is full.
  std::vector<Buffer> blocks_;
  size_t block_ = 0;
  size_t used_ = 0;
};

}  // namespace tpla::cpu
