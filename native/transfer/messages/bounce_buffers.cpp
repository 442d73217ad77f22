#include "transfer/messages/bounce_buffers.h"

#include <algorithm>
#include <utility>

namespace tpla {

namespace {

constexpr size_t kSlabBytes = size_t(16) << 20;

}  // namespace

BounceBuffers::BounceBuffers(std::shared_ptr<Messenger> messenger, std::shared_ptr<DevicePort> port, size_t slot_bytes)
    : messenger_(std::move(messenger)), port_(std::move(port)), slot_bytes_((slot_bytes + 63) / 64 * 64) {}

BounceBuffers::~BounceBuffers() {
  for (const Slab& slab : slabs_) {
    messenger_->post([messenger = messenger_, slab] { messenger->unregister_memory(slab.registration); });
  }
}

BounceBuffers::Slot BounceBuffers::take() {
  if (free_.empty()) {
    const size_t slots = std::max<size_t>(1, kSlabBytes / slot_bytes_);
    const auto memory = port_->allocate_pinned(slots * slot_bytes_);
    slabs_.push_back({memory, messenger_->register_memory(memory.get(), slots * slot_bytes_, -1)});
    for (size_t i = 0; i < slots; i++) free_.push_back({memory.get() + i * slot_bytes_, slabs_.back().registration});
  }
  const Slot slot = free_.back();
  free_.pop_back();
  return slot;
}

}  // namespace tpla
