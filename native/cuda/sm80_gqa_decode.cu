// Decode with ordinary keys and values (GQA, MQA, MHA), any GPU from sm_80 up: mma.sync and cp.async, within 99 KiB of shared memory.
// Memory-bound, so everything serves the loads:
//
//   - The query heads that share a KV head are the rows of one multiplication; keys and values are read once for up to 64 rows.
//   - The four warps of a block form teams that own the tokens in turn. A team has a ring of stages of its own and runs on its own: with up to
//     16 rows a team is one warp, and nothing in the loop waits for another warp. With 32 (64) rows it is two (four) warps with 16 rows each.
//   - Each team keeps an own online softmax and an own output in registers; teams are joined at the end of a piece, as parts are.
//   - Page numbers are fetched a window ahead, one run of 16 tokens a lane, so that no load waits for its address.
#include <cuda_bf16.h>

#include "gqa_decode_args.h"
#include "gqa_decode_kernel.h"
#include "mla_decode_combine.cuh"
#include "sm80_primitives.cuh"
#include "row_softmax.cuh"

namespace tpla::cuda {
namespace {

constexpr int kThreads = 128;
constexpr int kWarps = kThreads / 32;
constexpr int kRun = 16;  // tokens that are sure to lie in one page, one after another

template <int kDim, int kRowGroups>
struct GqaShape {
  static constexpr int kRows = 16 * kRowGroups;
  static constexpr int kTeams = kWarps / kRowGroups;
  static constexpr int kTeamThreads = 32 * kRowGroups;
  static constexpr int kStep = 2048 * kRowGroups / kDim < 64 ? 2048 * kRowGroups / kDim : 64;  // tokens a team takes at a time
  static constexpr int kRowBytes = kDim * 2;
  static constexpr int kHalfStage = kStep * kRowBytes;  // keys, then as many bytes of values
  static constexpr int kStages = 96 * 1024 / (kTeams * 2 * kHalfStage);
  static constexpr int kRingBytes = kStages * 2 * kHalfStage;  // of a team
  static constexpr int kOutStride = kDim + 8;                  // floats; conflict-free for fragments
  static constexpr int kScratchBytes = 1024;
  static constexpr int kSharedBytes = kTeams * kRingBytes + kScratchBytes;
  static constexpr int kOverhead = kDim == 128 ? 1 : 2;
  static_assert(kStages >= 3 && kRowGroups * 16 * kOutStride * 4 <= kRingBytes, "a team's output must fit into its ring");
  static_assert(kWarps * 16 * sizeof(float2) + 2 * sizeof(DecodePiece) + 34 * sizeof(int) <= kScratchBytes, "state of every row of every warp, split pieces, plan");
};

// Rows of kRowBytes with their 16-byte units permuted, so that eight rows of one column meet no bank twice.
template <int kRowBytes>
__device__ __forceinline__ uint32_t unit_offset(int row, int unit) {
  return row * kRowBytes + ((unit ^ (row & 7)) << 4);
}

template <int kDim, int kRowGroups, class Logits>
__global__ void __launch_bounds__(kThreads, 2) sm80_gqa_decode(const __grid_constant__ GqaDecodeArgs args) {
  using Shape = GqaShape<kDim, kRowGroups>;
  constexpr int kRows = Shape::kRows, kTeams = Shape::kTeams, kStep = Shape::kStep, kStages = Shape::kStages, kRowBytes = Shape::kRowBytes;
  constexpr int kUnits = kDim / 8;              // 16-byte units of a row
  constexpr int kRunsPerStep = kStep / kRun;
  constexpr int kWindow = 32 / kRunsPerStep;    // steps whose page numbers the lanes hold
  extern __shared__ __align__(128) uint8_t shared[];
  float2* row_state = reinterpret_cast<float2*>(shared + kTeams * Shape::kRingBytes);  // [team][row]: maximum, sum
  // Pieces that other blocks share: the first of this block's share and the last.
  DecodePiece* split = reinterpret_cast<DecodePiece*>(row_state + kWarps * 16);
  int* plan_scratch = reinterpret_cast<int*>(split + 2);

  const int thread = threadIdx.x, warp = thread / 32, lane = thread % 32;
  const int team = warp / kRowGroups, row_group = warp % kRowGroups, in_team = thread % Shape::kTeamThreads;
  uint8_t* ring = shared + team * Shape::kRingBytes;
  const uint32_t ring_address = shared_address(ring);
  const auto team_sync = [&] {
    static_assert(kTeams <= 2 || kRowGroups == 1);
    if constexpr (kRowGroups == 1) __syncwarp();
    else if constexpr (kTeams == 1) __syncthreads();
    else if (team == 0) asm volatile("bar.sync 1, %0;" ::"n"(Shape::kTeamThreads) : "memory");
    else asm volatile("bar.sync 2, %0;" ::"n"(Shape::kTeamThreads) : "memory");
  };

  const DecodeSchedule<kRows, Shape::kOverhead, Logits, GqaDecodeArgs> schedule(args);
  const int row0 = schedule.row_tile * kRows;
  const int thread_row = row_group * 16 + lane / 4;  // and + 8; within the row tile
  DecodeShare share = schedule.share(plan_scratch, reinterpret_cast<int*>(shared));
  DecodePiece piece;
  int splits = 0;

  while (schedule.next(share, piece)) {
    const Logits policy(args, piece);
    const int hidden_places = policy.hidden_places();
    const int64_t sequence = args.sequence_of(piece.sequence);
    const int32_t* pages = args.block_table + sequence * args.block_table_stride;
    const int64_t head_offset = piece.sequence % args.kv_heads * args.head_stride;
    const uint8_t* keys = static_cast<const uint8_t*>(args.k) + head_offset;
    const uint8_t* values = static_cast<const uint8_t*>(args.v) + head_offset;
    const int piece_begin = piece.tile_begin * kTokenTile;
    const int piece_steps = (min(piece.tile_end * kTokenTile, piece.kv_len) - piece_begin + kStep - 1) / kStep;
    const int steps = (piece_steps - team + kTeams - 1) / kTeams;  // of this team: team, team + kTeams, …
    const auto first_place = [&](int step) { return piece_begin + (step * kTeams + team) * kStep; };

    // Bytes from the base to this lane's run: run lane % kRunsPerStep of step begin + lane / kRunsPerStep.
    const auto locate = [&](int begin) -> int64_t {
      const int place = first_place(begin + lane / kRunsPerStep) + lane % kRunsPerStep * kRun;
      if (place >= piece.kv_len) return 0;
      const int token = policy.position(place);
      const int page = token / args.page_size;
      return pages[page] * args.page_stride + (token - page * args.page_size) * args.token_stride;
    };
    int64_t run = locate(0), later_run = locate(kWindow);

    const auto load = [&](int step, int slot) {
      if (step < steps) {
        if (step > 0 && step % kWindow == 0) {
          run = later_run;
          later_run = locate(step + kWindow);
        }
        constexpr int kRowsAtOnce = Shape::kTeamThreads / kUnits;
        const int unit = in_team % kUnits;
        const uint32_t stage = ring_address + slot * 2 * Shape::kHalfStage;
        const int place = first_place(step);
#pragma unroll
        for (int i = 0; i < kStep / kRowsAtOnce; ++i) {
          const int row = i * kRowsAtOnce + in_team / kUnits;
          // Rows of one instruction may belong to two runs.
          const int64_t begin = __shfl_sync(~0u, run, step % kWindow * kRunsPerStep + row / kRun);
          const int64_t offset = begin + (row % kRun) * args.token_stride + unit * 16;
          const bool valid = place + row < piece.kv_len && (Logits::kPlain || place + row >= hidden_places);
          const uint32_t target = stage + unit_offset<kRowBytes>(row, unit);
          copy_async_16(target, keys + (valid ? offset : 0), valid);
          copy_async_16(target + Shape::kHalfStage, values + (valid ? offset : 0), valid);
        }
      }
      copy_async_commit();
    };
#pragma unroll
    for (int s = 0; s < kStages - 1; ++s) load(s, s);

    // Query rows of this warp as A operands of all k-steps.
    uint32_t query[kDim / 16][4];
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int row = row0 + thread_row + h * 8;
      const uint32_t* source = reinterpret_cast<const uint32_t*>(args.q) + args.out_row(piece.sequence, piece.q_begin, min(row, piece.rows - 1)) * (kDim / 2) + lane % 4;
#pragma unroll
      for (int k = 0; k < kDim / 16; ++k) {
        query[k][h] = row < piece.rows ? __ldg(source + k * 8) : 0;
        query[k][h + 2] = row < piece.rows ? __ldg(source + k * 8 + 4) : 0;
      }
    }

    float out[kDim / 2];
#pragma unroll
    for (int i = 0; i < kDim / 2; ++i) out[i] = 0.0f;
    RowSoftmax softmax;
    const int unmasked = schedule.limit(piece, row0);  // row0 sees the fewest
    const int limits[2] = {schedule.limit(piece, row0 + thread_row), schedule.limit(piece, row0 + thread_row + 8)};

    int slot = 0, fill_slot = kStages - 1;
    for (int step = 0; step < steps; ++step) {
      copy_async_wait<kStages - 2>();
      team_sync();  // the stage has arrived for all, and all are through with the one before
      load(step + kStages - 1, fill_slot);
      const uint32_t stage = ring_address + slot * 2 * Shape::kHalfStage;
      const int place0 = first_place(step);

      float logits[kStep / 2];
#pragma unroll
      for (int i = 0; i < kStep / 2; ++i) logits[i] = 0.0f;
      {
        const int matrix = lane / 8, row = lane % 8;
#pragma unroll
        for (int k = 0; k < kDim / 16; ++k) {
#pragma unroll
          for (int n = 0; n < kStep / 8; n += 2) {
            uint32_t b[4];
            load_matrix_x4(stage + unit_offset<kRowBytes>((n + matrix / 2) * 8 + row, k * 2 + matrix % 2), b);
            multiply_16x8x16(logits + n * 4, query[k], b[0], b[1]);
            multiply_16x8x16(logits + n * 4 + 4, query[k], b[2], b[3]);
          }
        }
      }

      if constexpr (!Logits::kPlain) {
        const typename Logits::Row rows[2] = {policy.row(row0 + thread_row), policy.row(row0 + thread_row + 8)};
        int positions[kRunsPerStep];
#pragma unroll
        for (int r = 0; r < kRunsPerStep; ++r) positions[r] = policy.position(place0 + r * kRun + (lane % 4) * 2);
        policy.apply_to_rows(logits, rows, positions);
      } else if (place0 + kStep > unmasked) {
#pragma unroll
        for (int i = 0; i < kStep / 2; ++i) {
          const int place = place0 + (i / 4) * 8 + (lane % 4) * 2 + i % 2;
          if (place >= limits[i % 4 / 2]) logits[i] = -INFINITY;
        }
      }
      float factor[2];
      if (softmax.update(logits, Logits::scale(args), factor)) scale_rows(out, factor);
      softmax.exponentiate(logits, Logits::scale(args));
      uint32_t probs[kRunsPerStep][4];
      pack_fragment(logits, probs);

      {
        const int matrix = lane / 8, row = lane % 8;
#pragma unroll
        for (int k = 0; k < kRunsPerStep; ++k) {
#pragma unroll
          for (int n = 0; n < kDim / 8; n += 2) {
            uint32_t b[4];
            load_matrix_x4_trans(stage + Shape::kHalfStage + unit_offset<kRowBytes>(k * 16 + matrix % 2 * 8 + row, n + matrix / 2), b);
            multiply_16x8x16(out + n * 4, probs[k], b[0], b[1]);
            multiply_16x8x16(out + n * 4 + 4, probs[k], b[2], b[3]);
          }
        }
      }
      slot = slot + 1 == kStages ? 0 : slot + 1;
      fill_slot = fill_slot + 1 == kStages ? 0 : fill_slot + 1;
    }
    copy_async_wait<0>();
    // Teams meet equally many barriers even where the last steps are not theirs: compute-sanitizer's racecheck orders what two warps did by how
    // many each had met.
    if (kRowGroups > 1 && steps < (piece_steps + kTeams - 1) / kTeams) team_sync();

    // Join the teams: a common reference, then a sum over their outputs in shared memory.
    float sums[2] = {softmax.row_sum(0), softmax.row_sum(1)};
    if (lane % 4 == 0) {
#pragma unroll
      for (int h = 0; h < 2; ++h) row_state[team * kRows + thread_row + h * 8] = make_float2(softmax.maximum[h], sums[h]);
    }
    __syncthreads();  // also: all are through with their stages
    const auto reference_of = [&](int row) {
      float top = -INFINITY;
#pragma unroll
      for (int t = 0; t < kTeams; ++t) top = fmaxf(top, row_state[t * kRows + row].x);
      return top;
    };
    float* team_out = reinterpret_cast<float*>(ring);  // [row of the tile][kOutStride]
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const float top = reference_of(thread_row + h * 8);
      const float factor = top == -INFINITY ? 0.0f : exp2_approx(softmax.maximum[h] - top);
      float* target = team_out + (thread_row + h * 8) * Shape::kOutStride + (lane % 4) * 2;
#pragma unroll
      for (int n = 0; n < kDim / 8; ++n) *reinterpret_cast<float2*>(target + n * 8) = make_float2(out[n * 4 + h * 2] * factor, out[n * 4 + h * 2 + 1] * factor);
    }
    __syncthreads();

