#pragma once
#include <cstdint>
#include <string>
#include <utility>

namespace tpla {

// A descriptor with an owner.
class UniqueFd {
 public:
  UniqueFd() = default;
  explicit UniqueFd(int fd) : fd_(fd) {}
  UniqueFd(UniqueFd&& other) noexcept : fd_(std::exchange(other.fd_, -1)) {}
  UniqueFd& operator=(UniqueFd&& other) noexcept {
    std::swap(fd_, other.fd_);
    return *this;
  }
  UniqueFd(const UniqueFd&) = delete;
  UniqueFd& operator=(const UniqueFd&) = delete;
  ~UniqueFd() { reset(); }

  int get() const { return fd_; }
  explicit operator bool() const { return fd_ >= 0; }
  int release() { return std::exchange(fd_, -1); }
  void reset();
  // Close-on-exec duplicate; throws IO_FAILED.
  static UniqueFd duplicate(int fd);

 private:
  int fd_ = -1;
};

// Where a stream socket listens or connects: a Unix path, or host and port where `path` is empty.
struct SocketAddress {
  std::string path;
  std::string host;
  uint16_t port = 0;

  bool is_unix() const { return !path.empty(); }
  std::string text() const;
};

// Non-blocking, close-on-exec. Throws ADDRESS_IN_USE or IO_FAILED with the address and the kernel's reason. A stale socket file is
// the caller's to remove.
UniqueFd listen_socket(const SocketAddress& address);
// Port a TCP listener is bound to; 0 for a Unix socket.
uint16_t bound_port(int listener);
// Blocks until connected, at most `timeout_ms`; the result is non-blocking. Throws IO_FAILED.
UniqueFd connect_socket(const SocketAddress& address, int timeout_ms);

// Process at the other end of a Unix socket when it was connected; zeros for TCP or an unseen PID namespace.
struct PeerCredentials {
  int pid = 0;
  int uid = 0;
};
PeerCredentials peer_credentials(int socket);

// TCP: no Nagle delay, and a peer that vanished without a FIN is given up after `timeout_ms`.
void tune_tcp(int socket, int timeout_ms);

}  // namespace tpla
