// MLA decode over fp8 KV for up to 32 query rows per block, with a latent of 512 up to 64, Hopper: tokens of latent e4m3 values, a power-of-two
// scale per 128 of them, and 64 rope values of bf16. The products are those of the bf16 kernels; what is new is that every value is widened to
// bf16 on its way, once.
//
//   logits^T [64 tokens × rows] = K [64 × width] · Q^T,      out^T [latent × rows] += V^T [latent × 64 tokens] · P^T
//
// Two warpgroups share a tile and halve its columns. A thread reads four bytes of a token at a time, widens them in registers, multiplies them
// from there as the A operand of the logits, and stores them once in shared memory, for the second product. A half of the columns gives partial
// logits: each warpgroup hands the partial logits of one half of the rows to the other and does the softmax of its own half of the rows; the
// output it accumulates is that of all rows and its own columns.
//
// Within 16 columns, a k-step, the order is such that no byte has to change its place in a thread: the four bytes that thread j of a token reads
// are columns 4j..4j+3, and byte 2e + h of them is position 8h + 2j + e of the k-step. The query is stored in that order, and out^T comes out in it.
//
// A tile's second product runs on while the next tile's first chunk is widened.
#include <algorithm>

#include "mla_decode_combine.cuh"
#include "mla_decode_kernel.h"
#include "sm90_fp8_widen.cuh"

