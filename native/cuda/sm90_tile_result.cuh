#pragma once
// The end of a piece in the tile kernels, over bf16 and over fp8 KV: two warpgroups with the output of 64 rows × the whole latent in registers each.
#include "mla_decode_args.h"
#include "mla_decode_schedule.cuh"
#include "row_softmax.cuh"
#include "sm90_primitives.cuh"

namespace tpla::cuda {

// Writes rows, or a part of them where other blocks share the piece. `out` [kLatent / 2] is a fragment of wgmma, 64 rows from `group_row0` on. With 64 rows both
// warpgroups hold a sum over tokens of the same rows and are joined through `exchange` [32][128] and `row_values` [2 warpgroups][64]; with 128 each writes its own.
// Meets `kConsumerBarrier`; parts are to be published by the caller.
template <int kLatent, int kRows, int kConsumerBarrier, int kConsumers, class Schedule>
__device__ __forceinline__ void write_tile_result(const MlaDecodeArgs& args, const Schedule& schedule, const DecodePiece& piece, int group_row0, RowSoftmax& softmax,
                                                  float (&out)[kLatent / 2], float* exchange, float2* row_values, int group, int in_group) {
  constexpr bool kSplitRows = kRows == 128;
  const int lane = in_group % 32, thread_row = in_group / 32 * 16 + lane / 4;  // and + 8
  float sums[2] = {softmax.row_sum(0), softmax.row_sum(1)};
  const bool is_split = piece.participants > 1;
  const int part = schedule.partial_index(piece, piece.participant);
  const int64_t out_row0 = static_cast<int64_t>(piece.q_begin) * args.heads + group_row0;
  const int rows = min(piece.rows - group_row0, 64);
  const int part_row0 = kSplitRows ? group * 64 : 0;
  const int thread_offset = thread_row * kLatent + (lane % 4) * 2;
  float* partial = args.partial_out + (static_cast<int64_t>(part) * kRows + part_row0) * kLatent + thread_offset;
  __nv_bfloat16* final_out = static_cast<__nv_bfloat16*>(args.out) + out_row0 * kLatent + thread_offset;

  // Values begin, begin + 1, … of the fragment; i, i + 1 are neighbours in a row. Final rows are scaled by `inverse`.
  float inverse[2];
  const auto write = [&](const float* values, int begin, int count) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      if (thread_row + h * 8 >= rows) continue;
      const int offset = h * 8 * kLatent + begin / 4 * 8;
      if (is_split) {
#pragma unroll
        for (int n = 0; n < count / 4; ++n) *reinterpret_cast<float2*>(partial + offset + n * 8) = make_float2(values[n * 4 + h * 2], values[n * 4 + h * 2 + 1]);
      } else {
#pragma unroll
        for (int n = 0; n < count / 4; ++n) {
          *reinterpret_cast<uint32_t*>(final_out + offset + n * 8) = pack_bf16(values[n * 4 + h * 2] * inverse[h], values[n * 4 + h * 2 + 1] * inverse[h]);
        }
      }
    }
  };
  const auto invert = [&] {
#pragma unroll
    for (int h = 0; h < 2; ++h) inverse[h] = sums[h] > 0.0f ? __fdividef(1.0f, sums[h]) : 0.0f;
  };

  if constexpr (kSplitRows) {
    invert();
    write(out, 0, kLatent / 2);
  } else {
    if (lane % 4 == 0) {
#pragma unroll
      for (int h = 0; h < 2; ++h) row_values[group * 64 + thread_row + h * 8] = make_float2(softmax.maximum[h], sums[h]);
    }
    named_barrier_sync(kConsumerBarrier, kConsumers);
    float factor[2];
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const float2 other = row_values[(group ^ 1) * 64 + thread_row + h * 8];
      const float top = fmaxf(softmax.maximum[h], other.x);
      const float reference = top == -INFINITY ? 0.0f : top;
      factor[h] = exp2_approx(softmax.maximum[h] - reference);
      // In this order in both warpgroups, for equal bits.
      const float own = sums[h] * factor[h], others = other.y * exp2_approx(other.x - reference);
      sums[h] = group == 0 ? own + others : others + own;
      softmax.maximum[h] = top;
    }
    invert();
    constexpr int kRound = kLatent % 64 == 0 ? 32 : 16;
#pragma unroll
    for (int round = 0; round < kLatent / 2 / kRound; ++round) {
      if (group == (round & 1)) {
#pragma unroll
        for (int i = 0; i < kRound; ++i) exchange[i * 128 + in_group] = out[round * kRound + i] * factor[i % 4 / 2];
      }
      named_barrier_sync(kConsumerBarrier, kConsumers);
      if (group != (round & 1)) {
#pragma unroll
        for (int i = 0; i < kRound; ++i) out[round * kRound + i] = fmaf(out[round * kRound + i], factor[i % 4 / 2], exchange[i * 128 + in_group]);
        write(out + round * kRound, round * kRound, kRound);
      }
      named_barrier_sync(kConsumerBarrier, kConsumers);
    }
  }
  if ((kSplitRows || group == 0) && lane % 4 == 0) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int row = thread_row + h * 8;
      if (row >= rows) continue;
      if (is_split) {
        args.partial_sum[part * kRows + part_row0 + row] = make_float2(softmax.maximum[h], sums[h]);
      } else if (args.lse) {
        args.lse[out_row0 + row] = sums[h] > 0.0f ? (softmax.maximum[h] + log2f(sums[h])) * 0.6931471805599453f : -INFINITY;
      }
    }
  }
}

}  // namespace tpla::cuda
