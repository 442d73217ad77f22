#include "cuda/bench/gpu_rates.h"

#include <cuda_bf16.h>

#include "bench/random.h"
#include "cuda/bench/gpu.h"
#include "cuda/bench/matrix_rate.h"
#include "cuda/cublaslt.h"
#include "cuda/device.h"

namespace tpla::bench {

namespace {

constexpr int kRuns = 10;

double median(const std::vector<double>& sorted) { return sorted[sorted.size() / 2]; }

__global__ void draw(__nv_bfloat16* data, size_t count, uint64_t seed) {
  for (size_t i = blockIdx.x * size_t{blockDim.x} + threadIdx.x; i < count; i += size_t{gridDim.x} * blockDim.x) data[i] = __float2bfloat16(random_normal(seed, i));
}

__global__ void copy_kernel(uint4* to, const uint4* from, size_t count) {
  const size_t step = size_t{gridDim.x} * blockDim.x;
  size_t i = blockIdx.x * size_t{blockDim.x} + threadIdx.x;
  for (; i + 3 * step < count; i += 4 * step) {
    uint4 values[4];
#pragma unroll
    for (int u = 0; u < 4; ++u) values[u] = __ldcs(from + i + u * step);
#pragma unroll
    for (int u = 0; u < 4; ++u) __stcs(to + i + u * step, values[u]);
  }
  for (; i < count; i += step) to[i] = from[i];
}

// The better of the driver's copy and a plain kernel.
double copy_bytes_per_s(GpuStream& stream) {
  size_t free = 0, total = 0;
  gpu_check(cudaMemGetInfo(&free, &total), "cudaMemGetInfo");
  const size_t bytes = std::min<size_t>(size_t{1} << 30, free / 4 / sizeof(uint4) * sizeof(uint4));
  DeviceBuffer<uint8_t> from(bytes), to(bytes);
  from.fill_bytes(0x5a, stream.get());
  const auto by_driver =
      time_on_gpu(stream, kRuns, [&] { gpu_check(cudaMemcpyAsync(to.data(), from.data(), bytes, cudaMemcpyDeviceToDevice, stream.get()), "cudaMemcpyAsync"); });
  const auto by_kernel = time_on_gpu(stream, kRuns, [&] {
    copy_kernel<<<cuda::current_device().multiprocessors * 8, 256, 0, stream.get()>>>(reinterpret_cast<uint4*>(to.data()), reinterpret_cast<const uint4*>(from.data()),
                                                                                     bytes / sizeof(uint4));
    gpu_check(cudaGetLastError(), "copy_kernel");
  });
  return 2.0 * static_cast<double>(bytes) / std::min(median(by_driver), median(by_kernel)) * 1e3;
}

// 0 where the library is not there or refuses.
double product_flops_per_s(GpuStream& stream, std::string& source) {
  constexpr int64_t kSize = 8192;
  constexpr int kProducts = 4;  // in one timed run
  constexpr size_t kWorkspace = size_t{64} << 20;
  const auto library = cuda::CublasLt::open();
  if (!library) return 0;
  DeviceBuffer<__nv_bfloat16> a(kSize * kSize), b(kSize * kSize), c(kSize * kSize);
  DeviceBuffer<uint8_t> workspace(kWorkspace);
  draw<<<1024, 256, 0, stream.get()>>>(a.data(), a.count(), 1);
  draw<<<1024, 256, 0, stream.get()>>>(b.data(), b.count(), 2);
  gpu_check(cudaGetLastError(), "drawing matrices");
  const cuda::Bf16Product product{a.data(), b.data(), c.data(), kSize, kSize, kSize};
  bool accepted = true;
  const auto times = time_on_gpu(stream, kRuns, [&] {
    for (int i = 0; i < kProducts && accepted; ++i) accepted = library->multiply(product, workspace.data(), kWorkspace, stream.get());
  });
  if (!accepted) return 0;
  const double ms = median(times) / kProducts;
  source = library->name() + ", 8192 x 8192 x 8192 bf16";
  return 2.0 * kSize * kSize * kSize / ms * 1e3;
}

double instruction_flops_per_s(GpuStream& stream, std::string& source) {
  const cuda::Device& device = cuda::current_device();
  const bool sm90 = device.major == 9;
  const MatrixRateKernel kernel = sm90 ? sm90_matrix_rate_kernel() : sm80_matrix_rate_kernel();
  int steps = 20000;
  DeviceBuffer<float> sink(1);
  float* target = sink.data();
  void* parameters[] = {&target, &steps};
  gpu_check(cudaFuncSetAttribute(kernel.function, cudaFuncAttributeMaxDynamicSharedMemorySize, kernel.shared_bytes), "cudaFuncSetAttribute");
  const int blocks = device.multiprocessors;
  const auto times = time_on_gpu(stream, kRuns, [&] {
    gpu_check(cudaLaunchKernel(kernel.function, dim3(blocks), dim3(kernel.threads), parameters, kernel.shared_bytes, stream.get()), "cudaLaunchKernel");
  });
  source = sm90 ? "wgmma m64n256k16 on operands in shared memory" : "mma.sync m16n8k16 on operands in registers";
  return kernel.flops_per_step * steps * blocks / median(times) * 1e3;
}

}  // namespace

Rates gpu_rates() {
  GpuStream stream;
  Rates rates;
  rates.copy_bytes_per_s = copy_bytes_per_s(stream);
  rates.matrix_flops_per_s = product_flops_per_s(stream, rates.matrix_source);
  if (rates.matrix_flops_per_s == 0) rates.matrix_flops_per_s = instruction_flops_per_s(stream, rates.matrix_source);
  return rates;
}

}  // namespace tpla::bench
