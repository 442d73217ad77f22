// MLA decode for few query rows (up to 32 per block), Hopper. Memory-bound: rows lie on the N side of wgmma, tokens and latent
// columns on the M side, so that 8 rows cost 8 columns of tensor work and not 64 padded rows.
//
//   logits^T [64 tokens × rows] = K [64 × width] · Q^T,      out^T [latent × rows] += V^T [latent × 64 tokens] · P^T
//
// One TMA warp fills the ring; two warpgroups take alternate tiles, each with an own online softmax and an own out^T in
// registers, joined at the end of the piece.
#include "mla_decode_combine.cuh"
#include "mla_decode_kernel.h"
#include "sm90_column_softmax.cuh"
#include "sm90_mla_decode.cuh"

namespace tpla::cuda {

template <int kLatent, int kRows>
struct NarrowShape {
  static constexpr int kLatentChunks = TokenChunks<kLatent>::kValues;
  static constexpr int kChunks = TokenChunks<kLatent>::kAll;
  static constexpr int kQueryBytes = kChunks * kRows * 128;
  static constexpr int kProbBytes = 2 * kRows * 128;  // one [rows][64 tokens] for each warpgroup
  static constexpr int kScratchBytes = 2048 + 2 * 4 * kRows * 4 + 4 * kRows * 4;
  static constexpr int kSlots = (kSharedMemoryPerBlock - kSharedAlignment - kQueryBytes - kProbBytes - kScratchBytes) / kChunkBytes;
  static constexpr int kSharedBytes = kSharedAlignment + kQueryBytes + kProbBytes + kScratchBytes + kSlots * kChunkBytes;
  static constexpr int kExchanged = kQueryBytes + kProbBytes >= 4 * kRows * 256 ? 4 : 2;  // chunks the warpgroups exchange at a time, of kRows · 256 bytes
  static constexpr int kStagedRowBytes = kLatent * 2 + 16;                                // rows lie in different banks
  static_assert(kQueryBytes + kProbBytes >= kExchanged * kRows * 256 && kQueryBytes >= kRows * kStagedRowBytes);
  static constexpr int kOverhead = kLatent >= 512 ? 1 : 2;
  static constexpr int kThreads = 384;
};

template <int kLatent, int kRows, class Logits>
__global__ void __launch_bounds__(384, 1)
    sm90_mla_decode_narrow(const __grid_constant__ CUtensorMap kv_map, const __grid_constant__ MlaDecodeArgs args) {
  using Shape = NarrowShape<kLatent, kRows>;
  constexpr int kLatentChunks = Shape::kLatentChunks;
  constexpr int kChunks = Shape::kChunks;
  constexpr int kSlots = Shape::kSlots;
  constexpr int kColumnBlocks = kRows / 8;
  using Mma = Wgmma<kRows>;
  static_assert(kSlots >= kChunks + 1, "the ring must hold more than one tile");

  extern __shared__ uint8_t shared_raw[];
  uint8_t* shared = shared_raw + ((kSharedAlignment - (smem_address(shared_raw) & (kSharedAlignment - 1))) & (kSharedAlignment - 1));
  uint8_t* ring_data = shared;
  uint8_t* query = ring_data + kSlots * kChunkBytes;
  uint8_t* probs = query + Shape::kQueryBytes;
  uint8_t* scratch = probs + Shape::kProbBytes;
  int* plan_scratch = reinterpret_cast<int*>(scratch);              // 34 ints
  // Pieces that other blocks share: the first of this block's share and the last.
  DecodePiece* split = reinterpret_cast<DecodePiece*>(scratch + 144);
  uint64_t* barriers = reinterpret_cast<uint64_t*>(scratch + 256);
  float* warp_values = reinterpret_cast<float*>(scratch + 2048);    // [2 warpgroups][4 warps][rows]
  float* row_values = warp_values + 2 * 4 * kRows;                  // [2 warpgroups][{maximum, sum}][rows]

  const ChunkRing<kChunks, kSlots, TokenChunks<kLatent>::kMissing> ring{smem_address(ring_data), smem_address(barriers)};
  const DecodeSchedule<kRows, Shape::kOverhead, Logits> schedule(args);

  if (threadIdx.x / 32 == 1) ring.init(4);  // the four warps of the warpgroup that owns the tile
  if (threadIdx.x / 32 == 2) prefetch_block_table(args);
  if (threadIdx.x == 96) tma_prefetch_map(kv_map);
  if (threadIdx.x >= 128 && threadIdx.x < 130) mbarrier_init(smem_address(barriers) + (ring.kBarriers + threadIdx.x - 128) * 8, 128);
  DecodeShare share = schedule.share(plan_scratch, reinterpret_cast<int*>(query));  // its barriers also publish the mbarriers
  DecodePiece piece;

  if (threadIdx.x < 128) {
    registers_shrink<40>();
    if (threadIdx.x < 32) {
      int count = 0;
      while (schedule.next(share, piece)) {
        ring.template feed<Logits>(kv_map, args, piece, count, [&] { prefetch_next_query<kRows, kLatent>(args, schedule, share); });
      }
    }
  } else {
    registers_grow<232>();

    const int thread = threadIdx.x - 128;
    const int group = warp_uniform(thread / 128), in_group = thread % 128;
    const int warp = in_group / 32, lane = in_group % 32;
    const int group_barrier = 1 + group;
    constexpr int kConsumerBarrier = 3, kConsumers = 256;
    const uint32_t query_address = smem_address(query);
    const uint32_t probs_address = smem_address(probs) + group * kRows * 128;
    float* group_warp_values = warp_values + group * 4 * kRows;

    int splits = 0;
    int count = 0;
    // Taken where references move, in which the warpgroups differ: all other barriers both meet equally often, and compute-sanitizer's racecheck
    // orders what two warps did by how many barriers each had met.
    PhasedBarrier tops_ready{smem_address(barriers) + ring.kBarriers * 8 + group * 8};

    while (schedule.next(share, piece)) {
      const int row0 = piece.row0;
      load_query<kRows, kLatent, kLatent + 64, kConsumers>(args, row0, piece, query, thread);
      fence_async_proxy();
      named_barrier_sync(kConsumerBarrier, kConsumers);

      float out[kLatentChunks][kRows / 2];
#pragma unroll
      for (int c = 0; c < kLatentChunks; ++c)
#pragma unroll
        for (int i = 0; i < kRows / 2; ++i) out[c][i] = 0.0f;
      ColumnSoftmax<kRows> softmax;
      const int tiles = piece.tile_end - piece.tile_begin;
      const int unmasked_tokens = schedule.limit(piece, row0);  // row0 sees the fewest
      const Logits policy(args, piece);

      for (int t = group; t < tiles; t += 2) {
        const int number = count + t * kChunks;
        const int first_slot = warp_uniform(number % kSlots);
        const int first_use = number / kSlots;
        const auto slot_of = [&](int position) { return first_slot + position >= kSlots ? first_slot + position - kSlots : first_slot + position; };
        const auto use_of = [&](int position) { return first_slot + position >= kSlots ? first_use + 1 : first_use; };

        float logits[kRows / 2];
#pragma unroll
        for (int i = 0; i < kRows / 2; ++i) logits[i] = 0.0f;
        wgmma_pin(logits);
#pragma unroll
        for (int position = 0; position < kChunks; ++position) {
          const int slot = slot_of(position);
          const int column = position == 0 ? kLatentChunks : position - 1;
          const uint32_t keys_low = descriptor_low(ring.chunk(slot)), query_low = descriptor_low(query_address + column * (kRows * 128));
          ring.wait_full(slot, use_of(position));
          wgmma_fence();
#pragma unroll
          for (int k = position == 0 ? TokenChunks<kLatent>::kFirstStep : 0; k < 4; ++k) {
            Mma::template ss<0, 0>(logits, descriptor(keys_low + k * 2), descriptor(query_low + k * 2));
          }
        }
        wgmma_commit();
        wgmma_wait<0>();
        wgmma_pin(logits);
        if (lane == 0) ring.release(first_slot);  // rope

        // Mask.
        const int token0 = (piece.tile_begin + t) * kTokenTile;
        const int token = token0 + warp * 16 + lane / 4;
        if constexpr (!Logits::kPlain) {
          typename Logits::Row rows[kColumnBlocks * 2];
#pragma unroll
          for (int i = 0; i < kColumnBlocks * 2; ++i) rows[i] = policy.row(row0 + (i / 2) * 8 + (lane % 4) * 2 + i % 2);
          const int position = policy.position(token), low = policy.position(token + 8);
          policy.apply(
              logits, [&](int i) { return i % 4 < 2 ? position : low; }, [&](int i) { return rows[i / 4 * 2 + i % 2]; });
        } else if (token0 + kTokenTile > unmasked_tokens) {
          mask_columns<kRows>(logits, token, lane, [&](int row) { return schedule.limit(piece, row0 + row); });
        }

        if (named_barrier_any(group_barrier, 128, softmax.exceeded(logits, Logits::scale(args)))) {
          softmax.publish_tops(logits, Logits::scale(args), group_warp_values + warp * kRows, lane);
          tops_ready.arrive_and_wait();
          float factor[kColumnBlocks * 2];
          softmax.move(group_warp_values, lane, factor);
#pragma unroll
          for (int c = 0; c < kLatentChunks; ++c) scale_columns<kRows>(out[c], factor);
        }
        softmax.exponentiate(logits, Logits::scale(args));
        store_probabilities<kRows>(logits, probs_address, warp, lane);
        if (token0 + kTokenTile > piece.kv_len) {
          for (int c = 0; c < kLatentChunks; ++c) zero_chunk_tail<128>(ring.chunk(slot_of(1 + c)), piece.kv_len - token0, in_group);
        }
        if constexpr (!Logits::kPlain) {
          if (token0 == 0) {
            for (int c = 0; c < kLatentChunks; ++c) zero_chunk<128>(ring.chunk(slot_of(1 + c)), 0, policy.hidden_places(), in_group);
          }
        }
        fence_async_proxy();
        named_barrier_sync(group_barrier, 128);

#pragma unroll
        for (int c = 0; c < kLatentChunks; ++c) wgmma_pin(out[c]);
        wgmma_fence();
#pragma unroll
        for (int c = 0; c < kLatentChunks; ++c) {
          const uint32_t values_low = descriptor_low(ring.chunk(slot_of(1 + c)), kChunkBytes), probs_low = descriptor_low(probs_address);
#pragma unroll
          for (int k = 0; k < 4; ++k) {
            Mma::template ss<1, 0>(out[c], descriptor(values_low + k * (2048 / 16)), descriptor(probs_low + k * 2));
          }
          wgmma_commit();
        }
        constexpr int kHalf = kLatentChunks / 2;
        wgmma_wait<kLatentChunks - kHalf>();
        if (lane < kHalf) ring.release(slot_of(1 + lane));
        wgmma_wait<0>();
        if (lane >= kHalf && lane < kLatentChunks) ring.release(slot_of(1 + lane));
#pragma unroll
        for (int c = 0; c < kLatentChunks; ++c) wgmma_pin(out[c]);
      }
      if (group == 1 && tiles % 2 == 1) {  // as many as the other warpgroup met in its last tile
        named_barrier_sync(group_barrier, 128);
        named_barrier_sync(group_barrier, 128);
      }
      count += tiles * kChunks;

      // Join the two warpgroups: sums over lanes and warps, then one common reference.
      softmax.publish_sums(group_warp_values + warp * kRows, lane);
      if (warp == 0 && lane < 4) {
#pragma unroll
        for (int i = 0; i < kColumnBlocks * 2; ++i) row_values[group * kRows + softmax.row_of(i, lane)] = softmax.maximum[i];
      }
      named_barrier_sync(kConsumerBarrier, kConsumers);
      float factor[kColumnBlocks * 2];
#pragma unroll
      for (int i = 0; i < kColumnBlocks * 2; ++i) {
        const int row = (i / 2) * 8 + (lane % 4) * 2 + i % 2;
        const float top = fmaxf(row_values[row], row_values[kRows + row]);
        const float reference = top == -INFINITY ? 0.0f : top;
        factor[i] = exp2_approx(softmax.maximum[i] - reference);
        float total[2] = {0.0f, 0.0f};
#pragma unroll
        for (int g = 0; g < 2; ++g)
#pragma unroll
          for (int w = 0; w < 4; ++w) total[g] += warp_values[(g * 4 + w) * kRows + row];
        softmax.maximum[i] = top;
        softmax.sum[i] = total[0] * exp2_approx(row_values[row] - reference) + total[1] * exp2_approx(row_values[kRows + row] - reference);
      }

      const bool is_split = piece.participants > 1;
      if (!is_split) {
#pragma unroll
        for (int i = 0; i < kColumnBlocks * 2; ++i) factor[i] *= softmax.sum[i] > 0.0f ? __fdividef(1.0f, softmax.sum[i]) : 0.0f;
      }

      // Each warpgroup hands the other every second chunk, through shared memory where nobody reads this query any more.
      const auto keeps = [&](int chunk) { return group != (chunk & 1); };
      float* exchange = reinterpret_cast<float*>(query) + in_group;
#pragma unroll
      for (int first = 0; first < kLatentChunks; first += Shape::kExchanged) {
#pragma unroll
        for (int c = first; c < first + Shape::kExchanged && c < kLatentChunks; ++c) {
          if (keeps(c)) continue;
#pragma unroll
          for (int i = 0; i < kRows / 2; ++i) exchange[((c - first) * (kRows / 2) + i) * 128] = out[c][i] * factor[(i / 4) * 2 + i % 2];
        }
        named_barrier_sync(kConsumerBarrier, kConsumers);
#pragma unroll
        for (int c = first; c < first + Shape::kExchanged && c < kLatentChunks; ++c) {
          if (!keeps(c)) continue;
#pragma unroll
          for (int i = 0; i < kRows / 2; ++i) out[c][i] = fmaf(out[c][i], factor[(i / 4) * 2 + i % 2], exchange[((c - first) * (kRows / 2) + i) * 128]);
        }
        named_barrier_sync(kConsumerBarrier, kConsumers);
      }

      const auto is_latent = [&](int chunk) { return kLatent % 64 == 0 || chunk * 64 + warp * 16 < kLatent; };
      if (is_split) {
        float scale[kColumnBlocks * 2];
#pragma unroll
        for (int i = 0; i < kColumnBlocks * 2; ++i) {
          float top = 0.0f;
#pragma unroll
          for (int c = 0; c < kLatentChunks; ++c) {
            const int value = i / 2 * 4 + i % 2;
            if (keeps(c) && is_latent(c)) top = fmaxf(top, fmaxf(fabsf(out[c][value]), fabsf(out[c][value + 2])));
          }
#pragma unroll
          for (int d = 4; d < 32; d *= 2) top = fmaxf(top, __shfl_xor_sync(~0u, top, d));
          if (lane < 4) group_warp_values[warp * kRows + softmax.row_of(i, lane)] = top;
        }
        named_barrier_sync(kConsumerBarrier, kConsumers);
#pragma unroll
        for (int i = 0; i < kColumnBlocks * 2; ++i) {
          float top = 0.0f;
#pragma unroll
          for (int w = 0; w < 8; ++w) top = fmaxf(top, warp_values[w * kRows + softmax.row_of(i, lane)]);
          const int exponent = part_exponent(top);
          scale[i] = power_of_two(-exponent);
          softmax.maximum[i] += exponent;
          softmax.sum[i] *= scale[i];
        }
#pragma unroll
        for (int c = 0; c < kLatentChunks; ++c) {
          if (keeps(c)) scale_columns<kRows>(out[c], scale);
        }
      }

      // Rows of the result, from there in whole lines.
      const int matrix = lane / 8;  // of an stmatrix: half of the 16 columns, then 8 rows
      const uint32_t staged = smem_address(query);
      const uint32_t lane_address = staged + (matrix / 2 * 8 + lane % 8) * Shape::kStagedRowBytes + warp * 32 + matrix % 2 * 16;
      const auto stage = [&](auto pack) {
#pragma unroll
        for (int c = 0; c < kLatentChunks; ++c) {
          if (!keeps(c) || !is_latent(c)) continue;
          const float(&v)[kRows / 2] = out[c];
          if constexpr (kRows == 8) {
            stmatrix_x2_trans(lane_address + c * 128, pack(v[0], v[1]), pack(v[2], v[3]));
          } else {
#pragma unroll
            for (int n = 0; n < kRows / 8; n += 2) {
              stmatrix_x4_trans(lane_address + c * 128 + n * 8 * Shape::kStagedRowBytes, pack(v[n * 4], v[n * 4 + 1]), pack(v[n * 4 + 2], v[n * 4 + 3]),
                                pack(v[n * 4 + 4], v[n * 4 + 5]), pack(v[n * 4 + 6], v[n * 4 + 7]));
            }
          }
        }
      };
      if (is_split) stage([](float lo, float hi) { return pack_f16(lo, hi); });
      else stage([](float lo, float hi) { return pack_bf16(lo, hi); });
      named_barrier_sync(kConsumerBarrier, kConsumers);
      constexpr int kRowUnits = kLatent / 8;
      const int64_t out_row0 = static_cast<int64_t>(piece.q_begin) * args.heads + row0;
      const int part = schedule.partial_index(piece, piece.participant);
      const int rows = min(piece.rows - row0, kRows);
      uint4* to = static_cast<uint4*>(is_split ? static_cast<void*>(args.partial_out) : args.out) + (is_split ? static_cast<int64_t>(part) * kRows : out_row0) * kRowUnits;
#pragma unroll 2
      for (int i = thread; i < rows * kRowUnits; i += kConsumers) to[i] = load_shared_16(staged + i / kRowUnits * Shape::kStagedRowBytes + i % kRowUnits * 16);
      if (group == 0 && warp == 0 && lane < 4) {
#pragma unroll
        for (int i = 0; i < kColumnBlocks * 2; ++i) {
          const int row = softmax.row_of(i, lane);
          if (row >= rows) continue;
          if (is_split) {
            args.partial_sum[part * kRows + row] = make_float2(softmax.maximum[i], softmax.sum[i]);
          } else if (args.lse) {
            args.lse[out_row0 + row] = softmax.sum[i] > 0.0f ? (softmax.maximum[i] + log2f(softmax.sum[i])) * 0.6931471805599453f : -INFINITY;
          }
        }
      }
      if (is_split) {
        if (thread == 0) split[splits] = piece;
        ++splits;
      }
      named_barrier_sync(kConsumerBarrier, kConsumers);
      if (is_split && thread == 0) publish_part(args.arrivals + schedule.arrival_index(piece));
    }

    const auto barrier = [] { named_barrier_sync(kConsumerBarrier, kConsumers); };
    for (int i = 0; i < splits; ++i) {
      combine_parts<kLatent, kConsumers, __half>(args, schedule, split[i], ring_data, thread, barrier);
    }
  }
}

namespace {

template <int kLatent, int kRows>
DecodeKernel describe(LogitKind logits) {
  const void* function = logits == LogitKind::plain ? reinterpret_cast<const void*>(&sm90_mla_decode_narrow<kLatent, kRows, PlainLogits>)
                                                    : reinterpret_cast<const void*>(&sm90_mla_decode_narrow<kLatent, kRows, VariantLogits>);
  return {function, kRows, NarrowShape<kLatent, kRows>::kSharedBytes, NarrowShape<kLatent, kRows>::kThreads, true};
}

template <int kLatent>
DecodeKernel choose_rows(int rows, LogitKind logits) {
  if (rows <= 8) return describe<kLatent, 8>(logits);
  if (rows <= 16) return describe<kLatent, 16>(logits);
  return describe<kLatent, 32>(logits);
}

}  // namespace

DecodeKernel sm90_mla_decode_narrow_kernel(int latent, int rows, LogitKind logits) {
  switch (latent) {
    case 128: return choose_rows<128>(rows, logits);
    case 256: return choose_rows<256>(rows, logits);
    case 288: return choose_rows<288>(rows, logits);
    case 320: return choose_rows<320>(rows, logits);
    case 512: return choose_rows<512>(rows, logits);
    default: return {};
  }
}

}  // namespace tpla::cuda
