#include "core/kv_row.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "core/numeric.h"

namespace tpla {

namespace {

void encode_bf16(const float* values, int count, std::byte* out) {
  for (int i = 0; i < count; ++i) {
    const uint16_t bits = float_to_bf16(values[i]);
    std::memcpy(out + size_t(i) * 2, &bits, 2);
  }
}

void decode_bf16(const std::byte* in, int count, float* values) {
  for (int i = 0; i < count; ++i) {
    uint16_t bits;
    std::memcpy(&bits, in + size_t(i) * 2, 2);
    values[i] = bf16_to_float(bits);
  }
}

void encode_fp8(const float* latent, int width, std::byte* row) {
  std::byte* scales = row + fp8_scales_offset(width);
  for (int begin = 0; begin < width; begin += kFp8ScaleGroup) {
    const int end = std::min(begin + kFp8ScaleGroup, width);
    float amax = 0;
    for (int i = begin; i < end; ++i) amax = std::max(amax, std::fabs(latent[i]));
    const float scale = e4m3_scale(amax);
    const float inverse = 1.0f / scale;
    for (int i = begin; i < end; ++i) row[i] = std::byte{float_to_e4m3(latent[i] * inverse)};
    std::memcpy(scales + size_t(begin / kFp8ScaleGroup) * 4, &scale, 4);
  }
  for (size_t i = width; i < fp8_scales_offset(width); ++i) row[i] = std::byte{0};
}

void decode_fp8(const std::byte* row, int width, float* latent) {
  const std::byte* scales = row + fp8_scales_offset(width);
  for (int begin = 0; begin < width; begin += kFp8ScaleGroup) {
    float scale;
    std::memcpy(&scale, scales + size_t(begin / kFp8ScaleGroup) * 4, 4);
    const int end = std::min(begin + kFp8ScaleGroup, width);
    for (int i = begin; i < end; ++i) latent[i] = e4m3_to_float(uint8_t(row[i])) * scale;
  }
}

}  // namespace

void encode_row(const RowLayout& layout, const float* latent, const float* rope, std::byte* row) {
  const int width = layout.width();
  switch (layout.dtype) {
    case KvDType::f32:
      std::memcpy(row, latent, size_t(width) * 4);
      std::memcpy(row + size_t(width) * 4, rope, size_t(layout.rope) * 4);
      return;
    case KvDType::bf16:
      encode_bf16(latent, width, row);
      encode_bf16(rope, layout.rope, row + size_t(width) * 2);
      return;
    case KvDType::fp8:
      encode_fp8(latent, width, row);
      encode_bf16(rope, layout.rope, row + fp8_rope_offset(width));
      return;
  }
}

void decode_row(const RowLayout& layout, const std::byte* row, float* out) {
  const int width = layout.width();
  switch (layout.dtype) {
    case KvDType::f32:
      std::memcpy(out, row, size_t(width + layout.rope) * 4);
      return;
    case KvDType::bf16:
      decode_bf16(row, width + layout.rope, out);
      return;
    case KvDType::fp8:
      decode_fp8(row, width, out);
      decode_bf16(row + fp8_rope_offset(width), layout.rope, out + width);
      return;
  }
}

}  // namespace tpla