    const bool is_split = piece.participants > 1;
    const int part = schedule.partial_index(piece, piece.participant);
    const int rows = min(piece.rows - row0, kRows);
    constexpr int kVectors = kDim / 4;
    for (int i = thread; i < rows * kVectors; i += kThreads) {
      const int row = i / kVectors, vector = i % kVectors;
      const float top = reference_of(row);
      const float reference = top == -INFINITY ? 0.0f : top;
      float sum = 0.0f;
      float4 total = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
#pragma unroll
      for (int t = 0; t < kTeams; ++t) {
        const float2 state = row_state[t * kRows + row];
        sum += state.y * exp2_approx(state.x - reference);
        const float4 value = *reinterpret_cast<const float4*>(reinterpret_cast<const float*>(shared + t * Shape::kRingBytes) + row * Shape::kOutStride + vector * 4);
        total.x += value.x;
        total.y += value.y;
        total.z += value.z;
        total.w += value.w;
      }
      if (is_split) {
        reinterpret_cast<float4*>(args.partial_out)[(static_cast<int64_t>(part) * kRows + row) * kVectors + vector] = total;
        if (vector == 0) args.partial_sum[part * kRows + row] = make_float2(top, sum);
      } else {
        const float inverse = sum > 0.0f ? 1.0f / sum : 0.0f;
        const int64_t out_row = args.out_row(piece.sequence, piece.q_begin, row0, row);
        reinterpret_cast<uint2*>(args.out)[out_row * kVectors + vector] =
            make_uint2(pack_bf16(total.x * inverse, total.y * inverse), pack_bf16(total.z * inverse, total.w * inverse));
        if (vector == 0 && args.lse) args.lse[out_row] = sum > 0.0f ? (top + log2f(sum)) * 0.6931471805599453f : -INFINITY;
      }
    }
    if (is_split) {
      if (thread == 0) split[splits] = piece;
      ++splits;
      __threadfence();
    }
    __syncthreads();  // also: the stages may be filled again
    if (is_split && thread == 0) publish_part(args.arrivals + schedule.arrival_index(piece));
  }

