#include "transfer/push_announcer.h"

#include "core/error.h"
#include "transfer/parallel.h"

namespace tpla {

namespace {

// Where puts are very many, decode shall not hear of all at the end.
constexpr size_t kMostHeld = 16;

}  // namespace

PushAnnouncer& PushAnnouncer::shared() {
  static auto* announcer = new PushAnnouncer();
  return *announcer;
}

void PushAnnouncer::expect(const std::shared_ptr<Channel>& channel, const std::string& session) {
  const std::lock_guard lock(mutex_);
  sessions_[{channel.get(), session}].puts++;
}

void PushAnnouncer::ended(const std::shared_ptr<Channel>& channel, const std::string& session, std::optional<std::vector<std::byte>> message) {
  Messages due;
  {
    const std::lock_guard lock(mutex_);
    const auto found = sessions_.find({channel.get(), session});
    Session& at = found->second;
    at.puts--;
    if (message) at.held.push_back(std::move(*message));
    if (at.puts > 0 && at.held.size() < kMostHeld && shares_few_cpus(channel->peer().pid)) return;
    due.swap(at.held);
    if (at.puts == 0) sessions_.erase(found);
  }
  for (const std::vector<std::byte>& each : due) announce_push(*channel, each);
}

void announce_push(Channel& channel, const std::vector<std::byte>& message) {
  try {
    channel.send(message.data(), message.size(), {});
  } catch (const Error&) {
  }
}

}  // namespace tpla
