#include "core/sd_notify.h"

#include <cerrno>
#include <cstddef>
#include <cstring>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#include "core/error.h"

namespace tpla {

void sd_notify(const std::string& socket, const std::string& state) {
  sockaddr_un address{};
  address.sun_family = AF_UNIX;
  const bool abstract = !socket.empty() && socket[0] == '@';
  if ((!abstract && (socket.empty() || socket[0] != '/')) || socket.size() >= sizeof address.sun_path) {
    throw Error("IO_FAILED", "NOTIFY_SOCKET is \"" + socket + "\"; expected an absolute path or an abstract name beginning with @");
  }
  std::memcpy(address.sun_path, socket.data(), socket.size());
  if (abstract) address.sun_path[0] = '\0';
  // An abstract name has no terminating NUL: the length says where it ends.
  const auto length = static_cast<socklen_t>(offsetof(sockaddr_un, sun_path) + socket.size() + (abstract ? 0 : 1));

  const int fd = ::socket(AF_UNIX, SOCK_DGRAM | SOCK_CLOEXEC, 0);
  if (fd < 0) throw Error("IO_FAILED", std::string("cannot open a datagram socket: ") + std::strerror(errno));
  const ssize_t sent = sendto(fd, state.data(), state.size(), MSG_NOSIGNAL, reinterpret_cast<sockaddr*>(&address), length);
  const int error = errno;
  close(fd);
  if (sent < 0) throw Error("IO_FAILED", "cannot notify the service manager at " + socket + ": " + std::strerror(error));
}

}  // namespace tpla
