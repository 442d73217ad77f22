#pragma once
#include <cstdint>

namespace tpla {

// Kinds of messages between KvMessageSender and KvMessageReceiver, and which members of the head they use.
enum MessageKind : uint32_t {
  // To who listens. Data: key, the sender's link (8 bytes), its address.
  kHello = 1,
  // link; `put` is the link that the sender's pieces go to.
  kWelcome,
  // All of the head; `pieces` is unused. Data: rows.
  kPiece,
  // put, pieces: so many more of them are in the receiver's pages.
  kLanded,
  // put: the gate is shut.
  kRefused,
  // The receiver ends the link: a piece broke the rules, or could not be fetched.
  kBroken,
};

}  // namespace tpla
