#include "transfer/write_gate.h"

#include <string>

#include "core/error.h"

namespace tpla {

namespace {

// One word per cache line: sessions do not disturb each other.
constexpr size_t kLine = 64;
constexpr int kEpochShift = 32;
constexpr uint64_t kRevoked = uint64_t(1) << 31;
constexpr uint64_t kWriters = kRevoked - 1;

static_assert(std::atomic<uint64_t>::is_always_lock_free, "the word is shared between processes");

size_t bytes_for(int slots) {
  if (slots < 1 || slots > WriteGate::kMaxSlots) {
    throw Error("REQUEST_INVALID", "a write gate has 1 to " + std::to_string(WriteGate::kMaxSlots) + " slots, not " + std::to_string(slots));
  }
  return size_t(slots) * kLine;
}

}  // namespace

WriteGate WriteGate::create(int slots) {
  WriteGate gate(SharedMemory::create(bytes_for(slots), "tpla-gate"), slots);
  for (int slot = 0; slot < slots; slot++) gate.word(slot) = kRevoked;
  return gate;
}

WriteGate WriteGate::map(int fd, int slots) { return WriteGate(SharedMemory::map(fd, bytes_for(slots)), slots); }

std::atomic<uint64_t>& WriteGate::word(int slot) const {
  if (slot < 0 || slot >= slots_) throw Error("REQUEST_INVALID", "write gate: slot " + std::to_string(slot) + " of " + std::to_string(slots_));
  return *reinterpret_cast<std::atomic<uint64_t>*>(memory_.data() + size_t(slot) * kLine);
}

uint32_t WriteGate::open(int slot) {
  std::atomic<uint64_t>& at = word(slot);
  uint64_t before = at.load();
  uint64_t after;
  do {
    if ((before & kRevoked) == 0 || (before & kWriters) != 0) {
      throw Error("REQUEST_INVALID", "write gate: slot " + std::to_string(slot) + " is still in use");
    }
    after = ((before >> kEpochShift) + 1) << kEpochShift;
  } while (!at.compare_exchange_weak(before, after));
  return static_cast<uint32_t>(after >> kEpochShift);
}

uint32_t WriteGate::revoke(int slot) { return static_cast<uint32_t>(word(slot).fetch_or(kRevoked) & kWriters); }

uint32_t WriteGate::writers(int slot) const { return static_cast<uint32_t>(word(slot).load() & kWriters); }

bool WriteGate::enter(int slot, uint32_t epoch) const {
  const uint64_t before = word(slot).fetch_add(1);
  if ((before & kRevoked) == 0 && before >> kEpochShift == epoch) return true;
  leave(slot);
  return false;
}

void WriteGate::leave(int slot) const { word(slot).fetch_sub(1); }

GatedWrite::GatedWrite(const WritePass& pass) : pass_(pass) {
  if (pass.gate != nullptr && !pass.gate->enter(pass.slot, pass.epoch)) {
    throw Error("CANCELLED", "the receiver has taken its pages back");
  }
}

GatedWrite::~GatedWrite() {
  if (pass_.gate != nullptr) pass_.gate->leave(pass_.slot);
}

}  // namespace tpla
