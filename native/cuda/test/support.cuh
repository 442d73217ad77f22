// What benchmarks and GPU tests share: device buffers, deterministic random tensors, a watchdog, timing by graph replay.
#pragma once

#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <string>
#include <vector>

#include "attention.h"
#include "device.h"

#define CUDA(call) ::tpla::cuda::check((call), #call)

namespace tpla::cuda {

// Waits for the device, but not for ever: a kernel that hangs must end in an error.
inline void finish(const std::string& what) {
  const auto deadline = std::chrono::steady_clock::now() + std::chrono::seconds(10);
  cudaEvent_t done;
  CUDA(cudaEventCreate(&done));
  CUDA(cudaEventRecord(done, nullptr));
  for (cudaError_t status; (status = cudaEventQuery(done)) != cudaSuccess;) {
    if (status != cudaErrorNotReady) throw AttentionError(what + ": " + cudaGetErrorString(status));
    if (std::chrono::steady_clock::now() > deadline) throw AttentionError(what + ": the kernel has not ended after 10 s");
  }
  CUDA(cudaEventDestroy(done));
}

template <class T>
struct Buffer {
  T* data = nullptr;
  size_t count = 0;
  explicit Buffer(size_t n) : count(n) { CUDA(cudaMalloc(&data, std::max<size_t>(n, 1) * sizeof(T))); }
  explicit Buffer(const std::vector<T>& host) : Buffer(host.size()) { CUDA(cudaMemcpy(data, host.data(), count * sizeof(T), cudaMemcpyHostToDevice)); }
  Buffer(const Buffer&) = delete;
  ~Buffer() { cudaFree(data); }
  std::vector<T> read() const {
    std::vector<T> host(count);
    CUDA(cudaMemcpy(host.data(), data, count * sizeof(T), cudaMemcpyDeviceToHost));
    return host;
  }
  void poison() { CUDA(cudaMemset(data, 0xFF, count * sizeof(T))); }
};

__device__ inline uint32_t hash(uint64_t x) {
  x ^= x >> 33;
  x *= 0xff51afd7ed558ccdULL;
  x ^= x >> 33;
  x *= 0xc4ceb9fe1a85ec53ULL;
  x ^= x >> 33;
  return static_cast<uint32_t>(x);
}

__device__ inline float normal(uint64_t index, uint64_t seed) {
  const float u = (hash(index * 2 + seed * 0x9E3779B97F4A7C15ULL) + 1.0f) * 2.3283064e-10f;
  const float v = hash(index * 2 + 1 + seed * 0x9E3779B97F4A7C15ULL) * 2.3283064e-10f;
  return sqrtf(-2.0f * logf(fminf(u, 1.0f))) * cospif(2.0f * v);
}

static __global__ void fill_normal(__nv_bfloat16* data, size_t count, float scale, uint64_t seed) {
  for (size_t i = blockIdx.x * size_t{blockDim.x} + threadIdx.x; i < count; i += size_t{gridDim.x} * blockDim.x) data[i] = __float2bfloat16(scale * normal(i, seed));
}

// Median time of one of `launches` calls of enqueue(i, stream), captured into one graph and replayed.
template <class Enqueue>
double time_replay(int launches, Enqueue enqueue) {
  cudaStream_t stream;
  CUDA(cudaStreamCreate(&stream));
  cudaGraph_t graph;
  cudaGraphExec_t replay;
  CUDA(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal));
  for (int i = 0; i < launches; ++i) enqueue(i, stream);
  CUDA(cudaStreamEndCapture(stream, &graph));
  CUDA(cudaGraphInstantiate(&replay, graph, 0));
  cudaEvent_t begin, end;
  CUDA(cudaEventCreate(&begin));
  CUDA(cudaEventCreate(&end));
  std::vector<float> times;
  for (int i = 0; i < 12; ++i) {
    CUDA(cudaEventRecord(begin, stream));
    CUDA(cudaGraphLaunch(replay, stream));
    CUDA(cudaEventRecord(end, stream));
    CUDA(cudaEventSynchronize(end));
    float ms;
    CUDA(cudaEventElapsedTime(&ms, begin, end));
    if (i >= 2) times.push_back(ms / launches);
  }
  std::sort(times.begin(), times.end());
  CUDA(cudaGraphExecDestroy(replay));
  CUDA(cudaGraphDestroy(graph));
  CUDA(cudaStreamDestroy(stream));
  CUDA(cudaEventDestroy(begin));
  CUDA(cudaEventDestroy(end));
  return times[times.size() / 2];
}

}  // namespace tpla::cuda
