#include "transfer/row_mover.h"

#include <algorithm>
#include <cstring>

#include "core/kv_row.h"
#include "transfer/kv_checksum.h"

namespace tpla {

namespace {

void decode_latent(const RowKernels& kernels, KvDType dtype, int width, const std::byte* row, Range columns, float* out) {
  const size_t count = columns.size();
  switch (dtype) {
    case KvDType::f32:
      std::memcpy(out, row + size_t(columns.begin) * 4, count * 4);
      return;
    case KvDType::bf16:
      kernels.bf16_to_f32(row + size_t(columns.begin) * 2, count, out);
      return;
    case KvDType::fp8: {
      const std::byte* scales = row + fp8_scales_offset(width);
      for (int at = columns.begin; at < columns.end;) {
        const int end = std::min(columns.end, (at / kFp8ScaleGroup + 1) * kFp8ScaleGroup);
        float scale;
        std::memcpy(&scale, scales + size_t(at / kFp8ScaleGroup) * 4, 4);
        kernels.e4m3_to_f32(row + at, end - at, scale, out + at - columns.begin);
        at = end;
      }
      return;
    }
  }
}

void encode_latent(const RowKernels& kernels, KvDType dtype, int width, const float* latent, std::byte* row) {
  switch (dtype) {
    case KvDType::f32:
      std::memcpy(row, latent, size_t(width) * 4);
      return;
    case KvDType::bf16:
      kernels.f32_to_bf16(latent, width, row);
      return;
    case KvDType::fp8: {
      std::byte* scales = row + fp8_scales_offset(width);
      for (int at = 0; at < width; at += kFp8ScaleGroup) {
        const float scale = kernels.f32_to_e4m3(latent + at, std::min(kFp8ScaleGroup, width - at), row + at);
        std::memcpy(scales + size_t(at / kFp8ScaleGroup) * 4, &scale, 4);
      }
      std::memset(row + width, 0, fp8_scales_offset(width) - width);
      return;
    }
  }
}

}  // namespace

RowMover::RowMover(const KvRegion& src, const KvLayout& dst, bool streams)
    : region_(src), src_(src.layout), dst_(dst), plans_(plan_reshard(src.layout, dst)), kernels_(row_kernels()),
      write_(streams ? kernels_.stream : kernels_.copy) {}

void RowMover::move(PagePlace from, Range tokens, int layer, std::byte* const* to, uint64_t* sums) const {
  // Copies inside: what they share of a source row is read while it is in the nearest cache.
  for (int token = tokens.begin; token < tokens.end; token++) {
    const size_t offset = size_t(token - tokens.begin) * dst_.row_bytes();
    for (int copy = 0; copy < copies(); copy++) {
      const RowPlan& plan = plans_[copy];
      const uint64_t row_hash = plan.is_copy ? copy_row(plan, from, layer, token, to[copy] + offset) : convert_row(plan, from, layer, token, to[copy] + offset);
      sums[copy] += row_value(row_hash, copy, layer, token);
    }
  }
}

const std::byte* RowMover::src_row(PagePlace from, int memory, int layer, int token) const {
  return region_.row(memory == kHolder ? from.memory : memory, layer, from.page, token % src_.page_tokens);
}

uint64_t RowMover::copy_row(const RowPlan& plan, PagePlace from, int layer, int token, std::byte* to) const {
  uint64_t row_hash = 0;
  for (const ByteSegment& segment : plan.segments) {
    const std::byte* at = src_row(from, segment.src_memory, layer, token) + segment.src_offset;
    row_hash += write_(to + segment.dst_offset, at, segment.bytes / 4, segment.dst_offset / 4);
  }
  return row_hash;
}

uint64_t RowMover::convert_row(const RowPlan& plan, PagePlace from, int layer, int token, std::byte* to) const {
  thread_local std::vector<float> values;
  thread_local std::vector<std::byte> row;
  values.resize(size_t(dst_.width()) + dst_.rope);
  row.resize(dst_.row_bytes());
  for (const LatentPiece& piece : plan.pieces) {
    decode_latent(kernels_, src_.dtype, src_.width(), src_row(from, piece.src_memory, layer, token), {piece.src_column, piece.src_column + piece.columns},
                  values.data() + piece.dst_column);
  }
  encode_latent(kernels_, dst_.dtype, dst_.width(), values.data(), row.data());
  convert_rope(src_row(from, plan.rope_memory, layer, token) + rope_offset(src_), row.data() + rope_offset(dst_), values.data());
  return write_(to, row.data(), row.size() / 4, 0);
}

// The rope key is fp32 with fp32 latents and bf16 else.
void RowMover::convert_rope(const std::byte* from, std::byte* to, float* values) const {
  const bool from_f32 = src_.dtype == KvDType::f32;
  const bool to_f32 = dst_.dtype == KvDType::f32;
  if (from_f32 == to_f32) {
    std::memcpy(to, from, size_t(src_.rope) * (from_f32 ? 4 : 2));
  } else if (to_f32) {
    kernels_.bf16_to_f32(from, src_.rope, values);
    std::memcpy(to, values, size_t(src_.rope) * 4);
  } else {
    std::memcpy(values, from, size_t(src_.rope) * 4);
    kernels_.f32_to_bf16(values, src_.rope, to);
  }
}

}  // namespace tpla
