#include "addon/announcement.h"

#include "addon/arguments.h"
#include "addon/transfer_arguments.h"
#include "transfer/push_announcer.h"
#include "transfer/push_message.h"
#include "transfer/timeline.h"

namespace tpla::addon {

namespace {

void announce(const Announcement& of, Range layers, Range tokens, const std::vector<uint64_t>* checksums) {
  std::optional<std::vector<std::byte>> message;
  if (checksums != nullptr) message = encode_push({of.session, layers, tokens, *checksums});
  if (of.is_on_cpu) PushAnnouncer::shared().ended(of.channel, of.session, std::move(message));
  else if (message) announce_push(*of.channel, *message);
}

}  // namespace

std::shared_ptr<const Announcement> parse_announcement(const Napi::Value& value, bool is_on_cpu) {
  if (value.IsUndefined()) return nullptr;
  const Napi::Object options = to_object(value, "announce");
  const std::string session = to_text(options.Get("session"), "session");
  if (session.size() > kMaxSessionBytes) refuse("session", "at most " + std::to_string(kMaxSessionBytes) + " bytes");
  return std::make_shared<const Announcement>(Announcement{channel_of(options.Get("channel")), session, is_on_cpu});
}

std::function<void(KvPutResult, std::unique_ptr<Error>)> settle_put(std::shared_ptr<ThreadPromise> promise, std::shared_ptr<const Announcement> announcement,
                                                                    Range layers, Range tokens) {
  if (announcement && announcement->is_on_cpu) PushAnnouncer::shared().expect(announcement->channel, announcement->session);
  return [promise = std::move(promise), announcement = std::move(announcement), layers, tokens](KvPutResult outcome, std::unique_ptr<Error> error) {
    const int64_t placed_ns = monotonic_ns();
    mark_step("put in place");
    if (announcement) announce(*announcement, layers, tokens, error ? nullptr : &outcome.checksums);
    mark_step("pushed sent");
    promise->settle([placed_ns, outcome = std::move(outcome), error = std::shared_ptr<Error>(std::move(error))](Napi::Env at) -> Napi::Value {
      if (error) throw *error;
      return put_result_to_js(at, outcome, placed_ns);
    });
  };
}

}  // namespace tpla::addon
