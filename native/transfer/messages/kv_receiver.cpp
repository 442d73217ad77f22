#include <cstring>
#include <map>
#include <set>
#include <utility>
#include <vector>

#include "transfer/grant_book.h"
#include "transfer/messages/kv_messages.h"
#include "transfer/messages/message_kinds.h"
#include "transfer/messages/registered_memory.h"

namespace tpla {

struct KvMessageReceiver::Core : MessageLink, std::enable_shared_from_this<Core> {
  Core(std::shared_ptr<Messenger> of, std::shared_ptr<const KvRegion> region) : messenger(std::move(of)), book(std::move(region)) {}
  // A hello.
  void on_message(const Incoming& message) override;
  void drop(const std::string& key);

  const std::shared_ptr<Messenger> messenger;
  GrantBook book;
  std::vector<std::unique_ptr<RegisteredMemory>> memories;
  // By key; on the messenger's thread.
  std::map<std::string, std::shared_ptr<Peer>> peers;
};

// A sender that was let in. On the messenger's thread.
struct KvMessageReceiver::Peer : MessageLink, std::enable_shared_from_this<Peer> {
  Peer(std::shared_ptr<Core> of, std::shared_ptr<GrantBook::Client> who, uint64_t link) : core(std::move(of)), client(std::move(who)), remote(link) {}
  void connect(const std::string& address);
  void on_message(const Incoming& message) override;
  void take(const Incoming& message, const Grant& grant, const Piece& piece);
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
};

KvMessageReceiver::KvMessageReceiver(std::shared_ptr<Messenger> messenger, std::shared_ptr<const KvRegion> region) : core_(std::make_shared<Core>(std::move(messenger), region)) {
  const size_t bytes = region->layout.rank_bytes(region->pages);
  for (int memory = 0; memory < region->layout.memories(); memory++) {
    core_->memories.push_back(std::make_unique<RegisteredMemory>(core_->messenger, region, region->base[memory], bytes));
  }
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

void KvMessageReceiver::close() {
  for (const std::string& key : core_->book.keys()) withdraw(key);
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
  if (!message.is_remote) {
    std::memcpy(place, message.data, message.bytes);
    client->gate().leave(static_cast<int>(head.slot));
    return answer(head.put, false);
  }
  core->messenger->receive(message, place, core->memories[core->book.memory_of(grant, piece)]->get(),
                           [self = shared_from_this(), put = head.put, slot = head.slot](const std::string& failure) {
    self->client->gate().leave(static_cast<int>(slot));
    if (failure.empty()) self->answer(put, false);
    else self->reject();
  });
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
