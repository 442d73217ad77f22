// Device-side schedule of MLA decode: cuts the batch into shares of equal time without a host or a metadata kernel. Every block finds
// its share from the lengths alone, so the same lengths give the same cuts, hence the same bits. Two ways to cut, whichever ends first:
//
//   aligned: each sequence is cut into equal parts, one part a slot; the longest part is as short as the number of slots allows.
//            At most one piece a block, and short batches of similar lengths need no reduction.
//   stream:  the tiles of all sequences lie on one line, each sequence preceded by kOverhead units for its fixed cost; slot s
//            of S owns the s-th S-th ("stream-K"). Perfectly even, but a block may touch two split sequences.
#pragma once

#include "mla_decode_args.h"
#include "mla_decode_logits.cuh"

namespace tpla::cuda {

struct DecodeShare {
  int parts;  // aligned: parts of the one sequence; 0: stream
  int part;
  int unit_begin;  // aligned: tiles of the part
  int unit_end;
  int units;  // per slot
  int sequence;        // first item that may reach into the share
  int sequence_begin;  // its first unit
};

// Logits says which tokens of a sequence there are at all: what a window or a block mask hides is not scheduled.
template <int kBlockRows, int kOverhead, class Logits = PlainLogits, class Args = MlaDecodeArgs>
struct DecodeSchedule {
  static constexpr int kMinUnits = 2;
  static constexpr int kPlannedItems = 256;  // more get the stream cut
  static constexpr int kSplitCost = kOverhead > 1 ? 6 : 4;  // tiles that the second piece of a stream share is worth
  static constexpr int kCuts = kSplitCost + 2;              // lengths of the longest part that the aligned cut tries
  static constexpr int kGroups = kPlannedItems / 32;
  static constexpr int kPlanInts = kPlannedItems + kGroups + kCuts * kGroups;
  static constexpr bool kStacks = Args::kStacks && Logits::kStacks;

  const Args& args;
  int row_tile;
  int slot;

  __device__ explicit DecodeSchedule(const Args& a) : args(a), row_tile(blockIdx.x), slot(blockIdx.y) {}

  __device__ int query_tokens(int sequence) const {
    return args.q_indptr ? args.q_indptr[args.sequence_of(sequence) + 1] - args.q_indptr[args.sequence_of(sequence)] : args.q_tokens;
  }

  // Items are sequences, or as many of each as its rows are stacked.
  __device__ int items() const {
    if constexpr (kStacks) return args.batch * args.stacked;
    return args.batch;
  }
  __device__ int sequence_of(int item) const {
    if constexpr (kStacks) return args.stacked == 1 ? item : item / args.stacked;
    return item;
  }
  // Of the sequence's rows, the first that this block computes.
  __device__ int first_row(int item) const {
    if constexpr (kStacks) return (item % args.stacked * args.row_tiles + row_tile) * kBlockRows;
    return row_tile * kBlockRows;
  }

  __device__ int tiles(int item) const {
    const int sequence = sequence_of(item);
    int tokens = Logits::tokens(args, sequence);
    if constexpr (kStacks && Logits::kPlain) {
      // What comes after the item's last query token is nothing to it.
      if (args.causal) {
        const int q_tokens = query_tokens(sequence);
        const int end_row = min((item % args.stacked + 1) * args.row_tiles * kBlockRows, q_tokens * args.heads);
        tokens = max(tokens - (q_tokens - 1 - (end_row - 1) / args.heads), 0);
      }
    }
    return (tokens + kTokenTile - 1) / kTokenTile;
  }

  // 0 where the sequence has no rows for this block.
  __device__ int cost(int item) const {
    if ((args.q_indptr || kStacks) && query_tokens(sequence_of(item)) * args.heads <= first_row(item)) return 0;
    return tiles(item) + kOverhead;
  }

  // All threads of the block call this. `scratch` holds 34 ints, `workspace` kPlanInts, which are free again afterwards. Ends with a barrier.
  __device__ DecodeShare share(int* scratch, int* workspace) const {
    static_assert(sizeof(DecodeShare) <= 34 * sizeof(int));
    if (items() > kPlannedItems) return share_of_many(scratch);
    DecodeShare* result = reinterpret_cast<DecodeShare*>(scratch);
    plan(*result, workspace);
    __syncthreads();
    return *result;
  }

