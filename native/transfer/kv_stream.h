#pragma once
#include <cstdint>
#include <memory>
#include <string>

#include "transfer/channel.h"
#include "transfer/kv_link.h"
#include "transfer/put_job.h"
#include "transfer/socket.h"

namespace tpla {

// KV over plain TCP, for hosts that have nothing better: several connections, rows made on the sender in the receiver's layout, read by the
// receiver straight into its pages. Both ends are little-endian.
//
// A connection begins with the receiver's 32-byte key. Then frames of at most kMaxFrameBytes: a FrameHeader and, for each copy of the page,
// the rows of the tokens. A frame without tokens asks, and is answered with the 8 bytes of its `put` once all that came before it on this connection
// is in place. Where the gate is shut the answer comes at once, its top bit set.

inline constexpr size_t kMaxFrameBytes = PutJob::kMaxUnitBytes;

// Decode's side: one for a process.
class StreamReceiver : public LinkReceiver {
 public:
  // Listens on `host`, any port. Throws what listen_socket throws.
  StreamReceiver(const std::string& host, std::shared_ptr<const KvRegion> region);
  ~StreamReceiver() override;
  uint16_t port() const;

  void admit(const std::string& key, std::shared_ptr<const WriteGate> gate) override;
  void grant(const std::string& key, int slot, uint32_t epoch, Range tokens, PageTables pages) override;
  void disconnect(const std::string& key) override;
  void withdraw(const std::string& key) override;
  void close() override;

 private:
  struct Core;
  std::shared_ptr<Core> core_;
};

// Prefill's side of one receiver.
class StreamSender : public LinkSender {
 public:
  enum class ZeroCopy { automatic, never, always };

  // Blocks while it connects. Throws IO_FAILED, REQUEST_INVALID for a bad key or count.
  StreamSender(const SocketAddress& address, const std::string& key, int connections, const KvLayout& dst, ZeroCopy zero_copy);
  ~StreamSender() override;

  void put(LinkPut put, Done done) override;
  void close() override;
  // Whether the kernel sends from our buffers: it does not on loopback, nor where it cannot.
  bool is_zero_copy() const;

 private:
  struct Core;
  std::shared_ptr<Core> core_;
};

}  // namespace tpla
