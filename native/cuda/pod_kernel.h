// The fused prefill+decode kernels, as the dispatcher sees them.
#pragma once

namespace tpla::cuda {

struct PodKernel {
  const void* function = nullptr;  // null: no kernel for this latent
  int block_rows = 0;
  int shared_bytes = 0;
  int box_chunks = 0;  // chunks of 64 columns a TMA box takes where 64 tokens are sure to lie in one page
};

PodKernel sm90_pod_kernel(int latent, int rows);

}  // namespace tpla::cuda
