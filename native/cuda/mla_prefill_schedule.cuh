// What every prefill kernel is launched with, and the order in which its tiles are taken: 128 query rows of one head each.
#pragma once

#include <cuda_bf16.h>

#include <cstdint>

namespace tpla::cuda {

constexpr int kPrefillKeyDim = 192;
constexpr int kPrefillValueDim = 128;
constexpr int kPrefillRopeDim = 64;  // of the key's columns, the last
constexpr int kPrefillRows = 128;  // of a tile

struct PrefillArgs {
  const __nv_bfloat16* q;
  const __nv_bfloat16* k;
  const __nv_bfloat16* v;
  const __nv_bfloat16* k_rope;
  int64_t k_token, k_head, v_token, v_head, k_rope_token, k_rope_head;  // strides in values; all heads may share k_rope
  const int32_t* q_indptr;
  const int32_t* kv_indptr;
  __nv_bfloat16* out;
  float* lse;
  float scale_log2;
  int batch;
  int heads;
  int heads_per_group;  // whose keys and values of the longest sequence share L2
  int row_blocks;       // of the longest sequence
  int causal;
  int* counter;  // [0] tiles drawn, [1] blocks that are through; both zero between launches

  __host__ __device__ int tiles() const { return (heads + heads_per_group - 1) / heads_per_group * heads_per_group * row_blocks * batch; }
};

struct PrefillTile {
  int head;
  int q_begin;  // of the sequence
  int q_len;
  int kv_begin;
  int kv_len;
  int row0;         // within the sequence
  int first_limit;  // keys that row 0 of the tile sees, the next row one more; negative where it sees none
  int keys;         // that any row of the tile sees

  __device__ int rows() const { return min(q_len - row0, kPrefillRows); }
  __device__ int limit(int row) const { return min(kv_len, first_limit + row); }
};

// Group of heads, then row blocks from the last, then sequences, then heads of the group. False: no such rows.
__device__ inline bool find_tile(const PrefillArgs& args, int index, PrefillTile& tile) {
  const int per_group = args.row_blocks * args.batch * args.heads_per_group;
  const int group = index / per_group;
  int rest = index - group * per_group;
  const int head_in_group = rest % args.heads_per_group;
  rest /= args.heads_per_group;
  const int sequence = rest % args.batch;
  const int row_block = args.row_blocks - 1 - rest / args.batch;
  tile.head = group * args.heads_per_group + head_in_group;
  if (tile.head >= args.heads) return false;
  tile.q_begin = args.q_indptr[sequence];
  tile.q_len = args.q_indptr[sequence + 1] - tile.q_begin;
  tile.kv_begin = args.kv_indptr[sequence];
  tile.kv_len = args.kv_indptr[sequence + 1] - tile.kv_begin;
  tile.row0 = row_block * kPrefillRows;
  if (tile.row0 >= tile.q_len) return false;
  tile.first_limit = args.causal ? tile.kv_len - tile.q_len + 1 + tile.row0 : tile.kv_len;
  tile.keys = max(0, tile.limit(tile.rows() - 1));
  return true;
}

}  // namespace tpla::cuda
