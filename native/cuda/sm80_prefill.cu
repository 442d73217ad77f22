// Un-absorbed MLA prefill, head dims 192 (keys) / 128 (values), any GPU from sm_80 up: mma.sync and cp.async within 99 KiB of shared memory.
//
// A block takes 128 query rows of one head, a warp 32 of them, 64 keys at a time: keys of the next step arrive while this step's values are
// multiplied, values while the logits are.
#include <cuda_runtime.h>

#include "mla_prefill_kernel.h"
#include "mla_prefill_schedule.cuh"
#include "sm80_primitives.cuh"
#include "row_softmax.cuh"

namespace tpla::cuda {
namespace {

constexpr int kKeyDim = kPrefillKeyDim;
constexpr int kValueDim = kPrefillValueDim;
constexpr int kWarps = 4;
constexpr int kThreads = kWarps * 32;
constexpr int kRowTiles = kPrefillRows / kWarps / 16;  // of 16 rows, a warp
constexpr int kKeys = 64;                              // of a step
// An odd number of 16-byte units: ldmatrix without bank conflicts.
constexpr int kKeyRowBytes = kKeyDim * 2 + 16;
constexpr int kValueRowBytes = kValueDim * 2 + 16;
constexpr int kQueryBytes = kPrefillRows * kKeyRowBytes;
constexpr int kSharedBytes = kQueryBytes + kKeys * (kKeyRowBytes + kValueRowBytes);
static_assert(kSharedBytes <= 99 * 1024);

// kRows rows of kDim values, from `tensor` on, `stride` values apart; zeros from `valid` on.
template <int kRows, int kDim, int kRowBytes>
__device__ __forceinline__ void load_rows(uint32_t destination, const __nv_bfloat16* tensor, int64_t stride, int valid) {
  constexpr int kRowsAtOnce = kThreads / 8;  // 8 threads of 16 bytes side by side
  const int row = threadIdx.x / 8, unit = threadIdx.x % 8;
  const __nv_bfloat16* source = tensor + unit * 8;
#pragma unroll
  for (int r = row; r < row + kRows; r += kRowsAtOnce) {
#pragma unroll
    for (int column = 0; column < kDim; column += 64) {
      copy_async_16(destination + r * kRowBytes + unit * 16 + column * 2, source + min(r, valid - 1) * stride + column, r < valid);
    }
  }
}

__global__ void __launch_bounds__(kThreads) sm80_prefill_192_128(const __grid_constant__ PrefillArgs args) {
  extern __shared__ __align__(16) uint8_t shared[];
  PrefillTile tile;
  if (!find_tile(args, blockIdx.x, tile)) return;
  const uint32_t query = shared_address(shared), keys = query + kQueryBytes, values = keys + kKeys * kKeyRowBytes;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int warp_row0 = warp * kRowTiles * 16;

  const auto load_keys = [&](int step) {
    const int64_t first = tile.kv_begin + step * kKeys;
    const int valid = tile.kv_len - step * kKeys;
    load_rows<kKeys, kKeyDim - kPrefillRopeDim, kKeyRowBytes>(keys, args.k + first * args.k_token + tile.head * args.k_head, args.k_token, valid);
    load_rows<kKeys, kPrefillRopeDim, kKeyRowBytes>(keys + (kKeyDim - kPrefillRopeDim) * 2, args.k_rope + first * args.k_rope_token + tile.head * args.k_rope_head, args.k_rope_token, valid);
    copy_async_commit();
  };
  const auto load_values = [&](int step) {
    load_rows<kKeys, kValueDim, kValueRowBytes>(values, args.v + (tile.kv_begin + step * kKeys) * args.v_token + tile.head * args.v_head, args.v_token, tile.kv_len - step * kKeys);
    copy_async_commit();
  };

  float out[kRowTiles][kValueDim / 2];
#pragma unroll
  for (int m = 0; m < kRowTiles; ++m)
#pragma unroll
    for (int i = 0; i < kValueDim / 2; ++i) out[m][i] = 0.0f;
  RowSoftmax softmax[kRowTiles];

  const int steps = (tile.keys + kKeys - 1) / kKeys;
  if (steps > 0) {
    const int64_t stride = static_cast<int64_t>(args.heads) * kKeyDim;
    load_rows<kPrefillRows, kKeyDim, kKeyRowBytes>(query, args.q + (tile.q_begin + tile.row0) * stride + tile.head * kKeyDim, stride, tile.rows());
    load_keys(steps - 1);
  }
  for (int step = steps - 1; step >= 0; --step) {
    copy_async_wait<0>();
    __syncthreads();  // keys are here, and nobody reads the values of the step before
    load_values(step);

    float logits[kRowTiles][kKeys / 2];
#pragma unroll
    for (int m = 0; m < kRowTiles; ++m)
#pragma unroll
      for (int i = 0; i < kKeys / 2; ++i) logits[m][i] = 0.0f;
    const uint32_t query_address = query + (warp_row0 + lane % 16) * kKeyRowBytes + lane / 16 * 16;
    const uint32_t key_address = keys + (lane / 16 * 8 + lane % 8) * kKeyRowBytes + lane / 8 % 2 * 16;
#pragma unroll
    for (int k = 0; k < kKeyDim / 16; ++k) {
      uint32_t a[kRowTiles][4];
#pragma unroll
      for (int m = 0; m < kRowTiles; ++m) load_matrix_x4(query_address + m * 16 * kKeyRowBytes + k * 32, a[m]);
#pragma unroll
      for (int n = 0; n < kKeys / 16; ++n) {
        uint32_t b[4];
        load_matrix_x4(key_address + n * 16 * kKeyRowBytes + k * 32, b);
#pragma unroll
        for (int m = 0; m < kRowTiles; ++m) {
          multiply_16x8x16(&logits[m][n * 8], a[m], b[0], b[1]);
          multiply_16x8x16(&logits[m][n * 8 + 4], a[m], b[2], b[3]);
        }
      }
    }
    __syncthreads();  // nobody reads these keys any more
    if (step > 0) load_keys(step - 1);

    uint32_t probs[kRowTiles][kKeys / 16][4];
#pragma unroll
    for (int m = 0; m < kRowTiles; ++m) {
      const int row = warp_row0 + m * 16 + lane / 4;
      if ((step + 1) * kKeys > tile.limit(warp_row0 + m * 16)) {  // the first row sees the fewest
        const int limits[2] = {tile.limit(row), tile.limit(row + 8)};
#pragma unroll
        for (int i = 0; i < kKeys / 2; ++i) {
          if (step * kKeys + i / 4 * 8 + lane % 4 * 2 + i % 2 >= limits[i % 4 / 2]) logits[m][i] = -INFINITY;
        }
      }
      float factor[2];
      if (softmax[m].update(logits[m], args.scale_log2, factor)) scale_rows(out[m], factor);
      softmax[m].exponentiate(logits[m], args.scale_log2);
      pack_fragment(logits[m], probs[m]);
    }

    if (step > 0) copy_async_wait<1>();
    else copy_async_wait<0>();
    __syncthreads();  // values are here
    const uint32_t value_address = values + lane % 16 * kValueRowBytes + lane / 16 * 16;
#pragma unroll
    for (int k = 0; k < kKeys / 16; ++k) {
#pragma unroll
      for (int n = 0; n < kValueDim / 16; ++n) {
        uint32_t b[4];
        load_matrix_x4_trans(value_address + k * 16 * kValueRowBytes + n * 32, b);
#pragma unroll
        for (int m = 0; m < kRowTiles; ++m) {
          multiply_16x8x16(&out[m][n * 8], probs[m][k], b[0], b[1]);
          multiply_16x8x16(&out[m][n * 8 + 4], probs[m][k], b[2], b[3]);
        }
      }
    }
  }

  // Through this warp's own rows of the query buffer, so that rows leave in 16-byte pieces.
  uint8_t* staged = shared + warp_row0 * kKeyRowBytes;
  const int64_t out_row0 = tile.q_begin + tile.row0 + warp_row0;
  const int rows = min(tile.rows() - warp_row0, kRowTiles * 16);
  __syncwarp();
#pragma unroll
  for (int m = 0; m < kRowTiles; ++m) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int row = m * 16 + lane / 4 + h * 8;
      const float sum = softmax[m].row_sum(h);
      const float inverse = sum > 0.0f ? __fdividef(1.0f, sum) : 0.0f;
      if (args.lse && lane % 4 == 0 && row < rows) {
        args.lse[(out_row0 + row) * args.heads + tile.head] = sum > 0.0f ? (softmax[m].maximum[h] + log2f(sum)) * 0.6931471805599453f : -INFINITY;
      }
#pragma unroll
      for (int n = 0; n < kValueDim / 8; ++n) {
        *reinterpret_cast<uint32_t*>(staged + row * kKeyRowBytes + n * 16 + lane % 4 * 4) = pack_bf16(out[m][n * 4 + h * 2] * inverse, out[m][n * 4 + h * 2 + 1] * inverse);
      }
    }
  }
  __syncwarp();
#pragma unroll
  for (int i = lane; i < kRowTiles * 16 * (kValueDim / 8); i += 32) {
    const int row = i / (kValueDim / 8), unit = i % (kValueDim / 8);
    if (row < rows) {
      reinterpret_cast<uint4*>(args.out)[((out_row0 + row) * args.heads + tile.head) * (kValueDim / 8) + unit] = *reinterpret_cast<const uint4*>(staged + row * kKeyRowBytes + unit * 16);
    }
  }
}

}  // namespace

void launch_sm80_prefill(const PrefillArgs& args, Stream stream) {
  prepare_kernel(reinterpret_cast<const void*>(&sm80_prefill_192_128), kSharedBytes);
  sm80_prefill_192_128<<<args.tiles(), kThreads, kSharedBytes, stream>>>(args);
  check(cudaGetLastError(), "sm80_prefill_192_128");
}

}  // namespace tpla::cuda
