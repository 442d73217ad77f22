// Online softmax over a tile of logits in the fragments of mma.sync and wgmma with rows on the M side: a warp has 16 rows, each thread two of
// them, r and r + 8, and kCount = tokens / 2 values.
#pragma once

#include "arithmetic.cuh"

namespace tpla::cuda {

// The reference of the exponent moves only when a row's logit exceeds it by 2^8, so that rescaling the output is rare.
constexpr float kReferenceSlack = 8.0f;

struct RowSoftmax {
  float maximum[2] = {-INFINITY, -INFINITY};  // reference, log2 units
  float sum[2] = {0.0f, 0.0f};                // of this thread's columns only

  // True where the reference of a row of this warp moved; factor[] then rescales what was accumulated so far.
  template <int kCount>
  __device__ bool update(const float (&logits)[kCount], float scale, float (&factor)[2]) {
    bool moved = false;
    float top[2];
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      float value = -INFINITY;
#pragma unroll
      for (int n = 0; n < kCount / 4; ++n) value = fmaxf(value, fmaxf(logits[n * 4 + h * 2], logits[n * 4 + h * 2 + 1]));
      top[h] = value * scale;
      moved |= top[h] > maximum[h] + kReferenceSlack;
    }
    factor[0] = factor[1] = 1.0f;
    if (!__any_sync(~0u, moved)) return false;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      top[h] = fmaxf(top[h], __shfl_xor_sync(~0u, top[h], 1));
      top[h] = fmaxf(top[h], __shfl_xor_sync(~0u, top[h], 2));
      move_to(h, fmaxf(top[h], maximum[h]), factor[h]);
    }
    return true;
  }

  __device__ void move_to(int h, float reference, float& factor) {
    factor = reference == -INFINITY ? 1.0f : exp2_approx(maximum[h] - reference);
    maximum[h] = reference;
    sum[h] *= factor;
  }

  template <int kCount>
  __device__ void exponentiate(float (&logits)[kCount], float scale) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const float reference = maximum[h] == -INFINITY ? 0.0f : maximum[h];
      float total = 0.0f;
#pragma unroll
      for (int n = 0; n < kCount / 4; ++n)
#pragma unroll
        for (int j = 0; j < 2; ++j) {
          const float p = exp2_approx(fmaf(logits[n * 4 + h * 2 + j], scale, -reference));
          logits[n * 4 + h * 2 + j] = p;
          total += p;
        }
      sum[h] += total;
    }
  }

  // Sum over the four lanes of a row.
  __device__ float row_sum(int h) const {
    float total = sum[h] + __shfl_xor_sync(~0u, sum[h], 1);
    return total + __shfl_xor_sync(~0u, total, 2);
  }
};

// Fragment of logits -> A operands of the k-steps of the second product.
template <int kSteps>
__device__ __forceinline__ void pack_fragment(const float (&logits)[kSteps * 8], uint32_t (&packed)[kSteps][4]) {
#pragma unroll
  for (int k = 0; k < kSteps; ++k)
#pragma unroll
    for (int i = 0; i < 4; ++i) packed[k][i] = pack_bf16(logits[(2 * k + i / 2) * 4 + (i % 2) * 2], logits[(2 * k + i / 2) * 4 + (i % 2) * 2 + 1]);
}

template <int kCount>
__device__ __forceinline__ void scale_rows(float (&out)[kCount], const float (&factor)[2]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) out[i] *= factor[i % 4 / 2];
}

}  // namespace tpla::cuda