  // Takes the next non-empty piece off the share; false at its end.
  __device__ bool next(DecodeShare& share, DecodePiece& piece) const {
    if (share.parts > 0) {
      if (share.part == share.parts) return false;
      piece.tile_begin = share.unit_begin;
      piece.tile_end = share.unit_end;
      piece.participants = share.parts;
      piece.participant = share.part;
      describe(share.sequence, piece);
      share.part = share.parts;
      return true;
    }
    while (share.sequence < items() && share.sequence_begin < share.unit_end) {
      const int sequence = share.sequence;
      const int units = cost(sequence);
      const int first_tile_unit = share.sequence_begin + kOverhead;
      const int begin = share.sequence_begin;
      share.sequence++;
      share.sequence_begin += units;
      if (units == 0) continue;
      const int count = units - kOverhead;
      if (count == 0) {  // an empty sequence belongs to the slot its first unit lies in
        if (begin < share.unit_begin) continue;
        piece.tile_begin = piece.tile_end = 0;
        piece.participants = 1;
        piece.participant = 0;
      } else {
        piece.tile_begin = max(share.unit_begin - first_tile_unit, 0);
        piece.tile_end = min(share.unit_end - first_tile_unit, count);
        if (piece.tile_begin >= piece.tile_end) continue;
        const int first_slot = first_tile_unit / share.units;
        piece.participants = (first_tile_unit + count - 1) / share.units - first_slot + 1;
        piece.participant = slot - first_slot;
      }
      describe(sequence, piece);
      return true;
    }
    return false;
  }

  // Row within the sequence -> tokens it sees.
  __device__ int limit(const DecodePiece& piece, int row) const {
    return args.causal ? min(piece.kv_len, piece.kv_len - (piece.q_tokens - 1 - row / args.heads)) : piece.kv_len;
  }

  // Partial results: a block continues at most one sequence begun elsewhere (place 0) and begins at most one that ends elsewhere (place 1).
  __device__ int partial_index(const DecodePiece& piece, int participant) const {
    const int block = (slot - piece.participant + participant) * args.row_tiles + row_tile;
    return block * 2 + (participant == 0 ? 1 : 0);
  }
  __device__ int arrival_index(const DecodePiece& piece) const { return (slot - piece.participant) * args.row_tiles + row_tile; }

 private:
  __device__ void describe(int item, DecodePiece& piece) const {
    const int sequence = sequence_of(item);
    piece.sequence = sequence;
    piece.row0 = first_row(item);
    piece.kv_len = Logits::tokens(args, sequence);
    piece.q_begin = args.q_indptr ? args.q_indptr[args.sequence_of(sequence)] : args.sequence_of(sequence) * args.q_tokens;
    piece.q_tokens = query_tokens(sequence);
    piece.rows = piece.q_tokens * args.heads;
  }

