#include <cstring>
#include <map>
#include <optional>
#include <set>
#include <utility>
#include <vector>

#include "transfer/grant_book.h"
#include "transfer/messages/kv_messages.h"
#include "transfer/messages/bounce_buffers.h"
#include "transfer/messages/message_kinds.h"
#include "transfer/messages/registered_memory.h"

namespace tpla {

struct KvMessageReceiver::Core : MessageLink, std::enable_shared_from_this<Core> {
  Core(std::shared_ptr<Messenger> of, std::shared_ptr<const KvRegion> region, std::shared_ptr<DevicePort> with)
      : messenger(std::move(of)), book(std::move(region)), port(std::move(with)) {}
  void register_pages(const std::shared_ptr<const KvRegion>& region);
  void register_gpu_pages(const std::shared_ptr<const KvRegion>& region);
  bool is_on_gpu() const { return book.region().device >= 0; }
  // A hello.
  void on_message(const Incoming& message) override;
  void drop(const std::string& key);
  // From a bounce buffer into a page on a GPU, together with the others of this round.
  void copy(DevicePort::Copy what, std::function<void(bool is_good)> done);
  void send_copies();

  const std::shared_ptr<Messenger> messenger;
  GrantBook book;
  const std::shared_ptr<DevicePort> port;
  // Empty where pages are on a GPU that the messenger does not reach.
  std::vector<std::unique_ptr<RegisteredMemory>> memories;
  std::unique_ptr<BounceBuffers> bounce;
  std::vector<DevicePort::Copy> copies;
  std::vector<std::function<void(bool)>> copied;
  // By key; on the messenger's thread.
  std::map<std::string, std::shared_ptr<Peer>> peers;
};

// A sender that was let in. On the messenger's thread.
struct KvMessageReceiver::Peer : MessageLink, std::enable_shared_from_this<Peer> {
  Peer(std::shared_ptr<Core> of, std::shared_ptr<GrantBook::Client> who, uint64_t link) : core(std::move(of)), client(std::move(who)), remote(link) {}
  void connect(const std::string& address);
  void on_message(const Incoming& message) override;
  void take(const Incoming& message, const Grant& grant, const Piece& piece);
  bool lands_directly();
  void take_through_host(const Incoming& message, std::byte* place);
  void finish_piece(const MessageHead& head, bool is_good);
  void answer(uint64_t put, bool refused);
  void send_answers();
  void reject();
  void disconnect();
  void say(uint32_t kind, uint64_t put, uint32_t pieces);

