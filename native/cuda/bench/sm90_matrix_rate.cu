#include "cuda/bench/matrix_rate.h"
#include "cuda/sm90_primitives.cuh"
#include "cuda/sm90_wgmma.cuh"

namespace tpla::bench {

namespace {

using namespace tpla::cuda;

constexpr int kGroups = 2;
constexpr int kTileBytes = 256 * 128;  // 256 rows of 64 bf16

__device__ uint32_t mix(uint32_t x) {
  x ^= x >> 16;
  x *= 0x7feb352du;
  x ^= x >> 15;
  x *= 0x846ca68bu;
  return x ^ x >> 16;
}

// Two warpgroups, each 64 × 256 += [64 × 64] · [64 × 256] per step, on random operands (zeros would run faster than data does).
__global__ void __launch_bounds__(kGroups * 128, 1) matrix_rate_kernel(float* sink, int steps) {
  extern __shared__ uint8_t raw[];
  uint8_t* tiles = raw + ((1024 - (smem_address(raw) & 1023)) & 1023);
  for (int i = threadIdx.x; i < 2 * kTileBytes / 4; i += blockDim.x) {
    const uint32_t bits = mix(i * 2654435761u + blockIdx.x);
    reinterpret_cast<uint32_t*>(tiles)[i] = (bits & 0x807f807fu) | 0x3f003f00u;  // ±0.5 to ±1
  }
  fence_async_proxy();
  __syncthreads();
  const int group = warp_uniform(threadIdx.x / 128);
  const uint32_t a = descriptor_low(smem_address(tiles) + group * 64 * 128), b = descriptor_low(smem_address(tiles) + kTileBytes);
  float d[128] = {};
  for (int s = 0; s < steps; ++s) {
    wgmma_pin(d);
    wgmma_fence();
#pragma unroll
    for (int k = 0; k < 4; ++k) Wgmma<256>::ss<0, 0>(d, descriptor(a + k * 2), descriptor(b + k * 2));
    wgmma_commit();
    wgmma_wait<0>();
    wgmma_pin(d);
  }
  float total = 0;
  for (int i = 0; i < 128; ++i) total += d[i];
  if (total == 12345.678f) *sink = total;
}

}  // namespace

MatrixRateKernel sm90_matrix_rate_kernel() {
  return {reinterpret_cast<const void*>(&matrix_rate_kernel), kGroups * 128, 2 * kTileBytes + 1024, kGroups * 2.0 * 64 * 256 * 64};
}

}  // namespace tpla::bench
