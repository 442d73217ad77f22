#pragma once
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>

#include "core/kv_layout.h"
#include "transfer/channel.h"
#include "transfer/kv_put.h"
#include "transfer/socket.h"

namespace tpla {

// What a transfer is measured against: the same bytes moved with nothing done to them.

// Fills rows of a sequence with values that (seed, layer, token, column) decide: finite, of either sign, magnitudes from 1/2 to 2. Layer l of
// the region is taken for first_layer + l. Only canonical regions (mla).
void fill_pattern(const KvRegion& region, const PageTables& pages, Range tokens, int first_layer, uint64_t seed);

// memcpy of `bytes` from the first memory of one region to the first of the other on `threads` threads; seconds. Throws REQUEST_INVALID
// where either is smaller.
double plain_copy(const KvRegion& src, const KvRegion& dst, size_t bytes, int threads);

// Reads connections to their end and throws the bytes away; one byte answers each end.
class SocketSink : public ChannelListener::Events, public std::enable_shared_from_this<SocketSink> {
 public:
  static std::shared_ptr<SocketSink> listen(const std::string& host);
  uint16_t port() const { return port_; }
  void close();
  void on_accept(UniqueFd socket) override;
  void on_listener_closed() override {}

 private:
  std::shared_ptr<ChannelListener> listener_;
  uint16_t port_ = 0;
};

// Sends `bytes` to a sink over several connections at once, one thread each; seconds until the last answer. Throws IO_FAILED.
double plain_send(const SocketAddress& sink, int connections, size_t bytes);

}  // namespace tpla
