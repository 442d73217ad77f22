#pragma once
#include <memory>
#include <string>

#include "transfer/kv_link.h"
#include "transfer/ucx/worker.h"

namespace tpla::ucx {

// KV over UCX. The sender makes rows in registered memory and sends them piece by piece as active messages; UCX picks the transport, and
// for what is larger than UCX_RNDV_THRESH a rendezvous, in which the receiver fetches the bytes straight into its pages (an RDMA read where
// there is RDMA). No piece is taken that the receiver has not checked, and no peer gets the address or key of memory: RMA is not enabled.

// Decode's side: one for a process.
class KvReceiver : public LinkReceiver {
 public:
  // Throws IO_FAILED where the pages cannot be registered.
  KvReceiver(std::shared_ptr<Worker> worker, std::shared_ptr<const KvRegion> region);
  ~KvReceiver() override;
  void admit(const std::string& key, std::shared_ptr<const WriteGate> gate) override;
  void grant(const std::string& key, int slot, uint32_t epoch, Range tokens, PageTables pages) override;
  void disconnect(const std::string& key) override;
  void withdraw(const std::string& key) override;
  void close() override;

 private:
  struct Core;
  struct Peer;
  std::shared_ptr<Core> core_;
};

// Prefill's side of one receiver.
class KvSender : public LinkSender {
 public:
  // Blocks until the receiver has let it in. Throws IO_FAILED, REQUEST_INVALID.
  KvSender(std::shared_ptr<Worker> worker, const std::string& address, const std::string& key, const KvLayout& dst);
  ~KvSender() override;
  void put(LinkPut put, Done done) override;
  void close() override;

 private:
  struct Core;
  std::shared_ptr<Core> core_;
};

}  // namespace tpla::ucx
