#include "transfer/kv_stream.h"

#include <algorithm>
#include <array>
#include <atomic>
#include <cerrno>
#include <condition_variable>
#include <cstring>
#include <deque>
#include <fcntl.h>
#include <linux/errqueue.h>
#include <map>
#include <mutex>
#include <netinet/in.h>
#include <optional>
#include <poll.h>
#include <pthread.h>
#include <span>
#include <sys/socket.h>
#include <sys/uio.h>
#include <thread>
#include <unistd.h>
#include <vector>

#include "core/error.h"
#include "transfer/grant_book.h"
#include "transfer/parallel.h"
#include "transfer/reshard.h"

namespace tpla {

namespace {

constexpr uint32_t kMagic = 0x32564b54;  // "TKV2"
constexpr uint64_t kRefusedBit = uint64_t(1) << 63;
// A frame that a core has hashed or made is still in its cache when the kernel copies it. Of 32 to 512 KiB this takes the least time of the two
// cores it was tried on, by a quarter.
constexpr size_t kFrameBytes = 128 * 1024;
constexpr int kMaxUnknownConnections = 64;
constexpr int kKeyTimeoutMs = 3000;
constexpr int kConnectTimeoutMs = 5000;
constexpr int kMaxConnections = 64;
constexpr int kMostMakers = 2;  // threads of one connection: while one sends its frame, the other makes the next
constexpr int kBuffers = 4;     // frames of one of them that the kernel may hold
constexpr size_t kMaxVector = 512;

struct FrameHeader {
  uint32_t magic;
  uint32_t slot;
  uint32_t epoch;
  uint32_t layer;
  uint32_t begin;
  uint32_t end;
  uint64_t put;
};
static_assert(sizeof(FrameHeader) == 32);

void set_blocking(int socket) { fcntl(socket, F_SETFL, fcntl(socket, F_GETFL) & ~O_NONBLOCK); }

void set_receive_timeout(int socket, int ms) {
  const timeval limit{ms / 1000, ms % 1000 * 1000};
  setsockopt(socket, SOL_SOCKET, SO_RCVTIMEO, &limit, sizeof(limit));
}

// False at the end of the stream or on an error.
bool receive_all(int socket, void* data, size_t bytes) {
  auto* at = static_cast<char*>(data);
  while (bytes > 0) {
    const ssize_t got = recv(socket, at, bytes, MSG_WAITALL);
    if (got < 0 && errno == EINTR) continue;
    if (got <= 0) return false;
    at += got;
    bytes -= static_cast<size_t>(got);
  }
  return true;
}

// Takes `bytes` off the front of what begins at `at`; returns what begins then.
size_t skip(std::vector<iovec>& vector, size_t at, size_t bytes) {
  while (bytes > 0) {
    iovec& first = vector[at];
    const size_t part = std::min(bytes, first.iov_len);
    first.iov_base = static_cast<char*>(first.iov_base) + part;
    first.iov_len -= part;
    bytes -= part;
    if (first.iov_len == 0) at++;
  }
  return at;
}

bool send_all(int socket, const void* data, size_t bytes) {
  const auto* at = static_cast<const char*>(data);
  while (bytes > 0) {
    const ssize_t sent = send(socket, at, bytes, MSG_NOSIGNAL);
    if (sent < 0 && errno == EINTR) continue;
    if (sent <= 0) return false;
    at += sent;
    bytes -= static_cast<size_t>(sent);
  }
  return true;
}

}  // namespace

// ---------------------------------------------------------------- receiver

struct StreamReceiver::Core : ChannelListener::Events, std::enable_shared_from_this<StreamReceiver::Core> {
  explicit Core(std::shared_ptr<const KvRegion> region) : book(std::move(region)), copies(copies_per_page(book.region().layout)) {}

  void on_accept(UniqueFd socket) override;
  void on_listener_closed() override {}
  void serve(UniqueFd socket);
  void shut_down(const std::string& key);
  void read_frames(int socket, const GrantBook::Client& client);
  bool check_frame(const FrameHeader& frame, const Grant& grant) const;
  bool read_payload(int socket, const FrameHeader& frame, const Grant& grant, const GrantBook::Client& client, bool& refused, FrameHeader& next) const;
  void append_places(const FrameHeader& frame, const Grant& grant, std::vector<iovec>& places) const;

