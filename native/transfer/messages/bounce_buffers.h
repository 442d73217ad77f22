#pragma once
#include <memory>
#include <vector>

#include "transfer/messages/device_port.h"
#include "transfer/messages/messenger.h"

namespace tpla {

// Pinned and registered memory of the host in which pieces for pages on a GPU land first. On the messenger's thread; it grows to what was in
// flight at most.
class BounceBuffers {
 public:
  struct Slot {
    std::byte* data;
    Messenger::Registration* registration;
  };

  BounceBuffers(std::shared_ptr<Messenger> messenger, std::shared_ptr<DevicePort> port, size_t slot_bytes);
  ~BounceBuffers();
  // Throws OUT_OF_MEMORY, IO_FAILED.
  Slot take();
  void give(Slot slot) { free_.push_back(slot); }

 private:
  struct Slab {
    std::shared_ptr<std::byte> memory;
    Messenger::Registration* registration;
  };
  const std::shared_ptr<Messenger> messenger_;
  const std::shared_ptr<DevicePort> port_;
  const size_t slot_bytes_;
  std::vector<Slab> slabs_;
  std::vector<Slot> free_;
};

}  // namespace tpla
