#pragma once
#include <cstddef>
#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "transfer/kv_put.h"

namespace tpla {

// `pushed` of the hand-off channel (src/transfer/messages.ts): what a put has placed, with its checksums. The one message that is written and
// read without waking JavaScript, since the next step of a hand-off waits for it. Little-endian:
//
//   u32 0 (no JSON head is so short), u32 bytes of the session's name, i32 layers begin, end, i32 tokens begin, end,
//   the name, zeros up to a multiple of 8, u64 checksums
struct PushMessage {
  std::string session;
  Range layers;
  Range tokens;
  std::vector<uint64_t> checksums;
};

inline constexpr size_t kMaxSessionBytes = 256;

std::vector<std::byte> encode_push(const PushMessage& message);
// Nothing where the bytes are another message, or none.
std::optional<PushMessage> decode_push(const std::vector<std::byte>& bytes);

}  // namespace tpla