  GrantBook book;
  const int copies;
  uint16_t port = 0;
  std::mutex mutex;
  std::shared_ptr<ChannelListener> listener;
  // Data connections by key.
  std::map<std::string, std::vector<int>> sockets;
  std::atomic<int> unknown{0};
};

StreamReceiver::StreamReceiver(const std::string& host, std::shared_ptr<const KvRegion> region) : core_(std::make_shared<Core>(std::move(region))) {
  SocketAddress address;
  address.host = host;
  core_->listener = std::make_shared<ChannelListener>(address, core_);
  core_->port = core_->listener->port();
  core_->listener->start();
}

StreamReceiver::~StreamReceiver() { close(); }

uint16_t StreamReceiver::port() const { return core_->port; }

void StreamReceiver::admit(const std::string& key, std::shared_ptr<const WriteGate> gate) { core_->book.admit(key, std::move(gate)); }

void StreamReceiver::grant(const std::string& key, int slot, uint32_t epoch, Range tokens, PageTables pages) {
  core_->book.grant(key, slot, epoch, tokens, std::move(pages));
}

void StreamReceiver::disconnect(const std::string& key) {
  const std::lock_guard lock(core_->mutex);
  core_->shut_down(key);
}

void StreamReceiver::withdraw(const std::string& key) {
  const std::lock_guard lock(core_->mutex);
  core_->book.withdraw(key);
  core_->shut_down(key);
}

void StreamReceiver::close() {
  std::shared_ptr<ChannelListener> listener;
  {
    const std::lock_guard lock(core_->mutex);
    listener.swap(core_->listener);
  }
  if (listener) listener->close();
  for (const std::string& key : core_->book.keys()) withdraw(key);
}

// Its reader closes a socket: here it could already be another's number. Under the mutex.
void StreamReceiver::Core::shut_down(const std::string& key) {
  const auto found = sockets.find(key);
  if (found == sockets.end()) return;
  for (int socket : found->second) shutdown(socket, SHUT_RDWR);
}

void StreamReceiver::Core::on_accept(UniqueFd socket) {
  if (unknown.fetch_add(1) >= kMaxUnknownConnections) {
    unknown--;
    return;
  }
  std::thread([self = shared_from_this(), held = std::make_shared<UniqueFd>(std::move(socket))] {
    pthread_setname_np(pthread_self(), "tpla-stream");
    self->serve(std::move(*held));
  }).detach();
}

void StreamReceiver::Core::serve(UniqueFd socket) {
  set_blocking(socket.get());
  set_receive_timeout(socket.get(), kKeyTimeoutMs);
  std::string key(kLinkKeyBytes, '\0');
  const bool came = receive_all(socket.get(), key.data(), key.size());
  unknown--;
  if (!came) return;
  std::shared_ptr<GrantBook::Client> client;
  {
    const std::lock_guard lock(mutex);
    client = book.find(key);
    if (!client || sockets[key].size() >= kMaxConnections) return;
    sockets[key].push_back(socket.get());
  }
  set_receive_timeout(socket.get(), 0);
  tune_tcp(socket.get(), 10000);
  read_frames(socket.get(), *client);
  const std::lock_guard lock(mutex);
  std::vector<int>& open = sockets[key];
  open.erase(std::find(open.begin(), open.end(), socket.get()));
  if (open.empty()) sockets.erase(key);
}

// Until the connection ends, or breaks a rule.
void StreamReceiver::Core::read_frames(int socket, const GrantBook::Client& client) {
  FrameHeader frame;
  uint64_t refused_put = 0;
  bool is_there = receive_all(socket, &frame, sizeof(frame));
  while (is_there) {
    if (frame.begin == frame.end) {
      if (frame.magic != kMagic || !send_all(socket, &frame.put, sizeof(frame.put))) return;
      is_there = receive_all(socket, &frame, sizeof(frame));
      continue;
    }
    const std::shared_ptr<const Grant> grant = client.grant(frame.slot);
    // A frame of an earlier session on the slot has no pages of its own any more, and its size cannot be checked: it must still be read past.
    if (!grant || !check_frame(frame, *grant)) return;
    bool refused = frame.epoch != grant->epoch;
    FrameHeader next;
    is_there = read_payload(socket, frame, *grant, client, refused, next);
    if (refused && frame.put != refused_put) {
      refused_put = frame.put;
      const uint64_t answer = frame.put | kRefusedBit;
      if (!send_all(socket, &answer, sizeof(answer))) return;
    }
    frame = next;
  }
}

bool StreamReceiver::Core::check_frame(const FrameHeader& frame, const Grant& grant) const {
  const KvLayout& layout = book.region().layout;
  if (frame.magic != kMagic || (frame.put & kRefusedBit) != 0 || frame.layer >= uint32_t(layout.layers)) return false;
  if (frame.begin >= frame.end || size_t(frame.end - frame.begin) * layout.row_bytes(int(frame.layer)) * copies > kMaxFrameBytes) return false;
  // An old epoch's tokens are read past; this one's must be granted.
  return frame.epoch != grant.epoch || (frame.begin >= uint32_t(grant.tokens.begin) && frame.end <= uint32_t(grant.tokens.end));
}

void StreamReceiver::Core::append_places(const FrameHeader& frame, const Grant& grant, std::vector<iovec>& places) const {
  const KvLayout& layout = book.region().layout;
  for (int copy = 0; copy < copies; copy++) {
    for (int token = frame.begin; token < int(frame.end);) {
      const int end = std::min<int>(frame.end, (token / layout.page_tokens + 1) * layout.page_tokens);
      const Piece piece{frame.layer, uint32_t(copy), uint32_t(token), uint32_t(end)};
      places.push_back({book.place(grant, piece), book.bytes_of(piece)});
      token = end;
    }
  }
}

// Reads the rows, and the header that follows them; false when the connection ended before. The gate is passed for each read by itself: revoking
// never waits for the network.
bool StreamReceiver::Core::read_payload(int socket, const FrameHeader& frame, const Grant& grant, const GrantBook::Client& client, bool& refused, FrameHeader& next) const {
  thread_local std::vector<char> scrap(64 * 1024);
  thread_local std::vector<iovec> places;
  places.clear();
  if (!refused) append_places(frame, grant, places);
  // Most often it has arrived by the time its predecessor has.
  places.push_back({&next, sizeof(next)});
  size_t left = size_t(frame.end - frame.begin) * book.region().layout.row_bytes(int(frame.layer)) * copies;
  size_t at = 0;
  while (left > 0) {
    if (!refused && !client.gate().enter(frame.slot, frame.epoch)) refused = true;
    ssize_t got;
    if (refused) {
      got = recv(socket, scrap.data(), std::min(left, scrap.size()), MSG_DONTWAIT);
    } else {
      msghdr message{};
      message.msg_iov = &places[at];
      message.msg_iovlen = std::min(places.size() - at, kMaxVector);
      got = recvmsg(socket, &message, MSG_DONTWAIT);
      const int error = errno;
      client.gate().leave(frame.slot);
      errno = error;
    }
    if (got < 0 && (errno == EAGAIN || errno == EINTR)) {
      // Outside the gate.
      pollfd readable{socket, POLLIN, 0};
      if (poll(&readable, 1, -1) < 0 && errno != EINTR) return false;
      continue;
    }
    if (got <= 0) return false;
    if (!refused) at = skip(places, at, static_cast<size_t>(got));
    if (static_cast<size_t>(got) > left) {
      const size_t more = static_cast<size_t>(got) - left;
      return receive_all(socket, reinterpret_cast<std::byte*>(&next) + more, sizeof(next) - more);
    }
    left -= static_cast<size_t>(got);
  }
  return receive_all(socket, &next, sizeof(next));
}

// ---------------------------------------------------------------- sender

namespace {

// Zero-copy sends of one connection, numbered as the kernel numbers them: one for each successful send call. Completions come in ranges and
// not always in order.
class ZeroCopySends {
 public:
  uint64_t sent() {
    is_complete_.push_back(false);
    return first_open_ + is_complete_.size() - 1;
  }
  // Whether the kernel has let go of this send and of all before it.
  bool is_done(uint64_t send) const { return send < first_open_; }
  bool was_copied() const { return was_copied_; }

