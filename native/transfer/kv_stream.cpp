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
#include <sys/socket.h>
#include <sys/uio.h>
#include <thread>
#include <unistd.h>
#include <vector>

#include "core/error.h"
#include "transfer/grant_book.h"
#include "transfer/reshard.h"
#include "transfer/row_mover.h"

namespace tpla {

namespace {

constexpr uint32_t kMagic = 0x31564b54;  // "TKV1"
constexpr uint64_t kRefusedBit = uint64_t(1) << 63;
// Small enough that a frame made by a core is still in its cache when the kernel copies it.
constexpr size_t kFrameBytes = 128 * 1024;
constexpr int kMaxUnknownConnections = 64;
constexpr int kKeyTimeoutMs = 3000;
constexpr int kConnectTimeoutMs = 5000;
constexpr int kMaxConnections = 64;
constexpr int kMakers = 2;   // threads of one connection: while one sends its frame, the other makes the next
constexpr int kBuffers = 4;  // frames of one of them that the kernel may hold
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
  bool read_payload(int socket, const FrameHeader& frame, const Grant& grant, const GrantBook::Client& client, bool& refused) const;
  std::vector<iovec> places_of(const FrameHeader& frame, const Grant& grant) const;

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
  while (receive_all(socket, &frame, sizeof(frame))) {
    const std::shared_ptr<const Grant> grant = client.grant(frame.slot);
    // A frame of an earlier session on the slot has no pages of its own any more, and its size cannot be checked: it must still be read past.
    if (!grant || !check_frame(frame, *grant)) return;
    bool refused = frame.epoch != grant->epoch;
    if (!read_payload(socket, frame, *grant, client, refused)) return;
    const uint64_t answer = frame.put | (refused ? kRefusedBit : 0);
    if (!send_all(socket, &answer, sizeof(answer))) return;
  }
}

bool StreamReceiver::Core::check_frame(const FrameHeader& frame, const Grant& grant) const {
  const KvLayout& layout = book.region().layout;
  if (frame.magic != kMagic || (frame.put & kRefusedBit) != 0 || frame.layer >= uint32_t(layout.layers)) return false;
  if (frame.begin >= frame.end || size_t(frame.end - frame.begin) * layout.row_bytes(int(frame.layer)) * copies > kMaxFrameBytes) return false;
  // An old epoch's tokens are read past; this one's must be granted.
  return frame.epoch != grant.epoch || (frame.begin >= uint32_t(grant.tokens.begin) && frame.end <= uint32_t(grant.tokens.end));
}

std::vector<iovec> StreamReceiver::Core::places_of(const FrameHeader& frame, const Grant& grant) const {
  const KvLayout& layout = book.region().layout;
  std::vector<iovec> places;
  for (int copy = 0; copy < copies; copy++) {
    for (int token = frame.begin; token < int(frame.end);) {
      const int end = std::min<int>(frame.end, (token / layout.page_tokens + 1) * layout.page_tokens);
      const Piece piece{frame.layer, uint32_t(copy), uint32_t(token), uint32_t(end)};
      places.push_back({book.place(grant, piece), book.bytes_of(piece)});
      token = end;
    }
  }
  return places;
}

// False when the connection ended. The gate is passed for each read by itself: revoking never waits for the network.
bool StreamReceiver::Core::read_payload(int socket, const FrameHeader& frame, const Grant& grant, const GrantBook::Client& client, bool& refused) const {
  thread_local std::vector<char> scrap(64 * 1024);
  size_t left = size_t(frame.end - frame.begin) * book.region().layout.row_bytes(int(frame.layer)) * copies;
  std::vector<iovec> places = refused ? std::vector<iovec>{} : places_of(frame, grant);
  size_t next = 0;
  while (left > 0) {
    if (!refused && !client.gate().enter(frame.slot, frame.epoch)) refused = true;
    ssize_t got;
    if (refused) {
      got = recv(socket, scrap.data(), std::min(left, scrap.size()), MSG_DONTWAIT);
    } else {
      msghdr message{};
      message.msg_iov = &places[next];
      message.msg_iovlen = std::min(places.size() - next, kMaxVector);
      got = recvmsg(socket, &message, MSG_DONTWAIT);
      const int error = errno;
      client.gate().leave(frame.slot);
      errno = error;
    }
    if (got < 0 && (errno == EAGAIN || errno == EINTR)) {
      // Outside the gate: revoking never waits for the network.
      pollfd readable{socket, POLLIN, 0};
      if (poll(&readable, 1, -1) < 0 && errno != EINTR) return false;
      continue;
    }
    if (got <= 0) return false;
    left -= static_cast<size_t>(got);
    for (size_t taken = static_cast<size_t>(got); !refused && taken > 0;) {
      iovec& place = places[next];
      const size_t part = std::min(taken, place.iov_len);
      place.iov_base = static_cast<char*>(place.iov_base) + part;
      place.iov_len -= part;
      taken -= part;
      if (place.iov_len == 0) next++;
    }
  }
  return true;
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
  struct Job {
    Job(LinkPut what, const KvLayout& dst, Done finished) : put(std::move(what)), mover(*put.src, dst, false), done(std::move(finished)) {}
    LinkPut put;
    RowMover mover;
    Done done;
    uint64_t id = 0;
    // Frames: layer by layer, token ranges that begin at pages of the destination.
    std::vector<Range> ranges;
    size_t frames = 0;
    std::atomic<size_t> next{0};
    std::atomic<size_t> answered{0};
    std::atomic<bool> is_refused{false};
    std::atomic<bool> is_over{false};
    KvPutResult result;
  };
  struct Connection {
    UniqueFd socket;   // closed, under the mutex, by the last of its threads
    int threads = kMakers + 1;
    // One frame at a time goes out; zero-copy is counted in the same order.
    std::mutex sending;
    bool zero_copy = false;
    ZeroCopySends sends;
  };
  // A frame's memory.
  struct Buffer {
    std::vector<std::byte> bytes;
    // The kernel may read from it until this send has completed.
    std::optional<uint64_t> lent_until;
  };

  explicit Core(const KvLayout& layout) : dst(layout), copies(copies_per_page(layout)) {}

  void send_frames(Connection& connection);
  void read_answers(Connection& connection);
  bool await_release(Connection& connection, Buffer& buffer);
  void make_frame(Job& job, size_t index, std::vector<std::byte>& bytes);
  bool send_frame(Connection& connection, Buffer& buffer);
  std::shared_ptr<Job> next_job(size_t& frame);
  void end(const std::shared_ptr<Job>& job, std::unique_ptr<Error> error);
  void fail(const std::string& reason);

  const KvLayout dst;
  const int copies;
  std::vector<std::unique_ptr<Connection>> connections;
  ZeroCopy mode = ZeroCopy::automatic;
  std::atomic<bool> uses_zero_copy{false};

  std::mutex mutex;
  std::condition_variable work;
  std::deque<std::shared_ptr<Job>> waiting;              // with frames to send
  std::map<uint64_t, std::shared_ptr<Job>> under_way;    // with answers to come
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
  for (const auto& connection : core_->connections) {
    const auto run = [core = core_, at = connection.get()](auto body, const char* name) {
      std::thread([core, at, body, name] {
        pthread_setname_np(pthread_self(), name);
        (core.get()->*body)(*at);
        const std::lock_guard lock(core->mutex);
        if (--at->threads == 0) at->socket.reset();
      }).detach();
    };
    for (int maker = 0; maker < kMakers; maker++) run(&Core::send_frames, "tpla-send");
    run(&Core::read_answers, "tpla-answers");
  }
}

StreamSender::~StreamSender() { close(); }

void StreamSender::close() { core_->fail("the sender was closed"); }

bool StreamSender::is_zero_copy() const { return core_->uses_zero_copy; }

void StreamSender::put(LinkPut put, Done done) {
  check_compatible(put.src->layout, core_->dst);
  check_pages("source", *put.src, put.src_pages, put.layers, put.tokens);
  const KvLayout& dst = core_->dst;
  const size_t token_bytes = dst.widest_row_bytes() * core_->copies;
  if (token_bytes > kMaxFrameBytes) throw Error("REQUEST_INVALID", "a token takes " + std::to_string(token_bytes) + " bytes per layer, more than a frame");
  auto job = std::make_shared<Core::Job>(std::move(put), dst, std::move(done));
  const Range tokens = job->put.tokens;
  const int most = std::max<int>(1, static_cast<int>(kFrameBytes / token_bytes));
  for (int begin = tokens.begin; begin < tokens.end;) {
    const int end = std::min(tokens.end, begin + most);
    job->ranges.push_back({begin, end});
    begin = end;
  }
  job->frames = job->ranges.size() * job->put.layers.size();
  job->result.bytes = dst.token_bytes(job->put.layers.begin, job->put.layers.end) * core_->copies * tokens.size();
  job->result.wire_bytes = job->result.bytes + job->frames * (sizeof(FrameHeader) + sizeof(uint64_t));
  job->result.checksums.assign(size_t(pages_of(dst, tokens).size()) * core_->copies, 0);
  {
    const std::lock_guard lock(core_->mutex);
    if (core_->failure.empty()) {
      job->id = core_->next_id++;
      core_->under_way[job->id] = job;
      core_->waiting.push_back(job);
      core_->work.notify_all();
      return;
    }
  }
  job->done({}, std::make_unique<Error>("IO_FAILED", core_->failure));
}

// The next frame to send; null when the sender has failed.
std::shared_ptr<StreamSender::Core::Job> StreamSender::Core::next_job(size_t& frame) {
  std::unique_lock lock(mutex);
  while (true) {
    work.wait(lock, [this] { return !waiting.empty() || !failure.empty(); });
    if (!failure.empty()) return nullptr;
    std::shared_ptr<Job> job = waiting.front();
    frame = job->is_over ? job->frames : job->next.fetch_add(1);
    if (frame + 1 >= job->frames) waiting.pop_front();
    if (frame < job->frames) return job;
  }
}

void StreamSender::Core::send_frames(Connection& connection) {
  const auto self = shared_from_this();
  std::array<Buffer, kBuffers> buffers;
  size_t turn = 0;
  size_t frame = 0;
  while (const std::shared_ptr<Job> job = next_job(frame)) {
    Buffer& buffer = buffers[turn++ % kBuffers];
    bool is_fine = await_release(connection, buffer);
    if (is_fine) {
      make_frame(*job, frame, buffer.bytes);
      const std::lock_guard lock(connection.sending);
      is_fine = send_frame(connection, buffer);
    }
    if (!is_fine) {
      fail(std::string("data connection lost: ") + std::strerror(errno));
      break;
    }
  }
  // The kernel may still read: after a failure the connection is reset, else all was acknowledged.
  for (Buffer& buffer : buffers) await_release(connection, buffer);
}

// Waits until the kernel reads no more from a buffer.
bool StreamSender::Core::await_release(Connection& connection, Buffer& buffer) {
  const int socket = connection.socket.get();
  while (buffer.lent_until) {
    {
      const std::lock_guard lock(connection.sending);
      connection.sends.read_completions(socket);
      if (connection.sends.is_done(*buffer.lent_until)) {
        buffer.lent_until.reset();
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

void StreamSender::Core::make_frame(Job& job, size_t index, std::vector<std::byte>& bytes) {
  const int layer = job.put.layers.begin + static_cast<int>(index / job.ranges.size());
  const Range tokens = job.ranges[index % job.ranges.size()];
  const size_t row_bytes = dst.row_bytes(layer);
  bytes.resize(sizeof(FrameHeader) + row_bytes * tokens.size() * copies);
  const FrameHeader header{kMagic, uint32_t(job.put.slot), job.put.epoch, uint32_t(layer), uint32_t(tokens.begin), uint32_t(tokens.end), job.id};
  std::memcpy(bytes.data(), &header, sizeof(header));
  const KvLayout& src = job.put.src->layout;
  const int first_page = pages_of(dst, job.put.tokens).begin;
  std::byte* to[kMaxCopies];
  for (int copy = 0; copy < copies; copy++) to[copy] = bytes.data() + sizeof(FrameHeader) + row_bytes * tokens.size() * copy;
  for (int token = tokens.begin; token < tokens.end;) {
    const int end = std::min({tokens.end, (token / src.page_tokens + 1) * src.page_tokens, (token / dst.page_tokens + 1) * dst.page_tokens});
    uint64_t sums[kMaxCopies];
    std::fill_n(sums, copies, 0);
    job.mover.move({place_of(src, job.put.src_pages, token / src.page_tokens), {token, end}, layer}, to, sums);
    for (int copy = 0; copy < copies; copy++) {
      const size_t entry = size_t(token / dst.page_tokens - first_page) * copies + copy;
      std::atomic_ref(job.result.checksums[entry]).fetch_add(sums[copy], std::memory_order_relaxed);
      to[copy] += row_bytes * (end - token);
    }
    token = end;
  }
}

// The caller holds connection.sending.
bool StreamSender::Core::send_frame(Connection& connection, Buffer& buffer) {
  const int socket = connection.socket.get();
  const std::vector<std::byte>& bytes = buffer.bytes;
  if (!connection.zero_copy) return send_all(socket, bytes.data(), bytes.size());
  for (size_t at = 0; at < bytes.size();) {
    const ssize_t sent = send(socket, bytes.data() + at, bytes.size() - at, MSG_NOSIGNAL | MSG_ZEROCOPY);
    if (sent < 0 && errno == EINTR) continue;
    // No room to pin pages: this piece goes the ordinary way, which is not counted.
    if (sent < 0 && errno == ENOBUFS) return send_all(socket, bytes.data() + at, bytes.size() - at);
    if (sent <= 0) return false;
    buffer.lent_until = connection.sends.sent();
    at += static_cast<size_t>(sent);
  }
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
    std::shared_ptr<Job> job;
    {
      const std::lock_guard lock(mutex);
      const auto found = under_way.find(answer & ~kRefusedBit);
      if (found == under_way.end()) continue;
      job = found->second;
    }
    if (answer & kRefusedBit) {
      job->is_refused = true;
      end(job, std::make_unique<Error>("CANCELLED", "the receiver has taken its pages back"));
    } else if (job->answered.fetch_add(1) + 1 == job->frames && !job->is_refused) {
      end(job, nullptr);
    }
  }
  fail("the receiver closed the data connection");
}

void StreamSender::Core::end(const std::shared_ptr<Job>& job, std::unique_ptr<Error> error) {
  if (job->is_over.exchange(true)) return;
  {
    const std::lock_guard lock(mutex);
    under_way.erase(job->id);
  }
  // After an error other threads may still be making a frame of it.
  KvPutResult result;
  if (!error) result = std::move(job->result);
  job->done(std::move(result), std::move(error));
}

void StreamSender::Core::fail(const std::string& reason) {
  std::map<uint64_t, std::shared_ptr<Job>> lost;
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
  for (const auto& [id, job] : lost) {
    if (!job->is_over.exchange(true)) job->done({}, std::make_unique<Error>("IO_FAILED", reason));
  }
}

}  // namespace tpla
