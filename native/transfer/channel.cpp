#include "transfer/channel.h"

#include <cerrno>
#include <cstring>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <unistd.h>

#include "core/error.h"

namespace tpla {

namespace {

constexpr size_t kHeaderBytes = 8;
constexpr size_t kReadBytes = 256 * 1024;
constexpr size_t kMaxUnconsumed = 2 * kMaxMessageBytes;
// A peer that lets so much pile up is not reading.
constexpr size_t kMaxQueued = 4 * kMaxMessageBytes;
constexpr int kReadsPerTurn = 8;
constexpr auto kLinger = std::chrono::milliseconds(1000);
constexpr auto kAcceptPause = std::chrono::milliseconds(100);
// Most descriptors one sendmsg can carry (SCM_MAX_FD): room to receive, and then refuse, whatever a peer sends.
constexpr size_t kMostFdsOnTheWire = 253;

uint32_t load_u32(const std::byte* at) {
  uint32_t value;
  std::memcpy(&value, at, sizeof(value));
  return value;
}

void store_u32(std::byte* at, uint32_t value) { std::memcpy(at, &value, sizeof(value)); }

// Ends the connection from within a read; the text becomes the reason.
struct Refused {
  std::string reason;
};

}  // namespace

Channel::Channel(UniqueFd socket, bool is_unix, std::shared_ptr<ChannelEvents> events)
    : events_(std::move(events)), is_unix_(is_unix), peer_(is_unix ? peer_credentials(socket.get()) : PeerCredentials{}), socket_(std::move(socket)) {}

void Channel::start() {
  EventLoop::shared().post([self = shared_from_this()] {
    const std::lock_guard lock(self->mutex_);
    EventLoop::shared().add(self->socket_.get(), EPOLLIN | EPOLLRDHUP, self);
    self->registered_ = true;
    self->update_interest();
  });
}

void Channel::send(const std::byte* data, size_t bytes, const std::vector<int>& fds) {
  if (bytes > kMaxMessageBytes) {
    throw Error("REQUEST_INVALID", "message of " + std::to_string(bytes) + " bytes, a channel carries at most " + std::to_string(kMaxMessageBytes));
  }
  if (fds.size() > (is_unix_ ? kMaxMessageFds : 0)) {
    throw Error("REQUEST_INVALID", std::to_string(fds.size()) + " descriptors with one message, this channel carries at most " +
                                       std::to_string(is_unix_ ? kMaxMessageFds : 0));
  }
  Frame frame;
  for (int fd : fds) frame.fds.push_back(UniqueFd::duplicate(fd));
  frame.bytes.resize(kHeaderBytes + bytes);
  store_u32(frame.bytes.data(), static_cast<uint32_t>(bytes));
  store_u32(frame.bytes.data() + 4, static_cast<uint32_t>(fds.size()));
  if (bytes > 0) std::memcpy(frame.bytes.data() + kHeaderBytes, data, bytes);

  const std::lock_guard lock(mutex_);
  if (closing_) throw Error("IO_FAILED", "the channel is closed");
  if (!socket_) return;
  if (queued_bytes_ + frame.bytes.size() > kMaxQueued) {
    EventLoop::shared().post([self = shared_from_this()] { self->finish("the peer does not read: " + std::to_string(kMaxQueued) + " bytes are waiting for it"); });
    return;
  }
  queued_bytes_ += frame.bytes.size();
  queue_.push_back(std::move(frame));
  if (queue_.size() == 1) write_queued();
  if (!queue_.empty()) update_interest();
}

void Channel::close() {
  {
    const std::lock_guard lock(mutex_);
    if (closing_.exchange(true)) return;
  }
  EventLoop::shared().post([self = shared_from_this()] {
    {
      const std::lock_guard lock(self->mutex_);
      if (!self->socket_) return;
      if (!self->queue_.empty()) {
        self->update_interest();
        EventLoop::shared().post([self] { self->finish("closed"); }, kLinger);
        return;
      }
    }
    self->finish("closed");
  });
}

void Channel::consumed(size_t bytes) {
  const size_t before = unconsumed_.fetch_sub(bytes);
  if (before <= kMaxUnconsumed || before - bytes > kMaxUnconsumed) return;
  EventLoop::shared().post([self = shared_from_this()] {
    const std::lock_guard lock(self->mutex_);
    self->paused_ = false;
    self->update_interest();
  });
}

void Channel::on_ready(uint32_t events) {
  if (events & EPOLLOUT) {
    bool drained;
    {
      const std::lock_guard lock(mutex_);
      if (!write_queued()) events |= EPOLLERR;
      drained = queue_.empty();
      update_interest();
    }
    if (drained && closing_) return finish("closed");
  }
  const bool peer_gone = (events & (EPOLLHUP | EPOLLERR)) != 0;
  if (closing_ && peer_gone) return finish("closed");
  // A dead peer's last messages are read even where the consumer lags: the kernel holds few of them, and the news must get through.
  if (!closing_ && (peer_gone || ((events & (EPOLLIN | EPOLLRDHUP)) && !paused_))) read_some();
}

void Channel::read_some() {
  try {
    for (int reads = 0; reads < kReadsPerTurn && receive_once(); reads++) deliver_frames();
  } catch (const Refused& refused) {
    return finish(refused.reason);
  }
  if (unconsumed_ > kMaxUnconsumed) {
    const std::lock_guard lock(mutex_);
    paused_ = unconsumed_ > kMaxUnconsumed;
    update_interest();
  }
}

// False when the socket has nothing more for now. Throws Refused at the end of the stream, on an error, and on descriptors beyond the bounds.
bool Channel::receive_once() {
  static thread_local std::vector<std::byte> buffer(kReadBytes);
  iovec vector{buffer.data(), buffer.size()};
  alignas(cmsghdr) char control[CMSG_SPACE(kMostFdsOnTheWire * sizeof(int))];
  msghdr header{};
  header.msg_iov = &vector;
  header.msg_iovlen = 1;
  header.msg_control = control;
  header.msg_controllen = sizeof(control);
  const ssize_t got = recvmsg(socket_.get(), &header, MSG_CMSG_CLOEXEC);
  const int error = errno;
  if (got == 0) throw Refused{received_.empty() ? "the peer closed the connection" : "the peer closed the connection in the middle of a message"};
  if (got < 0) {
    if (error == EAGAIN || error == EINTR) return false;
    throw Refused{std::string("connection lost: ") + std::strerror(error)};
  }
  received_.insert(received_.end(), buffer.begin(), buffer.begin() + got);
  take_fds(header);
  return true;
}

void Channel::take_fds(msghdr& header) {
  for (cmsghdr* part = CMSG_FIRSTHDR(&header); part != nullptr; part = CMSG_NXTHDR(&header, part)) {
    if (part->cmsg_level != SOL_SOCKET || part->cmsg_type != SCM_RIGHTS) continue;
    const size_t count = (part->cmsg_len - CMSG_LEN(0)) / sizeof(int);
    for (size_t i = 0; i < count; i++) {
      int fd;
      std::memcpy(&fd, CMSG_DATA(part) + i * sizeof(int), sizeof(fd));
      received_fds_.emplace_back(fd);
    }
  }
  if (header.msg_flags & MSG_CTRUNC) throw Refused{"descriptors sent by the peer were lost: this process has no room for more (raise LimitNOFILE)"};
  if (received_fds_.size() > 2 * kMaxMessageFds) throw Refused{"the peer sent more descriptors than its messages announce"};
}

void Channel::deliver_frames() {
  size_t at = 0;
  while (received_.size() - at >= kHeaderBytes) {
    const size_t bytes = load_u32(received_.data() + at);
    const size_t fds = load_u32(received_.data() + at + 4);
    if (bytes > kMaxMessageBytes) {
      throw Refused{"the peer announced a message of " + std::to_string(bytes) + " bytes, at most " + std::to_string(kMaxMessageBytes) + " are taken"};
    }
    if (fds > kMaxMessageFds) {
      throw Refused{"the peer announced " + std::to_string(fds) + " descriptors with one message, at most " + std::to_string(kMaxMessageFds) + " are taken"};
    }
    if (received_.size() - at < kHeaderBytes + bytes) break;
    if (fds > received_fds_.size()) {
      throw Refused{"the peer announced " + std::to_string(fds) + " descriptors and sent " + std::to_string(received_fds_.size())};
    }
    Message message;
    message.bytes.assign(received_.begin() + at + kHeaderBytes, received_.begin() + at + kHeaderBytes + bytes);
    for (size_t i = 0; i < fds; i++) message.fds.push_back(std::move(received_fds_[i]));
    received_fds_.erase(received_fds_.begin(), received_fds_.begin() + fds);
    at += kHeaderBytes + bytes;
    unconsumed_ += bytes;
    events_->on_message(shared_from_this(), std::move(message));
  }
  received_.erase(received_.begin(), received_.begin() + at);
  // A large message's buffer is not kept for the small ones that follow.
  if (received_.empty() && received_.capacity() > 2 * kReadBytes) received_ = {};
}

// False when the connection is broken. The mutex is held.
bool Channel::write_queued() {
  while (!queue_.empty()) {
    Frame& frame = queue_.front();
    const size_t before = frame.sent;
    errno = 0;
    frame.sent += write_frame(frame);
    queued_bytes_ -= frame.sent - before;
    if (frame.sent < frame.bytes.size()) return errno == 0 || errno == EAGAIN || errno == EINTR;
    queue_.pop_front();
  }
  return true;
}

size_t Channel::write_frame(Frame& frame) {
  iovec vector{frame.bytes.data() + frame.sent, frame.bytes.size() - frame.sent};
  msghdr header{};
  header.msg_iov = &vector;
  header.msg_iovlen = 1;
  alignas(cmsghdr) char control[CMSG_SPACE(kMaxMessageFds * sizeof(int))] = {};
  if (frame.sent == 0 && !frame.fds.empty()) {
    header.msg_control = control;
    header.msg_controllen = CMSG_SPACE(frame.fds.size() * sizeof(int));
    cmsghdr* part = CMSG_FIRSTHDR(&header);
    part->cmsg_level = SOL_SOCKET;
    part->cmsg_type = SCM_RIGHTS;
    part->cmsg_len = CMSG_LEN(frame.fds.size() * sizeof(int));
    for (size_t i = 0; i < frame.fds.size(); i++) {
      const int fd = frame.fds[i].get();
      std::memcpy(CMSG_DATA(part) + i * sizeof(int), &fd, sizeof(fd));
    }
  }
  const ssize_t sent = sendmsg(socket_.get(), &header, MSG_NOSIGNAL);
  if (sent <= 0) return 0;
  frame.fds.clear();
  return static_cast<size_t>(sent);
}

// The mutex is held.
void Channel::update_interest() {
  if (!registered_ || !socket_) return;
  uint32_t events = queue_.empty() ? 0u : static_cast<uint32_t>(EPOLLOUT);
  if (!closing_ && !paused_) events |= EPOLLIN | EPOLLRDHUP;
  EventLoop::shared().modify(socket_.get(), events);
}

void Channel::finish(const std::string& reason) {
  {
    const std::lock_guard lock(mutex_);
    if (!socket_) return;
    if (registered_) EventLoop::shared().remove(socket_.get());
    socket_.reset();
    queue_.clear();
    queued_bytes_ = 0;
  }
  received_fds_.clear();
  received_ = {};
  events_->on_close(shared_from_this(), reason);
}

ChannelListener::ChannelListener(const SocketAddress& address, std::shared_ptr<Events> events)
    : address_(address), events_(std::move(events)), socket_(listen_socket(address)), port_(bound_port(socket_.get())) {}

void ChannelListener::start() {
  EventLoop::shared().post([self = shared_from_this()] { EventLoop::shared().add(self->socket_.get(), EPOLLIN, self); });
}

void ChannelListener::close() {
  if (closed_.exchange(true)) return;
  if (address_.is_unix()) unlink(address_.path.c_str());
  EventLoop::shared().post([self = shared_from_this()] {
    EventLoop::shared().remove(self->socket_.get());
    self->socket_.reset();
    self->events_->on_listener_closed();
  });
}

void ChannelListener::on_ready(uint32_t) {
  while (!closed_) {
    UniqueFd socket(accept4(socket_.get(), nullptr, nullptr, SOCK_NONBLOCK | SOCK_CLOEXEC));
    if (!socket) {
      // Out of descriptors: the waiting connection would wake the loop for ever; look again when some may be free.
      if (errno == EMFILE || errno == ENFILE || errno == ENOBUFS || errno == ENOMEM) {
        EventLoop::shared().modify(socket_.get(), 0);
        EventLoop::shared().post([self = shared_from_this()] { if (self->socket_) EventLoop::shared().modify(self->socket_.get(), EPOLLIN); }, kAcceptPause);
      }
      return;
    }
    events_->on_accept(std::move(socket));
  }
}

}  // namespace tpla
