#include "transfer/push_message.h"

#include <cstring>

namespace tpla {

namespace {

struct Head {
  uint32_t zero;
  uint32_t session_bytes;
  int32_t layers[2];
  int32_t tokens[2];
};
static_assert(sizeof(Head) == 24);

size_t padded(size_t bytes) { return (bytes + 7) / 8 * 8; }

}  // namespace

std::vector<std::byte> encode_push(const PushMessage& message) {
  const Head head{0, static_cast<uint32_t>(message.session.size()), {message.layers.begin, message.layers.end}, {message.tokens.begin, message.tokens.end}};
  const size_t sums_at = sizeof(head) + padded(message.session.size());
  std::vector<std::byte> bytes(sums_at + message.checksums.size() * sizeof(uint64_t));
  std::memcpy(bytes.data(), &head, sizeof(head));
  std::memcpy(bytes.data() + sizeof(head), message.session.data(), message.session.size());
  if (!message.checksums.empty()) std::memcpy(bytes.data() + sums_at, message.checksums.data(), message.checksums.size() * sizeof(uint64_t));
  return bytes;
}

std::optional<PushMessage> decode_push(const std::vector<std::byte>& bytes) {
  Head head;
  if (bytes.size() < sizeof(head)) return std::nullopt;
  std::memcpy(&head, bytes.data(), sizeof(head));
  const size_t sums_at = sizeof(head) + padded(head.session_bytes);
  if (head.zero != 0 || head.session_bytes > kMaxSessionBytes || sums_at > bytes.size() || (bytes.size() - sums_at) % sizeof(uint64_t) != 0) return std::nullopt;
  PushMessage message;
  message.session.assign(reinterpret_cast<const char*>(bytes.data() + sizeof(head)), head.session_bytes);
  message.layers = {head.layers[0], head.layers[1]};
  message.tokens = {head.tokens[0], head.tokens[1]};
  message.checksums.resize((bytes.size() - sums_at) / sizeof(uint64_t));
  if (!message.checksums.empty()) std::memcpy(message.checksums.data(), bytes.data() + sums_at, bytes.size() - sums_at);
  return message;
}

}  // namespace tpla
