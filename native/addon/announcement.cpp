#include "addon/announcement.h"

#include "addon/arguments.h"
#include "addon/transfer_arguments.h"
#include "transfer/push_message.h"
#include "transfer/timeline.h"

namespace tpla::addon {

namespace {

void announce(const Announcement& of, Range layers, Range tokens, const std::vector<uint64_t>& checksums) {
  const std::vector<std::byte> message = encode_push({of.session, layers, tokens, checksums});
  try {
    of.channel->send(message.data(), message.size(), {});
  } catch (const Error&) {
    // Closed meanwhile: its end is on the way to whoever waits.
  }
}

}  // namespace

std::shared_ptr<const Announcement> parse_announcement(const Napi::Value& value) {
  if (value.IsUndefined()) return nullptr;
  const Napi::Object options = to_object(value, "announce");
  const std::string session = to_text(options.Get("session"), "session");
  if (session.size() > kMaxSessionBytes) refuse("session", "at most " + std::to_string(kMaxSessionBytes) + " bytes");
  return std::make_shared<const Announcement>(Announcement{channel_of(options.Get("channel")), session});
}

std::function<void(KvPutResult, std::unique_ptr<Error>)> settle_put(std::shared_ptr<ThreadPromise> promise, std::shared_ptr<const Announcement> announcement,
                                                                    Range layers, Range tokens) {
  return [promise = std::move(promise), announcement = std::move(announcement), layers, tokens](KvPutResult outcome, std::unique_ptr<Error> error) {
    mark_step("put in place");
    if (announcement && !error) announce(*announcement, layers, tokens, outcome.checksums);
    mark_step("pushed sent");
    promise->settle([outcome = std::move(outcome), error = std::shared_ptr<Error>(std::move(error))](Napi::Env at) -> Napi::Value {
      if (error) throw *error;
      return put_result_to_js(at, outcome);
    });
  };
}

}  // namespace tpla::addon
