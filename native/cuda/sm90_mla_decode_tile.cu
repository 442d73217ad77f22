// MLA decode for 64 or 128 query rows per block and latents up to 320 wide, Hopper. Rows lie on the M side of wgmma; a warpgroup
// holds 64 rows × the whole latent of the output in registers.
//   128 rows (compute-bound): each warpgroup has its own 64 rows and reads every tile; the logits of the next tile are multiplied
//            while the softmax of this one runs, and the other warpgroup fills the tensor cores meanwhile. A latent of 320 leaves
//            shared memory for three tiles only, too few to hold two of them.
//   64 rows  (memory-bound): both warpgroups have the same rows and take alternate tiles; they are joined at the end of the piece.
#include <type_traits>

#include "mla_decode_combine.cuh"
#include "mla_decode_kernel.h"
#include "sm90_mla_decode.cuh"
#include "row_softmax.cuh"
#include "sm90_tile_result.cuh"

namespace tpla::cuda {

template <int kLatent, int kRows>
struct TileShape {
  static constexpr int kChunks = TokenChunks<kLatent>::kAll;
  static constexpr bool kSplitRows = kRows == 128;
  // Two tiles at a time for each warpgroup need registers for a second set of logits, and more than three stages.
  static constexpr bool kPipelined = kSplitRows && kLatent <= 256;
  static constexpr int kQueryColumns = TokenChunks<kLatent>::kValues * 64;  // the last chunk of the query lives in registers
  static constexpr int kQueryBytes = kQueryColumns / 64 * kRows * 128;
  static constexpr int kExchangeBytes = kSplitRows ? 0 : 128 * 32 * 4;
  static constexpr int kScratchBytes = 2048;
  static constexpr int kStages =
      (kSharedMemoryPerBlock - kSharedAlignment - kQueryBytes - kExchangeBytes - kScratchBytes) / (kChunks * kChunkBytes);
  static constexpr int kSlots = kStages * kChunks;
  static constexpr int kSharedBytes = kSharedAlignment + kQueryBytes + kExchangeBytes + kScratchBytes + kSlots * kChunkBytes;
  static constexpr int kOverhead = 2;
  static constexpr int kThreads = 384;
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
    sm90_mla_decode_tile(const __grid_constant__ CUtensorMap kv_map, const __grid_constant__ MlaDecodeArgs args) {
  using Shape = TileShape<kLatent, kRows>;
  constexpr int kChunks = Shape::kChunks;
  constexpr int kSlots = Shape::kSlots;
  constexpr bool kSplitRows = Shape::kSplitRows;
  static_assert(Shape::kStages >= 2);

  extern __shared__ uint8_t shared_raw[];
  uint8_t* shared = shared_raw + ((kSharedAlignment - (smem_address(shared_raw) & (kSharedAlignment - 1))) & (kSharedAlignment - 1));
  uint8_t* ring_data = shared;
  uint8_t* query = ring_data + kSlots * kChunkBytes;
  float* exchange = reinterpret_cast<float*>(query + Shape::kQueryBytes);
  uint8_t* scratch = query + Shape::kQueryBytes + Shape::kExchangeBytes;
  int* plan_scratch = reinterpret_cast<int*>(scratch);
  // Pieces that other blocks share: the first of this block's share and the last.
  DecodePiece* split = reinterpret_cast<DecodePiece*>(scratch + 144);
  uint64_t* barriers = reinterpret_cast<uint64_t*>(scratch + 256);
  float2* row_values = reinterpret_cast<float2*>(scratch + 1024);  // [2 warpgroups][64 rows]: reference, sum

  const ChunkRing<kChunks, kSlots, TokenChunks<kLatent>::kMissing> ring{smem_address(ring_data), smem_address(barriers)};
  const DecodeSchedule<kRows, Shape::kOverhead, Logits> schedule(args);

  if (threadIdx.x / 32 == 1) ring.init(kSplitRows ? 8 : 4);
  if (threadIdx.x / 32 == 2) prefetch_block_table(args);
  if (threadIdx.x == 96) tma_prefetch_map(kv_map);
  DecodeShare share = schedule.share(plan_scratch, reinterpret_cast<int*>(query));
  DecodePiece piece;

  if (threadIdx.x < 128) {
    registers_shrink<24>();
    if (threadIdx.x < 32) {
      int count = 0;
      while (schedule.next(share, piece)) {
        const auto begun = [&] { prefetch_next_query<kRows, kLatent>(args, schedule, share); };
        if constexpr (kSplitRows) ring.template feed<Logits>(kv_map, args, piece, count, begun);
        else ring.template feed_by_one<Logits>(kv_map, args, piece, count, begun);
      }
    }
  } else {
    registers_grow<240>();

    const int thread = threadIdx.x - 128;
    const int group = warp_uniform(thread / 128), in_group = thread % 128;
    const int warp = in_group / 32, lane = in_group % 32;
    const int group_barrier = 1 + group;
    constexpr int kConsumerBarrier = 3, kTurn = 4, kConsumers = 256;  // kTurn + warpgroup: its turn at the tensor cores
    const uint32_t query_address = smem_address(query) + (kSplitRows ? group * 64 * 128 : 0);
    const int thread_row = warp * 16 + lane / 4;  // and + 8; within the warpgroup's 64

    int splits = 0;
    int stage_count = 0;  // tiles of earlier pieces
    if (kSplitRows && group == 1) named_barrier_arrive(kTurn, kConsumers);

    while (schedule.next(share, piece)) {
      const int row0 = piece.row0, group_row0 = row0 + (kSplitRows ? group * 64 : 0);
      uint32_t rope_query[4][4];
      load_rope_query<kLatent>(args, piece, group_row0 + thread_row, rope_query);
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
        const int slot = stage_of(t) * kChunks, use = use_of(t);
        uint32_t query_low = descriptor_low(query_address);
        asm volatile("" : "+r"(query_low));  // else 4 · kChunks descriptors are kept in registers across the loop
        const uint32_t keys_low = descriptor_low(ring.chunk(slot));
#pragma unroll
        for (int i = 0; i < 32; ++i) logits[i] = 0.0f;
        wgmma_pin(logits);
#pragma unroll
        for (int position = 0; position < kChunks; ++position) {
          const int column = position == 0 ? kChunks - 1 : position - 1;
          ring.wait_full(slot + position, use);
          wgmma_fence();
#pragma unroll
          for (int k = position == 0 ? TokenChunks<kLatent>::kFirstStep : 0; k < 4; ++k) {
            const uint64_t keys = descriptor(keys_low + (position * kChunkBytes + k * 32) / 16);
            if (position == 0) {
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
        if (lane < kChunks) ring.release(stage * kChunks + lane);
      };

      // Tokens past the end of the sequence, in its last tile: 0 · garbage must not become NaN.
      const auto clear_tail = [&](int t) {
        const int valid = piece.kv_len - (piece.tile_begin + t) * kTokenTile;
        if (valid >= kTokenTile) return;
        // Split rows: both warpgroups read the tile, each clears a part of it.
        constexpr int kClearing = kSplitRows ? kConsumers : 128;
        const int stage = stage_of(t);
        for (int c = 0; c < kChunks - 1; ++c) zero_chunk_tail<kClearing>(ring.chunk(stage * kChunks + 1 + c), valid, kSplitRows ? thread : in_group);
        fence_async_proxy();
        named_barrier_sync(kSplitRows ? kConsumerBarrier : group_barrier, kClearing);
      };
      // The same for what a window hides of the first box.
      const auto clear_head = [&](int t) {
        if constexpr (!Logits::kPlain) {
          if (piece.tile_begin + t > 0) return;
          constexpr int kClearing = kSplitRows ? kConsumers : 128;
          const int stage = stage_of(t);
          for (int c = 0; c < kChunks - 1; ++c) zero_chunk<kClearing>(ring.chunk(stage * kChunks + 1 + c), 0, policy.hidden_places(), kSplitRows ? thread : in_group);
          fence_async_proxy();
          named_barrier_sync(kSplitRows ? kConsumerBarrier : group_barrier, kClearing);
        }
      };
      const auto multiply = [&](int t) {
        wgmma_pin(out);
        wgmma_fence();
        multiply_values<kLatent>(out, probs, ring.chunk(stage_of(t) * kChunks + 1));
        wgmma_commit();
      };

      if constexpr (Shape::kPipelined) {
        if (tiles > 0) {
          multiply_logits(0);
          wgmma_wait<0>();
          wgmma_pin(logits);
          mask(0);
          clear_head(0);
          softmax.update(logits, Logits::scale(args), factor);
          softmax.exponentiate(logits, Logits::scale(args));
          pack_fragment(logits, probs);
          for (int t = 0; t + 1 < tiles; ++t) {
            named_barrier_sync(kTurn + group, kConsumers);
            multiply_logits(t + 1);
            multiply(t);
            named_barrier_arrive(kTurn + (group ^ 1), kConsumers);
            wgmma_wait<1>();
            wgmma_pin(logits);
            mask(t + 1);
            const bool moved = softmax.update(logits, Logits::scale(args), factor);
            softmax.exponentiate(logits, Logits::scale(args));
            wgmma_wait<0>();
            wgmma_pin(out);
            release(t);
            if (moved) scale_rows(out, factor);
            pack_fragment(logits, probs);
          }
          clear_tail(tiles - 1);
          multiply(tiles - 1);
          wgmma_wait<0>();
          wgmma_pin(out);
          release(tiles - 1);
        }
      } else {
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
          clear_head(t);
          clear_tail(t);
          multiply(t);
          wgmma_wait<0>();
          wgmma_pin(out);
          release(t);
        }
      }
      if constexpr (!kSplitRows) {
        // As many barriers as the other warpgroup met that cleared the first tile or the last, see tops_ready in the narrow kernel.
        if (!Logits::kPlain && piece.tile_begin == 0 && tiles > 0 && group == 1) named_barrier_sync(group_barrier, 128);
        if (piece.kv_len < piece.tile_end * kTokenTile && tiles % 2 == group) named_barrier_sync(group_barrier, 128);
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
  using Variants = std::conditional_t<kRows == 64, Unstacked<VariantLogits>, VariantLogits>;
  const void* function = reinterpret_cast<const void*>(&sm90_mla_decode_tile<kLatent, kRows, Variants>);
  if (logits == LogitKind::plain) function = reinterpret_cast<const void*>(&sm90_mla_decode_tile<kLatent, kRows, PlainLogits>);
  if constexpr (kRows == 128) {
    if (logits == LogitKind::chunk) function = reinterpret_cast<const void*>(&sm90_mla_decode_tile<kLatent, kRows, ChunkLogits>);
  }
  return {function, kRows, TileShape<kLatent, kRows>::kSharedBytes, TileShape<kLatent, kRows>::kThreads, true};
}

template <int kLatent>
DecodeKernel choose_rows(int rows, LogitKind logits) {
  return rows <= 64 ? describe<kLatent, 64>(logits) : describe<kLatent, 128>(logits);
}

}  // namespace

DecodeKernel sm90_mla_decode_tile_kernel(int latent, int rows, LogitKind logits) {
  switch (latent) {
    case 128: return choose_rows<128>(rows, logits);
    case 256: return choose_rows<256>(rows, logits);
    case 288: return choose_rows<288>(rows, logits);
    case 320: return choose_rows<320>(rows, logits);
    default: return {};
  }
}

}  // namespace tpla::cuda
