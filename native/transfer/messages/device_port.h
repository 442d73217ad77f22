#pragma once
#include <cstddef>
#include <functional>
#include <memory>
#include <vector>

#include "transfer/kv_put.h"

namespace tpla {

// What carrying KV by messages needs of GPUs: native/cuda/device_port.cu has it, so that links build and load without CUDA.
class DevicePort {
 public:
  struct Copy {
    void* to;
    const void* from;
    size_t bytes;
  };

  virtual ~DevicePort() = default;
  // The calling thread makes calls into libraries that want a GPU's context to be current.
  virtual void use(int device) = 0;
  // GPU that an address belongs to.
  virtual int device_of(const void* address) = 0;
  // Pinned memory of the host, at one address for it and for all GPUs. Throws OUT_OF_MEMORY.
  virtual std::shared_ptr<std::byte> allocate_pinned(size_t bytes) = 0;
  // Memory of a GPU that network devices can register. Throws OUT_OF_MEMORY.
  virtual std::shared_ptr<std::byte> allocate(int device, size_t bytes) = 0;
  // kv_put by a GPU, without a gate; blocks until the rows are there.
  virtual KvPutResult put(std::shared_ptr<const KvRegion> src, std::shared_ptr<const KvRegion> dst, const KvPut& what) = 0;
  // From pinned memory into a GPU's. `done`, with whether all went well, comes on a thread that must not call CUDA.
  virtual void copy(const std::vector<Copy>& copies, std::function<void(bool is_good)> done) = 0;
};

}  // namespace tpla
