// What the GQA decode kernels are launched with.
#pragma once

#include "mla_decode_args.h"

namespace tpla::cuda {

// An item of the schedule is one KV head of one sequence: item = sequence · kv_heads + KV head. Its rows are the query heads of that KV head,
// for one query token after the other.
struct GqaDecodeArgs {
  const void* q;
  const void* k;
  const void* v;
  const int32_t* block_table;
  const int32_t* kv_lens;
  const int32_t* q_indptr;
  void* out;
  float* lse;
  float softmax_scale_log2;  // softmax scale · log2(e)
  int batch;                 // items
  int heads;                 // query heads of one KV head
  int kv_heads;
  int q_tokens;
  int page_size;
  int box_tokens;            // 16
  int64_t page_stride;       // bytes, of keys as of values
  int64_t token_stride;
  int64_t head_stride;
  int block_table_stride;
  int causal;
  int row_tiles;
  int slots;
  float* partial_out;        // [block][2][rows of the tile][head_dim], not normalised
  float2* partial_sum;       // [block][2][rows of the tile]: running maximum (log2 units), sum
  int* arrivals;             // [block], zero between launches
  LogitArgs logits;

#if defined(__CUDACC__)
  static constexpr bool kStacks = false;
  __device__ int sequence_of(int item) const { return item / kv_heads; }
  __device__ int first_head(int item) const { return item % kv_heads * heads; }
  // Row row0 + i + j of an item -> row of out and lse.
  __device__ int64_t out_row(int item, int q_begin, int row0, int i = 0, int j = 0) const {
    const int row = row0 + i + j;
    return (static_cast<int64_t>(q_begin) + row / heads) * (kv_heads * heads) + first_head(item) + row % heads;
  }
#endif
};

}  // namespace tpla::cuda
