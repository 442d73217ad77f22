// Online softmax where query rows are the columns of the logits, Hopper: logits^T [64 tokens × rows] as wgmma leaves them with a warpgroup.
//
// A thread holds kRows / 2 values, of two tokens (warp · 16 + lane / 4, and 8 more) and kRows / 4 rows: value n · 4 + half · 2 + j is of
// token half and row n · 8 + lane % 4 · 2 + j.
#pragma once

#include "row_softmax.cuh"
#include "sm90_primitives.cuh"

namespace tpla::cuda {

template <int kRows>
struct ColumnSoftmax {
  static constexpr int kBlocks = kRows / 8;
  static constexpr int kThreadRows = kRows / 4;  // i: row (i / 2) · 8 + lane % 4 · 2 + i % 2

  float maximum[kThreadRows];  // reference, log2 units; the same in all threads of a row
  float sum[kThreadRows];      // of this thread's tokens only, until join_lanes()

  __device__ ColumnSoftmax() {
#pragma unroll
    for (int i = 0; i < kThreadRows; ++i) {
      maximum[i] = -INFINITY;
      sum[i] = 0.0f;
    }
  }

  __device__ static int row_of(int i, int lane) { return (i / 2) * 8 + (lane % 4) * 2 + i % 2; }

  // The reference of the exponent moves only when a logit exceeds it by 2^8; until then no reduction over tokens is needed.
  __device__ bool exceeded(const float (&logits)[kRows / 2], float scale) const {
    bool exceeds = false;
#pragma unroll
    for (int n = 0; n < kBlocks; ++n)
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        const float top = fmaxf(logits[n * 4 + j], logits[n * 4 + 2 + j]) * scale;
        exceeds |= top > maximum[n * 2 + j] + kReferenceSlack;
      }
    return exceeds;
  }

  // Highest logit of each row among this warp's tokens -> warp_values[kRows].
  __device__ void publish_tops(const float (&logits)[kRows / 2], float scale, float* warp_values, int lane) const {
#pragma unroll
    for (int n = 0; n < kBlocks; ++n)
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        float value = fmaxf(logits[n * 4 + j], logits[n * 4 + 2 + j]) * scale;
#pragma unroll
        for (int d = 4; d < 32; d *= 2) value = fmaxf(value, __shfl_xor_sync(~0u, value, d));
        if (lane < 4) warp_values[n * 8 + lane * 2 + j] = value;
      }
  }

  // Moves the references to what the four warps published, [4][kRows]; what was accumulated so far is to be multiplied by `factor`.
  __device__ void move(const float* warp_values, int lane, float (&factor)[kThreadRows]) {
#pragma unroll
    for (int i = 0; i < kThreadRows; ++i) {
      float value = maximum[i];
#pragma unroll
      for (int w = 0; w < 4; ++w) value = fmaxf(value, warp_values[w * kRows + row_of(i, lane)]);
      factor[i] = value == -INFINITY ? 1.0f : exp2_approx(maximum[i] - value);
      maximum[i] = value;
      sum[i] *= factor[i];
    }
  }

  // Logits -> probabilities.
  __device__ void exponentiate(float (&logits)[kRows / 2], float scale) {
#pragma unroll
    for (int n = 0; n < kBlocks; ++n)
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        const float reference = maximum[n * 2 + j] == -INFINITY ? 0.0f : maximum[n * 2 + j];
#pragma unroll
        for (int half = 0; half < 4; half += 2) {
          const float p = exp2_approx(fmaf(logits[n * 4 + half + j], scale, -reference));
          logits[n * 4 + half + j] = p;
          sum[n * 2 + j] += p;
        }
      }
  }

  // Sums of each row over this warp's tokens -> warp_values[kRows].
  __device__ void publish_sums(float* warp_values, int lane) {
#pragma unroll
    for (int i = 0; i < kThreadRows; ++i) {
#pragma unroll
      for (int d = 4; d < 32; d *= 2) sum[i] += __shfl_xor_sync(~0u, sum[i], d);
      if (lane < 4) warp_values[row_of(i, lane)] = sum[i];
    }
  }
};

// visible_of(row): tokens that it sees. token: the thread's first.
template <int kRows, class VisibleOf>
__device__ __forceinline__ void mask_columns(float (&logits)[kRows / 2], int token, int lane, VisibleOf visible_of) {
#pragma unroll
  for (int n = 0; n < kRows / 8; ++n)
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      const int visible = visible_of(n * 8 + (lane % 4) * 2 + j);
      if (token >= visible) logits[n * 4 + j] = -INFINITY;
      if (token + 8 >= visible) logits[n * 4 + 2 + j] = -INFINITY;
    }
}

// Multiplies what was accumulated of one chunk of columns, out^T [64 columns × rows].
template <int kRows>
__device__ __forceinline__ void scale_columns(float (&out)[kRows / 2], const float (&factor)[kRows / 4]) {
#pragma unroll
  for (int n = 0; n < kRows / 8; ++n)
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      out[n * 4 + j] *= factor[n * 2 + j];
      out[n * 4 + 2 + j] *= factor[n * 2 + j];
    }
}

// Probabilities -> shared memory as [row][64 tokens], 128-byte swizzle: the second product's B operand.
template <int kRows>
__device__ __forceinline__ void store_probabilities(const float (&values)[kRows / 2], uint32_t destination, int warp, int lane) {
  // Matrix i of a store: token half i % 2 of column block n + i / 2.
  const int matrix = lane / 8, row_in_block = lane % 8;
  const int unit = 2 * warp + matrix % 2;
  const uint32_t row_address = destination + row_in_block * 128 + ((unit ^ row_in_block) << 4);
  if constexpr (kRows == 8) {
    stmatrix_x2_trans(row_address, pack_bf16(values[0], values[1]), pack_bf16(values[2], values[3]));
  } else {
#pragma unroll
    for (int n = 0; n < kRows / 8; n += 2) {
      stmatrix_x4_trans(row_address + (n + matrix / 2) * 1024, pack_bf16(values[n * 4], values[n * 4 + 1]), pack_bf16(values[n * 4 + 2], values[n * 4 + 3]),
                        pack_bf16(values[n * 4 + 4], values[n * 4 + 5]), pack_bf16(values[n * 4 + 6], values[n * 4 + 7]));
    }
  }
}

}  // namespace tpla::cuda
