#pragma once
#include <memory>
#include <utility>

#include "transfer/messages/messenger.h"

namespace tpla {

// Memory that is registered with a messenger for as long as this lives; `owner` keeps it mapped until it has been unregistered.
class RegisteredMemory {
 public:
  // `device`: the GPU whose memory it is, -1 for host memory. Throws IO_FAILED. Not on the messenger's thread.
  RegisteredMemory(std::shared_ptr<Messenger> messenger, std::shared_ptr<const void> owner, void* address, size_t bytes, int device = -1)
      : messenger_(std::move(messenger)), owner_(std::move(owner)) {
    messenger_->run([&] { registration_ = messenger_->register_memory(address, bytes, device); });
  }
  ~RegisteredMemory() {
    // On that thread, and after what is under way there.
    messenger_->post([messenger = messenger_, owner = owner_, registration = registration_] { messenger->unregister_memory(registration); });
  }
  Messenger::Registration* get() const { return registration_; }
  RegisteredMemory(const RegisteredMemory&) = delete;
  RegisteredMemory& operator=(const RegisteredMemory&) = delete;

 private:
  const std::shared_ptr<Messenger> messenger_;
  const std::shared_ptr<const void> owner_;
  Messenger::Registration* registration_ = nullptr;
};

}  // namespace tpla