namespace tpla::cuda {

constexpr float kNoMaximum = -1e30f;  // below every logit, and finite: what it is subtracted from stays a number, or -inf
constexpr int kSharedMemoryPerMultiprocessor = 228 * 1024, kSharedMemoryReserved = 1024;  // the latter of each block

template <int kLatentColumns, int kBlockRows>
struct Fp8Shape {
  static constexpr int kLatent = kLatentColumns, kRows = kBlockRows;
  // Of the latent; the rope chunk of the query comes after them. Where the latent ends inside a chunk, what follows it in the token is widened
  // too, whatever it is: it meets zeros of the query, and its columns of the output are not written.
  static constexpr int kChunks = (kLatent + 63) / 64;
  static constexpr int kTokenBytes = kv_token_bytes(KvFormat::fp8, kLatent);
  static constexpr int kScaleOffset = kLatent;
  static constexpr int kRopeOffset = kTokenBytes - 128;
  static constexpr int kRunBytes = kRunTokens * kTokenBytes;
  static constexpr int kValueBytes = kChunks * kChunkBytes;  // a tile in bf16
  static constexpr int kQueryBytes = (kChunks + 1) * kRows * 128;
  static constexpr int kProbBytes = kRows * 128;
  static constexpr int kExchangeBytes = kRows * 256;  // partial logits, [warpgroup that wrote][rows / 16][thread] of four floats
  static constexpr int kScratchBytes = 4096;
  static constexpr int kFixedBytes = kSharedAlignment + kValueBytes + kQueryBytes + kProbBytes + kExchangeBytes + kScratchBytes;
  // A tile is a chain of short steps; where two blocks fit on a multiprocessor, one works while the other waits. More than 32 values of output a
  // thread would spill.
  static constexpr int kHalfSharedMemory = kSharedMemoryPerMultiprocessor / 2 - kSharedMemoryReserved;
  static constexpr int kBlocks = kHalfSharedMemory - kFixedBytes >= 5 * kRunBytes && (kChunks + 1) / 2 * kRows <= 32 ? 2 : 1;
  static constexpr int kFitting = ((kBlocks == 2 ? kHalfSharedMemory : kSharedMemoryPerBlock) - kFixedBytes) / kRunBytes;
  static constexpr int kRuns = kFitting < 32 ? kFitting : 32;
  static constexpr int kSharedBytes = kFixedBytes + kRuns * kRunBytes;
  static constexpr int kOverhead = kLatent >= 512 ? 1 : 2;
  static constexpr int kThreads = 384;
  // Registers: 168 a thread at the start with one block on a multiprocessor, 80 with two.
  static constexpr bool kCrowded = kBlocks == 2 || kRows == 64;
  static constexpr int kFeedRegisters = kBlocks == 2 ? 32 : kCrowded ? 24 : 40, kComputeRegisters = kBlocks == 2 ? 104 : kCrowded ? 240 : 232;
  static_assert(kRuns > 4, "the ring must hold more than one tile");
};

__device__ __forceinline__ uint32_t load_word(const uint8_t* shared) { return *reinterpret_cast<const uint32_t*>(shared); }

// Query rows of this row tile -> shared memory, [chunk][row][64 columns in the order of the k-steps], 128-byte swizzle; absent rows are zero.
// In the columns of warpgroup 1 the halves of the rows change places, so that both warpgroups find their own half of the rows first.
template <int kBlockRows, int kLatent, int kThreads>
__device__ __forceinline__ void load_permuted_query(const MlaDecodeArgs& args, int row0, const DecodePiece& piece, uint8_t* destination, int thread) {
  constexpr int kUnits = (kLatent + 64) / 8, kTotal = kBlockRows * kUnits;
  constexpr int kLatentChunks = (kLatent + 63) / 64, kPadding = kLatentChunks * 8 - kLatent / 8;  // units of zeros behind the latent
  constexpr int kBatch = std::min((kTotal + kThreads - 1) / kThreads, 18);  // all in flight together: under load each takes as long as many
  const uint4* source = reinterpret_cast<const uint4*>(args.q) + (static_cast<int64_t>(piece.q_begin) * args.heads + row0) * kUnits;
#pragma unroll 1
  for (int base = thread; base < kTotal; base += kBatch * kThreads) {
    uint4 values[kBatch];
#pragma unroll
    for (int n = 0; n < kBatch; ++n) {
      const int i = base + n * kThreads;
      values[n] = i < kTotal && row0 + i / kUnits < piece.rows ? __ldg(source + i) : make_uint4(0, 0, 0, 0);
    }
#pragma unroll
    for (int n = 0; n < kBatch; ++n) {
      const int i = base + n * kThreads;
      if (i >= kTotal) break;
      const int row = i / kUnits, unit = i % kUnits;
      uint4 value = values[n];
      if (args.latent_scale && unit < kLatent / 8) {
        const float scale = args.latent_scale[(row0 + row) % args.heads];
        uint32_t* words = reinterpret_cast<uint32_t*>(&value);
#pragma unroll
        for (int w = 0; w < 4; ++w) words[w] = pack_bf16(__uint_as_float(words[w] << 16) * scale, __uint_as_float(words[w] & 0xFFFF0000u) * scale);
      }
      const bool is_latent = unit < kLatent / 8;
      const int place = is_latent ? unit : unit + kPadding, chunk = place / 8;
      const int group = is_latent ? chunk >= kLatent / 128 : place % 8 / 4;
      uint8_t* target = destination + chunk * (kBlockRows * 128) + (row ^ group * (kBlockRows / 2)) * 128;
      const auto unit_address = [&](int u) { return target + ((u ^ (row & 7)) << 4); };
      if (is_latent) {
        // Columns 0..7 -> (0, 2, 4, 6) and (1, 3, 5, 7), half a unit each.
        const int step = place % 8 / 2, half = place % 2 * 8;
        *reinterpret_cast<uint2*>(unit_address(2 * step) + half) = make_uint2(__byte_perm(value.x, value.y, 0x5410), __byte_perm(value.z, value.w, 0x5410));
        *reinterpret_cast<uint2*>(unit_address(2 * step + 1) + half) = make_uint2(__byte_perm(value.x, value.y, 0x7632), __byte_perm(value.z, value.w, 0x7632));
      } else {
        *reinterpret_cast<uint4*>(unit_address(place % 8)) = value;
      }
    }
  }
  if constexpr (kPadding > 0) {
    for (int i = thread; i < kBlockRows * kPadding; i += kThreads) {
      const int row = i / kPadding, unit = 8 - kPadding + i % kPadding;
      *reinterpret_cast<uint4*>(destination + (kLatentChunks - 1) * (kBlockRows * 128) + row * 128 + ((unit ^ (row & 7)) << 4)) = make_uint4(0, 0, 0, 0);
    }
  }
}

// Ring of runs of tokens as they lie in the pages. Run number n of the block lies in slot n % kRuns.
//
// Uses of a slot take turns at two `full` barriers, as in ChunkRing and for the same reason.
template <int kTokenBytes, int kRuns>
struct RunRing {
  static constexpr int kRunBytes = kRunTokens * kTokenBytes;
  static constexpr int kBarriers = 3 * kRuns;

  uint8_t* runs;
  uint64_t* barriers;  // [kBarriers]: full [kRuns][2], then empty [kRuns]

  __device__ uint32_t full(int number) const { return smem_address(barriers + number % kRuns * 2 + (number / kRuns & 1)); }
  __device__ uint32_t empty(int number) const { return smem_address(barriers + 2 * kRuns + number % kRuns); }

