// How fused prefill+decode cuts decode into items. They follow from the lengths alone, so the same lengths give the same bits, whichever block draws
// an item.
#pragma once

#include "mla_decode_combine.cuh"

namespace tpla::cuda {

constexpr int kMostSequences = 1024;  // of decode
constexpr int kMostParts = 32;        // of one sequence
constexpr int kItems = 512;           // at most, more by at most one a sequence
constexpr int kShrink = 64;           // a part is this fraction of all tiles that are left, so that items shrink towards the end
constexpr int kLeastPartTiles = 16;
constexpr int kPodDecodeControlBytes = 2048;
constexpr int kPodControlBytes = kPodDecodeControlBytes + 256 /* prefill */ + (kMostSequences + 2) * 2 /* PodItems */;

struct PodPiece : DecodePiece {
  int first_item;  // of the sequence, times row tiles, plus this row tile
  int row_tiles;
  int arrival;

  __device__ int partial_index(int part) const { return first_item + part * row_tiles; }
};

struct PodItems {
  const uint16_t* first;  // shared memory, [sequences + 1]: items before each sequence
  int* counter;

  __device__ static int tiles(const MlaDecodeArgs& args, int sequence) { return (args.kv_lens[sequence] + kTokenTile - 1) / kTokenTile; }
  __device__ static int query_tokens(const MlaDecodeArgs& args, int sequence) {
    return args.q_indptr ? args.q_indptr[sequence + 1] - args.q_indptr[sequence] : args.q_tokens;
  }
  // `left`: tiles of this and all later sequences. A sequence without tokens is one item that writes zeros.
  __device__ static int parts(int tiles, int left, int all) {
    const int part_tiles = max(max((left + kShrink - 1) / kShrink, (all + kItems - 1) / kItems), kLeastPartTiles);
    return min(max((tiles + part_tiles - 1) / part_tiles, 1), kMostParts);
  }

  // False past the last item. Tickets of one item's row tiles follow each other, so that all but the first find the tokens in L2.
  __device__ bool find(const MlaDecodeArgs& args, int ticket, int block_rows, PodPiece& piece) const {
    const int item = ticket / args.row_tiles, row_tile = ticket % args.row_tiles;
    if (item >= first[args.batch]) return false;
    int low = 0, high = args.batch;  // first[low] <= item < first[high]
    while (high - low > 1) {
      const int middle = (low + high) / 2;
      if (first[middle] <= item) low = middle;
      else high = middle;
    }
    piece.sequence = low;
    piece.kv_len = args.kv_lens[low];
    piece.q_begin = args.q_indptr ? args.q_indptr[low] : low * args.q_tokens;
    piece.q_tokens = query_tokens(args, low);
    piece.rows = piece.q_tokens * args.heads;
    piece.participants = first[low + 1] - first[low];
    piece.participant = item - first[low];
    piece.row0 = row_tile * block_rows;
    piece.row_tiles = args.row_tiles;
    piece.first_item = first[low] * args.row_tiles + row_tile;
    piece.arrival = low * args.row_tiles + row_tile;
    const int count = piece.row0 < piece.rows ? tiles(args, low) : 0;
    piece.tile_begin = count * piece.participant / piece.participants;
    piece.tile_end = count * (piece.participant + 1) / piece.participants;
    return true;
  }
};

// Sum over the block, and over the threads before this one; `scratch`: an int a warp. Ends with a barrier.
__device__ inline int block_sum(int value, int* scratch, int* before = nullptr) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  int inclusive = value;
#pragma unroll
  for (int d = 1; d < 32; d *= 2) {
    const int other = __shfl_up_sync(~0u, inclusive, d);
    if (lane >= d) inclusive += other;
  }
  if (lane == 31) scratch[warp] = inclusive;
  __syncthreads();
  int total = 0, of_warps_before = 0;
  for (int w = 0; w < static_cast<int>(blockDim.x) / 32; ++w) {
    if (w == warp) of_warps_before = total;
    total += scratch[w];
  }
  if (before) *before = of_warps_before + inclusive - value;
  __syncthreads();
  return total;
}

// All threads of the block call this; `scratch`: an int a warp. Fills `first` (shared memory, sequences + 1 numbers) and returns the tiles of all
// sequences. Ends with a barrier.
__device__ inline int cut_decode(const MlaDecodeArgs& decode, int* counter, uint16_t* first, int* scratch, PodItems& items) {
  const int threads = blockDim.x, thread = threadIdx.x;
  const int per_thread = (decode.batch + threads - 1) / threads;
  const int begin = min(thread * per_thread, decode.batch), end = min(begin + per_thread, decode.batch);
  int own = 0, tiles_before, items_before;
  for (int i = begin; i < end; ++i) own += PodItems::tiles(decode, i);
  const int decode_tiles = block_sum(own, scratch, &tiles_before);

  // Adds up the parts of this thread's sequences, and says where each begins.
  const auto count_parts = [&](auto begins_at) {
    int count = 0, left = decode_tiles - tiles_before;
    for (int i = begin; i < end; ++i) {
      const int tiles = PodItems::tiles(decode, i);
      begins_at(i, count);
      count += PodItems::parts(tiles, left, decode_tiles);
      left -= tiles;
    }
    return count;
  };
  items.first = first;
  items.counter = counter;
  const int all_items = block_sum(count_parts([](int, int) {}), scratch, &items_before);
  count_parts([&](int i, int before) { first[i] = static_cast<uint16_t>(items_before + before); });
  if (thread == threads - 1) first[decode.batch] = static_cast<uint16_t>(all_items);
  __syncthreads();
  return decode_tiles;
}

}  // namespace tpla::cuda
