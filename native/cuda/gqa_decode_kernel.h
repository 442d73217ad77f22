#pragma once

#include "mla_decode_kernel.h"

namespace tpla::cuda {

// function is null where there is no kernel for the head dim.
DecodeKernel sm80_gqa_decode_kernel(int head_dim, int rows, LogitKind logits);

}  // namespace tpla::cuda
