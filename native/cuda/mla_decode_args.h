// What every MLA decode kernel is launched with.
#pragma once

#include <cstdint>

namespace tpla::cuda {

constexpr int kTokenTile = 64;  // tokens a kernel handles at a time; unit of scheduling

// Blocks of the launch form row_tiles × slots: block = slot · row_tiles + row tile. Blocks of one slot read the same tokens at
// about the same time, so that all but the first of them find the tokens in L2.
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
  int box_tokens;  // tokens a TMA box takes: gcd(page_size, kTokenTile)
  int num_pages;
  int64_t page_stride;  // bytes
  int block_table_stride;
  int causal;
  int row_tiles;
  int slots;
  float* partial_out;   // [block][2][rows of the tile][latent], not normalised
  float2* partial_sum;  // [block][2][rows of the tile]: running maximum (log2 units), sum
  int* arrivals;        // [block], zero between launches
};

}  // namespace tpla::cuda
