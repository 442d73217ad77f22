#pragma once
#include <atomic>
#include <cstddef>
#include <deque>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "transfer/event_loop.h"
#include "transfer/socket.h"

struct msghdr;

namespace tpla {

// Messages over a stream socket, with descriptors where the socket is a Unix one (SCM_RIGHTS).
//
// A frame is: u32 length of the payload, u32 number of descriptors, payload; little-endian. The descriptors ride on the first
// byte of their frame. A frame that claims more than these bounds, or descriptors that do not match the claim, end the connection.
inline constexpr size_t kMaxMessageBytes = size_t(16) << 20;
inline constexpr size_t kMaxMessageFds = 64;

struct Message {
  std::vector<std::byte> bytes;
  std::vector<UniqueFd> fds;
};

class Channel;

// Called on the event loop's thread; must not block.
class ChannelEvents {
 public:
  virtual ~ChannelEvents() = default;
  virtual void on_message(const std::shared_ptr<Channel>& channel, Message message) = 0;
  // Last event of a channel, once, whichever side ended it.
  virtual void on_close(const std::shared_ptr<Channel>& channel, const std::string& reason) = 0;
};

class Channel : public EventLoop::Source, public std::enable_shared_from_this<Channel> {
 public:
  // Takes a connected, non-blocking socket. Nothing is read before start().
  Channel(UniqueFd socket, bool is_unix, std::shared_ptr<ChannelEvents> events);
  void start();

  PeerCredentials peer() const { return peer_; }

  // Queues one message and writes what the socket takes at once; `fds` are duplicated. Throws REQUEST_INVALID over the bounds and
  // IO_FAILED after close(). To a peer that is gone it does nothing: on_close tells.
  void send(const std::byte* data, size_t bytes, const std::vector<int>& fds);
  // Sends what is queued (for a second at most), then ends the connection.
  void close();
  // The consumer has dealt with a message of so many bytes. A channel whose consumer lags by kMaxUnconsumed stops reading.
  void consumed(size_t bytes);

  void on_ready(uint32_t events) override;

 private:
  struct Frame {
    std::vector<std::byte> bytes;
    size_t sent = 0;
    std::vector<UniqueFd> fds;
  };

  void read_some();
  bool receive_once();
  void take_fds(msghdr& header);
  void deliver_frames();
  bool write_queued();
  size_t write_frame(Frame& frame);
  void update_interest();
  void finish(const std::string& reason);

  const std::shared_ptr<ChannelEvents> events_;
  const bool is_unix_;
  const PeerCredentials peer_;

  std::mutex mutex_;  // guards the socket against close while another thread sends, and the queue
  UniqueFd socket_;
  std::deque<Frame> queue_;
  size_t queued_bytes_ = 0;
  bool registered_ = false;
  std::atomic<bool> closing_{false};

  // Loop's thread only.
  std::vector<std::byte> received_;
  std::vector<UniqueFd> received_fds_;
  bool paused_ = false;
  std::atomic<size_t> unconsumed_{0};
};

// Accepts connections until closed; each comes as a Channel that the callback starts.
class ChannelListener : public EventLoop::Source, public std::enable_shared_from_this<ChannelListener> {
 public:
  class Events {
   public:
    virtual ~Events() = default;
    virtual void on_accept(UniqueFd socket) = 0;
    // Last event, once.
    virtual void on_listener_closed() = 0;
  };

  // Throws what listen_socket throws.
  ChannelListener(const SocketAddress& address, std::shared_ptr<Events> events);
  void start();
  // Stops listening and removes the socket file; connections live on.
  void close();
  uint16_t port() const { return port_; }

  void on_ready(uint32_t events) override;

 private:
  const SocketAddress address_;
  const std::shared_ptr<Events> events_;
  UniqueFd socket_;
  uint16_t port_ = 0;
  std::atomic<bool> closed_{false};
};

}  // namespace tpla
