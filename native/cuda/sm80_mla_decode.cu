// MLA decode for any GPU from sm_80 up: mma.sync and cp.async, 16 query rows per block, within 99 KiB of shared memory.
//
// Eight warps. Logits of 32 tokens: warp w takes 8 tokens and half of the width; output: warp w takes an eighth of the latent.
#include <cuda_bf16.h>
#include <cuda_fp8.h>

#include "mla_decode_combine.cuh"
#include "mla_decode_kernel.h"
#include "sm80_primitives.cuh"

namespace tpla::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kRows = 16;
constexpr int kStep = 32;  // tokens per pipeline stage
constexpr int kOverhead = 1;

template <int kLatent>
struct Sm80Shape {
  static constexpr int kWidth = kLatent + 64;
  static constexpr int kRowBytes = kWidth * 2 + 16;  // an odd number of 16-byte units: ldmatrix without bank conflicts
  static constexpr int kQueryBytes = kRows * kRowBytes;
  static constexpr int kStageBytes = kStep * kRowBytes;
  static constexpr int kLogitStride = kStep + 4;
  static constexpr int kProbRowBytes = kStep * 2 + 16;
  static constexpr int kLogitBytes = 2 * kRows * kLogitStride * 4;
  static constexpr int kProbBytes = kRows * kProbRowBytes;
  static constexpr int kScratchBytes = 512;
  static constexpr int kSharedBytes = kQueryBytes + 2 * kStageBytes + kLogitBytes + kProbBytes + kScratchBytes;
  static constexpr int kColumnBlocks = kLatent / 64;  // 8-column blocks of the output per warp
};

// kBytes of 4, 8 or 16; zeros where not valid.
template <int kBytes>
__device__ __forceinline__ void copy_async(uint32_t destination, const void* source, bool valid) {
  if constexpr (kBytes == 16) {
    copy_async_16(destination, source, valid);
  } else {
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(destination), "l"(source), "n"(kBytes), "r"(valid ? kBytes : 0) : "memory");
  }
}

// One fp8 token, by a warp: from the bytes that lie at the start of its row to bf16 in the same row.
template <int kLatent>
__device__ __forceinline__ void widen_token(uint8_t* row) {
  constexpr int kWords = kLatent / 4, kPerLane = (kWords + 31) / 32, kScales = (kLatent + 127) / 128;
  const int lane = threadIdx.x % 32;
  uint32_t words[kPerLane];
  float scales[kPerLane];
#pragma unroll
  for (int i = 0; i < kPerLane; ++i) {
    const int word = lane + i * 32;
    if (word >= kWords) continue;
    words[i] = reinterpret_cast<const uint32_t*>(row)[word];
    scales[i] = reinterpret_cast<const float*>(row + kLatent)[word / 32];
  }
  const uint32_t rope = reinterpret_cast<const uint32_t*>(row + kLatent + kScales * 4)[lane];
  __syncwarp();
#pragma unroll
  for (int i = 0; i < kPerLane; ++i) {
    const int word = lane + i * 32;
    if (word >= kWords) continue;
    const __nv_fp8x4_e4m3 packed = reinterpret_cast<const __nv_fp8x4_e4m3&>(words[i]);
    const float4 values = static_cast<float4>(packed);
    __nv_bfloat162 pairs[2] = {__floats2bfloat162_rn(values.x * scales[i], values.y * scales[i]), __floats2bfloat162_rn(values.z * scales[i], values.w * scales[i])};
    *reinterpret_cast<uint2*>(row + word * 8) = *reinterpret_cast<const uint2*>(pairs);
  }
  reinterpret_cast<uint32_t*>(row + kLatent * 2)[lane] = rope;
}

