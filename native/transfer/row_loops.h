#pragma once
#include <bit>
#include <cstddef>
#include <cstdint>
#include <cstring>

#include "core/numeric.h"
#include "transfer/kv_checksum.h"

namespace tpla {

// Loops without branches that the compiler vectorises for whatever instruction set the including file is built for. Internal linkage on
// purpose: the linker must not share one copy between files built for different instruction sets. Results are those of core/numeric.h
// bit for bit.

static inline uint64_t word_term(const std::byte* at, size_t word) {
  uint32_t value;
  std::memcpy(&value, at, 4);
  return checksum_key(static_cast<uint32_t>(word)) * value;
}

static void bf16_to_f32(const std::byte* from, size_t count, float* to) {
  for (size_t i = 0; i < count; i++) {
    uint16_t bits;
    std::memcpy(&bits, from + i * 2, 2);
    to[i] = std::bit_cast<float>(static_cast<uint32_t>(bits) << 16);
  }
}

static void f32_to_bf16(const float* from, size_t count, std::byte* to) {
  for (size_t i = 0; i < count; i++) {
    const uint32_t bits = std::bit_cast<uint32_t>(from[i]);
    const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    const uint32_t quiet = (bits >> 16) | 0x40u;
    const bool is_nan = static_cast<int32_t>(bits & 0x7fffffffu) > 0x7f800000;
    const uint16_t narrow = static_cast<uint16_t>(is_nan ? quiet : rounded);
    std::memcpy(to + i * 2, &narrow, 2);
  }
}

// Magnitudes below are int32, whose comparisons every vector unit has, and choices are masks: AVX2 code has no other.
static inline int32_t pick(bool condition, int32_t yes, int32_t no) {
  const int32_t mask = -static_cast<int32_t>(condition);
  return (yes & mask) | (no & ~mask);
}

static void e4m3_to_f32(const std::byte* from, size_t count, float scale, float* to) {
  const auto* codes = reinterpret_cast<const uint8_t*>(from);
  for (size_t i = 0; i < count; i++) {
    const uint32_t code = codes[i];
    const int32_t magnitude = static_cast<int32_t>(code & 0x7fu);
    const int32_t scaled = std::bit_cast<int32_t>(std::bit_cast<float>(magnitude << 20) * 0x1p120f);
    const int32_t bits = pick(magnitude == 0x7f, 0x7fc00000, scaled);
    to[i] = std::bit_cast<float>(static_cast<uint32_t>(bits) | (code & 0x80u) << 24) * scale;
  }
}

static float f32_to_e4m3(const float* from, size_t count, std::byte* to) {
  // Magnitudes of floats order like their bits; NaN is left out.
  int32_t largest = 0;
  for (size_t i = 0; i < count; i++) {
    const int32_t magnitude = std::bit_cast<int32_t>(from[i]) & 0x7fffffff;
    const int32_t counted = magnitude > 0x7f800000 ? 0 : magnitude;
    largest = counted > largest ? counted : largest;
  }
  const float scale = e4m3_scale(std::bit_cast<float>(largest));
  const float inverse = 1.0f / scale;
  auto* codes = reinterpret_cast<uint8_t*>(to);
  for (size_t i = 0; i < count; i++) {
    const int32_t bits = std::bit_cast<int32_t>(from[i] * inverse);
    const int32_t magnitude = bits & 0x7fffffff;
    // Below 2^-6 the grid is uniform with step 2^-9: adding 2^14 leaves the rounded multiple in the low mantissa bits.
    const int32_t small = std::bit_cast<int32_t>(std::bit_cast<float>(magnitude) + 0x1p14f) - 0x46800000;
    const int32_t normal = ((magnitude + 0x7ffff + ((magnitude >> 20) & 1)) >> 20) - (120 << 3);
    int32_t code = pick(magnitude < 0x3c800000, small, normal);
    code = pick(magnitude >= 0x43e00000, 0x7e, code);
    code = pick(magnitude > 0x7f800000, 0x7f, code);
    codes[i] = static_cast<uint8_t>(((bits >> 24) & 0x80) | code);
  }
  return scale;
}

}  // namespace tpla
