#include "decode_logits.h"

#include <algorithm>
#include <cmath>
#include <numeric>
#include <string>

namespace tpla::cuda {

namespace {

constexpr double kLog2E = 1.4426950408889634;

}  // namespace

void validate_variants(const LogitVariants& variants, const char* kernel) {
  const auto expect = [&](bool ok, const std::string& message) {
    if (!ok) throw AttentionError(std::string(kernel) + ": " + message);
  };
  expect(variants.softcap >= 0.0f && std::isfinite(variants.softcap), "softcap must be positive, or 0 for none; got " + std::to_string(variants.softcap));
  expect(variants.window >= 0, "window must be a positive number of tokens, or 0 for none; got " + std::to_string(variants.window));
  if (!variants.block_list) return;
  expect(variants.block_counts != nullptr, "a block mask needs block_counts");
  expect(variants.mask_block >= 16 && variants.mask_block % 16 == 0, "mask_block must be a multiple of 16 tokens; got " + std::to_string(variants.mask_block));
}

LogitArgs logit_args(const LogitVariants& variants, float softmax_scale) {
  LogitArgs args{};
  if (variants.softcap > 0.0f) {
    args.softcap_in = static_cast<float>(2 * kLog2E * softmax_scale / variants.softcap);
    args.softcap_out = static_cast<float>(variants.softcap * kLog2E);
  }
  args.window = variants.window > 0 ? std::min(variants.window, kNoWindow) : kNoWindow;
  args.slopes = variants.alibi_slopes;
  args.block_list = variants.block_list;
  args.block_counts = variants.block_counts;
  args.block_list_stride = variants.block_list_stride;
  args.mask_block = variants.mask_block;
  return args;
}

int box_tokens(const LogitVariants& variants, int page_size) {
  const int box = std::gcd(page_size, kTokenTile);
  return variants.block_list ? std::gcd(box, variants.mask_block) : box;
}

}  // namespace tpla::cuda
