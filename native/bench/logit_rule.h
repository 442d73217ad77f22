// Logit variants as the references apply them: written down as the formula reads, on host and device. What they mean: cuda/attention.h.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

#include "bench/attention_shape.h"
#include "bench/random.h"

namespace tpla::bench {

// ALiBi's slopes for any number of heads: 2^(-8 (h + 1) / heads).
inline std::vector<float> alibi_slopes(int heads) {
  std::vector<float> slopes;
  for (int h = 0; h < heads; ++h) slopes.push_back(static_cast<float>(std::exp2(-8.0 * (h + 1) / heads)));
  return slopes;
}

// [sequence][visible_stride]: 1 where a block is listed.
inline std::vector<uint8_t> visible_blocks(const LogitVariantShape& variants, int64_t stride) {
  std::vector<uint8_t> visible(variants.blocks.size() * static_cast<size_t>(stride));
  for (size_t s = 0; s < variants.blocks.size(); ++s) {
    for (const int32_t block : variants.blocks[s]) {
      if (block < stride) visible[s * static_cast<size_t>(stride) + static_cast<size_t>(block)] = 1;
    }
  }
  return visible;
}

inline int64_t visible_stride(const LogitVariantShape& variants, const std::vector<int32_t>& kv_lens) {
  if (variants.mask_block == 0) return 0;
  return *std::max_element(kv_lens.begin(), kv_lens.end()) / variants.mask_block + 1;
}

struct LogitRule {
  double softcap = 0;
  int window = 0;
  const float* slopes = nullptr;     // [query heads]
  int mask_block = 0;
  const uint8_t* visible = nullptr;  // [sequence][visible_stride]
  int64_t visible_stride = 0;

  TPLA_ANYWHERE bool listed(int sequence, int t) const { return mask_block == 0 || visible[sequence * visible_stride + t / mask_block]; }

  // Beside the causal limit, which is the caller's.
  TPLA_ANYWHERE bool sees(int sequence, int position, int t) const { return (window == 0 || t > position - window) && listed(sequence, t); }

  // Whether any query of a sequence whose first one is at `position` may see the token.
  TPLA_ANYWHERE bool present(int sequence, int first_position, int t) const { return sees(sequence, first_position, t); }

  // `logit` is scaled.
  TPLA_ANYWHERE double apply(int head, int position, int t, double logit) const {
    if (softcap > 0) logit = softcap * tanh(logit / softcap);
    if (slopes) logit -= static_cast<double>(slopes[head]) * fabs(static_cast<double>(position - t));
    return logit;
  }
};

}  // namespace tpla::bench