  // By a whole warp.
  __device__ void init(int readers) const {
    for (int i = threadIdx.x % 32; i < kBarriers; i += 32) mbarrier_init(smem_address(barriers + i), i < 2 * kRuns ? 1 : readers);
    mbarrier_init_fence();
  }

  // Waits for the run; its first token.
  __device__ const uint8_t* wait(int number) const {
    mbarrier_wait(full(number), number / (2 * kRuns) & 1);
    return runs + number % kRuns * kRunBytes;
  }
  __device__ void release(int number) const { mbarrier_arrive(empty(number)); }

  // One warp brings all runs of the share.
  template <int kRows, int kLatent, class Logits, class Schedule>
  __device__ void feed(const MlaDecodeArgs& args, const Schedule& schedule, DecodeShare share) const {
    const int lane = threadIdx.x % 32;
    DecodePiece piece;
    int count = 0;
    while (schedule.next(share, piece)) {
      const int piece_runs = (piece.tile_end - piece.tile_begin) * (kTokenTile / kRunTokens);
      const Logits policy(args, piece);
      // A lane finds the page of every 32nd run and brings it when its turn comes; null past the end of the sequence.
      const auto find = [&](int run) -> const uint8_t* {
        const int place = piece.tile_begin * kTokenTile + run * kRunTokens;
        if (run >= piece_runs || place >= piece.kv_len) return nullptr;
        const int token = policy.position(place);
        const int index = token / args.page_size;
        const int page = args.block_table[static_cast<int64_t>(piece.sequence) * args.block_table_stride + index];
        return static_cast<const uint8_t*>(args.kv) + page * args.page_stride + static_cast<int64_t>(token - index * args.page_size) * kTokenBytes;
      };
      const uint8_t* source = find(lane);
#pragma unroll 1
      for (int base = 0; base < piece_runs; base += 32) {
        const int last = min(piece_runs - base, 32);
#pragma unroll 1
        for (int turn = 0; turn < last; ++turn) {
          if (lane == turn) {
            const int number = count + base + turn;
            mbarrier_wait(empty(number), (number / kRuns & 1) ^ 1);
            const uint32_t filled = full(number);
            if (source) {
              mbarrier_arrive_expect_bytes(filled, kRunBytes);
              tma_load_bytes(smem_address(runs + number % kRuns * kRunBytes), source, kRunBytes, filled);
            } else {
              mbarrier_arrive(filled);  // nobody looks at the slot
            }
          }
          __syncwarp();
        }
        if (base == 0 && lane == 0) prefetch_next_query<kRows, kLatent>(args, schedule, share);
        source = find(base + 32 + lane);
      }
      count += piece_runs;
    }
  }
};

template <class Shape>
struct Fp8Shared {
  uint8_t* values;       // [chunk][token][64 columns], 128-byte swizzle
  uint8_t* query;
  uint8_t* probs;        // [row][64 tokens], 128-byte swizzle
  float4* exchange;
  RunRing<Shape::kTokenBytes, Shape::kRuns> ring;
  DecodePiece* split;    // pieces that other blocks share: the first of this block's share and the last
  float* factors;        // [rows]: by how much references moved
  float* row_maxima;     // [rows]
  float* warp_values;    // [4 warps][rows]
};

template <int kLatent, int kRows, int kOwn, class Logits>
__device__ __forceinline__ void compute(const MlaDecodeArgs& args, const DecodeSchedule<kRows, Fp8Shape<kLatent, kRows>::kOverhead, Logits>& schedule,
                                        DecodeShare share, const Fp8Shared<Fp8Shape<kLatent, kRows>>& shared, int group, int first_chunk) {
  using Shape = Fp8Shape<kLatent, kRows>;
  using Mma = Wgmma<kRows>;
  constexpr int kColumnBlocks = kRows / 8, kHalfBlocks = kRows / 16, kHalfRows = kRows / 2;
  constexpr int kOwnLogits = kRows / 4;  // values of a thread in its half of the rows
  constexpr int kTokenBytes = Shape::kTokenBytes;
  constexpr bool kCrowded = Shape::kCrowded;
  constexpr int kSteps = kCrowded ? 2 : 4, kParts = kOwn * 4 / kSteps;  // k-steps that are widened together, and how often
  constexpr int kBothBarrier = 3, kBoth = 256;    // both warpgroups
  const int thread = threadIdx.x - 128, in_group = thread % 128;
  const int warp = in_group / 32, lane = in_group % 32;
  const int group_barrier = 1 + group;
  const int token_in_tile = warp * 16 + lane / 4;  // and + 8
  const int j = lane % 4;
  const int half_row0 = group * kHalfRows;  // of the rows whose softmax this warpgroup does

  const uint32_t query_low = descriptor_low(smem_address(shared.query) + first_chunk * (kRows * 128));
  const uint32_t rope_query_low = descriptor_low(smem_address(shared.query) + Shape::kChunks * (kRows * 128) + group * 64);
  const uint32_t values_low = descriptor_low(smem_address(shared.values) + first_chunk * kChunkBytes, kChunkBytes);
  const uint32_t probs_low = descriptor_low(smem_address(shared.probs));
  // This lane's row of 16 bytes for stmatrix.x4: k-step n is 32n bytes away by exclusive or.
  const uint32_t values_row = smem_address(shared.values) + first_chunk * kChunkBytes + (warp * 16 + lane % 16) * 128 + ((lane / 16 ^ (lane & 7)) << 4);

  int splits = 0;
  int tile_count = 0;  // of the block, over all pieces
  DecodePiece piece;
  while (schedule.next(share, piece)) {
    const int row0 = piece.row0;
    load_permuted_query<kRows, kLatent, kBoth>(args, row0, piece, shared.query, thread);
    fence_async_proxy();
    named_barrier_sync(kBothBarrier, kBoth);

    float out[kOwn][kRows / 2];
#pragma unroll
    for (int c = 0; c < kOwn; ++c)
#pragma unroll
      for (int i = 0; i < kRows / 2; ++i) out[c][i] = 0.0f;
    float maximum[kHalfBlocks * 2], sum[kHalfBlocks * 2];
#pragma unroll
    for (int i = 0; i < kHalfBlocks * 2; ++i) {
      maximum[i] = kNoMaximum;
      sum[i] = 0.0f;
    }
    const int tiles = piece.tile_end - piece.tile_begin;
    const int unmasked_tokens = schedule.limit(piece, row0);  // row0 sees the fewest
    const Logits policy(args, piece);

    for (int t = 0; t < tiles; ++t, ++tile_count) {
      const int token0 = (piece.tile_begin + t) * kTokenTile;
      const int first_place = !Logits::kPlain && token0 == 0 ? policy.hidden_places() : 0;
      const bool partial = token0 + kTokenTile > piece.kv_len || first_place > 0;
      const auto is_present = [&](int place) { return place < piece.kv_len && (Logits::kPlain || place >= first_place); };
      const bool present[2] = {is_present(token0 + token_in_tile), is_present(token0 + token_in_tile + 8)};

      // Logits of this warpgroup's columns; the columns go to shared memory in bf16.
      float logits[kRows / 2];
#pragma unroll
      for (int i = 0; i < kRows / 2; ++i) logits[i] = 0.0f;
      {
        const int number = tile_count * 4 + warp;
        const uint8_t* token = shared.ring.wait(number) + lane / 4 * kTokenBytes + j * 4;  // and 8 tokens on

        uint32_t rope[2][4];  // each warpgroup has half of the rope columns, two k-steps
        uint32_t words[kCrowded ? 1 : 2][2][kSteps];  // [][token, token + 8]
#pragma unroll
        for (int k = 0; k < 2; ++k)
#pragma unroll
          for (int i = 0; i < 4; ++i) rope[k][i] = load_word(token + i % 2 * 8 * kTokenBytes + Shape::kRopeOffset + group * 64 + k * 32 + i / 2 * 16);
        const auto load_part = [&](int i) {
#pragma unroll
          for (int h = 0; h < 2; ++h)
#pragma unroll
            for (int n = 0; n < kSteps; ++n) words[kCrowded ? 0 : i % 2][h][n] = load_word(token + h * 8 * kTokenBytes + first_chunk * 64 + (i * kSteps + n) * 16);
          if (partial) {  // what lies past the end may be anything, and 0 · NaN is NaN
#pragma unroll
            for (int h = 0; h < 2; ++h)
#pragma unroll
              for (int n = 0; n < kSteps; ++n) words[kCrowded ? 0 : i % 2][h][n] = present[h] ? words[kCrowded ? 0 : i % 2][h][n] : 0;
          }
        };
        float scales[(kOwn + 1) / 2][2];
#pragma unroll
        for (int s = 0; s < (kOwn + 1) / 2; ++s)
#pragma unroll
          for (int h = 0; h < 2; ++h) {
            const float scale = __uint_as_float(load_word(token - j * 4 + h * 8 * kTokenBytes + Shape::kScaleOffset + (first_chunk / 2 + s) * 4));
            scales[s][h] = present[h] ? scale : 0.0f;
          }
        load_part(0);
        wgmma_pin(logits);
        wgmma_fence();
#pragma unroll
        for (int k = 0; k < 2; ++k) Mma::template rs<0>(logits, rope[k], descriptor(rope_query_low + k * 2));
        wgmma_commit();

        uint32_t fragments[2][kSteps][4];
#pragma unroll
        for (int i = 0; i < kParts; ++i) {
          if (!kCrowded && i + 1 < kParts) load_part(i + 1);
          uint32_t(&fragment)[kSteps][4] = fragments[i % 2];
          if (i >= 2) wgmma_wait<1>();  // the part that had these registers
#pragma unroll
          for (int h = 0; h < 2; ++h) {
            const float scale = scales[i * kSteps / 8][h];
            const float factor = fminf(scale, kLargestScale) * kWidenFactor;
            const uint32_t factors = pack_bf16(factor, factor);
#pragma unroll
            for (int n = 0; n < kSteps; ++n) {
              const uint32_t word = words[kCrowded ? 0 : i % 2][h][n];
              fragment[n][h] = multiply_bf16x2(widen_e4m3<kEvenPair>(word), factors);
              fragment[n][2 + h] = multiply_bf16x2(widen_e4m3<kOddPair>(word), factors);
            }
          }
          const float top_scale = fmaxf(scales[i * kSteps / 8][0], scales[i * kSteps / 8][1]);
          if (__any_sync(~0u, top_scale > kLargestScale)) {
#pragma unroll
            for (int h = 0; h < 2; ++h) {
              const float factor = fmaxf(scales[i * kSteps / 8][h] / kLargestScale, 1.0f);
              const uint32_t factors = pack_bf16(factor, factor);
#pragma unroll
              for (int n = 0; n < kSteps; ++n) {
                fragment[n][h] = multiply_bf16x2(fragment[n][h], factors);
                fragment[n][2 + h] = multiply_bf16x2(fragment[n][2 + h], factors);
              }
            }
          }
          if (kCrowded && i + 1 < kParts) load_part(i + 1);
          if (i == kParts - 1) {
            __syncwarp();
            if (lane == 0) shared.ring.release(number);
          }
          if (i == 0) {
            wgmma_wait<0>();  // the output of the last tile, which reads the values and probabilities
            named_barrier_sync(group_barrier, 128);
          }
#pragma unroll
          for (int n = 0; n < kSteps; ++n) {
            const int step = i * kSteps + n;
            stmatrix_x4((values_row ^ step % 4 * 32) + step / 4 * kChunkBytes, fragment[n][0], fragment[n][1], fragment[n][2], fragment[n][3]);
          }
          wgmma_fence();
#pragma unroll
          for (int n = 0; n < kSteps; ++n) {
            const int step = i * kSteps + n;
            Mma::template rs<0>(logits, fragment[n], descriptor(query_low + (step / 4 * kRows * 128 + step % 4 * 32) / 16));
          }
          wgmma_commit();
        }
        wgmma_wait<0>();
        wgmma_pin(logits);
#pragma unroll
        for (int c = 0; c < kOwn; ++c) wgmma_pin(out[c]);
      }

      // Whole logits of this warpgroup's rows: its own part and the other's.
      float(&own)[kOwnLogits] = reinterpret_cast<float(&)[kOwnLogits]>(logits);
#pragma unroll
      for (int n = 0; n < kHalfBlocks; ++n) {
        const float* away = logits + kOwnLogits + n * 4;
        shared.exchange[(group * kHalfBlocks + n) * 128 + in_group] = make_float4(away[0], away[1], away[2], away[3]);
      }
      named_barrier_sync(kBothBarrier, kBoth);
#pragma unroll
      for (int n = 0; n < kHalfBlocks; ++n) {
        const float4 other = shared.exchange[((group ^ 1) * kHalfBlocks + n) * 128 + in_group];
        own[n * 4] += other.x;
        own[n * 4 + 1] += other.y;
        own[n * 4 + 2] += other.z;
        own[n * 4 + 3] += other.w;
      }

      const int token = token0 + token_in_tile;
      if constexpr (!Logits::kPlain) {
        typename Logits::Row rows[kHalfBlocks * 2];
#pragma unroll
        for (int i = 0; i < kHalfBlocks * 2; ++i) rows[i] = policy.row(row0 + half_row0 + i / 2 * 8 + j * 2 + i % 2);
        const int position = policy.position(token), low = policy.position(token + 8);
        policy.apply(
            own, [&](int i) { return i % 4 < 2 ? position : low; }, [&](int i) { return rows[i / 4 * 2 + i % 2]; });
      } else if (token0 + kTokenTile > unmasked_tokens) {
#pragma unroll
        for (int n = 0; n < kHalfBlocks; ++n)
#pragma unroll
          for (int e = 0; e < 2; ++e) {
            const int limit = schedule.limit(piece, row0 + half_row0 + n * 8 + j * 2 + e);
            if (token >= limit) own[n * 4 + e] = -INFINITY;
            if (token + 8 >= limit) own[n * 4 + 2 + e] = -INFINITY;
          }
      }

      // The reference of the exponent moves only when a logit exceeds it by 2^8, which after the first tile is rare. Probabilities are therefore
      // made with the old one, and once more where the barrier finds that some logit of the block exceeds its reference.
      bool exceeds = false;
#pragma unroll
      for (int n = 0; n < kHalfBlocks; ++n)
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          exceeds |= fmaxf(own[n * 4 + e], own[n * 4 + 2 + e]) * Logits::scale(args) > maximum[n * 2 + e] + 8.0f;
        }
      float tile_sum[kHalfBlocks * 2];
      const auto store_probabilities = [&] {
        float p[kOwnLogits];
#pragma unroll
        for (int n = 0; n < kHalfBlocks; ++n)
#pragma unroll
          for (int e = 0; e < 2; ++e) {
            p[n * 4 + e] = exp2_approx(fmaf(own[n * 4 + e], Logits::scale(args), -maximum[n * 2 + e]));
            p[n * 4 + 2 + e] = exp2_approx(fmaf(own[n * 4 + 2 + e], Logits::scale(args), -maximum[n * 2 + e]));
            tile_sum[n * 2 + e] = p[n * 4 + e] + p[n * 4 + 2 + e];
          }
        // Matrix i of a store: token half i % 2 of column block n + i / 2.
        const int matrix = lane / 8, row_in_block = lane % 8;
        const int unit = 2 * warp + matrix % 2;
        const uint32_t row_address = smem_address(shared.probs) + half_row0 * 128 + row_in_block * 128 + ((unit ^ row_in_block) << 4);
        if constexpr (kHalfBlocks == 1) {
          stmatrix_x2_trans(row_address, pack_bf16(p[0], p[1]), pack_bf16(p[2], p[3]));
        } else {
#pragma unroll
          for (int n = 0; n < kHalfBlocks; n += 2) {
            stmatrix_x4_trans(row_address + (n + matrix / 2) * 1024, pack_bf16(p[n * 4], p[n * 4 + 1]), pack_bf16(p[n * 4 + 2], p[n * 4 + 3]),
                              pack_bf16(p[n * 4 + 4], p[n * 4 + 5]), pack_bf16(p[n * 4 + 6], p[n * 4 + 7]));
          }
        }
        fence_async_proxy();  // values and probabilities
      };
      store_probabilities();
      if (named_barrier_any(kBothBarrier, kBoth, exceeds)) {
#pragma unroll
        for (int n = 0; n < kHalfBlocks; ++n)
#pragma unroll
          for (int e = 0; e < 2; ++e) {
            float top = fmaxf(own[n * 4 + e], own[n * 4 + 2 + e]) * Logits::scale(args);
#pragma unroll
            for (int d = 4; d < 32; d *= 2) top = fmaxf(top, __shfl_xor_sync(~0u, top, d));
            if (lane < 4) shared.warp_values[warp * kRows + half_row0 + n * 8 + lane * 2 + e] = top;
          }
        named_barrier_sync(group_barrier, 128);
#pragma unroll
        for (int n = 0; n < kHalfBlocks; ++n)
#pragma unroll
          for (int e = 0; e < 2; ++e) {
            const int row = half_row0 + n * 8 + j * 2 + e;
            float top = maximum[n * 2 + e];
#pragma unroll
            for (int w = 0; w < 4; ++w) top = fmaxf(top, shared.warp_values[w * kRows + row]);
            const float factor = exp2_approx(maximum[n * 2 + e] - top);
            maximum[n * 2 + e] = top;
            sum[n * 2 + e] *= factor;
            if (warp == 0 && lane < 4) shared.factors[row] = factor;
          }
        store_probabilities();
        named_barrier_sync(kBothBarrier, kBoth);
#pragma unroll
        for (int n = 0; n < kColumnBlocks; ++n) {
          const float2 factor = *reinterpret_cast<const float2*>(shared.factors + n * 8 + j * 2);
#pragma unroll
          for (int c = 0; c < kOwn; ++c) {
            out[c][n * 4] *= factor.x;
            out[c][n * 4 + 1] *= factor.y;
            out[c][n * 4 + 2] *= factor.x;
            out[c][n * 4 + 3] *= factor.y;
          }
        }
      }
#pragma unroll
      for (int i = 0; i < kHalfBlocks * 2; ++i) sum[i] += tile_sum[i];
#pragma unroll
      for (int c = 0; c < kOwn; ++c) wgmma_pin(out[c]);
      wgmma_fence();
#pragma unroll
      for (int c = 0; c < kOwn; ++c) {
#pragma unroll
        for (int k = 0; k < 4; ++k) Mma::template ss<1, 0>(out[c], descriptor(values_low + (c * kChunkBytes + k * 2048) / 16), descriptor(probs_low + k * 2));
      }
      wgmma_commit();
    }
    wgmma_wait<0>();
#pragma unroll
    for (int c = 0; c < kOwn; ++c) wgmma_pin(out[c]);

    // Sums over the lanes and warps of the warpgroup that has the row.
#pragma unroll
    for (int i = 0; i < kHalfBlocks * 2; ++i) {
#pragma unroll
      for (int d = 4; d < 32; d *= 2) sum[i] += __shfl_xor_sync(~0u, sum[i], d);
      if (lane < 4) {
        const int row = half_row0 + i / 2 * 8 + lane * 2 + i % 2;
        shared.warp_values[warp * kRows + row] = sum[i];
        if (warp == 0) shared.row_maxima[row] = maximum[i];
      }
    }
    named_barrier_sync(kBothBarrier, kBoth);
    const auto row_sum = [&](int row) {
      return shared.warp_values[row] + shared.warp_values[kRows + row] + (shared.warp_values[2 * kRows + row] + shared.warp_values[3 * kRows + row]);
    };

    const bool is_split = piece.participants > 1;
    const int64_t out_row0 = static_cast<int64_t>(piece.q_begin) * args.heads + row0;
    const int part = schedule.partial_index(piece, piece.participant);
    const int rows = min(piece.rows - row0, kRows);
    // A thread has two neighbouring columns of two rows, lane ^ 4 the next two: they trade, for four columns of one row each.
    const int odd = lane / 4 % 2;
#pragma unroll
    for (int n = 0; n < kColumnBlocks; ++n) {
      const int row = n * 8 + j * 2 + odd;
      float inverse[2] = {1.0f, 1.0f};
      if (!is_split) {
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const float total = row_sum(n * 8 + j * 2 + e);
          inverse[e] = total > 0.0f ? __fdividef(1.0f, total) : 0.0f;
        }
      }
#pragma unroll
      for (int c = 0; c < kOwn; ++c) {
        const float values[2][2] = {{out[c][n * 4] * inverse[0], out[c][n * 4 + 2] * inverse[0]}, {out[c][n * 4 + 1] * inverse[1], out[c][n * 4 + 3] * inverse[1]}};
        float received[2];
#pragma unroll
        for (int i = 0; i < 2; ++i) received[i] = __shfl_xor_sync(~0u, odd ? values[0][i] : values[1][i], 4);
        const float4 four = odd ? make_float4(received[0], received[1], values[1][0], values[1][1]) : make_float4(values[0][0], values[0][1], received[0], received[1]);
        const int column = (first_chunk + c) * 64 + warp * 16 + lane / 8 * 4;
        if (row >= rows || (kLatent % 64 != 0 && column >= kLatent)) continue;
        if (is_split) {
          *reinterpret_cast<float4*>(args.partial_out + (static_cast<int64_t>(part) * kRows + row) * kLatent + column) = four;
        } else {
          *reinterpret_cast<uint2*>(static_cast<__nv_bfloat16*>(args.out) + (out_row0 + row) * kLatent + column) = make_uint2(pack_bf16(four.x, four.y), pack_bf16(four.z, four.w));
        }
      }
    }
    if (thread < rows) {
      const float total = row_sum(thread), top = shared.row_maxima[thread];
      if (is_split) {
        args.partial_sum[part * kRows + thread] = make_float2(top, total);
      } else if (args.lse) {
        args.lse[out_row0 + thread] = total > 0.0f ? (top + log2f(total)) * 0.6931471805599453f : -INFINITY;
      }
    }
    if (is_split) {
      if (thread == 0) shared.split[splits] = piece;
      ++splits;
      __threadfence();
      named_barrier_sync(kBothBarrier, kBoth);
      if (thread == 0) publish_part(args.arrivals + schedule.arrival_index(piece));
    }
  }

  const auto barrier = [] { named_barrier_sync(kBothBarrier, kBoth); };
  for (int i = 0; i < splits; ++i) combine_parts<kLatent, kBoth>(args, schedule, shared.split[i], shared.values, thread, barrier);
}

