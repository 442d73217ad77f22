// fp8 KV on its way to the tensor cores: e4m3 values and their scales -> bf16.
#pragma once

#include "sm90_mla_decode.cuh"

namespace tpla::cuda {

constexpr int kRunTokens = 16;  // of one page, one behind the other: pages hold a multiple of them, and their bytes are a multiple of 16 in every layout

template <int kLatent>
struct Fp8Token {
  static constexpr int kBytes = kv_token_bytes(KvFormat::fp8, kLatent);
  static constexpr int kScaleOffset = kLatent;
  static constexpr int kRopeOffset = kBytes - 128;
  static constexpr int kGroups = (kLatent + 127) / 128;  // of 128 columns, one scale each
};

// Exponent and mantissa keep their bits, so that values come out 2^-120 of what they are, subnormal ones included; the scale makes up for it.
constexpr float kWidenFactor = 0x1p120f;
constexpr float kLargestScale = 128.0f;  // whose product with kWidenFactor is a bf16; larger ones are applied in two steps

// Two of four e4m3 values -> a bf16 pair. `kPair` is a selector of prmt that makes each value the lower byte of a half and spreads its sign over
// the upper one; four places up, sign, exponent and mantissa are where bf16 has them, and what lies between and below is masked out.
constexpr uint32_t kFirstPair = 0x9180, kSecondPair = 0xB3A2, kEvenPair = 0xA280, kOddPair = 0xB391;

template <uint32_t kPair>
__device__ __forceinline__ uint32_t widen_e4m3(uint32_t word) {
  uint32_t halves;
  asm("prmt.b32 %0, %1, 0, %2;" : "=r"(halves) : "r"(word), "n"(kPair));
  return halves << 4 & 0x87F087F0u;
}

__device__ __forceinline__ uint32_t multiply_bf16x2(uint32_t a, uint32_t b) {
  uint32_t product;
  asm("mul.bf16x2 %0, %1, %2;" : "=r"(product) : "r"(a), "r"(b));
  return product;
}

}  // namespace tpla::cuda
