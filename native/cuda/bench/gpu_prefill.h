#pragma once

#include <memory>

#include "cuda/attention.h"
#include "cuda/bench/gpu_problem.h"

namespace tpla::bench {

// Sizes only: enough for the kernels to say whether they take the shape.
cuda::MlaPrefill prefill_sizes(const PrefillShape& shape);

class GpuPrefillProblem : public GpuProblem {
 public:
  virtual cuda::MlaPrefill call(int set) const = 0;
};

// Un-absorbed prefill of a ragged batch, with NaN behind the last key. `timed`: several input sets, see sets_that_outgrow_l2.
std::unique_ptr<GpuPrefillProblem> make_gpu_prefill(const PrefillShape& shape, uint64_t seed, bool timed);

// Name of the kernel family that would run; throws cuda::AttentionError where the kernels do not take the shape.
std::string gpu_kernel_for(const PrefillShape& shape);

}  // namespace tpla::bench
