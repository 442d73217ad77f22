#pragma once
#include <cstddef>

#include "core/kv_layout.h"

namespace tpla {

// One row (a token of a layer on one rank) between fp32 and the layout's dtype; byte layout in kv_layout.h.

// `latent` is [layout.width()], `rope` is [layout.rope].
void encode_row(const RowLayout& layout, const float* latent, const float* rope, std::byte* row);

// `out` is [layout.width() + layout.rope].
void decode_row(const RowLayout& layout, const std::byte* row, float* out);

// Where the scales and the rope values of an fp8 row of `width` latents begin.
inline size_t fp8_scales_offset(int width) { return size_t(width + 3) / 4 * 4; }
inline size_t fp8_rope_offset(int width) {
  return fp8_scales_offset(width) + size_t(width + kFp8ScaleGroup - 1) / kFp8ScaleGroup * 4;
}

}  // namespace tpla
