#pragma once

#include <memory>

#include "cuda/bench/gpu_problem.h"

namespace tpla::bench {

// Un-absorbed prefill of a ragged batch, with NaN behind the last key. `timed`: several input sets, see sets_that_outgrow_l2.
std::unique_ptr<GpuProblem> make_gpu_prefill(const PrefillShape& shape, uint64_t seed, bool timed);

// Name of the kernel family that would run; throws cuda::AttentionError where the kernels do not take the shape.
std::string gpu_kernel_for(const PrefillShape& shape);

}  // namespace tpla::bench
