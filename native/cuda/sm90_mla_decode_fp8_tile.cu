// MLA decode over fp8 KV for 64 or 128 query rows per block and latents up to 320 wide, Hopper. What multiplies is the tile kernel of bf16 KV:
// rows on the M side of wgmma, a warpgroup holds 64 rows × the whole latent of the output; with 64 rows the two take alternate tiles, with 128
// each has rows of its own. What brings the tiles is a warpgroup instead of TMA: it widens every token to bf16 once, into the same chunks.
//
// Each of its four warps has 16 tokens of every tile, a run, which it fetches ahead by bulk copies into shared memory.
#include "mla_decode_combine.cuh"
#include "mla_decode_kernel.h"
#include "sm90_mla_decode.cuh"
#include "row_softmax.cuh"
#include "sm90_tile_result.cuh"
#include "sm90_fp8_feed.cuh"

namespace tpla::cuda {

template <int kLatentColumns, int kBlockRows>
struct Fp8TileShape {
  static constexpr int kLatent = kLatentColumns, kRows = kBlockRows;
  using Token = Fp8Token<kLatent>;
  static constexpr int kChunks = TokenChunks<kLatent>::kAll;
  static constexpr bool kSplitRows = kRows == 128;
  static constexpr bool kRopeInRegisters = kLatent < 320;  // the last chunk of the query
  static constexpr int kQueryColumns = (kRopeInRegisters ? TokenChunks<kLatent>::kValues : kChunks) * 64;
  static constexpr int kQueryBytes = kQueryColumns / 64 * kRows * 128;
  static constexpr int kExchangeBytes = kSplitRows ? 0 : 128 * 32 * 4;
  static constexpr int kScratchBytes = 2048;
  static constexpr int kAvailable = kSharedMemoryPerBlock - kSharedAlignment - kQueryBytes - kExchangeBytes - kScratchBytes;
  // Of e4m3 tokens, each widening warp has a ring of its own, of runs.
  static constexpr int kRunBytes = kRunTokens * Token::kBytes;
  static constexpr int kTileBytes = kWideningWarps * kRunBytes;
  static constexpr int kStages = kAvailable - 3 * kChunks * kChunkBytes >= 2 * kTileBytes ? 3 : 2;
  static constexpr int kRingBytes = kStages * kChunks * kChunkBytes;
  static constexpr int kFitting = (kAvailable - kRingBytes) / kTileBytes;
  static constexpr int kRuns = kFitting < 6 ? kFitting : 6;
  static_assert(kRuns >= 1);
  static constexpr int kSharedBytes = kSharedAlignment + kQueryBytes + kExchangeBytes + kScratchBytes + kRingBytes + kRuns * kTileBytes;
  static constexpr int kOverhead = 2;
  static constexpr int kThreads = 384;
  static constexpr int kWideningRegisters = 56, kComputeRegisters = 224;
};

// out[64 × latent] += P[64 × 64] · V[64 × latent]
template <int kLatent>
__device__ __forceinline__ void multiply_values(float (&out)[kLatent / 2], const uint32_t (&probs)[4][4], uint32_t values) {
  constexpr int kMain = kLatent < 256 ? kLatent : 256;
  const uint32_t low = descriptor_low(values, kChunkBytes);
  float(&main)[kMain / 2] = reinterpret_cast<float(&)[kMain / 2]>(out);
#pragma unroll
  for (int k = 0; k < 4; ++k) Wgmma<kMain>::template rs<1>(main, probs[k], descriptor(low + k * (2048 / 16)));
  if constexpr (kLatent > kMain) {
    float(&rest)[(kLatent - kMain) / 2] = reinterpret_cast<float(&)[(kLatent - kMain) / 2]>(out[kMain / 2]);
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      Wgmma<kLatent - kMain>::template rs<1>(rest, probs[k], descriptor(low + ((kMain / 64) * kChunkBytes + k * 2048) / 16));
    }
  }
}

