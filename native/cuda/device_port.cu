#include "device_port.h"

#include <cuda_runtime.h>

#include <future>
#include <string>
#include <utility>

#include "core/error.h"
#include "device_kv.h"
#include "device_memory.h"

namespace tpla::cuda {

namespace {

void check(cudaError_t status, const char* call) {
  if (status == cudaSuccess) return;
  throw Error(status == cudaErrorMemoryAllocation ? "OUT_OF_MEMORY" : "GPU_FAILED", std::string(call) + ": " + cudaGetErrorString(status));
}

class Port : public DevicePort {
 public:
  void use(int device) override {
    check(cudaSetDevice(device), "cudaSetDevice");
    // Makes its context current.
    check(cudaFree(nullptr), "cudaFree");
  }

  int device_of(const void* address) override {
    cudaPointerAttributes attributes{};
    check(cudaPointerGetAttributes(&attributes, address), "cudaPointerGetAttributes");
    return attributes.device;
  }

  std::shared_ptr<std::byte> allocate_pinned(size_t bytes) override {
    void* memory = nullptr;
    check(cudaHostAlloc(&memory, bytes, cudaHostAllocPortable), "cudaHostAlloc");
    return {static_cast<std::byte*>(memory), [](std::byte* data) { cudaFreeHost(data); }};
  }

  // Plain memory: of the VMM's, network devices take only what was made for them.
  std::shared_ptr<std::byte> allocate(int device, size_t bytes) override {
    auto memory = std::make_shared<DeviceMemory>(DeviceMemory::create(device, bytes, DeviceMemory::Sharing::ipc));
    return {memory, memory->data()};
  }

  KvPutResult put(std::shared_ptr<const KvRegion> src, std::shared_ptr<const KvRegion> dst, const KvPut& what) override {
    std::promise<KvPutResult> result;
    device_put(std::move(src), std::move(dst), what, nullptr, [&result](KvPutResult made, std::unique_ptr<Error> error) {
      if (error) result.set_exception(std::make_exception_ptr(*error));
      else result.set_value(std::move(made));
    });
    return result.get_future().get();
  }

  void copy(const std::vector<Copy>& copies, std::function<void(bool)> done) override {
    cudaError_t status = stream_ != nullptr ? cudaSuccess : cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking);
    for (const Copy& each : copies) {
      if (status == cudaSuccess) status = cudaMemcpyAsync(each.to, each.from, each.bytes, cudaMemcpyHostToDevice, stream_);
    }
    auto* held = new std::pair(std::move(done), status == cudaSuccess);
    const auto call = [](void* argument) {
      const std::unique_ptr<std::pair<std::function<void(bool)>, bool>> owned(static_cast<std::pair<std::function<void(bool)>, bool>*>(argument));
      owned->first(owned->second);
    };
    // After a failure the copies before it may still be under way; the host function comes behind them where the stream still works.
    if (cudaLaunchHostFunc(stream_, call, held) != cudaSuccess) {
      held->second = false;
      call(held);
    }
  }

 private:
  // Of the messenger's thread, which alone copies.
  cudaStream_t stream_ = nullptr;
};

}  // namespace

std::shared_ptr<DevicePort> device_port() { return std::make_shared<Port>(); }

}  // namespace tpla::cuda
