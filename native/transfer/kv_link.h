#pragma once
#include <cstdint>
#include <functional>
#include <memory>
#include <string>

#include "core/error.h"
#include "transfer/kv_put.h"
#include "transfer/write_gate.h"

namespace tpla {

// KV between processes that share no memory: the sender makes rows in the receiver's layout, threads of the receiver put them into its pages.
// TCP, UCX and NIXL are links.

// What a sender shows once to be let in: random, told over the hand-off channel.
inline constexpr size_t kLinkKeyBytes = 32;

// What to put: source pages, and the slot of the receiver's gate that lets it in.
struct LinkPut {
  std::shared_ptr<const KvRegion> src;
  Range layers;
  Range tokens;
  PageTables src_pages;
  int slot = 0;
  uint32_t epoch = 0;
};

// Prefill's side of one receiver.
class LinkSender {
 public:
  // Once per put, on a thread of the sender: its result, or an error with a code.
  using Done = std::function<void(KvPutResult result, std::unique_ptr<Error> error)>;

  virtual ~LinkSender() = default;
  // Done once the receiver has all of it in its pages; CANCELLED where its gate is shut, IO_FAILED where it is lost. Throws REQUEST_INVALID.
  virtual void put(LinkPut put, Done done) = 0;
  // Fails what is under way with IO_FAILED.
  virtual void close() = 0;
};

// Decode's side, one for a process and kind of link. The owner of a gate admits and revokes; every write into the pages passes it.
class LinkReceiver {
 public:
  virtual ~LinkReceiver() = default;
  // Senders that show `key` write through `gate`. Throws REQUEST_INVALID for a key of another length.
  virtual void admit(const std::string& key, std::shared_ptr<const WriteGate> gate) = 0;
  // What a slot of that key's gate stands for while `epoch` lasts. Throws REQUEST_INVALID for pages that do not exist.
  virtual void grant(const std::string& key, int slot, uint32_t epoch, Range tokens, PageTables pages) = 0;
  // Ends the connections of the sender that showed `key`, with what it is in the middle of: for one that is gone, or silent.
  virtual void disconnect(const std::string& key) = 0;
  // The same, and forgets the key.
  virtual void withdraw(const std::string& key) = 0;
  virtual void close() = 0;
};

}  // namespace tpla
