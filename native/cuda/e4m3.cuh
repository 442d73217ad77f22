// fp8 KV as it is written: eight values a lane, 16 lanes for the 128 that share a power-of-two scale. The bytes are those of the CPU (core/kv_row.cpp).
#pragma once

#include <cuda_fp8.h>

#include <cstdint>

namespace tpla::cuda {

constexpr int kScaleGroupLanes = 16;  // that hold the eight values each of one scale

// Largest magnitude in the scale group that this lane is of; of lanes that count, NaN for nothing.
__device__ __forceinline__ float scale_group_amax(const float (&values)[8], bool counts) {
  float amax = 0;
  if (counts) {
#pragma unroll
    for (int i = 0; i < 8; i++) amax = fmaxf(amax, fabsf(values[i]));
  }
#pragma unroll
  for (int step = kScaleGroupLanes / 2; step > 0; step /= 2) amax = fmaxf(amax, __shfl_xor_sync(~0u, amax, step));
  return amax;
}

// core/numeric.h: smallest power of two s with amax / s <= 448.
__device__ __forceinline__ float e4m3_scale_of(float amax) {
  if (!(amax > 0)) return 1.0f;
  const uint32_t bits = __float_as_uint(amax);
  const int exponent = int(bits >> 23) - 8 + ((bits & 0x7fffffu) > 0x600000u ? 1 : 0);
  return __uint_as_float(uint32_t(min(max(exponent, 1), 254)) << 23);
}

// Eight values over their scale, a power of two from 2^-126 to 2^120.
__device__ __forceinline__ uint2 encode_e4m3(const float (&values)[8], float scale) {
  const float inverse = __uint_as_float((254u << 23) - __float_as_uint(scale));
  uint32_t codes[2] = {};
#pragma unroll
  for (int i = 0; i < 4; i++) {
    const float2 pair = make_float2(values[2 * i] * inverse, values[2 * i + 1] * inverse);
    codes[i / 2] |= uint32_t(__nv_cvt_float2_to_fp8x2(pair, __NV_SATFINITE, __NV_E4M3)) << (i % 2 * 16);
  }
  return make_uint2(codes[0], codes[1]);
}

}  // namespace tpla::cuda
