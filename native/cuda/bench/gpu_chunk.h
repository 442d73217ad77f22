#pragma once

#include <memory>

#include "cuda/bench/gpu_problem.h"

namespace tpla::bench {

class GpuChunkProblem : public GpuProblem {
 public:
  // From now on.
  virtual void run_as(ChunkFormChoice form) = 0;
  virtual bool runs_absorbed() const = 0;
};

// A chunk behind cached latents, in the form that the shape asks for or the faster one, with NaN in every row that no sequence holds.
std::unique_ptr<GpuChunkProblem> make_gpu_chunk(const ChunkShape& shape, uint64_t seed, bool timed);

// "absorbed, sm90"; throws cuda::AttentionError where the kernels do not take the shape or cuBLASLt is not there.
std::string gpu_kernel_for(const ChunkShape& shape);

}  // namespace tpla::bench
