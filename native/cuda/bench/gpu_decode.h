#pragma once

#include <memory>

#include "cuda/attention.h"
#include "cuda/bench/gpu_problem.h"

namespace tpla::bench {

// Sizes only: enough for the kernels to say whether they take the shape.
cuda::MlaDecode decode_sizes(const DecodeShape& shape);

class GpuDecodeProblem : public GpuProblem {
 public:
  virtual cuda::MlaDecode call(int set) const = 0;
};

// Absorbed decode over paged KV with NaN in every row that no sequence holds. `timed`: several input sets, see sets_that_outgrow_l2.
std::unique_ptr<GpuDecodeProblem> make_gpu_decode(const DecodeShape& shape, uint64_t seed, bool timed);

// Name of the kernel family that would run; throws cuda::AttentionError where the kernels do not take the shape.
std::string gpu_kernel_for(const DecodeShape& shape);

}  // namespace tpla::bench
