// MLA decode with a 512-wide latent for 64 query rows per block, Hopper. The output, 64 × 512 in fp32, fills the registers of two
// warpgroups, so they share the rows: warpgroup 0 holds the left half of the latent, warpgroup 1 the right half.
//
// Tiles go in pairs (a, b). Warpgroup 0 computes the logits and probabilities of a, warpgroup 1 those of b, and they exchange
// the probabilities through shared memory. Both multiply tile a first: the tensor cores have that while warpgroup 1 is in its softmax, and
// buffer a is refilled while they multiply tile b.
//
//   warpgroup 0:  QK a | softmax a ->| P_a V_a left            | P_b V_b left
//   warpgroup 1:  QK b               | P_a V_a right, softmax b ->| P_b V_b right
//
// The reference of the exponent passes along the tiles (a, then b, then the next a); it moves rarely, see kReferenceSlack.
// Two tile buffers hold 144 KiB; each half of a tile is refilled as soon as its warpgroup is through with it, so every tile
// is loaded in the order in which its next reader wants it.
#include <type_traits>

#include "mla_decode_combine.cuh"
#include "mla_decode_kernel.h"
#include "sm90_mla_decode.cuh"
#include "row_softmax.cuh"

namespace tpla::cuda {

struct SharedShape {
  static constexpr int kLatent = 512;
  static constexpr int kRows = 64;
  static constexpr int kChunks = 9;
  static constexpr int kHalf = 4;  // chunks of a half
  static constexpr int kRun = 2;   // of these, that are loaded together
  static constexpr int kBuffers = 2;
  static constexpr int kQueryBytes = kChunks * kChunkBytes;
  static constexpr int kProbBytes = kChunkBytes;
  static constexpr int kScratchBytes = 2048;
  static constexpr int kRowValueBytes = 1024;
  static constexpr int kStagedRowBytes = 512 + 16;  // half a row; rows lie in different banks
  static constexpr int kSharedBytes = kSharedAlignment + kBuffers * kChunks * kChunkBytes + kQueryBytes + kProbBytes + kScratchBytes;
  static constexpr int kOverhead = 1;
  static constexpr int kThreads = 384;
};
static_assert(SharedShape::kSharedBytes <= kSharedMemoryPerBlock);
static_assert(SharedShape::kRowValueBytes + 2 * 64 * SharedShape::kStagedRowBytes <= SharedShape::kQueryBytes);

// Two tile buffers of five parts: the rope chunk, then two runs of chunks of each half. A buffer is waited for by one warpgroup, for all its
// uses in turn, so that one `full` barrier a part will do (compare ChunkRing).
struct SharedRing {
  using Shape = SharedShape;
  static constexpr int kHalfParts = Shape::kHalf / Shape::kRun;
  static constexpr int kParts = 1 + 2 * kHalfParts;
  static constexpr int kBarriers = 2 * Shape::kBuffers * kParts;
  static_assert(kBarriers <= 32);

  uint32_t data;
  uint32_t barriers;  // full [buffer][part], then empty [buffer][part]

  // First chunk of a part, as its place in the buffer: the rope chunk, then the latent in order.
  __device__ static int position(int part) { return part == 0 ? 0 : 1 + (part - 1) * Shape::kRun; }
  // First part of a half of the latent.
  __device__ static int half_part(int half) { return 1 + half * kHalfParts; }
  __device__ uint32_t chunk(int buffer, int position) const { return data + (buffer * Shape::kChunks + position) * kChunkBytes; }
  __device__ uint32_t full(int buffer, int part) const { return barriers + (buffer * kParts + part) * 8; }
  __device__ uint32_t empty(int buffer, int part) const { return barriers + ((Shape::kBuffers + buffer) * kParts + part) * 8; }
  __device__ void wait_full(int buffer, int part, int use) const { mbarrier_wait(full(buffer, part), use & 1); }
  __device__ void release(int buffer, int part) const { mbarrier_arrive(empty(buffer, part)); }  // by one thread of each warp that has read the part

