#pragma once
#include <bit>
#include <cstdint>

namespace tpla {

// Scalar conversions between storage formats and fp32. Internal linkage on purpose: these are also compiled into
// files built for newer instruction sets, and the linker must not share one copy between them.

static inline float bf16_to_float(uint16_t bits) { return std::bit_cast<float>(uint32_t(bits) << 16); }

// Round to nearest even; NaN stays NaN.
static inline uint16_t float_to_bf16(float value) {
  const uint32_t bits = std::bit_cast<uint32_t>(value);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return uint16_t((bits >> 16) | 0x40u);
  return uint16_t((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

static inline float f16_to_float(uint16_t bits) {
  const uint32_t sign = uint32_t(bits & 0x8000u) << 16;
  const uint32_t magnitude = bits & 0x7fffu;
  if (magnitude >= 0x7c00u) return std::bit_cast<float>(sign | 0x7f800000u | ((magnitude & 0x3ffu) << 13));
  // Shifting keeps exponent and mantissa in place; the multiplication moves the bias from 15 to 127 and normalises subnormals.
  const float scaled = std::bit_cast<float>(magnitude << 13) * 0x1p112f;
  return std::bit_cast<float>(sign | std::bit_cast<uint32_t>(scaled));
}

// e4m3fn: bias 7, no infinities, 0x7f and 0xff are NaN, largest 448.
static inline float e4m3_to_float(uint8_t bits) {
  const uint32_t sign = uint32_t(bits & 0x80u) << 24;
  const uint32_t magnitude = bits & 0x7fu;
  if (magnitude == 0x7fu) return std::bit_cast<float>(sign | 0x7fc00000u);
  const float scaled = std::bit_cast<float>(magnitude << 20) * 0x1p120f;
  return std::bit_cast<float>(sign | std::bit_cast<uint32_t>(scaled));
}

// Round to nearest even, saturating at 448; NaN stays NaN.
static inline uint8_t float_to_e4m3(float value) {
  const uint32_t bits = std::bit_cast<uint32_t>(value);
  const uint8_t sign = uint8_t(bits >> 24) & 0x80u;
  uint32_t magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return sign | 0x7fu;
  if (magnitude >= 0x43e00000u) return sign | 0x7eu;  // |value| >= 448
  if (magnitude < 0x3c800000u) {                      // below 2^-6 the grid is uniform with step 2^-9
    // Adding 2^14 leaves |value| rounded to a multiple of 2^-9 in the low mantissa bits.
    const float rounded = std::bit_cast<float>(magnitude) + 0x1p14f;
    return sign | uint8_t(std::bit_cast<uint32_t>(rounded) - 0x46800000u);
  }
  magnitude += 0x7ffffu + ((magnitude >> 20) & 1u);
  const uint32_t code = (magnitude >> 20) - (120u << 3);
  return sign | uint8_t(code > 0x7eu ? 0x7eu : code);
}

// Smallest power of two s with amax / s <= 448; 1 for an all-zero group.
static inline float e4m3_scale(float amax) {
  if (!(amax > 0)) return 1.0f;
  const uint32_t bits = std::bit_cast<uint32_t>(amax);
  // 448 = 1.75 * 2^8, so the exponent is that of amax minus 8, one more where the mantissa exceeds 1.75.
  int exponent = int(bits >> 23) - 8 + ((bits & 0x7fffffu) > 0x600000u ? 1 : 0);
  if (exponent < 1) exponent = 1;
  if (exponent > 254) exponent = 254;
  return std::bit_cast<float>(uint32_t(exponent) << 23);
}

}  // namespace tpla
