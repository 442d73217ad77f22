// Kernel tables: each architecture file names the kernels it has; the dispatcher picks and launches.
#pragma once

#include "attention.h"

namespace tpla::cuda {

struct DecodeKernel {
  const void* function = nullptr;  // null: the file has no kernel for this shape
  int block_rows = 0;              // query rows (query token × head) a block takes
  int shared_bytes = 0;
  int threads = 0;
  bool tensor_map = false;  // first kernel parameter is the CUtensorMap of the pages
  int blocks_per_multiprocessor = 1;
  int run_chunks = 0;  // not 0: the second kernel parameter is another tensor map of the pages, with boxes of so many chunks of 64 columns
};

struct MlaDecodeArgs;

// What a call says; how the launch is divided, its workspace and logit variants are still to be set.
MlaDecodeArgs mla_decode_args(const MlaDecode& call);

// Which instantiation: the plain one pays nothing for what the others can do. Only chunk and variant take stacked row tiles; where a kernel has no
// instantiation for chunks, the variant one serves.
enum class LogitKind { plain, chunk, variant };

// Smallest kernel that takes `rows` rows at once, or the largest there is.
DecodeKernel sm90_mla_decode_narrow_kernel(int latent, int rows, LogitKind logits);
DecodeKernel sm90_mla_decode_tile_kernel(int latent, int rows, LogitKind logits);
DecodeKernel sm90_mla_decode_shared_kernel(int latent, int rows, LogitKind logits);
DecodeKernel sm90_mla_decode_fp8_kernel(int latent, int rows, LogitKind logits);
DecodeKernel sm90_mla_decode_fp8_tile_kernel(int latent, int rows, LogitKind logits);
DecodeKernel sm80_mla_decode_kernel(int latent, KvFormat format, LogitKind logits);

}  // namespace tpla::cuda
