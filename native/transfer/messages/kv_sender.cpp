#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <deque>
#include <future>
#include <map>
#include <mutex>
#include <pthread.h>
#include <thread>
#include <vector>

#include "transfer/event_loop.h"
#include "transfer/parallel.h"
#include "transfer/put_job.h"
#include "transfer/messages/kv_messages.h"
#include "transfer/messages/message_kinds.h"
#include "transfer/messages/row_staging.h"

namespace tpla {

namespace {

constexpr int kMaxMakers = 4;
constexpr std::chrono::milliseconds kWelcomeTimeout{5000};
// A receiver that confirms nothing for so long is lost, whatever the transport says of it.
constexpr std::chrono::milliseconds kStallCheck{1000};
constexpr int kStallChecks = 30;

}  // namespace

struct KvMessageSender::Core : MessageLink, std::enable_shared_from_this<Core> {
  using Chunk = RowStaging::Chunk;

  Core(std::shared_ptr<Messenger> of, const KvLayout& layout, std::shared_ptr<DevicePort> with, int of_source)
      : messenger(std::move(of)), dst(layout), port(std::move(with)), device(of_source) {}
  void use_device();
  void connect(const std::string& address, const std::string& key);
  void reserve_staging();
  void start_makers();
  void make_units();
  void send_unit(const std::shared_ptr<PutJob>& job, uint64_t id, const PutJob::Unit& unit, Chunk* chunk);
  void return_chunk(Chunk* chunk);
  void on_message(const Incoming& message) override;
  void on_landed(uint64_t put, uint32_t pieces);
  void on_refused(uint64_t put);
  std::shared_ptr<PutJob> find(uint64_t put);
  void forget(uint64_t put);
  void watch_for_stalls(uint64_t seen, int checks);
  void fail(const std::string& reason);

  const std::shared_ptr<Messenger> messenger;
  const KvLayout dst;
  const std::shared_ptr<DevicePort> port;
  const int device;
  // Once the receiver has welcomed us.
  std::unique_ptr<RowStaging> staging;

  // On the messenger's thread.
  Messenger::Endpoint* endpoint = nullptr;
  uint64_t number = 0;
  uint64_t remote = 0;
  std::promise<void> welcome;
  bool is_welcome = false;

