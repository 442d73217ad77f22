// Owners of what the CUDA runtime hands out, for benchmarks and tests: memory, streams, events, graphs. Errors are tpla::Error.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <cstddef>
#include <functional>
#include <mutex>
#include <utility>
#include <vector>

namespace tpla::bench {

// OUT_OF_MEMORY or GPU_FAILED with the runtime's words.
void gpu_check(cudaError_t status, const char* call);

// Makes a device current for this thread and keeps other sessions of the process off the GPUs: times would disturb each other.
// Throws GPU_UNAVAILABLE where there is no such device or none that can be used.
class GpuSession {
 public:
  explicit GpuSession(int device);

 private:
  std::lock_guard<std::mutex> lock_;
};

// After a kernel that never ended nothing may wait for the device any more, not even to give memory back.
bool gpu_abandoned();

template <class T>
class DeviceBuffer {
 public:
  DeviceBuffer() = default;
  explicit DeviceBuffer(size_t count) : count_(count) { gpu_check(cudaMalloc(&data_, std::max<size_t>(count, 1) * sizeof(T)), "cudaMalloc"); }
  explicit DeviceBuffer(const std::vector<T>& host) : DeviceBuffer(host.size()) {
    gpu_check(cudaMemcpy(data_, host.data(), bytes(), cudaMemcpyHostToDevice), "cudaMemcpy");
    // From pageable memory the copy may return early, and other streams would not wait for it.
    gpu_check(cudaStreamSynchronize(nullptr), "cudaStreamSynchronize");
  }
  DeviceBuffer(DeviceBuffer&& other) noexcept { *this = std::move(other); }
  DeviceBuffer& operator=(DeviceBuffer&& other) noexcept {
    std::swap(data_, other.data_);
    std::swap(count_, other.count_);
    return *this;
  }
  ~DeviceBuffer() {
    if (data_ && !gpu_abandoned()) cudaFree(data_);
  }

  T* data() const { return data_; }
  size_t count() const { return count_; }
  size_t bytes() const { return count_ * sizeof(T); }

  std::vector<T> read() const {
    std::vector<T> host(count_);
    gpu_check(cudaMemcpy(host.data(), data_, bytes(), cudaMemcpyDeviceToHost), "cudaMemcpy");
    return host;
  }
  void fill_bytes(int byte, cudaStream_t stream) { gpu_check(cudaMemsetAsync(data_, byte, bytes(), stream), "cudaMemsetAsync"); }

 private:
  T* data_ = nullptr;
  size_t count_ = 0;
};

class GpuEvent {
 public:
  GpuEvent() { gpu_check(cudaEventCreate(&event_), "cudaEventCreate"); }
  GpuEvent(const GpuEvent&) = delete;
  GpuEvent& operator=(const GpuEvent&) = delete;
  ~GpuEvent() {
    if (!gpu_abandoned()) cudaEventDestroy(event_);
  }
  void record(cudaStream_t stream) { gpu_check(cudaEventRecord(event_, stream), "cudaEventRecord"); }
  cudaEvent_t get() const { return event_; }

 private:
  cudaEvent_t event_ = nullptr;
};

class GpuStream {
 public:
  GpuStream() { gpu_check(cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking), "cudaStreamCreateWithFlags"); }
  GpuStream(const GpuStream&) = delete;
  GpuStream& operator=(const GpuStream&) = delete;
  ~GpuStream() {
    if (!gpu_abandoned()) cudaStreamDestroy(stream_);
  }
  cudaStream_t get() const { return stream_; }

  // Waits for everything enqueued so far. A kernel that has not ended after `seconds` is GPU_FAILED, and the GPU is abandoned.
  void finish(const char* what, double seconds = 30);

 private:
  cudaStream_t stream_ = nullptr;
};

// What `enqueue` puts into a stream, to be replayed.
class GpuGraph {
 public:
  GpuGraph(const GpuStream& stream, const std::function<void(cudaStream_t)>& enqueue);
  GpuGraph(const GpuGraph&) = delete;
  GpuGraph& operator=(const GpuGraph&) = delete;
  ~GpuGraph();
  void replay(const GpuStream& stream) { gpu_check(cudaGraphLaunch(executable_, stream.get()), "cudaGraphLaunch"); }

 private:
  cudaGraphExec_t executable_ = nullptr;
};

// Milliseconds between two events around each of `runs` calls of `work`, sorted. Before each, another call runs untimed.
std::vector<double> time_on_gpu(GpuStream& stream, int runs, const std::function<void()>& work);

}  // namespace tpla::bench