  // By a whole warp.
  __device__ void init() const {
    const int lane = threadIdx.x % 32;
    if (lane < kBarriers) mbarrier_init(barriers + lane * 8, lane < kBarriers / 2 ? 1 : 4);
    mbarrier_init_fence();
  }

  // By one thread. `run_map` has boxes of kRun chunks: where a tile is one box (`whole`), a run is one load, since it takes a thread some 450
  // cycles to ask for one.
  template <class Logits>
  __device__ void fill(const CUtensorMap& chunk_map, const CUtensorMap& run_map, const PageWalk<Logits>& walk, const TileBoxes& boxes, bool whole, int buffer, int part, int use) const {
    const uint32_t barrier = full(buffer, part), to = chunk(buffer, position(part));
    const int column = part == 0 ? Shape::kChunks - 1 : position(part) - 1, chunks = part == 0 ? 1 : Shape::kRun;
    mbarrier_wait(empty(buffer, part), (use & 1) ^ 1);
    mbarrier_arrive_expect_bytes(barrier, chunks * kChunkBytes);
    if (whole && part > 0) {
      walk.load(run_map, boxes, column, to, barrier);
    } else {
      for (int i = 0; i < chunks; ++i) walk.load(chunk_map, boxes, column + i, to + i * kChunkBytes, barrier);
    }
  }
};

// Address of this lane's row of 16 bytes for ldmatrix/stmatrix.x4 on k-step k of a [64][64] bf16 tile, 128-byte swizzle.
__device__ __forceinline__ uint32_t fragment_address(uint32_t tile, int warp, int lane, int k) {
  const int row = warp * 16 + lane % 16, unit = 2 * k + lane / 16;
  return tile + row * 128 + ((unit ^ (row & 7)) << 4);
}

// Largest magnitude of each of this thread's two rows.
template <int kCount>
__device__ __forceinline__ void row_tops(const float (&values)[kCount], float (&tops)[2]) {
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    tops[h] = 0.0f;
#pragma unroll
    for (int n = 0; n < kCount / 4; ++n) tops[h] = fmaxf(tops[h], fmaxf(fabsf(values[n * 4 + h * 2]), fabsf(values[n * 4 + h * 2 + 1])));
    tops[h] = fmaxf(tops[h], __shfl_xor_sync(~0u, tops[h], 1));
    tops[h] = fmaxf(tops[h], __shfl_xor_sync(~0u, tops[h], 2));
  }
}

