#pragma once

#include <memory>

#include "cuda/bench/gpu_problem.h"

namespace tpla::bench {

// Decode with ordinary keys and values over paged KV with NaN in every row that no query sees. `timed`: several input sets, see
// sets_that_outgrow_l2.
std::unique_ptr<GpuProblem> make_gpu_gqa(const GqaShape& shape, uint64_t seed, bool timed);

// Name of the kernel family that would run; throws cuda::AttentionError where the kernels do not take the shape.
std::string gpu_kernel_for(const GqaShape& shape);

}  // namespace tpla::bench