template <int kLatent, KvFormat kFormat, class Logits>
__global__ void __launch_bounds__(kThreads, 1) sm80_mla_decode(const __grid_constant__ MlaDecodeArgs args) {
  using Shape = Sm80Shape<kLatent>;
  constexpr int kUnits = Shape::kWidth / 8;  // 16-byte units of a query row
  constexpr int kTokenBytes = kv_token_bytes(kFormat, kLatent);
  constexpr int kCopyBytes = kTokenBytes % 16 == 0 ? 16 : kTokenBytes % 8 == 0 ? 8 : 4;  // that tokens leave aligned
  constexpr int kCopies = kTokenBytes / kCopyBytes;
  extern __shared__ __align__(16) uint8_t shared[];
  uint8_t* query = shared;
  uint8_t* stages = query + Shape::kQueryBytes;
  float* logits_shared = reinterpret_cast<float*>(stages + 2 * Shape::kStageBytes);  // [half of the width][row][token]
  uint8_t* probs_shared = reinterpret_cast<uint8_t*>(logits_shared) + Shape::kLogitBytes;
  int* plan_scratch = reinterpret_cast<int*>(probs_shared + Shape::kProbBytes);
  DecodePiece* split = reinterpret_cast<DecodePiece*>(plan_scratch + 36);
  float* factors = reinterpret_cast<float*>(plan_scratch + 60);  // [16]
  float* row_sums = factors + 16;                                // [16]
  float* row_maxima = factors + 32;                              // [16]

  const int thread = threadIdx.x, warp = thread / 32, lane = thread % 32;
  const DecodeSchedule<kRows, kOverhead, Logits> schedule(args);
  DecodeShare share = schedule.share(plan_scratch, reinterpret_cast<int*>(query));
  DecodePiece piece;
  int splits = 0;

  while (schedule.next(share, piece)) {
    const int row0 = piece.row0;
    const int rows = min(piece.rows - row0, kRows);
    const int64_t out_row0 = static_cast<int64_t>(piece.q_begin) * args.heads + row0;
    for (int i = thread; i < kRows * kUnits; i += kThreads) {
      const int row = i / kUnits, unit = i % kUnits;
      uint4 value = make_uint4(0, 0, 0, 0);
      if (row < rows) {
        value = reinterpret_cast<const uint4*>(args.q)[(out_row0 + row) * kUnits + unit];
        if (args.latent_scale && unit < kLatent / 8) {
          const float scale = args.latent_scale[(row0 + row) % args.heads];
          __nv_bfloat162* pairs = reinterpret_cast<__nv_bfloat162*>(&value);
#pragma unroll
          for (int p = 0; p < 4; ++p) {
            const float2 both = __bfloat1622float2(pairs[p]);
            pairs[p] = __floats2bfloat162_rn(both.x * scale, both.y * scale);
          }
        }
      }
      *reinterpret_cast<uint4*>(query + row * Shape::kRowBytes + unit * 16) = value;
    }

    const Logits policy(args, piece);
    const int hidden_places = policy.hidden_places();
    const int token_begin = piece.tile_begin * kTokenTile;
    const int token_end = min(piece.tile_end * kTokenTile, piece.kv_len);
    const int steps = (token_end - token_begin + kStep - 1) / kStep;
    const auto load_stage = [&](int step) {
      if (step < steps) {
        uint8_t* stage = stages + (step & 1) * Shape::kStageBytes;
        for (int i = thread; i < kStep * kCopies; i += kThreads) {
          const int token_in_step = i / kCopies, copy = i % kCopies;
          const int place = token_begin + step * kStep + token_in_step;
          const bool valid = place < piece.kv_len && (Logits::kPlain || place >= hidden_places);
          const uint8_t* source = static_cast<const uint8_t*>(args.kv);
          if (valid) {
            const int token = policy.position(place);
            const int page = args.block_table[static_cast<int64_t>(piece.sequence) * args.block_table_stride + token / args.page_size];
            source += page * args.page_stride + (token % args.page_size) * kTokenBytes + copy * kCopyBytes;
          }
          copy_async<kCopyBytes>(shared_address(stage + token_in_step * Shape::kRowBytes + copy * kCopyBytes), source, valid);
        }
      }
      asm volatile("cp.async.commit_group;" ::: "memory");
    };

    float out[Shape::kColumnBlocks][4];
#pragma unroll
    for (int n = 0; n < Shape::kColumnBlocks; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i) out[n][i] = 0.0f;
    // Softmax: 16 threads a row, each two tokens of a step.
    const int softmax_row = thread / 16, softmax_lane = thread % 16;
    const int limit = schedule.limit(piece, row0 + softmax_row);
    const float logit_scale = Logits::scale(args);
    float maximum = -INFINITY, sum = 0.0f;

    load_stage(0);
    for (int step = 0; step < steps; ++step) {
      load_stage(step + 1);
      asm volatile("cp.async.wait_group 1;" ::: "memory");
      __syncthreads();
      uint8_t* stage = stages + (step & 1) * Shape::kStageBytes;
      if constexpr (kFormat == KvFormat::fp8) {
        for (int token = warp; token < kStep; token += kThreads / 32) widen_token<kLatent>(stage + token * Shape::kRowBytes);
        __syncthreads();
      }

      {
        constexpr int kHalfSteps = Shape::kWidth / 32;  // k-steps of 16 in half the width
        const int token_block = warp % 4, half = warp / 4;
        float d[4] = {0.0f, 0.0f, 0.0f, 0.0f};
        const uint32_t a_address = shared_address(query + (lane % 16) * Shape::kRowBytes + half * kHalfSteps * 32 + (lane / 16) * 16);
        const uint32_t b_address = shared_address(stage + (token_block * 8 + lane % 8) * Shape::kRowBytes + half * kHalfSteps * 32 + (lane / 8 % 2) * 16);
#pragma unroll
        for (int k = 0; k < kHalfSteps; ++k) {
          uint32_t a[4], b[2];
          load_matrix_x4(a_address + k * 32, a);
          load_matrix_x2(b_address + k * 32, b);
          multiply_16x8x16(d, a, b[0], b[1]);
        }
        float* target = logits_shared + (half * kRows + lane / 4) * Shape::kLogitStride + token_block * 8 + (lane % 4) * 2;
        target[0] = d[0];
        target[1] = d[1];
        target[8 * Shape::kLogitStride] = d[2];
        target[8 * Shape::kLogitStride + 1] = d[3];
      }
      __syncthreads();

      {
        float value[2];
        float top = maximum;
#pragma unroll
        for (int j = 0; j < 2; ++j) {
          const int token = softmax_lane * 2 + j;
          const float* both = logits_shared + softmax_row * Shape::kLogitStride + token;
          value[j] = (both[0] + both[kRows * Shape::kLogitStride]) * logit_scale;
          if constexpr (Logits::kPlain) {
            if (token_begin + step * kStep + token >= min(limit, token_end)) value[j] = -INFINITY;
            top = fmaxf(top, value[j]);
          }
        }
        if constexpr (!Logits::kPlain) {
          const int position = policy.position(token_begin + step * kStep + softmax_lane * 2);
          const typename Logits::Row row = policy.row(row0 + softmax_row);
          policy.apply(
              value, [&](int j) { return position + j; }, [&](int) { return row; });
          top = fmaxf(top, fmaxf(value[0], value[1]));
        }
#pragma unroll
        for (int d = 8; d > 0; d /= 2) top = fmaxf(top, __shfl_xor_sync(~0u, top, d));
        const float reference = top == -INFINITY ? 0.0f : top;
        const float factor = exp2f(maximum - reference);
        maximum = top;
        const float p0 = exp2f(value[0] - reference), p1 = exp2f(value[1] - reference);
        sum = sum * factor + p0 + p1;
        *reinterpret_cast<__nv_bfloat162*>(probs_shared + softmax_row * Shape::kProbRowBytes + softmax_lane * 4) = __floats2bfloat162_rn(p0, p1);
        if (softmax_lane == 0) factors[softmax_row] = factor;
      }
      __syncthreads();

      const float factor_lo = factors[lane / 4], factor_hi = factors[lane / 4 + 8];
#pragma unroll
      for (int n = 0; n < Shape::kColumnBlocks; ++n) {
        out[n][0] *= factor_lo;
        out[n][1] *= factor_lo;
        out[n][2] *= factor_hi;
        out[n][3] *= factor_hi;
      }
#pragma unroll
      for (int k = 0; k < kStep / 16; ++k) {
        uint32_t a[4];
        load_matrix_x4(shared_address(probs_shared + (lane % 16) * Shape::kProbRowBytes + k * 32 + (lane / 16) * 16), a);
        const uint32_t b_address = shared_address(stage + (k * 16 + lane % 16) * Shape::kRowBytes + warp * Shape::kColumnBlocks * 16);
#pragma unroll
        for (int n = 0; n < Shape::kColumnBlocks; ++n) {
          uint32_t b[2];
          load_matrix_x2_trans(b_address + n * 16, b);
          multiply_16x8x16(out[n], a, b[0], b[1]);
        }
      }
      __syncthreads();
    }
    asm volatile("cp.async.wait_group 0;" ::: "memory");

#pragma unroll
    for (int d = 8; d > 0; d /= 2) sum += __shfl_xor_sync(~0u, sum, d);
    if (softmax_lane == 0) {
      row_sums[softmax_row] = sum;
      row_maxima[softmax_row] = maximum;
    }
    __syncthreads();

    const bool is_split = piece.participants > 1;
    const int part = schedule.partial_index(piece, piece.participant);
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int row = lane / 4 + h * 8;
      if (row >= rows) continue;
      const float total = row_sums[row];
      const float inverse = total > 0.0f ? 1.0f / total : 0.0f;
      const int64_t offset = warp * Shape::kColumnBlocks * 8 + (lane % 4) * 2;
#pragma unroll
      for (int n = 0; n < Shape::kColumnBlocks; ++n) {
        const float lo = out[n][h * 2], hi = out[n][h * 2 + 1];
        if (is_split) {
          *reinterpret_cast<float2*>(args.partial_out + (static_cast<int64_t>(part) * kRows + row) * kLatent + offset + n * 8) = make_float2(lo, hi);
        } else {
          *reinterpret_cast<__nv_bfloat162*>(static_cast<__nv_bfloat16*>(args.out) + (out_row0 + row) * kLatent + offset + n * 8) =
              __floats2bfloat162_rn(lo * inverse, hi * inverse);
        }
      }
    }
    if (thread < rows) {
      if (is_split) {
        args.partial_sum[part * kRows + thread] = make_float2(row_maxima[thread], row_sums[thread]);
      } else if (args.lse) {
        args.lse[out_row0 + thread] = row_sums[thread] > 0.0f ? (row_maxima[thread] + log2f(row_sums[thread])) * 0.6931471805599453f : -INFINITY;
      }
    }
    if (is_split) {
      if (thread == 0) split[splits] = piece;
      ++splits;
      __threadfence();
    }
    __syncthreads();
    if (is_split && thread == 0) publish_part(args.arrivals + schedule.arrival_index(piece));
  }

  const auto barrier = [] { __syncthreads(); };
  for (int i = 0; i < splits; ++i) {
    combine_parts<kLatent, kThreads>(args, schedule, split[i], shared, thread, barrier);
  }
}

template <int kLatent, KvFormat kFormat>
DecodeKernel describe(LogitKind logits) {
  const void* function = logits == LogitKind::plain ? reinterpret_cast<const void*>(&sm80_mla_decode<kLatent, kFormat, PlainLogits>)
                                                    : reinterpret_cast<const void*>(&sm80_mla_decode<kLatent, kFormat, VariantLogits>);
  return {function, kRows, Sm80Shape<kLatent>::kSharedBytes, kThreads, false};
}

template <KvFormat kFormat>
DecodeKernel choose_latent(int latent, LogitKind logits) {
  switch (latent) {
    case 128: return describe<128, kFormat>(logits);
    case 256: return describe<256, kFormat>(logits);
    case 320: return describe<320, kFormat>(logits);
    case 512: return describe<512, kFormat>(logits);
    default: return {};
  }
}

}  // namespace

DecodeKernel sm80_mla_decode_kernel(int latent, KvFormat format, LogitKind logits) {
  return format == KvFormat::fp8 ? choose_latent<KvFormat::fp8>(latent, logits) : choose_latent<KvFormat::bf16>(latent, logits);
}

}  // namespace tpla::cuda