  const auto barrier = [] { __syncthreads(); };
  for (int i = 0; i < splits; ++i) {
    combine_parts<kDim, kThreads>(args, schedule, split[i], shared, thread, barrier);
  }
}

template <int kDim, int kRowGroups>
DecodeKernel describe(LogitKind logits) {
  const void* function = logits == LogitKind::plain ? reinterpret_cast<const void*>(&sm80_gqa_decode<kDim, kRowGroups, PlainLogits>)
                                                    : reinterpret_cast<const void*>(&sm80_gqa_decode<kDim, kRowGroups, VariantLogits>);
  return {function, 16 * kRowGroups, GqaShape<kDim, kRowGroups>::kSharedBytes, kThreads, false};
}

template <int kDim>
DecodeKernel choose_rows(int rows, LogitKind logits) {
  if (rows <= 16) return describe<kDim, 1>(logits);
  if (rows <= 32) return describe<kDim, 2>(logits);
  return describe<kDim, 4>(logits);
}

}  // namespace

DecodeKernel sm80_gqa_decode_kernel(int head_dim, int rows, LogitKind logits) {
  switch (head_dim) {
    case 64: return choose_rows<64>(rows, logits);
    case 128: return choose_rows<128>(rows, logits);
    default: return {};
  }
}

}  // namespace tpla::cuda
