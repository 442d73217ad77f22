#include "transfer/socket.h"

#include <cerrno>
#include <cstring>
#include <fcntl.h>
#include <memory>
#include <netdb.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <unistd.h>

#include "core/error.h"

namespace tpla {

namespace {

constexpr int kBacklog = 256;
constexpr int kPeerGoneMs = 10000;

[[noreturn]] void fail(const std::string& what, const SocketAddress& address, int error) {
  const char* code = error == EADDRINUSE ? "ADDRESS_IN_USE" : "IO_FAILED";
  throw Error(code, "cannot " + what + " " + address.text() + ": " + std::strerror(error));
}

struct AddressList {
  explicit AddressList(const SocketAddress& address, bool passive) {
    addrinfo hints{};
    hints.ai_family = AF_UNSPEC;
    hints.ai_socktype = SOCK_STREAM;
    hints.ai_flags = AI_NUMERICSERV | (passive ? AI_PASSIVE : 0);
    const int status = getaddrinfo(address.host.c_str(), std::to_string(address.port).c_str(), &hints, &first);
    if (status != 0) throw Error("IO_FAILED", "cannot resolve " + address.text() + ": " + gai_strerror(status));
  }
  ~AddressList() { freeaddrinfo(first); }
  addrinfo* first = nullptr;
};

sockaddr_un unix_name(const SocketAddress& address) {
  sockaddr_un name{};
  name.sun_family = AF_UNIX;
  if (address.path.size() >= sizeof(name.sun_path)) fail("use", address, ENAMETOOLONG);
  std::memcpy(name.sun_path, address.path.data(), address.path.size());
  return name;
}

UniqueFd stream_socket(int family, const SocketAddress& address) {
  UniqueFd socket(::socket(family, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0));
  if (!socket) fail("open a socket for", address, errno);
  return socket;
}

// 0, or the errno of a connect() that did not succeed within the time.
int connect_within(int socket, const sockaddr* name, socklen_t length, int timeout_ms) {
  // A Unix socket whose backlog is full answers EAGAIN at once and never becomes ready: try again until the time is up.
  for (int waited = 0;; waited += 10) {
    if (connect(socket, name, length) == 0) return 0;
    if (errno == EINPROGRESS) break;
    if (errno != EAGAIN || waited >= timeout_ms) return errno;
    poll(nullptr, 0, 10);
  }
  pollfd waiting{socket, POLLOUT, 0};
  const int ready = poll(&waiting, 1, timeout_ms);
  if (ready == 0) return ETIMEDOUT;
  int error = 0;
  socklen_t size = sizeof(error);
  getsockopt(socket, SOL_SOCKET, SO_ERROR, &error, &size);
  return error;
}

}  // namespace

void UniqueFd::reset() {
  if (fd_ >= 0) close(fd_);
  fd_ = -1;
}

UniqueFd UniqueFd::duplicate(int fd) {
  UniqueFd copy(fcntl(fd, F_DUPFD_CLOEXEC, 0));
  if (!copy) throw Error("IO_FAILED", "cannot duplicate descriptor " + std::to_string(fd) + ": " + std::strerror(errno));
  return copy;
}

std::string SocketAddress::text() const {
  if (is_unix()) return "unix:" + path;
  return "tcp://" + (host.find(':') == std::string::npos ? host : "[" + host + "]") + ":" + std::to_string(port);
}

UniqueFd listen_socket(const SocketAddress& address) {
  if (address.is_unix()) {
    UniqueFd socket = stream_socket(AF_UNIX, address);
    const sockaddr_un name = unix_name(address);
    if (bind(socket.get(), reinterpret_cast<const sockaddr*>(&name), sizeof(name)) != 0) fail("listen on", address, errno);
    chmod(address.path.c_str(), 0660);
    if (listen(socket.get(), kBacklog) != 0) fail("listen on", address, errno);
    return socket;
  }
  const AddressList resolved(address, true);
  UniqueFd socket = stream_socket(resolved.first->ai_family, address);
  const int on = 1;
  setsockopt(socket.get(), SOL_SOCKET, SO_REUSEADDR, &on, sizeof(on));
  if (bind(socket.get(), resolved.first->ai_addr, resolved.first->ai_addrlen) != 0) fail("listen on", address, errno);
  if (listen(socket.get(), kBacklog) != 0) fail("listen on", address, errno);
  return socket;
}

uint16_t bound_port(int listener) {
  sockaddr_storage name{};
  socklen_t length = sizeof(name);
  if (getsockname(listener, reinterpret_cast<sockaddr*>(&name), &length) != 0) return 0;
  if (name.ss_family == AF_INET) return ntohs(reinterpret_cast<sockaddr_in*>(&name)->sin_port);
  if (name.ss_family == AF_INET6) return ntohs(reinterpret_cast<sockaddr_in6*>(&name)->sin6_port);
  return 0;
}

UniqueFd connect_socket(const SocketAddress& address, int timeout_ms) {
  if (address.is_unix()) {
    UniqueFd socket = stream_socket(AF_UNIX, address);
    const sockaddr_un name = unix_name(address);
    const int error = connect_within(socket.get(), reinterpret_cast<const sockaddr*>(&name), sizeof(name), timeout_ms);
    if (error != 0) fail("connect to", address, error);
    return socket;
  }
  const AddressList resolved(address, false);
  int error = 0;
  for (const addrinfo* at = resolved.first; at != nullptr; at = at->ai_next) {
    UniqueFd socket = stream_socket(at->ai_family, address);
    error = connect_within(socket.get(), at->ai_addr, at->ai_addrlen, timeout_ms);
    if (error != 0) continue;
    tune_tcp(socket.get(), kPeerGoneMs);
    return socket;
  }
  fail("connect to", address, error);
}

PeerCredentials peer_credentials(int socket) {
  ucred credentials{};
  socklen_t length = sizeof(credentials);
  if (getsockopt(socket, SOL_SOCKET, SO_PEERCRED, &credentials, &length) != 0 || credentials.uid == static_cast<uid_t>(-1)) return {};
  return {credentials.pid, static_cast<int>(credentials.uid)};
}

void tune_tcp(int socket, int timeout_ms) {
  const int on = 1;
  const int idle_s = 2;
  const int interval_s = 1;
  setsockopt(socket, IPPROTO_TCP, TCP_NODELAY, &on, sizeof(on));
  setsockopt(socket, SOL_SOCKET, SO_KEEPALIVE, &on, sizeof(on));
  setsockopt(socket, IPPROTO_TCP, TCP_KEEPIDLE, &idle_s, sizeof(idle_s));
  setsockopt(socket, IPPROTO_TCP, TCP_KEEPINTVL, &interval_s, sizeof(interval_s));
  setsockopt(socket, IPPROTO_TCP, TCP_USER_TIMEOUT, &timeout_ms, sizeof(timeout_ms));
}

}  // namespace tpla
