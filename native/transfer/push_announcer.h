#pragma once
#include <cstddef>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "transfer/channel.h"

namespace tpla {

// Tells decode that puts into its memory have ended, so that it verifies them.
//
// Where CPUs do the putting, and prefill and decode have but a few of them between them, word of a put waits while others of its session
// are still to be done: decode would take the cores from those, put and verified would be the last of them no earlier, and prefill's pages were
// busy for longer. Word waits for puts that were asked for already, never for computing.
class PushAnnouncer {
 public:
  static PushAnnouncer& shared();

  // A put of CPU threads was asked for; ended() follows.
  void expect(const std::shared_ptr<Channel>& channel, const std::string& session);
  // `message`: what decode is told; nothing of a put that failed.
  void ended(const std::shared_ptr<Channel>& channel, const std::string& session, std::optional<std::vector<std::byte>> message);

 private:
  using Messages = std::vector<std::vector<std::byte>>;
  struct Session {
    int puts = 0;
    Messages held;
  };

  std::mutex mutex_;
  std::map<std::pair<const Channel*, std::string>, Session> sessions_;
};

// At once. A channel that is closed takes no message: its end is on the way to whoever waits.
void announce_push(Channel& channel, const std::vector<std::byte>& message);

}  // namespace tpla
