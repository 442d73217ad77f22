#include "cuda/bench/gpu_tensors.h"

#include "bench/random.h"
#include "cuda/device.h"

namespace tpla::bench {

namespace {

__global__ void fill_with_normals(__nv_bfloat16* values, size_t count, float deviation, uint64_t seed) {
  for (size_t i = blockIdx.x * size_t{blockDim.x} + threadIdx.x; i < count; i += size_t{gridDim.x} * blockDim.x) {
    values[i] = __float2bfloat16(deviation * random_normal(seed, i));
  }
}

size_t align_up(size_t bytes) { return (bytes + 255) / 256 * 256; }

}  // namespace

cuda::AttentionPath attention_path(KernelPath path) {
  if (path == KernelPath::sm80) return cuda::AttentionPath::sm80;
  return path == KernelPath::sm90 ? cuda::AttentionPath::sm90 : cuda::AttentionPath::automatic;
}

std::string kernel_family(KernelPath path) { return cuda::current_device().major == 9 && path != KernelPath::sm80 ? "sm90" : "sm80"; }

void draw_normals(__nv_bfloat16* values, size_t count, float deviation, uint64_t seed, cudaStream_t stream) {
  fill_with_normals<<<1024, 256, 0, stream>>>(values, count, deviation, seed);
  gpu_check(cudaGetLastError(), "drawing values");
}

std::vector<float> widened(const __nv_bfloat16* values, size_t count) {
  std::vector<float> result(count);
  for (size_t i = 0; i < count; ++i) result[i] = __bfloat162float(values[i]);
  return result;
}

void DeviceLengths::set_to_zero(bool zero, cudaStream_t stream) {
  if (zero) live_.fill_bytes(0, stream);
  else gpu_check(cudaMemcpyAsync(live_.data(), kept_.data(), live_.bytes(), cudaMemcpyDeviceToDevice, stream), "cudaMemcpyAsync");
}

AttentionOutputs::AttentionOutputs(size_t rows, int columns)
    : rows_(rows), values_(rows * static_cast<size_t>(columns)), out_bytes_(align_up(values_ * sizeof(__nv_bfloat16))), buffer_(out_bytes_ + rows * sizeof(float)) {}

HostResult AttentionOutputs::read() const {
  const std::vector<uint8_t> bytes = buffer_.read();
  const auto* lse = reinterpret_cast<const float*>(bytes.data() + out_bytes_);
  return {widened(reinterpret_cast<const __nv_bfloat16*>(bytes.data()), values_), {lse, lse + rows_}};
}

}  // namespace tpla::bench