  std::mutex mutex;
  std::condition_variable work;
  std::deque<std::pair<uint64_t, std::shared_ptr<PutJob>>> waiting;  // with units to make
  std::map<uint64_t, std::shared_ptr<PutJob>> under_way;             // with pieces to be confirmed
  std::vector<Chunk*> free_chunks;
  uint64_t next_id = 1;
  std::string failure;
  bool is_watched = false;
  std::atomic<uint64_t> confirmations{0};
};

KvMessageSender::KvMessageSender(std::shared_ptr<Messenger> messenger, const std::string& address, const std::string& key, const KvLayout& dst,
                                 std::shared_ptr<DevicePort> port, int device)
    : core_(std::make_shared<Core>(std::move(messenger), dst, std::move(port), device)) {
  if (key.size() != kLinkKeyBytes) throw Error("REQUEST_INVALID", "a link's key has " + std::to_string(kLinkKeyBytes) + " bytes");
  core_->use_device();
  core_->connect(address, key);
  core_->reserve_staging();
  core_->start_makers();
}

KvMessageSender::~KvMessageSender() { close(); }

bool KvMessageSender::is_direct() const { return core_->staging->is_direct(); }

std::vector<std::string> KvMessageSender::transports() const {
  std::vector<std::string> found;
  core_->messenger->run([&] {
    if (core_->endpoint != nullptr) found = core_->messenger->transports(core_->endpoint);
  });
  return found;
}

void KvMessageSender::close() { core_->fail("the sender was closed"); }

void KvMessageSender::put(LinkPut put, Done done) {
  if (put.src->device != core_->device) throw Error("REQUEST_INVALID", "a link that was made for other memory cannot send this source's rows");
  const auto job = std::make_shared<PutJob>(std::move(put), core_->dst, PutJob::kUnitBytes, std::move(done), core_->staging->unit_pages());
  {
    const std::lock_guard lock(core_->mutex);
    if (core_->failure.empty()) {
      const uint64_t id = core_->next_id++;
      core_->under_way[id] = job;
      core_->waiting.emplace_back(id, job);
      core_->work.notify_all();
      if (!std::exchange(core_->is_watched, true)) core_->watch_for_stalls(core_->confirmations, 0);
      return;
    }
  }
  job->end(std::make_unique<Error>("IO_FAILED", core_->failure));
}

// The library finds its way to a GPU's memory by what its thread uses.
void KvMessageSender::Core::use_device() {
  if (device < 0) return;
  if (!port) throw Error("REQUEST_INVALID", "this addon was built without CUDA; build it with TPLA_CUDA=on");
  messenger->run([this] { port->use(device); });
}

void KvMessageSender::Core::connect(const std::string& address, const std::string& key) {
  std::future<void> welcomed = welcome.get_future();
  try {
    messenger->run([&] {
      endpoint = messenger->connect(address, [weak = weak_from_this()](const std::string& reason) {
        if (const auto self = weak.lock()) self->fail(std::string(self->messenger->name()) + " lost the receiver: " + reason);
      });
      number = messenger->add_link(weak_from_this());
      const auto hello = std::make_shared<std::string>(key);
      hello->append(reinterpret_cast<const char*>(&number), sizeof(number)).append(messenger->address());
      MessageHead head{};
      head.kind = kHello;
      messenger->send(endpoint, head, hello->data(), hello->size(), nullptr, [hello](const std::string&) {});
    });
    if (welcomed.wait_for(kWelcomeTimeout) != std::future_status::ready) {
      throw Error("IO_FAILED", std::string("the receiver does not answer over ") + messenger->name() + "; are its transports blocked between the hosts?");
    }
    welcomed.get();
  } catch (const Error& error) {
    fail(error.what());
    throw;
  }
}

// Where rows leave from depends on what there is between the two ends.
void KvMessageSender::Core::reserve_staging() {
  try {
    bool is_gpu_carried = false;
    if (device >= 0) messenger->run([&] { is_gpu_carried = endpoint != nullptr && messenger->carries_gpu(endpoint); });
    staging = std::make_unique<RowStaging>(messenger, dst, port, device, is_gpu_carried);
  } catch (const Error& error) {
    fail(error.what());
    throw;
  }
  for (Chunk& chunk : staging->chunks()) free_chunks.push_back(&chunk);
}

void KvMessageSender::Core::start_makers() {
  for (int i = 0; i < std::clamp(transfer_threads(), 1, kMaxMakers); i++) {
    std::thread([self = shared_from_this()] {
      pthread_setname_np(pthread_self(), "tpla-make");
      self->make_units();
    }).detach();
  }
}

void KvMessageSender::Core::make_units() {
  size_t index = 0;
  Chunk* chunk = nullptr;
  uint64_t id = 0;
  while (true) {
    std::shared_ptr<PutJob> job;
    {
      std::unique_lock lock(mutex);
      work.wait(lock, [this] { return (!waiting.empty() && !free_chunks.empty()) || !failure.empty(); });
      if (!failure.empty()) return;
      std::tie(id, job) = waiting.front();
      if (!job->take(index)) {
        waiting.pop_front();
        continue;
      }
      chunk = free_chunks.back();
      free_chunks.pop_back();
    }
    const PutJob::Unit unit = job->unit(index);
    try {
      staging->make(*job, unit, *chunk);
    } catch (const Error& error) {
      return fail(error.what());
    }
    messenger->post([self = shared_from_this(), job, id, unit, chunk] { self->send_unit(job, id, unit, chunk); });
  }
}

void KvMessageSender::Core::send_unit(const std::shared_ptr<PutJob>& job, uint64_t id, const PutJob::Unit& unit, Chunk* chunk) {
  if (endpoint == nullptr || job->is_over()) return return_chunk(chunk);
  const std::vector<Piece> pieces = job->pieces_of(unit);
  chunk->pieces = pieces.size();
  job->add_wire_bytes(pieces.size() * sizeof(MessageHead));
  const std::vector<const std::byte*> places = staging->places(*chunk, pieces);
  for (size_t i = 0; i < pieces.size(); i++) {
    const Piece& piece = pieces[i];
    MessageHead head{};
    head.link = remote;
    head.put = id;
    head.kind = kPiece;
    head.slot = static_cast<uint32_t>(job->what().slot);
    head.epoch = job->what().epoch;
    head.layer = piece.layer;
    head.copy = piece.copy;
    head.begin = piece.begin;
    head.end = piece.end;
    const size_t bytes = dst.row_bytes(static_cast<int>(piece.layer)) * (piece.end - piece.begin);
    messenger->send(endpoint, head, places[i], bytes, staging->registration(), [self = shared_from_this(), chunk](const std::string& failure) {
      if (--chunk->pieces == 0) self->return_chunk(chunk);
      if (!failure.empty()) self->fail(std::string(self->messenger->name()) + " cannot send: " + failure);
    });
  }
}

void KvMessageSender::Core::return_chunk(Chunk* chunk) {
  const std::lock_guard lock(mutex);
  free_chunks.push_back(chunk);
  work.notify_one();
}

void KvMessageSender::Core::on_message(const Incoming& message) {
  const MessageHead& head = message.head;
  switch (head.kind) {
    case kWelcome:
      remote = head.put;
      if (!std::exchange(is_welcome, true)) welcome.set_value();
      return;
    case kLanded: return on_landed(head.put, head.pieces);
    case kRefused: return on_refused(head.put);
    case kBroken: return fail("the receiver ended the link");
    default: return;
  }
}

// Null where the put is over.
std::shared_ptr<PutJob> KvMessageSender::Core::find(uint64_t put) {
  const std::lock_guard lock(mutex);
  const auto found = under_way.find(put);
  return found == under_way.end() ? nullptr : found->second;
}

void KvMessageSender::Core::forget(uint64_t put) {
  const std::lock_guard lock(mutex);
  under_way.erase(put);
}

void KvMessageSender::Core::on_landed(uint64_t put, uint32_t pieces) {
  confirmations++;
  const auto job = find(put);
  if (!job || !job->confirm(pieces)) return;
  forget(put);
  job->end(nullptr);
}

void KvMessageSender::Core::on_refused(uint64_t put) {
  confirmations++;
  const auto job = find(put);
  if (!job) return;
  forget(put);
  job->end(std::make_unique<Error>("CANCELLED", "the receiver has taken its pages back"));
}

// Every kStallCheck while puts are under way.
void KvMessageSender::Core::watch_for_stalls(uint64_t seen, int checks) {
  EventLoop::shared().post([weak = weak_from_this(), seen, checks] {
    const auto self = weak.lock();
    if (!self) return;
    {
      const std::lock_guard lock(self->mutex);
      if (self->under_way.empty()) self->is_watched = false;
      if (!self->is_watched) return;
    }
    const uint64_t now = self->confirmations;
    if (now == seen && checks + 1 >= kStallChecks) return self->fail(std::string("the receiver confirms nothing over ") + self->messenger->name() + " any more");
    self->watch_for_stalls(now, now == seen ? checks + 1 : 0);
  }, kStallCheck);
}

void KvMessageSender::Core::fail(const std::string& reason) {
  std::map<uint64_t, std::shared_ptr<PutJob>> lost;
  {
    const std::lock_guard lock(mutex);
    if (!failure.empty()) return;
    failure = reason;
    lost.swap(under_way);
    waiting.clear();
    work.notify_all();
  }
  messenger->post([self = shared_from_this(), reason] {
    if (self->number != 0) self->messenger->remove_link(std::exchange(self->number, 0));
    if (!std::exchange(self->is_welcome, true)) self->welcome.set_exception(std::make_exception_ptr(Error("IO_FAILED", reason)));
    if (self->endpoint != nullptr) self->messenger->disconnect(std::exchange(self->endpoint, nullptr), [self] {});
  });
  for (const auto& [id, job] : lost) job->end(std::make_unique<Error>("IO_FAILED", reason));
}

}  // namespace tpla
