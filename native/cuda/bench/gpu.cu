#include "cuda/bench/gpu.h"

#include <atomic>
#include <chrono>
#include <string>
#include <thread>

#include "core/cuda_driver.h"
#include "core/error.h"

namespace tpla::bench {

namespace {

std::mutex gpu_mutex;
std::atomic<bool> abandoned{false};

}  // namespace

bool gpu_abandoned() { return abandoned; }

void gpu_check(cudaError_t status, const char* call) {
  if (status == cudaSuccess) return;
  cudaGetLastError();  // an error that does not stick must not show up in a later call
  throw Error(status == cudaErrorMemoryAllocation ? "OUT_OF_MEMORY" : "GPU_FAILED", std::string(call) + ": " + cudaGetErrorString(status));
}

GpuSession::GpuSession(int device) : lock_(gpu_mutex) {
  if (gpu_abandoned()) throw Error("GPU_FAILED", "a kernel of this process never ended; the GPU is free again once the process has");
  int count = 0;
  const cudaError_t status = cudaGetDeviceCount(&count);
  if (status != cudaSuccess || count == 0) {
    cudaGetLastError();
    // The runtime calls every absence an insufficient driver; the driver itself knows better.
    const std::string reason = probe_cuda().reason;
    throw Error("GPU_UNAVAILABLE", "no GPU can be used: " + (reason.empty() ? std::string(cudaGetErrorString(status)) : reason));
  }
  if (device < 0 || device >= count) {
    throw Error("GPU_UNAVAILABLE", "there is no GPU " + std::to_string(device) + ": this machine has " + std::to_string(count) + ", numbered from 0");
  }
  gpu_check(cudaSetDevice(device), "cudaSetDevice");
}

void GpuStream::finish(const char* what, double seconds) {
  GpuEvent done;
  done.record(stream_);
  const auto deadline = std::chrono::steady_clock::now() + std::chrono::duration<double>(seconds);
  for (;;) {
    const cudaError_t status = cudaEventQuery(done.get());
    if (status == cudaSuccess) return;
    if (status != cudaErrorNotReady) gpu_check(status, what);
    cudaGetLastError();  // "not ready" stays behind as the last error
    if (std::chrono::steady_clock::now() > deadline) {
      abandoned = true;
      throw Error("GPU_FAILED", std::string(what) + " did not end within " + std::to_string(static_cast<int>(seconds)) + " s");
    }
    std::this_thread::sleep_for(std::chrono::microseconds(20));
  }
}

GpuGraph::GpuGraph(const GpuStream& stream, const std::function<void(cudaStream_t)>& enqueue) {
  gpu_check(cudaStreamBeginCapture(stream.get(), cudaStreamCaptureModeThreadLocal), "cudaStreamBeginCapture");
  cudaGraph_t graph = nullptr;
  try {
    enqueue(stream.get());
  } catch (...) {
    cudaStreamEndCapture(stream.get(), &graph);
    if (graph) cudaGraphDestroy(graph);
    throw;
  }
  gpu_check(cudaStreamEndCapture(stream.get(), &graph), "cudaStreamEndCapture");
  const cudaError_t status = cudaGraphInstantiate(&executable_, graph, 0);
  cudaGraphDestroy(graph);
  gpu_check(status, "cudaGraphInstantiate");
}

GpuGraph::~GpuGraph() {
  if (executable_ && !gpu_abandoned()) cudaGraphExecDestroy(executable_);
}

std::vector<double> time_on_gpu(GpuStream& stream, int runs, const std::function<void()>& work) {
  constexpr int kWarmUps = 2;
  GpuEvent begin, end;
  std::vector<double> times;
  for (int i = 0; i < kWarmUps + runs; ++i) {
    // Untimed, so that the device is busy while the timed work is enqueued behind it: the time of launching stays out.
    work();
    begin.record(stream.get());
    work();
    end.record(stream.get());
    stream.finish("the timed work");
    float ms = 0;
    gpu_check(cudaEventElapsedTime(&ms, begin.get(), end.get()), "cudaEventElapsedTime");
    if (i >= kWarmUps) times.push_back(ms);
  }
  std::sort(times.begin(), times.end());
  return times;
}

}  // namespace tpla::bench
