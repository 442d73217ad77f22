#pragma once

#include <memory>

#include "cuda/bench/gpu_problem.h"

namespace tpla::bench {

class GpuPodProblem : public GpuProblem {
 public:
  // From now on: prefill and decode one after the other, in two launches.
  virtual void run_serially() = 0;
  // From now on: fused, with so many multiprocessors that begin with decode; 0: chosen on the device.
  virtual void run_fused(int decode_multiprocessors) = 0;
};

// A prefill and a decode problem in one call.
std::unique_ptr<GpuPodProblem> make_gpu_pod(const PodShape& shape, uint64_t seed, bool timed);

// "sm90 fused", or the kernels of the two launches; throws cuda::AttentionError where the kernels do not take the shape.
std::string gpu_kernel_for(const PodShape& shape);

}  // namespace tpla::bench