template <int kLatent, int kRows, class Logits>
__global__ void __launch_bounds__(384, (Fp8Shape<kLatent, kRows>::kBlocks)) sm90_mla_decode_fp8(const __grid_constant__ MlaDecodeArgs args) {
  using Shape = Fp8Shape<kLatent, kRows>;
  extern __shared__ uint8_t shared_raw[];
  uint8_t* base = shared_raw + ((kSharedAlignment - (smem_address(shared_raw) & (kSharedAlignment - 1))) & (kSharedAlignment - 1));
  Fp8Shared<Shape> shared;
  shared.values = base;
  shared.query = shared.values + Shape::kValueBytes;
  shared.probs = shared.query + Shape::kQueryBytes;
  shared.exchange = reinterpret_cast<float4*>(shared.probs + Shape::kProbBytes);
  uint8_t* scratch = shared.probs + Shape::kProbBytes + Shape::kExchangeBytes;
  shared.ring.runs = scratch + Shape::kScratchBytes;
  int* plan_scratch = reinterpret_cast<int*>(scratch);  // 34 ints
  shared.split = reinterpret_cast<DecodePiece*>(scratch + 144);
  shared.ring.barriers = reinterpret_cast<uint64_t*>(scratch + 256);
  shared.factors = reinterpret_cast<float*>(scratch + 1024);
  shared.row_maxima = reinterpret_cast<float*>(scratch + 1536);
  shared.warp_values = reinterpret_cast<float*>(scratch + 2048);

  const DecodeSchedule<kRows, Shape::kOverhead, Logits> schedule(args);
  if (threadIdx.x / 32 == 1) shared.ring.init(2);  // warpgroups
  if (threadIdx.x / 32 == 2) prefetch_block_table(args);
  const DecodeShare share = schedule.share(plan_scratch, reinterpret_cast<int*>(shared.query));  // its barriers also publish the mbarriers

  if (threadIdx.x < 128) {
    registers_shrink<Shape::kFeedRegisters>();
    if (threadIdx.x < 32) shared.ring.template feed<kRows, kLatent, Logits>(args, schedule, share);
  } else {
    registers_grow<Shape::kComputeRegisters>();
    const int group = warp_uniform(threadIdx.x / 128 - 1);
    if constexpr (Shape::kChunks % 2 == 0) {
      compute<kLatent, kRows, Shape::kChunks / 2, Logits>(args, schedule, share, shared, group, group * (Shape::kChunks / 2));
    } else if (group == 0) {
      compute<kLatent, kRows, Shape::kChunks / 2, Logits>(args, schedule, share, shared, 0, 0);
    } else {
      compute<kLatent, kRows, Shape::kChunks / 2 + 1, Logits>(args, schedule, share, shared, 1, Shape::kChunks / 2);
    }
  }
}

namespace {

template <int kLatent, int kRows>
DecodeKernel describe(LogitKind logits) {
  using Shape = Fp8Shape<kLatent, kRows>;
  const void* function = logits == LogitKind::plain ? reinterpret_cast<const void*>(&sm90_mla_decode_fp8<kLatent, kRows, PlainLogits>)
                                                    : reinterpret_cast<const void*>(&sm90_mla_decode_fp8<kLatent, kRows, VariantLogits>);
  return {function, kRows, Shape::kSharedBytes, Shape::kThreads, false, Shape::kBlocks};
}

template <int kLatent>
DecodeKernel choose_rows(int rows, LogitKind logits) {
  if (rows <= 16) return describe<kLatent, 16>(logits);
  if constexpr (kLatent == 512) {
    if (rows > 32) return describe<kLatent, 64>(logits);
  }
  return describe<kLatent, 32>(logits);
}

}  // namespace

DecodeKernel sm90_mla_decode_fp8_kernel(int latent, int rows, LogitKind logits) {
  if (rows > 32 && latent < 512) return sm90_mla_decode_fp8_tile_kernel(latent, rows, logits);
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
