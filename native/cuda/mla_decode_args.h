// What every MLA decode kernel is launched with.
#pragma once

#include <cstdint>

namespace tpla::cuda {

constexpr int kTokenTile = 64;  // tokens a kernel handles at a time; unit of scheduling

// What VariantLogits reads (mla_decode_logits.cuh).
struct LogitArgs {
  float softcap_in;              // 2 · log2(e) · softmax scale / softcap
  float softcap_out;             // softcap · log2(e); 0: no softcap
  int window;                    // tokens; at most kNoWindow, which hides none
  const float* slopes;           // [query heads]; null: no bias
  const int32_t* block_list;     // [sequences][block_list_stride], ascending; null: every block is visible
  const int32_t* block_counts;   // [sequences]
  int block_list_stride;
  int mask_block;                // tokens
};

constexpr int kNoWindow = 1 << 30;

// Blocks of the launch form a grid of row_tiles × slots. Blocks of one slot read the same tokens at
// about the same time, so that all but the first of them find the tokens in L2. Of a chunk of many query tokens, whose rows are more than
// row_tiles blocks take, `stacked` items of row_tiles row tiles each are scheduled like sequences of their own.
struct MlaDecodeArgs {
  const void* q;
  const void* kv;
  const int32_t* block_table;
  const int32_t* kv_lens;
  const int32_t* q_indptr;
  void* out;
  float* lse;
  const float* latent_scale;
  float softmax_scale_log2;  // softmax scale · log2(e)
  int batch;
  int heads;
  int q_tokens;
  int page_size;
  int box_tokens;  // tokens that are loaded at a time, always from one page: gcd of page_size, kTokenTile and, with a block mask, its block
  int num_pages;
  int64_t page_stride;  // bytes
  int block_table_stride;
  int causal;
  int row_tiles;
  int stacked;  // 1 but for chunks
  int slots;
  float* partial_out;   // [block][2][rows of the tile][latent], not normalised
  float2* partial_sum;  // [block][2][rows of the tile]: running maximum (log2 units), sum
  int* arrivals;        // [block], zero between launches
  LogitArgs logits;     // behind everything the plain kernels read

#if defined(__CUDACC__)
  static constexpr bool kStacks = true;
  // What has keys of its own: here a sequence.
  __device__ int sequence_of(int item) const { return item; }
  __device__ int first_head(int) const { return 0; }
  // Row row0 + i + j of an item -> row of out and lse.
  __device__ int64_t out_row(int, int q_begin, int row0, int i = 0, int j = 0) const { return static_cast<int64_t>(q_begin) * heads + row0 + i + j; }
#endif
};

}  // namespace tpla::cuda
