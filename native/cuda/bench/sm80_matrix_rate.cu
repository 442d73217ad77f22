#include "bench/random.h"
#include "cuda/bench/matrix_rate.h"

namespace tpla::bench {

namespace {

constexpr int kThreads = 512;
constexpr int kAccumulators = 8;  // independent products a warp keeps in flight

__device__ uint32_t random_bf16_pair(uint64_t index) {
  const uint32_t bits = random_bits(7, index);
  return (bits & 0x80ff80ffu) | 0x3f003f00u;  // magnitudes from 0.5 to 2
}

__global__ void __launch_bounds__(kThreads) matrix_rate_kernel(float* sink, int steps) {
  float d[kAccumulators][4] = {};
  uint32_t a[4], b[kAccumulators][2];
  for (int i = 0; i < 4; ++i) a[i] = random_bf16_pair(threadIdx.x * 64 + i);
  for (int i = 0; i < kAccumulators * 2; ++i) b[i / 2][i % 2] = random_bf16_pair(threadIdx.x * 64 + 8 + i);
  for (int step = 0; step < steps; ++step) {
#pragma unroll
    for (int i = 0; i < kAccumulators; ++i) {
      asm volatile(
          "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};\n"
          : "+f"(d[i][0]), "+f"(d[i][1]), "+f"(d[i][2]), "+f"(d[i][3])
          : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[i][0]), "r"(b[i][1]));
    }
  }
  float sum = 0;
  for (int i = 0; i < kAccumulators; ++i) sum += d[i][0] + d[i][1] + d[i][2] + d[i][3];
  if (sum == 12345.678f) *sink = sum;  // never, but the compiler cannot know
}

}  // namespace

MatrixRateKernel sm80_matrix_rate_kernel() {
  return {reinterpret_cast<const void*>(&matrix_rate_kernel), kThreads, 0, kThreads / 32 * kAccumulators * 2.0 * 16 * 8 * 16};
}

}  // namespace tpla::bench
