#pragma once
#include <atomic>
#include <cstdint>

#include "core/shared_memory.h"

namespace tpla {

// Lets the owner of memory shut out a peer that has it mapped, without the peer's help.
//
// A mapping cannot be taken back from another process, so a sender that was told to stop, or that slept through its lease, could still
// write. Each session has a word in memory shared by the two processes: epoch, a revoked bit, and the number of writers inside. A writer
// enters before each piece it writes and leaves after; it is refused when the word is revoked or of another epoch. Entering and revoking
// are read-modify-writes of one word, so once revoke() has seen no writer none can come: the memory is safe to reuse. While a writer is
// inside the owner waits for it to leave, or for its process to end (the kernel closes a dying process's sockets only after all its
// threads have left its memory).
class WriteGate {
 public:
  static constexpr int kMaxSlots = 1 << 16;

  // Throws REQUEST_INVALID for a slot count outside 1 to kMaxSlots, and what SharedMemory throws.
  static WriteGate create(int slots);
  static WriteGate map(int fd, int slots);

  int fd() const { return memory_.fd(); }
  int slots() const { return slots_; }

  // Owner. The slot must be revoked, or never opened, and without writers; throws REQUEST_INVALID otherwise. Returns the epoch that lets in.
  uint32_t open(int slot);
  // Owner. Number of writers still inside.
  uint32_t revoke(int slot);
  uint32_t writers(int slot) const;

  // Writer. False when it must not write; leave() only after true.
  bool enter(int slot, uint32_t epoch) const;
  void leave(int slot) const;

 private:
  WriteGate(SharedMemory memory, int slots) : memory_(std::move(memory)), slots_(slots) {}
  std::atomic<uint64_t>& word(int slot) const;

  SharedMemory memory_;
  int slots_;
};

// What a put shows at the gate.
struct WritePass {
  const WriteGate* gate = nullptr;
  int slot = 0;
  uint32_t epoch = 0;
};

// One piece of writing; without a gate everybody may write.
class GatedWrite {
 public:
  // Throws CANCELLED when the gate is shut.
  explicit GatedWrite(const WritePass& pass);
  ~GatedWrite();
  GatedWrite(const GatedWrite&) = delete;
  GatedWrite& operator=(const GatedWrite&) = delete;

 private:
  const WritePass& pass_;
};

}  // namespace tpla
