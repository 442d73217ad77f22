// Entry points for the addon: attention problems on a GPU. Errors are tpla::Error: GPU_UNAVAILABLE, REQUEST_INVALID for shapes the kernels do not
// take, GPU_FAILED, OUT_OF_MEMORY.
#pragma once

#include <cstddef>
#include <string>
#include <vector>

#include "bench/attention_shape.h"

namespace tpla::bench {

struct GpuDescription {
  std::string name;
  std::string capability;
  int multiprocessors = 0;
  size_t l2_bytes = 0;
  size_t memory_bytes = 0;
  double sm_clock_hz = 0;      // highest; 0 where the driver does not say
  double memory_clock_hz = 0;
};

GpuDescription describe_gpu(int device);
Rates measure_gpu(int device);

// Kernel family that would run.
std::string plan_on_gpu(int device, const DecodeShape& shape);
std::string plan_on_gpu(int device, const GqaShape& shape);
std::string plan_on_gpu(int device, const PrefillShape& shape);
std::string plan_on_gpu(int device, const ChunkShape& shape);
std::string plan_on_gpu(int device, const PodShape& shape);

Outcome run_on_gpu(int device, const DecodeShape& shape, const RunOptions& options);
Outcome run_on_gpu(int device, const GqaShape& shape, const RunOptions& options);
Outcome run_on_gpu(int device, const PrefillShape& shape, const RunOptions& options);
Outcome run_on_gpu(int device, const ChunkShape& shape, const RunOptions& options);
Outcome run_on_gpu(int device, const PodShape& shape, const RunOptions& options);

// As run_on_gpu, then times each split: multiprocessors that begin with decode.
Outcome run_on_gpu(int device, const PodShape& shape, const RunOptions& options, const std::vector<int>& splits, std::vector<Timing>& of_splits);

}  // namespace tpla::bench
