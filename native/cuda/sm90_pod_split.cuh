// How many multiprocessors of a fused launch begin with decode. Follows on the device from the lengths, by what both kinds of work cost, so that a
// captured graph may be replayed with others. It decides who does the work, not what is computed.
#pragma once

#include "mla_prefill_schedule.cuh"
#include "sm90_pod_items.cuh"

namespace tpla::cuda {

// Nanoseconds of one multiprocessor.
struct PodCosts {
  float prefill_block;     // for 128 query rows × 128 keys
  float prefill_tile;      // and for 128 query rows, however many keys
  float decode_tile;       // for a tile of 64 tokens
  float decode_neighbour;  // and for each multiprocessor that decodes at the same time: they share the memory
  int decode_first;        // multiprocessors that begin with decode; 0: from the costs
};

struct PrefillLengths {
  int q_len, kv_len;
  bool causal;

  __device__ PrefillLengths(const PrefillArgs& args, int sequence)
      : q_len(args.q_indptr[sequence + 1] - args.q_indptr[sequence]), kv_len(args.kv_indptr[sequence + 1] - args.kv_indptr[sequence]), causal(args.causal) {}

  __device__ int row_blocks() const { return (q_len + kPrefillRows - 1) / kPrefillRows; }
  // That a row sees.
  __device__ int mean_keys() const { return causal ? max(kv_len - q_len / 2, kv_len / 2) : kv_len; }
  __device__ int least_keys() const { return causal ? max(kv_len - q_len, 0) : kv_len; }
};

// The work of both kinds, and when all of it is done if so many multiprocessors begin with decode.
struct PodWork {
  float prefill_ns;   // of one multiprocessor
  int prefill_tiles;
  bool whole_rounds;  // prefill tiles are of about one length: multiprocessors finish them in rounds
  int decode_tiles;

  __device__ float decode_ns(const PodCosts& costs, int decoding) const { return decode_tiles * (costs.decode_tile + decoding * costs.decode_neighbour); }

  __device__ float end(const PodCosts& costs, int decoding, int all) const {
    const int others = all - decoding;
    const float decode_end = decode_ns(costs, decoding) / decoding;
    float prefill_end, idle_ns = 0.0f;
    int idle = 0;  // multiprocessors that find no tile in the last round: they help with decode
    if (whole_rounds) {
      const float round = prefill_ns / prefill_tiles;
      const int before = static_cast<int>(decode_end / round);  // rounds that the others finish until decode ends
      const int rounds = (prefill_tiles + decoding * (before + 1) + all - 1) / all;
      const int rounds_after = max((prefill_tiles - others * before + all - 1) / all, 0);
      prefill_end = fminf(rounds * round, decode_end + rounds_after * round);
      const int rounds_of_others = others > 0 ? (prefill_tiles + others - 1) / others : 0;
      if (others > 0 && rounds_of_others * round <= prefill_end) {
        prefill_end = rounds_of_others * round;
        idle = others * rounds_of_others - prefill_tiles;
        idle_ns = idle * round;
      }
    } else {
      prefill_end = prefill_ns <= others * decode_end ? prefill_ns / others : decode_end + (prefill_ns - others * decode_end) / all;
    }
    if (prefill_end >= decode_end) return prefill_end;
    float left = (1.0f - prefill_end / decode_end) * decode_tiles;
    left -= idle_ns / (costs.decode_tile + min(decoding + idle, all) * costs.decode_neighbour);
    if (left <= 0.0f) return prefill_end;
    return prefill_end + left * (costs.decode_tile / all + costs.decode_neighbour) + kLeastPartTiles / 2 * (costs.decode_tile + decoding * costs.decode_neighbour);
  }

  // Multiprocessors that should begin with decode, by all threads of the block. `scratch`: an int a warp.
  __device__ int best_split(const PodCosts& costs, int all, int* scratch) const {
    constexpr float kPerStep = 2e-3f;  // of two splits that end at about the same time, the one nearer to the proportion of the work
    constexpr unsigned kNumber = 1023;
    const float proportion = all * decode_ns(costs, all / 4) / (decode_ns(costs, all / 4) + prefill_ns);
    unsigned best = ~0u;  // time in the upper bits, the split in the lower ones
    for (int decoding = max(all / 8, 1) + threadIdx.x; decoding <= min(all, static_cast<int>(kNumber)); decoding += blockDim.x) {
      const float time = end(costs, decoding, all) * (1.0f + kPerStep * fminf(fabsf(decoding - proportion), all / 8));
      best = min(best, (__float_as_uint(time) & ~kNumber) | decoding);
    }
    best = __reduce_min_sync(~0u, best);
    if (threadIdx.x % 32 == 0) scratch[threadIdx.x / 32] = static_cast<int>(best);
    __syncthreads();
    for (int w = 0; w < static_cast<int>(blockDim.x) / 32; ++w) best = min(best, static_cast<unsigned>(scratch[w]));
    return static_cast<int>(best & kNumber);
  }
};

// Whether this multiprocessor begins with decode, whose row tiles together have `decode_tiles` tiles. All threads of the block call this; `scratch`:
// an int a warp.
__device__ inline bool begins_with_decode(const PrefillArgs& prefill, int decode_tiles, const PodCosts& costs, int* scratch) {
  int decoding = costs.decode_first;
  if (decoding == 0) {
    int blocks = 0, tiles = 0;
    for (int i = threadIdx.x; i < prefill.batch; i += blockDim.x) {
      const PrefillLengths lengths(prefill, i);
      tiles += lengths.row_blocks();
      blocks += lengths.row_blocks() * (lengths.mean_keys() / 128);
    }
    blocks = block_sum(blocks, scratch);
    tiles = block_sum(tiles, scratch);
    int uneven = 0;  // sequences with tiles of less than half or more than twice the mean
    for (int i = threadIdx.x; i < prefill.batch; i += blockDim.x) {
      const PrefillLengths lengths(prefill, i);
      if (lengths.q_len > 0) uneven += lengths.least_keys() / 128 * 2 * tiles < blocks || lengths.kv_len / 128 * tiles > blocks * 2;
    }
    PodWork work{};
    work.prefill_ns = (costs.prefill_block * blocks + costs.prefill_tile * tiles) * prefill.heads;
    work.prefill_tiles = tiles * prefill.heads;
    work.whole_rounds = block_sum(uneven, scratch) == 0 && tiles > 0;
    work.decode_tiles = decode_tiles;
    decoding = work.best_split(costs, gridDim.x, scratch);
  }
  const int all = gridDim.x;
  uint32_t multiprocessor;
  asm volatile("mov.u32 %0, %%smid;" : "=r"(multiprocessor));
  return (multiprocessor + 1) * decoding / all > multiprocessor * decoding / all;  // evenly over the chip
}

}  // namespace tpla::cuda
