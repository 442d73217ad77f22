#pragma once
#include <memory>
#include <string>
#include <vector>

#include "transfer/kv_link.h"
#include "transfer/messages/device_port.h"
#include "transfer/messages/messenger.h"

namespace tpla {

// KV over a messenger (UCX, NIXL). The sender makes rows in registered memory and tells of them piece by piece; the receiver checks each piece
// against its grant and takes it straight into its page. Nothing is written that the receiver has not asked for, so a peer that was cut off cannot.

// Decode's side: one for a process and messenger.
class KvMessageReceiver : public LinkReceiver {
 public:
  // `port`: for pages on a GPU. Throws IO_FAILED where the pages cannot be registered, REQUEST_INVALID for a GPU without a port.
  KvMessageReceiver(std::shared_ptr<Messenger> messenger, std::shared_ptr<const KvRegion> region, std::shared_ptr<DevicePort> port = nullptr);
  ~KvMessageReceiver() override;
  void admit(const std::string& key, std::shared_ptr<const WriteGate> gate) override;
  void grant(const std::string& key, int slot, uint32_t epoch, Range tokens, PageTables pages) override;
  void disconnect(const std::string& key) override;
  void withdraw(const std::string& key) override;
  void close() override;
  // Whether pieces can land in pages on a GPU without a copy by us, where a sender's way to them allows it.
  bool is_direct() const;

 private:
  struct Core;
  struct Peer;
  std::shared_ptr<Core> core_;
};

// Prefill's side of one receiver.
class KvMessageSender : public LinkSender {
 public:
  // `device`: the GPU that holds the sources of its puts, with its port; -1 for host memory. Blocks until the receiver has let it in. Throws
  // IO_FAILED, REQUEST_INVALID.
  KvMessageSender(std::shared_ptr<Messenger> messenger, const std::string& address, const std::string& key, const KvLayout& dst,
                  std::shared_ptr<DevicePort> port = nullptr, int device = -1);
  ~KvMessageSender() override;
  void put(LinkPut put, Done done) override;
  void close() override;
  // Whether rows of a GPU leave from its own memory.
  bool is_direct() const;
  // What carries them, as the library tells by now; empty where it does not tell, and once the link has ended.
  std::vector<std::string> transports() const;

 private:
  struct Core;
  std::shared_ptr<Core> core_;
};

}  // namespace tpla
