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

// Once per kernel and device: lets it have so much dynamic shared memory.
void prepare_kernel(const void* function, int shared_bytes);

// Blocks of a kernel that one multiprocessor holds at the same time; asked once per kernel and device.
int resident_blocks(const void* function, int threads, int shared_bytes);

// All blocks resident at the same time, or an error.
void launch_cooperative(const void* function, dim3 blocks, int threads, int shared_bytes, void** parameters, Stream stream);

}  // namespace tpla::cuda
