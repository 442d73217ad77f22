#include "cpu/cpu_backend.h"

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <string>
#include <utility>

#include "core/error.h"
#include "core/kv_row.h"
#include "core/routing.h"

namespace tpla::cpu {

namespace {

// Below this many elements a second thread costs more than it saves.
constexpr int64_t kSerialElements = 8192;

int64_t rows_per_range(int64_t rows, int64_t count) { return std::max<int64_t>(1, std::min(rows, kSerialElements / std::max<int64_t>(1, count))); }

constexpr size_t kSmallestBlock = size_t(1) << 18;
// Workspace kept between calls, in floats; more is given back to the system.
constexpr size_t kKeptWorkspace = size_t(1) << 28;

}  // namespace

// ---------------------------------------------------------------- memory

Buffer::~Buffer() { std::free(data_); }

Buffer::Buffer(Buffer&& other) noexcept { *this = std::move(other); }

Buffer& Buffer::operator=(Buffer&& other) noexcept {
  std::swap(data_, other.data_);
  std::swap(capacity_, other.capacity_);
  return *this;
}

float* Buffer::reserve(size_t count) {
  if (count <= capacity_) return data_;
  std::free(data_);
  data_ = nullptr;
  capacity_ = 0;
  const size_t bytes = (count * sizeof(float) + 63) / 64 * 64;
  data_ = static_cast<float*>(std::aligned_alloc(64, bytes));
  if (data_ == nullptr) throw Error("OUT_OF_MEMORY", "cannot allocate " + std::to_string(bytes) + " bytes of workspace; use smaller batches or prefill chunks");
  capacity_ = bytes / sizeof(float);
  return data_;
}

CpuBackend::CpuBackend(const InstructionSet& isa, int threads, int activation_parts)
    : kernels_(*isa.kernels),
      tiles_(activation_parts == 1 || isa.tiles_for_fp32 ? isa.tiles : nullptr),
      x_parts_(activation_parts),
      blas_(isa.blas),
      team_(threads),
      scratch_(size_t(threads)) {}

float* CpuBackend::allocate(size_t count) {
  // Kernels may read up to one panel past what they compute with.
  const size_t rounded = (count + size_t(kernels_.panel) + 15) / 16 * 16;
  if (block_ == blocks_.size() || used_ + rounded > blocks_[block_].capacity()) {
    if (block_ < blocks_.size()) ++block_;
    // Later blocks are empty; one that is too small makes way for a larger one.
    const size_t last = block_ == 0 ? 0 : blocks_[block_ - 1].capacity();
    if (block_ == blocks_.size()) blocks_.emplace_back();
    blocks_[block_].reserve(std::max({rounded, last, kSmallestBlock}));
    used_ = 0;
  }
  float* at = blocks_[block_].data() + used_;
  used_ += rounded;
  return at;
}

void CpuBackend::rewind(std::pair<size_t, size_t> mark) {
  block_ = mark.first;
  used_ = mark.second;
  if (block_ != 0 || used_ != 0 || blocks_.size() < 2) return;
  // Nothing is in use: one block that holds everything will do next time.
  size_t total = 0;
  for (const Buffer& block : blocks_) total += block.capacity();
  blocks_.clear();
  if (total > kKeptWorkspace) return;
  blocks_.emplace_back();
  blocks_.back().reserve(total);
}

void CpuBackend::upload(const float* host, int64_t count, float* to) { std::memcpy(to, host, size_t(count) * sizeof(float)); }

void CpuBackend::download(const float* from, int64_t ld, int64_t rows, int64_t count, float* host, int64_t ld_host) {
  copy_rows(from, ld, rows, count, host, ld_host);
}

// ---------------------------------------------------------------- elementwise

void CpuBackend::embed(const WeightView& table, std::span<const int32_t> tokens, float* out) {
  team_.run_ranges(int64_t(tokens.size()), rows_per_range(int64_t(tokens.size()), table.cols), [&](int64_t begin, int64_t end, int) {
    for (int64_t i = begin; i < end; ++i) widen_weights(table, tokens[size_t(i)], 0, table.cols, out + i * table.cols);
  });
}

void CpuBackend::rms_norm(const float* x, int64_t ldx, int64_t rows, int64_t count, const float* gamma, float eps, float* out, int64_t ldo) {
  team_.run_ranges(rows, rows_per_range(rows, count), [&](int64_t begin, int64_t end, int) {
    for (int64_t i = begin; i < end; ++i) kernels_.rms_norm(x + i * ldx, gamma, count, eps, out + i * ldo);
  });
}

void CpuBackend::add(float* x, const float* y, int64_t count) {
  team_.run_ranges(count, kSerialElements, [&](int64_t begin, int64_t end, int) { kernels_.add(x + begin, y + begin, end - begin); });
}

void CpuBackend::scale(float* x, int64_t ldx, int64_t rows, int64_t count, float factor) {
  team_.run_ranges(rows, rows_per_range(rows, count), [&](int64_t begin, int64_t end, int) {
    for (int64_t i = begin; i < end; ++i) kernels_.scale(x + i * ldx, factor, count);
  });
}

void CpuBackend::zero(float* x, int64_t count) { std::memset(x, 0, size_t(count) * sizeof(float)); }

void CpuBackend::silu_mul(const float* gate, const float* up, int64_t count, float* out) {
  team_.run_ranges(count, kSerialElements / 4,
                   [&](int64_t begin, int64_t end, int) { kernels_.silu_mul(gate + begin, up + begin, end - begin, out + begin); });
}

void CpuBackend::rotate(const Rope& rope, const float* tables, float* x, int64_t rows, int64_t ldx, int groups, int64_t stride) {
  team_.run_ranges(rows, rows_per_range(rows, int64_t(groups) * rope.dim()), [&](int64_t begin, int64_t end, int) {
    for (int64_t i = begin; i < end; ++i) {
      for (int g = 0; g < groups; ++g) rope.rotate(x + i * ldx + g * stride, tables + i * rope.dim());
    }
  });
}

void CpuBackend::copy_rows(const float* from, int64_t ld_from, int64_t rows, int64_t count, float* to, int64_t ld_to) {
  team_.run_ranges(rows, rows_per_range(rows, count), [&](int64_t begin, int64_t end, int) {
    for (int64_t i = begin; i < end; ++i) std::memcpy(to + i * ld_to, from + i * ld_from, size_t(count) * sizeof(float));
  });
}

void CpuBackend::split_groups(const float* from, int64_t ld, int64_t stride, int64_t rows, int groups, int64_t count, float* to) {
  team_.run_ranges(groups, rows_per_range(groups, rows * count), [&](int64_t begin, int64_t end, int) {
    for (int64_t g = begin; g < end; ++g) {
      for (int64_t i = 0; i < rows; ++i) std::memcpy(to + (g * rows + i) * count, from + i * ld + g * stride, size_t(count) * sizeof(float));
    }
  });
}

void CpuBackend::merge_groups(const float* from, int64_t rows, int groups, int64_t count, float* to, int64_t ld, int64_t stride) {
  team_.run_ranges(groups, rows_per_range(groups, rows * count), [&](int64_t begin, int64_t end, int) {
    for (int64_t g = begin; g < end; ++g) {
      for (int64_t i = 0; i < rows; ++i) std::memcpy(to + i * ld + g * stride, from + (g * rows + i) * count, size_t(count) * sizeof(float));
    }
  });
}

// ---------------------------------------------------------------- KV rows

void CpuBackend::write_kv(const KvRegion& kv, int memory, int layer, std::span<const KvSlot> slots, const float* latent, int64_t ld, const float* rope,
                          int64_t ld_rope) {
  const int64_t rows = int64_t(slots.size());
  const RowLayout layout = kv.layout.row(layer);
  team_.run_ranges(rows, rows_per_range(rows, int64_t(layout.width()) * 4), [&](int64_t begin, int64_t end, int) {
    for (int64_t i = begin; i < end; ++i) {
      const KvSlot slot = slots[size_t(i)];
      encode_row(layout, latent + i * ld, rope + i * ld_rope, kv.row(memory, layer, slot.page, slot.offset));
    }
  });
}

void CpuBackend::widen_row(const RowLayout& layout, const std::byte* row, float* out) const {
  const int width = layout.width();
  switch (layout.dtype) {
    case KvDType::f32: std::memcpy(out, row, size_t(width + layout.rope) * sizeof(float)); return;
    case KvDType::bf16: kernels_.widen(WeightDType::bf16, row, width + layout.rope, 1.0f, out); return;
    case KvDType::fp8:
      for (int begin = 0; begin < width; begin += kFp8ScaleGroup) {
        float scale;
        std::memcpy(&scale, row + fp8_scales_offset(width) + size_t(begin / kFp8ScaleGroup) * 4, 4);
        kernels_.widen(WeightDType::f8_e4m3, row + begin, std::min(kFp8ScaleGroup, width - begin), scale, out + begin);
      }
      kernels_.widen(WeightDType::bf16, row + fp8_rope_offset(width), layout.rope, 1.0f, out + width);
      return;
  }
}

void CpuBackend::widen_rows(const KvRegion& kv, int memory, int layer, const int32_t* pages, int64_t token0, int64_t token1, float* out, int64_t ld) const {
  const int64_t page_tokens = kv.layout.page_tokens;
  const RowLayout layout = kv.layout.row(layer);
  for (int64_t t = token0; t < token1; ++t, out += ld) widen_row(layout, kv.row(memory, layer, pages[t / page_tokens], int(t % page_tokens)), out);
}

void CpuBackend::scale_by_lse(float* out, int64_t rows, int64_t width, const float* lse_all, int ranks, int rank) {
  team_.run_ranges(rows, rows_per_range(rows, width), [&](int64_t begin, int64_t end, int) {
    for (int64_t i = begin; i < end; ++i) {
      float top = -INFINITY;
      for (int r = 0; r < ranks; ++r) top = std::max(top, lse_all[r * rows + i]);
      float sum = 0;
      for (int r = 0; r < ranks; ++r) sum += std::exp(lse_all[r * rows + i] - top);
      kernels_.scale(out + i * width, std::exp(lse_all[rank * rows + i] - top) / sum, width);
    }
  });
}

// ---------------------------------------------------------------- mixture of experts

void CpuBackend::route(const MoeSpec& moe, const float* logits, int64_t m, const float* bias, int32_t* experts, float* weights) {
  team_.run_ranges(m, rows_per_range(m, int64_t(moe.experts) * 16), [&](int64_t begin, int64_t end, int) {
    for (int64_t i = begin; i < end; ++i) route_token(moe, logits + i * moe.experts, bias, experts + i * moe.top_k, weights + i * moe.top_k);
  });
}

void CpuBackend::moe_ffn(const MoeFfn& ffn) {
  // Bounds the gathered copies of the tokens; weights are read once per tile, so tiles are large.
  constexpr int64_t kTileBytes = int64_t(256) << 20;
  const int64_t hidden = ffn.table[0].down.rows;
  const int64_t tile = std::max<int64_t>(1, kTileBytes / (hidden * int64_t(sizeof(float)) * ffn.top_k));
  for (int64_t begin = 0; begin < ffn.m; begin += tile) {
    MoeFfn part = ffn;
    part.m = std::min(tile, ffn.m - begin);
    part.x += begin * hidden;
    part.out += begin * hidden;
    part.experts += begin * ffn.top_k;
    part.weights += begin * ffn.top_k;
    moe_ffn_tile(part);
  }
}

void CpuBackend::moe_ffn_tile(const MoeFfn& ffn) {
  const Scope scope(*this);
  const int64_t slots = ffn.m * ffn.top_k;
  const int64_t hidden = ffn.table[0].down.rows;
  const int64_t inner = ffn.table[0].gate.rows;
  // Counting sort of (token, choice) by expert: slot_of[token * top_k + k] is its row in the gathered matrices.
  std::vector<int64_t> first(ffn.table.size() + 1, 0);
  for (int64_t i = 0; i < slots; ++i) ++first[size_t(ffn.experts[i]) + 1];
  for (size_t e = 1; e < first.size(); ++e) first[e] += first[e - 1];
  std::vector<int64_t> slot_of(static_cast<size_t>(slots));
  std::vector<int64_t> token_of(static_cast<size_t>(slots));
  std::vector<int64_t> next(first.begin(), first.end() - 1);
  for (int64_t i = 0; i < slots; ++i) {
    const int64_t slot = next[size_t(ffn.experts[i])]++;
    slot_of[size_t(i)] = slot;
    token_of[size_t(slot)] = i / ffn.top_k;
  }

  // A single token needs no gathering: every expert reads the same row.
  const float* gathered = ffn.x;
  if (ffn.m > 1) {
    float* copy = allocate(size_t(slots * hidden));
    team_.run_ranges(slots, rows_per_range(slots, hidden), [&](int64_t begin, int64_t end, int) {
      for (int64_t i = begin; i < end; ++i) std::memcpy(copy + i * hidden, ffn.x + token_of[size_t(i)] * hidden, size_t(hidden) * sizeof(float));
    });
    gathered = copy;
  }
  float* gate = allocate(size_t(slots * inner));
  float* up = allocate(size_t(slots * inner));
  float* down = allocate(size_t(slots * hidden));
  std::vector<Linear> batch;
  for (size_t e = 0; e < ffn.table.size(); ++e) {
    const int64_t rows = first[e + 1] - first[e];
    if (rows == 0) continue;
    const float* x = ffn.m > 1 ? gathered + first[e] * hidden : gathered;
    batch.push_back({.y = gate + first[e] * inner, .ldy = inner, .x = x, .ldx = hidden, .m = rows, .w = ffn.table[e].gate});
    batch.push_back({.y = up + first[e] * inner, .ldy = inner, .x = x, .ldx = hidden, .m = rows, .w = ffn.table[e].up});
  }
  linear(batch);
  silu_mul(gate, up, slots * inner, gate);
  batch.clear();
  for (size_t e = 0; e < ffn.table.size(); ++e) {
    const int64_t rows = first[e + 1] - first[e];
    if (rows > 0) batch.push_back({.y = down + first[e] * hidden, .ldy = hidden, .x = gate + first[e] * inner, .ldx = inner, .m = rows, .w = ffn.table[e].down});
  }
  linear(batch);
  team_.run_ranges(ffn.m, rows_per_range(ffn.m, hidden * ffn.top_k), [&](int64_t begin, int64_t end, int) {
    for (int64_t t = begin; t < end; ++t) {
      for (int k = 0; k < ffn.top_k; ++k) {
        const int64_t choice = t * ffn.top_k + k;
        kernels_.axpy(ffn.weights[choice], down + slot_of[size_t(choice)] * hidden, hidden, ffn.out + t * hidden);
      }
    }
  });
}

}  // namespace tpla::cpu
