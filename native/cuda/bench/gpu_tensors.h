// What drawn problems are made of: values, lengths and outputs on the device.
#pragma once

#include <cuda_bf16.h>

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "bench/attention_shape.h"
#include "bench/host_reference.h"
#include "cuda/attention.h"
#include "cuda/bench/gpu.h"

namespace tpla::bench {

cuda::AttentionPath attention_path(KernelPath path);

// "sm90" or "sm80": what runs on this device where a shape has kernels of both families.
std::string kernel_family(KernelPath path);

// Normal values of this standard deviation, by position.
void draw_normals(__nv_bfloat16* values, size_t count, float deviation, uint64_t seed, cudaStream_t stream = nullptr);

std::vector<float> widened(const __nv_bfloat16* values, size_t count);
inline std::vector<float> widened(const DeviceBuffer<__nv_bfloat16>& values) { return widened(values.read().data(), values.count()); }

// Numbers that kernels read at each launch, which can be zero for a while.
class DeviceLengths {
 public:
  explicit DeviceLengths(const std::vector<int32_t>& lengths) : live_(lengths), kept_(lengths) {}

  const int32_t* data() const { return live_.data(); }
  void set_to_zero(bool zero, cudaStream_t stream);

 private:
  DeviceBuffer<int32_t> live_, kept_;
};

// Rows of bf16 values and the log-sum-exp of each, in one buffer.
class AttentionOutputs {
 public:
  AttentionOutputs(size_t rows, int columns);

  __nv_bfloat16* out() const { return reinterpret_cast<__nv_bfloat16*>(buffer_.data()); }
  float* lse() const { return reinterpret_cast<float*>(buffer_.data() + out_bytes_); }
  DeviceBuffer<uint8_t>& buffer() { return buffer_; }
  HostResult read() const;

 private:
  size_t rows_, values_, out_bytes_;
  DeviceBuffer<uint8_t> buffer_;
};

}  // namespace tpla::bench
