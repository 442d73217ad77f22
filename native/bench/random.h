// Random numbers by position, the same on host and device: value i of a stream depends on its seed and on i alone.
#pragma once

#include <cmath>
#include <cstdint>

#if defined(__CUDACC__)
#define TPLA_ANYWHERE __host__ __device__
#else
#define TPLA_ANYWHERE
#endif

namespace tpla::bench {

TPLA_ANYWHERE inline uint32_t random_bits(uint64_t seed, uint64_t index) {
  uint64_t x = index + seed * 0x9E3779B97F4A7C15ULL;
  x ^= x >> 33;
  x *= 0xff51afd7ed558ccdULL;
  x ^= x >> 33;
  x *= 0xc4ceb9fe1a85ec53ULL;
  x ^= x >> 33;
  return static_cast<uint32_t>(x);
}

// In (0, 1].
TPLA_ANYWHERE inline float random_unit(uint64_t seed, uint64_t index) { return (static_cast<float>(random_bits(seed, index) >> 8) + 1.0f) * 0x1p-24f; }

// Standard normal (Box-Muller).
TPLA_ANYWHERE inline float random_normal(uint64_t seed, uint64_t index) {
  return sqrtf(-2.0f * logf(random_unit(seed, 2 * index))) * cosf(6.2831853f * random_unit(seed, 2 * index + 1));
}

// Seeds of independent streams that belong to one problem.
inline uint64_t stream_seed(uint64_t seed, uint64_t stream) { return (seed * 64 + stream) * 0xD1B54A32D192ED03ULL + 1; }

// Least and most of the per-head logit scales that problems draw.
TPLA_ANYWHERE inline float random_latent_scale(uint64_t seed, int head) { return 0.5f + 2.0f * random_unit(seed, static_cast<uint64_t>(head)); }

}  // namespace tpla::bench
