#pragma once
#include <atomic>
#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "core/error.h"
#include "transfer/channel.h"
#include "transfer/kv_put.h"
#include "transfer/socket.h"
#include "transfer/write_gate.h"

namespace tpla {

// KV over plain TCP, for hosts that have nothing better: several connections, rows made on the sender in the receiver's layout, read by the
// receiver straight into its pages. Both ends are little-endian.
//
// A connection begins with the receiver's 32-byte key. Then frames of at most kMaxFrameBytes: a FrameHeader and, for each copy of the page,
// the rows of the tokens. Each frame is answered with the 8 bytes of its `put`, the top bit set where the gate was shut.

inline constexpr size_t kStreamKeyBytes = 32;
inline constexpr size_t kMaxFrameBytes = size_t(4) << 20;

// Decode's side: one for a process. The owner of the gate admits and revokes; every write of this process into the pages passes it.
class StreamReceiver {
 public:
  // Listens on `host`, any port. Throws what listen_socket throws.
  StreamReceiver(const std::string& host, std::shared_ptr<const KvRegion> region);
  ~StreamReceiver();
  uint16_t port() const;

  // Connections that show `key` write through `gate`.
  void admit(const std::string& key, std::shared_ptr<const WriteGate> gate);
  // What a slot of that key's gate stands for while `epoch` lasts. Throws REQUEST_INVALID for pages that do not exist.
  void grant(const std::string& key, int slot, uint32_t epoch, Range tokens, PageTables pages);
  // Ends the connections of `key`.
  void withdraw(const std::string& key);
  // Ends all of it.
  void close();

 private:
  struct Core;
  std::shared_ptr<Core> core_;
};

// What to put: source pages, the receiver's layout, and the slot that lets it in.
struct StreamPut {
  std::shared_ptr<const KvRegion> src;
  Range layers;
  Range tokens;
  PageTables src_pages;
  int slot = 0;
  uint32_t epoch = 0;
};

// Prefill's side of one receiver.
class StreamSender {
 public:
  // Once per put: its result, or an error with a code.
  using Done = std::function<void(KvPutResult result, std::unique_ptr<Error> error)>;

  enum class ZeroCopy { automatic, never, always };

  // Blocks while it connects. Throws IO_FAILED, REQUEST_INVALID for a bad key or count.
  StreamSender(const SocketAddress& address, const std::string& key, int connections, const KvLayout& dst, ZeroCopy zero_copy);
  ~StreamSender();

  // Resolves when the receiver has all of it in its pages. Throws REQUEST_INVALID; `done` runs on one of the sender's threads.
  void put(StreamPut put, Done done);
  // Fails what is under way with IO_FAILED.
  void close();
  // Whether the kernel sends from our buffers: it does not on loopback, nor where it cannot.
  bool is_zero_copy() const;

 private:
  struct Core;
  std::shared_ptr<Core> core_;
};

}  // namespace tpla
