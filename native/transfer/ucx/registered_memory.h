#pragma once
#include <memory>
#include <utility>

#include "transfer/ucx/worker.h"

namespace tpla::ucx {

// Memory that is registered with a worker for as long as this lives; `owner` keeps it mapped until it has been unregistered.
class RegisteredMemory {
 public:
  // Throws IO_FAILED. Not on the worker's thread.
  RegisteredMemory(std::shared_ptr<Worker> worker, std::shared_ptr<const void> owner, void* address, size_t bytes)
      : worker_(std::move(worker)), owner_(std::move(owner)) {
    worker_->run([&] { memory_ = worker_->register_memory(address, bytes); });
  }
  ~RegisteredMemory() {
    // On that thread, and after what is under way there.
    worker_->post([worker = worker_, owner = owner_, memory = memory_] { worker->unregister_memory(memory); });
  }
  Memory* get() const { return memory_; }
  RegisteredMemory(const RegisteredMemory&) = delete;
  RegisteredMemory& operator=(const RegisteredMemory&) = delete;

 private:
  const std::shared_ptr<Worker> worker_;
  const std::shared_ptr<const void> owner_;
  Memory* memory_ = nullptr;
};

}  // namespace tpla::ucx
