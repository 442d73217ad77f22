#pragma once

#include <cuda_runtime.h>

namespace tpla::bench {

// Matrix instructions without end over operands that stay on chip, random so that they draw the power real data do: the rate the tensor
// cores can be driven at where nothing else stands in the way.
struct MatrixRateKernel {
  const void* function = nullptr;  // void(float* sink, int steps), one block a multiprocessor
  int threads = 0;
  int shared_bytes = 0;
  double flops_per_step = 0;  // of one block
};

MatrixRateKernel sm80_matrix_rate_kernel();  // mma.sync m16n8k16
MatrixRateKernel sm90_matrix_rate_kernel();  // wgmma m64n256k16; compute capability 9.0 only

}  // namespace tpla::bench
