// Calls of the CUDA runtime with coded errors, and the device they are made for.
#pragma once

#include <cuda_runtime.h>

#include <string>

#include "core/error.h"

namespace tpla::cuda {

// Throws OUT_OF_MEMORY, or INTERNAL with the runtime's words.
inline void check_runtime(cudaError_t status, const char* call) {
  if (status == cudaSuccess) return;
  throw Error(status == cudaErrorMemoryAllocation ? "OUT_OF_MEMORY" : "INTERNAL", std::string(call) + ": " + cudaGetErrorString(status));
}

// Makes `device` current, with its context, for the life of the object.
class OnDevice {
 public:
  explicit OnDevice(int device) {
    check_runtime(cudaGetDevice(&before_), "cudaGetDevice");
    check_runtime(cudaSetDevice(device), "cudaSetDevice");
  }
  ~OnDevice() { cudaSetDevice(before_); }
  OnDevice(const OnDevice&) = delete;

 private:
  int before_ = 0;
};

}  // namespace tpla::cuda
