// Dense bf16 rate of Hopper's tensor cores, operands in shared memory: the ceiling that attention kernels are measured against.
#pragma once

#include "attention.h"

namespace tpla::cuda {

void launch_matrix_rate_sm90(float* sink, int steps, int blocks, Stream stream);

// Of one block.
double matrix_rate_sm90_flops_per_step();

}  // namespace tpla::cuda