  void read_completions(int socket) {
    char control[128];
    while (true) {
      msghdr message{};
      message.msg_control = control;
      message.msg_controllen = sizeof(control);
      if (recvmsg(socket, &message, MSG_ERRQUEUE | MSG_DONTWAIT) < 0) return;
      for (cmsghdr* part = CMSG_FIRSTHDR(&message); part != nullptr; part = CMSG_NXTHDR(&message, part)) {
        const bool is_error = (part->cmsg_level == SOL_IP && part->cmsg_type == IP_RECVERR) || (part->cmsg_level == SOL_IPV6 && part->cmsg_type == IPV6_RECVERR);
        if (!is_error) continue;
        sock_extended_err error;
        std::memcpy(&error, CMSG_DATA(part), sizeof(error));
        if (error.ee_origin != SO_EE_ORIGIN_ZEROCOPY) continue;
        complete(error.ee_info, error.ee_data);
        was_copied_ = was_copied_ || (error.ee_code & SO_EE_CODE_ZEROCOPY_COPIED) != 0;
      }
    }
  }

 private:
  // Sends `low` to `high`, of which the kernel tells the lower 32 bits.
  void complete(uint32_t low, uint32_t high) {
    const uint32_t base = static_cast<uint32_t>(first_open_);
    for (uint32_t at = low - base; at <= high - base && at < is_complete_.size(); at++) is_complete_[at] = true;
    while (!is_complete_.empty() && is_complete_.front()) {
      is_complete_.pop_front();
      first_open_++;
    }
  }

