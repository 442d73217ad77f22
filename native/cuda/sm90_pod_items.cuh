// How fused prefill+decode cuts decode into items, and how many multiprocessors begin with it. Items follow from the lengths alone, so the same
// lengths give the same bits, whichever block draws an item.
#pragma once

#include "mla_decode_combine.cuh"
#include "mla_prefill_schedule.cuh"

namespace tpla::cuda {

constexpr int kMostSequences = 1024;  // of decode
constexpr int kMostParts = 32;        // of one sequence
constexpr int kItems = 512;           // at most, more by at most one a sequence
constexpr int kShrink = 96;           // a part is this fraction of all tiles that are left, so that items shrink towards the end
constexpr int kLeastPartTiles = 8;
constexpr int kPodDecodeControlBytes = 2048;
constexpr int kPodControlBytes = kPodDecodeControlBytes + 256 /* prefill */ + (kMostSequences + 2) * 2 /* PodItems */;

struct PodCosts {
  float decode_tile;        // nanoseconds a multiprocessor takes for a tile of 64 tokens
  float prefill_block;      // for 128 query rows × 128 keys
  float prefill_tile;       // and for 128 query rows, however many keys
  int most_decode;          // multiprocessors that saturate memory with decode
  int decode_first;         // 0: from the costs
};

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

// All threads of the block call this. `first` (shared memory, sequences + 1 numbers) is filled; true where this multiprocessor begins with decode.
__device__ inline bool plan_pod(const PrefillArgs& prefill, const MlaDecodeArgs& decode, const PodCosts& costs, int* counter, uint16_t* first, PodItems& items) {
  __shared__ int scratch[16];
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

  // Multiprocessors in proportion to the work, but no more for decode than memory can serve.
  int blocks = 0, tiles = 0;
  for (int i = thread; i < prefill.batch; i += threads) {
    const int q_len = prefill.q_indptr[i + 1] - prefill.q_indptr[i], kv_len = prefill.kv_indptr[i + 1] - prefill.kv_indptr[i];
    const int mean_keys = prefill.causal ? max(kv_len - q_len / 2, kv_len / 2) : kv_len;
    tiles += (q_len + kPrefillRows - 1) / kPrefillRows;
    blocks += (q_len + kPrefillRows - 1) / kPrefillRows * (mean_keys / 128);
  }
  const float prefill_ns = (costs.prefill_block * block_sum(blocks, scratch) + costs.prefill_tile * block_sum(tiles, scratch)) * prefill.heads;
  const float decode_ns = costs.decode_tile * decode_tiles * decode.row_tiles;
  const int all = gridDim.x;
  int decoding = costs.decode_first;
  if (decoding == 0) decoding = min(max(__float2int_rn(all * decode_ns / (decode_ns + prefill_ns)), 1), costs.most_decode);
  uint32_t multiprocessor;
  asm volatile("mov.u32 %0, %%smid;" : "=r"(multiprocessor));
  return (multiprocessor + 1) * decoding / all > multiprocessor * decoding / all;  // evenly over the chip
}

}  // namespace tpla::cuda