template <class Logits>
__global__ void __launch_bounds__(384, 1)
    sm90_mla_decode_shared(const __grid_constant__ CUtensorMap kv_map, const __grid_constant__ CUtensorMap run_map, const __grid_constant__ MlaDecodeArgs args) {
  using Shape = SharedShape;
  constexpr int kLatent = Shape::kLatent, kRows = Shape::kRows, kChunks = Shape::kChunks, kRun = Shape::kRun, kHalfParts = SharedRing::kHalfParts;

  extern __shared__ uint8_t shared_raw[];
  uint8_t* shared = shared_raw + ((kSharedAlignment - (smem_address(shared_raw) & (kSharedAlignment - 1))) & (kSharedAlignment - 1));
  uint8_t* ring_data = shared;
  uint8_t* query = ring_data + Shape::kBuffers * kChunks * kChunkBytes;
  uint8_t* probs_shared = query + Shape::kQueryBytes;  // of tile a, then of tile b: a warp reads its rows of a before it writes those of b
  uint8_t* scratch = probs_shared + Shape::kProbBytes;
  int* plan_scratch = reinterpret_cast<int*>(scratch);
  // Pieces that other blocks share: the first of this block's share and the last.
  DecodePiece* split = reinterpret_cast<DecodePiece*>(scratch + 144);
  uint64_t* barriers = reinterpret_cast<uint64_t*>(scratch + 256);
  float* references = reinterpret_cast<float*>(scratch + 768);  // [2 tiles][64 rows]

  const SharedRing ring{smem_address(ring_data), smem_address(barriers)};
  const DecodeSchedule<kRows, Shape::kOverhead, Logits> schedule(args);

  if (threadIdx.x / 32 == 1) ring.init();
  if (threadIdx.x == 96) {
    tma_prefetch_map(kv_map);
    tma_prefetch_map(run_map);
  }
  if (threadIdx.x / 32 == 2) prefetch_block_table(args);
  DecodeShare share = schedule.share(plan_scratch, reinterpret_cast<int*>(query));
  DecodePiece piece;

  if (threadIdx.x < 128) {
    registers_shrink<40>();
    // One warp for each half of each buffer, so that none waits for another's half to be free. The warp of the half that the logits
    // want last also brings the rope chunk.
    const int buffer = threadIdx.x / 64, half = threadIdx.x / 32 % 2;
    const bool brings_rope = half != buffer;
    const bool whole = args.box_tokens == kTokenTile;
    int use = 0;
    while (schedule.next(share, piece)) {
      // Long streams are a little faster where L2 treats them like anything else, short ones where it keeps code and partial results. Of many row
      // tiles some always ask at the same time, and one read of L2 serves them.
      PageWalk<Logits> walk(args, piece, args.row_tiles > 2 || (args.row_tiles * args.stacked == 1 && share.units <= 32));
      for (int tile = piece.tile_begin; tile < piece.tile_end; ++tile) {
        const TileBoxes boxes = walk.boxes(tile);
        if (((tile - piece.tile_begin) & 1) != buffer) continue;
        if (threadIdx.x % 32 == 0) {
          if (brings_rope) ring.fill(kv_map, run_map, walk, boxes, whole, buffer, 0, use);
          // While the buffer is still in use, L2 can fetch what goes there; two row tiles share that work, with more it does not pay.
          if (args.row_tiles == 2 && tile % 2 == schedule.row_tile) {
#pragma unroll 1
            for (int part = 1 + half * kHalfParts; part < 1 + (half + 1) * kHalfParts; ++part) {
              if (whole) {
                walk.prefetch(run_map, boxes, SharedRing::position(part) - 1);
              } else {
                for (int i = 0; i < kRun; ++i) walk.prefetch(kv_map, boxes, SharedRing::position(part) - 1 + i);
              }
            }
          }
#pragma unroll 1
          for (int part = 1 + half * kHalfParts; part < 1 + (half + 1) * kHalfParts; ++part) ring.fill(kv_map, run_map, walk, boxes, whole, buffer, part, use);
          if (threadIdx.x == 0 && tile == piece.tile_begin) prefetch_next_query<kRows, kLatent>(args, schedule, share);
        }
        ++use;
        __syncwarp();
      }
    }
  } else {
    registers_grow<232>();

    const int thread = threadIdx.x - 128;
    const int group = warp_uniform(thread / 128), in_group = thread % 128;
    const int warp = in_group / 32, lane = in_group % 32;
    const int group_barrier = 1 + group;
    constexpr int kConsumerBarrier = 3, kProbsReady = 5, kFirstTaken = 7, kConsumers = 256;  // kProbsReady + tile
    const int thread_row = warp * 16 + lane / 4;
    const uint32_t probs_tile = smem_address(probs_shared);
    const int half_position = 1 + group * Shape::kHalf;  // first chunk of this warpgroup's half

    if (group == 1) named_barrier_arrive(kFirstTaken, kConsumers);  // what tile a left in shared memory may be overwritten
    int splits = 0;
    int uses[2] = {0, 0};  // of each tile buffer

    while (schedule.next(share, piece)) {
      const int row0 = piece.row0;
      load_query<kRows, kLatent, kLatent + 64, kConsumers>(args, row0, piece, query, thread);
      fence_async_proxy();
      named_barrier_sync(kConsumerBarrier, kConsumers);

      float out[128];
#pragma unroll
      for (int i = 0; i < 128; ++i) out[i] = 0.0f;
      RowSoftmax softmax;
      const int tiles = piece.tile_end - piece.tile_begin;
      const Logits policy(args, piece);
      const int unmasked_tokens = schedule.limit(piece, row0);

      const auto multiply_logits = [&](auto of_group, float(&logits)[32], int use) {
        constexpr int kGroup = decltype(of_group)::value;  // compile-time positions: descriptors need one addition each
        uint32_t query_low = descriptor_low(smem_address(query)), keys_low = descriptor_low(ring.chunk(kGroup, 0));
        asm volatile("" : "+r"(query_low), "+r"(keys_low));  // keeps descriptors out of loop-invariant registers
#pragma unroll
        for (int i = 0; i < 32; ++i) logits[i] = 0.0f;
        wgmma_pin(logits);
        // Own half first, then rope, then the other half.
#pragma unroll
        for (int i = 0; i < kChunks; ++i) {
          const int position = i == 4 ? 0 : ((i < 4 ? i : i - 1) ^ (kGroup * 4)) + 1;
          if (position == 0) ring.wait_full(kGroup, 0, use);
          else if ((position - 1) % kRun == 0) ring.wait_full(kGroup, 1 + (position - 1) / kRun, use);
          wgmma_fence();
#pragma unroll
          for (int k = 0; k < 4; ++k) {
            const int column = position == 0 ? kChunks - 1 : position - 1;
            Wgmma<64>::ss<0, 0>(logits, descriptor(query_low + column * (kChunkBytes / 16) + k * 2), descriptor(keys_low + position * (kChunkBytes / 16) + k * 2));
          }
        }
        wgmma_commit();
        wgmma_wait<0>();
        wgmma_pin(logits);
        if (lane == 0) ring.release(kGroup, 0);  // rope
      };
      const auto mask = [&](float(&logits)[32], int t) {
        const int token0 = (piece.tile_begin + t) * kTokenTile;
        if constexpr (!Logits::kPlain) {
          const typename Logits::Row rows[2] = {policy.row(row0 + thread_row), policy.row(row0 + thread_row + 8)};
          int positions[kTokenTile / 16];  // a box is 16 tokens or more
#pragma unroll
          for (int box = 0; box < kTokenTile / 16; ++box) positions[box] = policy.position(token0 + box * 16 + (lane % 4) * 2);
          policy.apply_to_rows(logits, rows, positions);
          return;
        }
        if (token0 + kTokenTile <= unmasked_tokens) return;
        const int limits[2] = {schedule.limit(piece, row0 + thread_row), schedule.limit(piece, row0 + thread_row + 8)};  // here, not in registers throughout
#pragma unroll
        for (int i = 0; i < 32; ++i) {
          const int token = token0 + (i / 4) * 8 + (lane % 4) * 2 + i % 2;
          if (token >= limits[i % 4 / 2]) logits[i] = -INFINITY;
        }
      };
      // out += probs · V of buffer `buffer`, this warpgroup's half. Tile t lies in the buffer.
      const auto multiply_half = [&](const uint32_t(&probs)[4][4], int buffer, int t) {
        const uint32_t values = ring.chunk(buffer, half_position);
        const int valid = piece.kv_len - (piece.tile_begin + t) * kTokenTile;
        if (valid < kTokenTile) {
#pragma unroll 1
          for (int c = 0; c < 4; ++c) zero_chunk_tail<128>(values + c * kChunkBytes, valid, in_group);
          fence_async_proxy();
          named_barrier_sync(group_barrier, 128);
        }
        if constexpr (!Logits::kPlain) {
          if (piece.tile_begin + t == 0) {
            for (int c = 0; c < 4; ++c) zero_chunk<128>(values + c * kChunkBytes, 0, policy.hidden_places(), in_group);
            fence_async_proxy();
            named_barrier_sync(group_barrier, 128);
          }
        }
        const uint32_t low = descriptor_low(values, kChunkBytes);
        wgmma_pin(out);
        wgmma_fence();
#pragma unroll
        for (int k = 0; k < 4; ++k) Wgmma<256>::rs<1>(out, probs[k], descriptor(low + k * (2048 / 16)));
        wgmma_commit();
      };
      const auto release_half = [&](int buffer) {
        if (lane < kHalfParts) ring.release(buffer, SharedRing::half_part(group) + lane);
      };
      const auto publish_references = [&](int tile) {
        if (lane % 4 == 0) {
#pragma unroll
          for (int h = 0; h < 2; ++h) references[tile * 64 + thread_row + h * 8] = softmax.maximum[h];
        }
      };
      // Takes over the references the other warpgroup published; true where one of this warp's rows moved.
      const auto adopt_references = [&](int tile, float(&factor)[2]) {
        bool moved = false;
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          const float reference = references[tile * 64 + thread_row + h * 8];
          moved |= reference != softmax.maximum[h];
          softmax.move_to(h, reference, factor[h]);
        }
        return static_cast<bool>(__any_sync(~0u, moved));
      };
      const auto store_probs = [&](const uint32_t(&probs)[4][4]) {
#pragma unroll
        for (int k = 0; k < 4; ++k) stmatrix_x4(fragment_address(probs_tile, warp, lane, k), probs[k][0], probs[k][1], probs[k][2], probs[k][3]);
      };
      const auto load_probs = [&](uint32_t(&probs)[4][4]) {
#pragma unroll
        for (int k = 0; k < 4; ++k) ldmatrix_x4(fragment_address(probs_tile, warp, lane, k), probs[k]);
      };

      // Barriers of one warpgroup alone: compute-sanitizer's racecheck orders what two warps did by how many barriers each had met (arriving does
      // not count), so that a reader must have met more than the writer, and both equally many in the end. They lie where the warpgroup waits anyway.
      const int pairs = (tiles + 1) / 2;
      for (int pair = 0; pair < pairs; ++pair) {
        const int a = 2 * pair, b = a + 1;
        const bool has_b = b < tiles;
        float logits[32], factor[2];
        uint32_t own[4][4], other[4][4];
        if (group == 0) {
          multiply_logits(std::integral_constant<int, 0>{}, logits, uses[0] + pair);
          mask(logits, a);
          const bool moved = softmax.update(logits, Logits::scale(args), factor);
          named_barrier_sync(kFirstTaken, kConsumers);
          publish_references(0);
          softmax.exponentiate(logits, Logits::scale(args));
          pack_fragment(logits, own);
          store_probs(own);
          named_barrier_arrive(kProbsReady, kConsumers);
          if (moved) scale_rows(out, factor);
          multiply_half(own, 0, a);
          named_barrier_sync(group_barrier, 128);
          wgmma_wait<0>();
          wgmma_pin(out);
          release_half(0);
          if (has_b) {
            named_barrier_sync(kProbsReady + 1, kConsumers);
            load_probs(other);
            if (adopt_references(1, factor)) scale_rows(out, factor);
            multiply_half(other, 1, b);
            wgmma_wait<0>();
            wgmma_pin(out);
            release_half(1);
          }
        } else {
          if (has_b) {
            multiply_logits(std::integral_constant<int, 1>{}, logits, uses[1] + pair);
            mask(logits, b);
          }
          named_barrier_sync(group_barrier, 128);
          named_barrier_sync(kProbsReady, kConsumers);
          load_probs(other);
          const bool moved = adopt_references(0, factor);
          named_barrier_arrive(kFirstTaken, kConsumers);
          if (moved) scale_rows(out, factor);
          multiply_half(other, 0, a);
          if (has_b) {
            const bool moved_on = softmax.update(logits, Logits::scale(args), factor);
            publish_references(1);
            softmax.exponentiate(logits, Logits::scale(args));
            pack_fragment(logits, own);
            store_probs(own);
            named_barrier_arrive(kProbsReady + 1, kConsumers);
            named_barrier_sync(group_barrier, 128);
            wgmma_wait<0>();
            wgmma_pin(out);
            release_half(0);
            if (moved_on) scale_rows(out, factor);
            multiply_half(own, 1, b);
            wgmma_wait<0>();
            wgmma_pin(out);
            release_half(1);
          } else {
            wgmma_wait<0>();
            wgmma_pin(out);
            release_half(0);
          }
        }
      }
      uses[0] += pairs;
      uses[1] += tiles / 2;

      // Sums, and for parts the largest values, over both warpgroups; nobody reads this query any more.
      const bool is_split = piece.participants > 1;
      float2* row_values = reinterpret_cast<float2*>(query);  // [2 warpgroups][64 rows]
      float sums[2] = {softmax.row_sum(0), softmax.row_sum(1)}, tops[2] = {0.0f, 0.0f};
      if (is_split) row_tops(out, tops);
      if (lane % 4 == 0) {
#pragma unroll
        for (int h = 0; h < 2; ++h) row_values[group * 64 + thread_row + h * 8] = make_float2(sums[h], tops[h]);
      }
      named_barrier_sync(kConsumerBarrier, kConsumers);
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const float2 left = row_values[thread_row + h * 8], right = row_values[64 + thread_row + h * 8];
        sums[h] = left.x + right.x;
        tops[h] = fmaxf(left.y, right.y);
      }

      // Each warp's rows go out from shared memory, where nobody reads this query any more, in whole lines.
      const int64_t out_row0 = static_cast<int64_t>(piece.q_begin) * args.heads + row0;
      const int rows = min(piece.rows - row0, kRows);
      const int part = schedule.partial_index(piece, piece.participant);
      const uint32_t staged = smem_address(query) + Shape::kRowValueBytes + (group * 4 + warp) * 16 * Shape::kStagedRowBytes;
      const uint32_t lane_address = staged + lane % 16 * Shape::kStagedRowBytes + lane / 16 * 16;
      float scale[2];
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const int row = thread_row + h * 8;
        const bool reports = group == 0 && lane % 4 == 0 && row < rows;
        if (is_split) {
          const int exponent = part_exponent(tops[h]);
          scale[h] = power_of_two(-exponent);
          if (reports) args.partial_sum[part * kRows + row] = make_float2(softmax.maximum[h] + exponent, sums[h] * scale[h]);
        } else {
          scale[h] = sums[h] > 0.0f ? __fdividef(1.0f, sums[h]) : 0.0f;
          if (reports && args.lse) args.lse[out_row0 + row] = sums[h] > 0.0f ? (softmax.maximum[h] + log2f(sums[h])) * 0.6931471805599453f : -INFINITY;
        }
      }
      scale_rows(out, scale);
      const auto stage = [&](auto pack) {
#pragma unroll
        for (int k = 0; k < 16; ++k) {
          const float* v = out + k * 8;
          stmatrix_x4(lane_address + k * 32, pack(v[0], v[1]), pack(v[2], v[3]), pack(v[4], v[5]), pack(v[6], v[7]));
        }
      };
      if (is_split) stage([](float lo, float hi) { return pack_f16(lo, hi); });
      else stage([](float lo, float hi) { return pack_bf16(lo, hi); });
      __syncwarp();
      const int64_t to_row = is_split ? static_cast<int64_t>(part) * kRows : out_row0;
      uint4* to = static_cast<uint4*>(is_split ? static_cast<void*>(args.partial_out) : args.out) + (to_row + warp * 16) * (kLatent / 8) + group * 32 + lane;
#pragma unroll 4
      for (int i = 0; i < 16; ++i) {
        if (warp * 16 + i < rows) to[i * (kLatent / 8)] = load_shared_16(staged + i * Shape::kStagedRowBytes + lane * 16);
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

DecodeKernel sm90_mla_decode_shared_kernel(int latent, int, LogitKind logits) {
  if (latent != SharedShape::kLatent) return {};
  const void* function = logits == LogitKind::plain   ? reinterpret_cast<const void*>(&sm90_mla_decode_shared<PlainLogits>)
                         : logits == LogitKind::chunk ? reinterpret_cast<const void*>(&sm90_mla_decode_shared<ChunkLogits>)
                                                      : reinterpret_cast<const void*>(&sm90_mla_decode_shared<VariantLogits>);
  return {function, SharedShape::kRows, SharedShape::kSharedBytes, SharedShape::kThreads, true, 1, SharedShape::kRun};
}

}  // namespace tpla::cuda
