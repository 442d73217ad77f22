#pragma once

#include <memory>

#include "cuda/bench/gpu_problem.h"

namespace tpla::bench {

// A chunk behind cached latents, in the form that the shape asks for or the faster one. The reference covers the rows of up to three heads.
std::unique_ptr<GpuProblem> make_gpu_chunk(const ChunkShape& shape, uint64_t seed, bool timed);

// "absorbed, sm90"; throws cuda::AttentionError where the kernels do not take the shape or cuBLASLt is not there.
std::string gpu_kernel_for(const ChunkShape& shape);

}  // namespace tpla::bench