template <int kLatent, int kRows, class Logits>
__global__ void __launch_bounds__(384, 1)
    sm90_mla_decode_fp8_tile(const __grid_constant__ MlaDecodeArgs args) {
  using Shape = Fp8TileShape<kLatent, kRows>;
  constexpr int kChunks = Shape::kChunks;
  constexpr bool kSplitRows = Shape::kSplitRows;
  static_assert(Shape::kStages >= 2);

  extern __shared__ uint8_t shared_raw[];
  uint8_t* shared = shared_raw + ((kSharedAlignment - (smem_address(shared_raw) & (kSharedAlignment - 1))) & (kSharedAlignment - 1));
  uint8_t* ring_data = shared;
  uint8_t* query = ring_data + Shape::kRingBytes;
  float* exchange = reinterpret_cast<float*>(query + Shape::kQueryBytes);
  uint8_t* scratch = query + Shape::kQueryBytes + Shape::kExchangeBytes;
  uint8_t* runs = scratch + Shape::kScratchBytes;
  int* plan_scratch = reinterpret_cast<int*>(scratch);
  // Pieces that other blocks share: the first of this block's share and the last.
  DecodePiece* split = reinterpret_cast<DecodePiece*>(scratch + 144);
  uint64_t* barriers = reinterpret_cast<uint64_t*>(scratch + 256);
  static_assert((WidenedRing<Shape>::kBarriers + Shape::kRuns * kWideningWarps) * 8 <= 768);
  float2* row_values = reinterpret_cast<float2*>(scratch + 1024);  // [2 warpgroups][64 rows]: reference, sum

  const WidenedRing<Shape> ring{smem_address(ring_data), smem_address(barriers)};
  const DecodeSchedule<kRows, Shape::kOverhead, Logits> schedule(args);

  if (threadIdx.x / 32 == 1) init_barriers<Shape>(smem_address(barriers), kSplitRows ? 8 : 4);
  if (threadIdx.x / 32 == 2) prefetch_block_table(args);
  DecodeShare share = schedule.share(plan_scratch, reinterpret_cast<int*>(query));
  DecodePiece piece;

  if (threadIdx.x < 128) {
    registers_shrink<Shape::kWideningRegisters>();
    feed_widened<Shape, Logits>(args, schedule, share, ring, runs, barriers + WidenedRing<Shape>::kBarriers, threadIdx.x / 32);
  } else {
    registers_grow<Shape::kComputeRegisters>();

    const int thread = threadIdx.x - 128;
    const int group = warp_uniform(thread / 128), in_group = thread % 128;
    const int warp = in_group / 32, lane = in_group % 32;
    constexpr int kConsumerBarrier = 3, kTurn = 4, kConsumers = 256;  // kTurn + warpgroup: its turn at the tensor cores
    const uint32_t query_address = smem_address(query) + (kSplitRows ? group * 64 * 128 : 0);
    const int thread_row = warp * 16 + lane / 4;  // and + 8; within the warpgroup's 64

    int splits = 0;
    int stage_count = 0;  // tiles of earlier pieces
    if (kSplitRows && group == 1) named_barrier_arrive(kTurn, kConsumers);

    while (schedule.next(share, piece)) {
      const int row0 = piece.row0, group_row0 = row0 + (kSplitRows ? group * 64 : 0);
      uint32_t rope_query[4][4];
      if constexpr (Shape::kRopeInRegisters) load_rope_query<kLatent>(args, piece, group_row0 + thread_row, rope_query);
      load_query<kRows, kLatent, Shape::kQueryColumns, kConsumers>(args, row0, piece, query, thread);
      fence_async_proxy();
      named_barrier_sync(kConsumerBarrier, kConsumers);

      float out[kLatent / 2];
#pragma unroll
      for (int i = 0; i < kLatent / 2; ++i) out[i] = 0.0f;
      RowSoftmax softmax;
      float logits[32];
      uint32_t probs[4][4];
      float factor[2];

      const int tiles = piece.tile_end - piece.tile_begin;
      const Logits policy(args, piece);
      const int unmasked_tokens = schedule.limit(piece, group_row0);
      const int limits[2] = {schedule.limit(piece, group_row0 + thread_row), schedule.limit(piece, group_row0 + thread_row + 8)};

      const auto stage_of = [&](int t) { return warp_uniform((stage_count + t) % Shape::kStages); };
      const auto use_of = [&](int t) { return (stage_count + t) / Shape::kStages; };
      const auto multiply_logits = [&](int t) {
        const int stage = stage_of(t), use = use_of(t);
        uint32_t query_low = descriptor_low(query_address);
        asm volatile("" : "+r"(query_low));  // else 4 · kChunks descriptors are kept in registers across the loop
        const uint32_t keys_low = descriptor_low(ring.chunk(stage, 0));
#pragma unroll
        for (int i = 0; i < 32; ++i) logits[i] = 0.0f;
        wgmma_pin(logits);
#pragma unroll
        for (int position = 0; position < kChunks; ++position) {
          const int column = position == 0 ? kChunks - 1 : position - 1;
          if (position == 0) ring.wait_full(stage, 0, use);
          else if (position > 2 && position % 2 == 1) ring.wait_full(stage, position / 2, use);
          wgmma_fence();
#pragma unroll
          for (int k = position == 0 ? TokenChunks<kLatent>::kFirstStep : 0; k < 4; ++k) {
            const uint64_t keys = descriptor(keys_low + (position * kChunkBytes + k * 32) / 16);
            if (Shape::kRopeInRegisters && position == 0) {
              Wgmma<64>::template rs<0>(logits, rope_query[k], keys);
            } else {
              Wgmma<64>::template ss<0, 0>(logits, descriptor(query_low + (column * (kRows * 128) + k * 32) / 16), keys);
            }
          }
        }
        wgmma_commit();
      };
      const auto mask = [&](int t) {
        const int token0 = (piece.tile_begin + t) * kTokenTile;
        if constexpr (!Logits::kPlain) {
          const typename Logits::Row rows[2] = {policy.row(group_row0 + thread_row), policy.row(group_row0 + thread_row + 8)};
          int positions[kTokenTile / 16];  // a box is 16 tokens or more
#pragma unroll
          for (int box = 0; box < kTokenTile / 16; ++box) positions[box] = policy.position(token0 + box * 16 + (lane % 4) * 2);
          policy.apply_to_rows(logits, rows, positions);
          return;
        }
        if (token0 + kTokenTile <= unmasked_tokens) return;
#pragma unroll
        for (int i = 0; i < 32; ++i) {
          const int token = token0 + (i / 4) * 8 + (lane % 4) * 2 + i % 2;
          if (token >= limits[i % 4 / 2]) logits[i] = -INFINITY;
        }
      };
      const auto release = [&](int t) {
        const int stage = stage_of(t);  // by the whole warp
        if (lane == 0) ring.release(stage);
      };

      const auto multiply = [&](int t) {
        wgmma_pin(out);
        wgmma_fence();
        multiply_values<kLatent>(out, probs, ring.chunk(stage_of(t), 1));
        wgmma_commit();
      };

      // A warpgroup holds one tile at a time and leaves the rest of the ring to loads in flight. Those with rows of their own take turns
      // at the logits, so that one has its softmax while the other multiplies.
      for (int t = kSplitRows ? 0 : group; t < tiles; t += kSplitRows ? 1 : 2) {
        if (kSplitRows) named_barrier_sync(kTurn + group, kConsumers);
        multiply_logits(t);
        wgmma_wait<0>();
        wgmma_pin(logits);
        if (kSplitRows) named_barrier_arrive(kTurn + (group ^ 1), kConsumers);
        mask(t);
        if (softmax.update(logits, Logits::scale(args), factor)) scale_rows(out, factor);
        softmax.exponentiate(logits, Logits::scale(args));
        pack_fragment(logits, probs);
        multiply(t);
        wgmma_wait<0>();
        wgmma_pin(out);
        release(t);
      }
      stage_count += tiles;

      const bool is_split = piece.participants > 1;
      write_tile_result<kLatent, kRows, kConsumerBarrier, kConsumers>(args, schedule, piece, group_row0, softmax, out, exchange, row_values, group, in_group);
      if (is_split) {
        if (thread == 0) split[splits] = piece;
        ++splits;
        __threadfence();
      }
      named_barrier_sync(kConsumerBarrier, kConsumers);  // also: nobody reads this query any more
      if (is_split && thread == 0) publish_part(args.arrivals + schedule.arrival_index(piece));
    }

    const auto barrier = [] { named_barrier_sync(kConsumerBarrier, kConsumers); };
    for (int i = 0; i < splits; ++i) {
      combine_parts<kLatent, kConsumers>(args, schedule, split[i], ring_data, thread, barrier);
    }
  }
}

namespace {

template <int kLatent, int kRows>
DecodeKernel describe(LogitKind logits) {
  const void* function = logits == LogitKind::plain ? reinterpret_cast<const void*>(&sm90_mla_decode_fp8_tile<kLatent, kRows, PlainLogits>)
                                                    : reinterpret_cast<const void*>(&sm90_mla_decode_fp8_tile<kLatent, kRows, VariantLogits>);
  return {function, kRows, Fp8TileShape<kLatent, kRows>::kSharedBytes, Fp8TileShape<kLatent, kRows>::kThreads, false};
}

template <int kLatent>
DecodeKernel choose_rows(int rows, LogitKind logits) {
  return rows <= 64 ? describe<kLatent, 64>(logits) : describe<kLatent, 128>(logits);
}

}  // namespace

DecodeKernel sm90_mla_decode_fp8_tile_kernel(int latent, int rows, LogitKind logits) {
  switch (latent) {
    case 128: return choose_rows<128>(rows, logits);
    case 256: return choose_rows<256>(rows, logits);
    case 288: return choose_rows<288>(rows, logits);
    case 320: return choose_rows<320>(rows, logits);
    default: return {};
  }
}

}  // namespace tpla::cuda