  uint64_t first_open_ = 0;
  std::deque<bool> is_complete_;  // from first_open_ on
  bool was_copied_ = false;
};

}  // namespace

struct StreamSender::Core : std::enable_shared_from_this<StreamSender::Core> {
  struct Put {
    Put(LinkPut what, const KvLayout& dst, Done done) : job(std::move(what), dst, kFrameBytes, std::move(done)) {}
    PutJob job;
    uint64_t id = 0;
  };
  // Pieces of one put that went over one connection.
  struct Sent {
    std::shared_ptr<Put> put;
    size_t pieces = 0;
  };
  struct Connection {
    UniqueFd socket;   // closed, under the mutex, by the last of its threads
    int threads = 0;
    // One frame at a time goes out; zero-copy is counted in the same order.
    std::mutex sending;
    bool zero_copy = false;
    ZeroCopySends sends;
    // What went out since the receiver was last asked.
    Sent open;
    // What it was asked for and has not answered.
    std::mutex asking;
    std::deque<Sent> asked;
  };
  // A frame on its way out.
  struct Frame {
    FrameHeader header;
    std::vector<std::byte> made;
    std::vector<std::span<const std::byte>> rows;
    std::vector<iovec> vector;
    // The kernel may read `header` and `made` until this send has completed. Rows that are sent from where they stand belong to the put until it ends.
    std::optional<uint64_t> lent_until;
  };

  explicit Core(const KvLayout& layout) : dst(layout) {}

  void send_frames(Connection& connection);
  void read_answers(Connection& connection);
  bool await_release(Connection& connection, Frame& frame);
  void fill(Put& put, size_t unit, Frame& frame);
  bool send_unit(Connection& connection, const std::shared_ptr<Put>& put, size_t unit, Frame& frame);
  bool send_frame(Connection& connection, Frame& frame);
  bool ask(Connection& connection);
  std::shared_ptr<Put> next_put(size_t& unit, bool waits);
  void end(const std::shared_ptr<Put>& put, std::unique_ptr<Error> error);
  void fail(const std::string& reason);

  const KvLayout dst;
  std::vector<std::unique_ptr<Connection>> connections;
  ZeroCopy mode = ZeroCopy::automatic;
  std::atomic<bool> uses_zero_copy{false};