  const std::shared_ptr<Core> core;
  const std::shared_ptr<GrantBook::Client> client;
  const uint64_t remote;
  uint64_t number = 0;
  Messenger::Endpoint* endpoint = nullptr;
  // What the sender is to be told in one message after this round of progress.
  std::map<uint64_t, uint32_t> landed;
  std::set<uint64_t> refused;
  bool is_answering = false;
  // Asked when the first piece has come, since until then the library may not have settled on a way.
  std::optional<bool> is_direct;
};

KvMessageReceiver::KvMessageReceiver(std::shared_ptr<Messenger> messenger, std::shared_ptr<const KvRegion> region, std::shared_ptr<DevicePort> port)
    : core_(std::make_shared<Core>(std::move(messenger), region, std::move(port))) {
  if (core_->is_on_gpu()) core_->register_gpu_pages(region);
  else core_->register_pages(region);
  core_->messenger->post([core = core_] { core->messenger->listen(core); });
}

KvMessageReceiver::~KvMessageReceiver() { close(); }

void KvMessageReceiver::admit(const std::string& key, std::shared_ptr<const WriteGate> gate) { core_->book.admit(key, std::move(gate)); }

void KvMessageReceiver::grant(const std::string& key, int slot, uint32_t epoch, Range tokens, PageTables pages) {
  core_->book.grant(key, slot, epoch, tokens, std::move(pages));
}

void KvMessageReceiver::disconnect(const std::string& key) {
  core_->messenger->post([core = core_, key] { core->drop(key); });
}

void KvMessageReceiver::withdraw(const std::string& key) {
  core_->book.withdraw(key);
  disconnect(key);
}

bool KvMessageReceiver::is_direct() const { return !core_->memories.empty(); }

void KvMessageReceiver::close() {
  for (const std::string& key : core_->book.keys()) withdraw(key);
}

void KvMessageReceiver::Core::register_pages(const std::shared_ptr<const KvRegion>& region) {
  for (int memory = 0; memory < region->layout.memories(); memory++) {
    const int device = is_on_gpu() ? port->device_of(region->base[memory]) : -1;
    memories.push_back(std::make_unique<RegisteredMemory>(messenger, region, region->base[memory], region->layout.rank_bytes(region->pages), device));
  }
}

void KvMessageReceiver::Core::register_gpu_pages(const std::shared_ptr<const KvRegion>& region) {
  if (!port) throw Error("REQUEST_INVALID", "this addon was built without CUDA; build it with TPLA_CUDA=on");
  messenger->run([this] { port->use(book.region().device); });
  // Also for pieces that come with their message.
  bounce = std::make_unique<BounceBuffers>(messenger, port, region->layout.widest_row_bytes() * region->layout.page_tokens);
  if (!messenger->may_carry_gpu()) return;
  try {
    register_pages(region);
  } catch (const Error&) {
    // It carries memory of GPUs, but not of this one.
    memories.clear();
  }
}

void KvMessageReceiver::Core::copy(DevicePort::Copy what, std::function<void(bool is_good)> done) {
  copies.push_back(what);
  copied.push_back(std::move(done));
  if (copies.size() > 1) return;
  messenger->post([self = shared_from_this()] { self->send_copies(); });
}

void KvMessageReceiver::Core::send_copies() {
  port->copy(std::exchange(copies, {}), [self = shared_from_this(), done = std::exchange(copied, {})](bool is_good) {
    self->messenger->post([done, is_good] {
      for (const auto& call : done) call(is_good);
    });
  });
}

void KvMessageReceiver::Core::on_message(const Incoming& message) {
  constexpr size_t kFixedBytes = kLinkKeyBytes + sizeof(uint64_t);
  if (message.head.kind != kHello || message.is_remote || message.bytes <= kFixedBytes) return;
  const auto* data = static_cast<const char*>(message.data);
  const std::string key(data, kLinkKeyBytes);
  const auto client = book.find(key);
  if (!client || peers.contains(key)) return;
  uint64_t link;
  std::memcpy(&link, data + kLinkKeyBytes, sizeof(link));
  const auto peer = std::make_shared<Peer>(shared_from_this(), client, link);
  // An endpoint is not made inside a message's handler.
  messenger->post([peer, address = std::string(data + kFixedBytes, message.bytes - kFixedBytes)] { peer->connect(address); });
  peers[key] = peer;
}

void KvMessageReceiver::Core::drop(const std::string& key) {
  const auto found = peers.find(key);
  if (found == peers.end()) return;
  found->second->disconnect();
  peers.erase(found);
}

void KvMessageReceiver::Peer::connect(const std::string& address) {
  try {
    endpoint = core->messenger->connect(address, [weak = weak_from_this()](const std::string&) {
      // An endpoint is not closed inside its own failure's handler.
      if (const auto self = weak.lock()) self->core->messenger->post([self] { self->disconnect(); });
    });
  } catch (const Error&) {
    // The sender, which hears nothing, gives up.
    return;
  }
  number = core->messenger->add_link(weak_from_this());
  say(kWelcome, number, 0);
}

void KvMessageReceiver::Peer::on_message(const Incoming& message) {
  const MessageHead& head = message.head;
  const Piece piece{head.layer, head.copy, head.begin, head.end};
  const auto grant = client->grant(head.slot);
  if (head.kind != kPiece || !grant) return reject();
  // Tokens of an old epoch are dropped; this one's must be granted.
  if (grant->epoch != head.epoch) return answer(head.put, true);
  if (!core->book.covers(*grant, piece) || core->book.bytes_of(piece) != message.bytes) return reject();
  take(message, *grant, piece);
}

void KvMessageReceiver::Peer::take(const Incoming& message, const Grant& grant, const Piece& piece) {
  const MessageHead& head = message.head;
  if (!client->gate().enter(static_cast<int>(head.slot), head.epoch)) return answer(head.put, true);
  std::byte* place = core->book.place(grant, piece);
  if (message.is_remote && lands_directly()) {
    core->messenger->receive(message, place, core->memories[core->book.memory_of(grant, piece)]->get(),
                             [self = shared_from_this(), head](const std::string& failure) { self->finish_piece(head, failure.empty()); });
  } else if (core->is_on_gpu()) {
    take_through_host(message, place);
  } else {
    std::memcpy(place, message.data, message.bytes);
    finish_piece(head, true);
  }
}

bool KvMessageReceiver::Peer::lands_directly() {
  if (!core->is_on_gpu()) return true;
  if (!is_direct) is_direct = !core->memories.empty() && endpoint != nullptr && core->messenger->carries_gpu(endpoint);
  return *is_direct;
}

void KvMessageReceiver::Peer::take_through_host(const Incoming& message, std::byte* place) {
  BounceBuffers::Slot slot;
  try {
    slot = core->bounce->take();
  } catch (const Error&) {
    return finish_piece(message.head, false);
  }
  const auto landed = [self = shared_from_this(), head = message.head, slot, place, bytes = message.bytes](const std::string& failure) {
    const auto finish = [self, head, slot](bool is_good) {
      self->core->bounce->give(slot);
      self->finish_piece(head, is_good);
    };
    if (failure.empty()) self->core->copy({place, slot.data, bytes}, finish);
    else finish(false);
  };
  if (message.is_remote) return core->messenger->receive(message, slot.data, slot.registration, landed);
  std::memcpy(slot.data, message.data, message.bytes);
  landed("");
}

void KvMessageReceiver::Peer::finish_piece(const MessageHead& head, bool is_good) {
  client->gate().leave(static_cast<int>(head.slot));
  if (is_good) answer(head.put, false);
  else reject();
}

void KvMessageReceiver::Peer::answer(uint64_t put, bool is_refused) {
  if (is_refused) refused.insert(put);
  else landed[put]++;
  if (std::exchange(is_answering, true)) return;
  core->messenger->post([self = shared_from_this()] { self->send_answers(); });
}

void KvMessageReceiver::Peer::send_answers() {
  is_answering = false;
  for (const auto& [put, pieces] : std::exchange(landed, {})) say(kLanded, put, pieces);
  for (const uint64_t put : std::exchange(refused, {})) say(kRefused, put, 0);
}

void KvMessageReceiver::Peer::say(uint32_t kind, uint64_t put, uint32_t pieces) {
  if (endpoint == nullptr) return;
  MessageHead head{};
  head.link = remote;
  head.put = put;
  head.kind = kind;
  head.pieces = pieces;
  core->messenger->send(endpoint, head, nullptr, 0, nullptr, nullptr);
}

// Tells the sender first; the end of the endpoint alone is not seen on every transport.
void KvMessageReceiver::Peer::reject() {
  if (number == 0) return;
  core->messenger->remove_link(std::exchange(number, 0));
  say(kBroken, 0, 0);
}

void KvMessageReceiver::Peer::disconnect() {
  if (number != 0) core->messenger->remove_link(std::exchange(number, 0));
  if (endpoint == nullptr) return;
  core->messenger->disconnect(std::exchange(endpoint, nullptr), [self = shared_from_this()] {});
}

}  // namespace tpla
