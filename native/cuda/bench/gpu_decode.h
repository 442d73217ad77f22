#pragma once

#include <memory>

#include "cuda/bench/gpu_problem.h"

namespace tpla::bench {

// Absorbed decode over paged KV with NaN in every row that no sequence holds. `timed`: several input sets, see sets_that_outgrow_l2.
std::unique_ptr<GpuProblem> make_gpu_decode(const DecodeShape& shape, uint64_t seed, bool timed);

// Name of the kernel family that would run; throws cuda::AttentionError where the kernels do not take the shape.
std::string gpu_kernel_for(const DecodeShape& shape);

}  // namespace tpla::bench