  // Items in groups of 32, one a lane. Short code, no loop unrolled: every launch fetches it cold, which takes longer than to run it.
  __device__ void plan(DecodeShare& result, int* workspace) const {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
    const int count = items(), groups = (count + 31) / 32;
    int* units = workspace;                     // [item]
    int* group_units = units + kPlannedItems;   // [group]
    int* group_slots = group_units + kGroups;   // [cut][group]
#pragma unroll 1
    for (int group = warp; group < groups; group += warps) {
      const int item = group * 32 + lane, own = item < count ? cost(item) : 0;
      units[item] = own;
      const int sum = __reduce_add_sync(~0u, own);
      if (lane == 0) group_units[group] = sum;
    }
    __syncthreads();
    const int total = __reduce_add_sync(~0u, lane < groups ? group_units[lane] : 0);
    int stream_units = max(static_cast<int>(static_cast<unsigned>(total + args.slots - 1) / args.slots), kMinUnits);

    // Aligned, where there is a slot for each: the longest part is as short as the number of slots allows, if that is at most kSplitCost tiles longer
    // than what the stream cut gives. No part can be shorter than an even share without overhead.
    const bool may_align = count <= args.slots;
    const int shortest = max(stream_units - kOverhead - 1, 1), cuts = stream_units - kOverhead + kSplitCost - shortest + 1;
#pragma unroll 1
    for (int i = warp; i < groups * kCuts && may_align; i += warps) {
      const int group = i / kCuts, cut = i % kCuts;
      const int slots = __reduce_add_sync(~0u, parts_of(units[group * 32 + lane], shortest + cut));
      if (lane == 0) group_slots[cut * kGroups + group] = slots;
    }
    __syncthreads();
    int most = 0, length_of_all = total;
    const int* group_lengths = group_units;
    if (may_align) {
      int slots = 0;
#pragma unroll 1
      for (int group = 0; group < groups; ++group) slots += group_slots[lane % kCuts * kGroups + group];
      const unsigned enough = __ballot_sync(~0u, lane < cuts && slots <= args.slots);
      if (enough) {
        const int cut = __ffs(enough) - 1;
        most = shortest + cut;
        length_of_all = __shfl_sync(~0u, slots, cut);
        group_lengths = group_slots + cut * kGroups;
      }
    } else {
      stream_units = whole_sequences(units, stream_units);
    }

    // Aligned: which sequence, in parts, this slot falls into. Stream: which sequence, in units, the share begins in.
    const int position = most > 0 ? slot : slot * stream_units;
    if (position >= length_of_all && threadIdx.x == 0) result = {most > 0, most > 0, position, position, stream_units, count, 0};
#pragma unroll 1
    for (int group = warp; group < groups; group += warps) {
      const int item = group * 32 + lane;
      const int length = most > 0 ? parts_of(units[item], most) : units[item];
      int inclusive = length;
#pragma unroll
      for (int d = 1; d < 32; d *= 2) {
        const int other = __shfl_up_sync(~0u, inclusive, d);
        if (lane >= d) inclusive += other;
      }
      const int first = __reduce_add_sync(~0u, lane < group ? group_lengths[lane] : 0) + inclusive - length;
      if (position < first || position >= first + length) continue;
      if (most > 0) {
        const unsigned tiles = units[item] - kOverhead, part = position - first;
        result = {length, static_cast<int>(part), static_cast<int>(tiles * part / length), static_cast<int>(tiles * (part + 1) / length), stream_units, item, first};
      } else {
        result = {0, 0, position, min(position + stream_units, total), stream_units, item, first};
      }
    }
  }

  // Parts of a sequence when none may exceed `most` tiles.
  __device__ static int parts_of(int units, int most) { return units == 0 ? 0 : max(1, static_cast<int>(static_cast<unsigned>(units - kOverhead + most - 1) / most)); }

  // Share of a stream cut that, where all sequences are equally long, holds whole ones if that costs less than splitting two. By one warp.
  __device__ int whole_sequences(const int* units, int stream_units) const {
    const int length = units[0];
    bool equal = length > 0;
#pragma unroll 1
    for (int i = threadIdx.x % 32; i < items(); i += 32) equal &= units[i] == length;
    if (!__all_sync(~0u, equal)) return stream_units;
    const int whole = (stream_units + length - 1) / length * length;
    return whole - stream_units <= 2 * kSplitCost ? whole : stream_units;
  }

  // Stream cut of a long batch, by all threads.
  __device__ DecodeShare share_of_many(int* scratch) const {
    const int per_thread = (items() + blockDim.x - 1) / blockDim.x;
    const int first = min(static_cast<int>(threadIdx.x) * per_thread, items());
    const int last = min(first + per_thread, items());
    int own = 0;
    for (int i = first; i < last; ++i) own += cost(i);

    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
    int inclusive = own;
#pragma unroll
    for (int d = 1; d < 32; d *= 2) {
      const int other = __shfl_up_sync(~0u, inclusive, d);
      if (lane >= d) inclusive += other;
    }
    if (lane == 31) scratch[warp] = inclusive;
    if (threadIdx.x == 0) {
      scratch[32] = items();
      scratch[33] = 0;
    }
    __syncthreads();
    int before = 0, total = 0;
    for (int w = 0; w < warps; ++w) {
      if (w < warp) before += scratch[w];
      total += scratch[w];
    }
    const int begin = before + inclusive - own;

    DecodeShare result;
    result.parts = result.part = 0;
    result.units = max((total + args.slots - 1) / args.slots, kMinUnits);
    result.unit_begin = slot * result.units;
    result.unit_end = min(result.unit_begin + result.units, total);
    if (own > 0 && begin <= result.unit_begin && result.unit_begin < begin + own) {
      int sequence = first, position = begin;
      while (position + cost(sequence) <= result.unit_begin) position += cost(sequence++);
      scratch[32] = sequence;
      scratch[33] = position;
    }
    __syncthreads();
    result.sequence = scratch[32];
    result.sequence_begin = scratch[33];
    __syncthreads();
    return result;
  }
};

}  // namespace tpla::cuda
