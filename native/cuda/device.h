// The current CUDA device, tensor maps and launches, with errors that name the call.
#pragma once

#include <cuda.h>
#include <cuda_runtime.h>

#include <array>
#include <cstdint>

#include "attention.h"

namespace tpla::cuda {

struct Device {
  int major = 0;
  int minor = 0;
  int multiprocessors = 0;
};

// Read once per device.
const Device& current_device();

// Throws AttentionError with the driver's words.
void check(cudaError_t status, const char* call);

// bf16, 128-byte swizzle, zeros outside. Strides in bytes, of dimensions 1 to 3.
CUtensorMap encode_tensor_map_4d(const void* base, std::array<uint64_t, 4> sizes, std::array<uint64_t, 3> strides, std::array<uint32_t, 4> box);

// All blocks resident at the same time, or an error.
void launch_cooperative(const void* function, int blocks, int threads, int shared_bytes, void** parameters, Stream stream);

}  // namespace tpla::cuda