  std::mutex mutex;
  std::condition_variable work;
  std::deque<std::shared_ptr<Put>> waiting;              // with frames to send
  std::map<uint64_t, std::shared_ptr<Put>> under_way;    // with answers to come
  uint64_t next_id = 1;
  std::string failure;
};

StreamSender::StreamSender(const SocketAddress& address, const std::string& key, int connections, const KvLayout& dst, ZeroCopy zero_copy)
    : core_(std::make_shared<Core>(dst)) {
  if (key.size() != kLinkKeyBytes) throw Error("REQUEST_INVALID", "a stream key has " + std::to_string(kLinkKeyBytes) + " bytes");
  if (connections < 1 || connections > kMaxConnections) throw Error("REQUEST_INVALID", std::to_string(connections) + " connections, expected 1 to " + std::to_string(kMaxConnections));
  core_->mode = zero_copy;
  for (int i = 0; i < connections; i++) {
    auto connection = std::make_unique<Core::Connection>();
    connection->socket = connect_socket(address, kConnectTimeoutMs);
    const int socket = connection->socket.get();
    set_blocking(socket);
    const int on = 1;
    connection->zero_copy = zero_copy != ZeroCopy::never && setsockopt(socket, SOL_SOCKET, SO_ZEROCOPY, &on, sizeof(on)) == 0;
    core_->uses_zero_copy = core_->uses_zero_copy || connection->zero_copy;
    if (!send_all(socket, key.data(), key.size())) throw Error("IO_FAILED", "cannot open a data connection to " + address.text());
    core_->connections.push_back(std::move(connection));
  }
  const int makers = std::clamp(transfer_threads() / (2 * connections), 1, kMostMakers);
  for (const auto& connection : core_->connections) {
    connection->threads = makers + 1;
    const auto run = [core = core_, at = connection.get()](auto body, const char* name) {
      std::thread([core, at, body, name] {
        pthread_setname_np(pthread_self(), name);
        (core.get()->*body)(*at);
        const std::lock_guard lock(core->mutex);
        if (--at->threads == 0) at->socket.reset();
      }).detach();
    };
    for (int maker = 0; maker < makers; maker++) run(&Core::send_frames, "tpla-send");
    run(&Core::read_answers, "tpla-answers");
  }
}

StreamSender::~StreamSender() { close(); }

void StreamSender::close() { core_->fail("the sender was closed"); }

bool StreamSender::is_zero_copy() const { return core_->uses_zero_copy; }

void StreamSender::put(LinkPut put, Done done) {
  const auto started = std::make_shared<Core::Put>(std::move(put), core_->dst, std::move(done));
  {
    const std::lock_guard lock(core_->mutex);
    if (core_->failure.empty()) {
      started->id = core_->next_id++;
      core_->under_way[started->id] = started;
      core_->waiting.push_back(started);
      core_->work.notify_all();
      return;
    }
  }
  started->job.end(std::make_unique<Error>("IO_FAILED", core_->failure));
}

// The next frame to send; null when the sender has failed, or there is none and the caller does not wait.
std::shared_ptr<StreamSender::Core::Put> StreamSender::Core::next_put(size_t& unit, bool waits) {
  std::unique_lock lock(mutex);
  while (true) {
    if (waits) work.wait(lock, [this] { return !waiting.empty() || !failure.empty(); });
    if (!failure.empty() || waiting.empty()) return nullptr;
    std::shared_ptr<Put> put = waiting.front();
    if (put->job.take(unit)) return put;
    waiting.pop_front();
  }
}

void StreamSender::Core::send_frames(Connection& connection) {
  const auto self = shared_from_this();
  std::array<Frame, kBuffers> frames;
  size_t turn = 0;
  size_t unit = 0;
  while (true) {
    std::shared_ptr<Put> put = next_put(unit, false);
    bool is_fine = true;
    if (!put) {
      {
        const std::lock_guard lock(connection.sending);
        is_fine = ask(connection);
      }
      if (is_fine) put = next_put(unit, true);
      if (is_fine && !put) break;
    }
    if (is_fine) is_fine = send_unit(connection, put, unit, frames[turn++ % kBuffers]);
    if (!is_fine) {
      fail(std::string("data connection lost: ") + std::strerror(errno));
      break;
    }
  }
  // The kernel may still read: after a failure the connection is reset, else all was acknowledged.
  for (Frame& frame : frames) await_release(connection, frame);
}

// Waits until the kernel reads no more of what a frame owns.
bool StreamSender::Core::await_release(Connection& connection, Frame& frame) {
  const int socket = connection.socket.get();
  while (frame.lent_until) {
    {
      const std::lock_guard lock(connection.sending);
      connection.sends.read_completions(socket);
      if (connection.sends.is_done(*frame.lent_until)) {
        frame.lent_until.reset();
        break;
      }
    }
    // The other thread may take the completion that ends this wait.
    pollfd completed{socket, 0, 0};
    if (poll(&completed, 1, 5) < 0 && errno != EINTR) return false;
    if (completed.revents & POLLHUP) return false;
  }
  return true;
}

// Rows that are the same on both sides are hashed where they stand, and the kernel reads them from the near cache; others are made.
void StreamSender::Core::fill(Put& put, size_t index, Frame& frame) {
  const PutJob::Unit unit = put.job.unit(index);
  const LinkPut& what = put.job.what();
  frame.header = {kMagic, uint32_t(what.slot), what.epoch, uint32_t(unit.layer), uint32_t(unit.tokens.begin), uint32_t(unit.tokens.end), put.id};
  frame.rows.clear();
  if (put.job.keeps_rows(unit)) {
    put.job.find(unit, frame.rows);
  } else {
    frame.made.resize(put.job.bytes_of(unit));
    put.job.make(unit, frame.made.data());
    frame.rows.emplace_back(frame.made);
  }
  frame.vector.clear();
  frame.vector.push_back({&frame.header, sizeof(frame.header)});
  for (const auto& rows : frame.rows) frame.vector.push_back({const_cast<std::byte*>(rows.data()), rows.size()});
}

bool StreamSender::Core::send_unit(Connection& connection, const std::shared_ptr<Put>& put, size_t unit, Frame& frame) {
  if (!await_release(connection, frame)) return false;
  fill(*put, unit, frame);
  const std::lock_guard lock(connection.sending);
  if (connection.open.put != put && !ask(connection)) return false;
  connection.open.put = put;
  connection.open.pieces += put->job.count_pieces(put->job.unit(unit));
  put->job.add_wire_bytes(sizeof(frame.header));
  return send_frame(connection, frame);
}

// Asks for what went out since it did so last. The caller holds connection.sending.
bool StreamSender::Core::ask(Connection& connection) {
  if (!connection.open.put) return true;
  const FrameHeader header{kMagic, 0, 0, 0, 0, 0, connection.open.put->id};
  connection.open.put->job.add_wire_bytes(sizeof(header) + sizeof(uint64_t));
  {
    const std::lock_guard lock(connection.asking);
    connection.asked.push_back(std::move(connection.open));
  }
  connection.open = {};
  return send_all(connection.socket.get(), &header, sizeof(header));
}

// The caller holds connection.sending.
bool StreamSender::Core::send_frame(Connection& connection, Frame& frame) {
  const int socket = connection.socket.get();
  for (size_t at = 0; at < frame.vector.size();) {
    msghdr message{};
    message.msg_iov = &frame.vector[at];
    message.msg_iovlen = std::min(frame.vector.size() - at, kMaxVector);
    ssize_t sent = sendmsg(socket, &message, MSG_NOSIGNAL | (connection.zero_copy ? MSG_ZEROCOPY : 0));
    if (sent > 0 && connection.zero_copy) frame.lent_until = connection.sends.sent();
    // No room to pin pages: this piece goes the ordinary way, which is not counted.
    if (sent < 0 && errno == ENOBUFS && connection.zero_copy) sent = sendmsg(socket, &message, MSG_NOSIGNAL);
    if (sent < 0 && errno == EINTR) continue;
    if (sent <= 0) return false;
    at = skip(frame.vector, at, static_cast<size_t>(sent));
  }
  if (!connection.zero_copy) return true;
  connection.sends.read_completions(socket);
  if (mode == ZeroCopy::automatic && connection.sends.was_copied()) {
    // The kernel copied after all (loopback does): plain sends are cheaper.
    connection.zero_copy = false;
    uses_zero_copy = false;
  }
  return true;
}

void StreamSender::Core::read_answers(Connection& connection) {
  const auto self = shared_from_this();
  uint64_t answer;
  while (receive_all(connection.socket.get(), &answer, sizeof(answer))) {
    if (answer & kRefusedBit) {
      std::shared_ptr<Put> put;
      {
        const std::lock_guard lock(mutex);
        const auto found = under_way.find(answer & ~kRefusedBit);
        if (found == under_way.end()) continue;
        put = found->second;
      }
      end(put, std::make_unique<Error>("CANCELLED", "the receiver has taken its pages back"));
      continue;
    }
    Sent sent;
    {
      const std::lock_guard lock(connection.asking);
      if (connection.asked.empty() || connection.asked.front().put->id != answer) return fail("the receiver answered what it was not asked");
      sent = std::move(connection.asked.front());
      connection.asked.pop_front();
    }
    if (sent.put->job.confirm(sent.pieces)) end(sent.put, nullptr);
  }
  fail("the receiver closed the data connection");
}

void StreamSender::Core::end(const std::shared_ptr<Put>& put, std::unique_ptr<Error> error) {
  {
    const std::lock_guard lock(mutex);
    under_way.erase(put->id);
  }
  put->job.end(std::move(error));
}

void StreamSender::Core::fail(const std::string& reason) {
  std::map<uint64_t, std::shared_ptr<Put>> lost;
  {
    const std::lock_guard lock(mutex);
    if (failure.empty()) failure = reason;
    lost.swap(under_way);
    waiting.clear();
    work.notify_all();
    for (const auto& connection : connections) {
      if (connection->socket) shutdown(connection->socket.get(), SHUT_RDWR);
    }
  }
  for (const auto& [id, put] : lost) put->job.end(std::make_unique<Error>("IO_FAILED", reason));
}

}  // namespace tpla
