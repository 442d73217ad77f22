#pragma once
#include <functional>
#include <memory>
#include <string>

#include "addon/promise.h"
#include "transfer/channel.h"
#include "transfer/kv_put.h"

namespace tpla::addon {

// The hand-off that puts belong to. The end of each is told to decode (transfer/push_message.h) by the thread that saw it.
struct Announcement {
  std::shared_ptr<Channel> channel;
  std::string session;
  // CPU threads of this process do the putting (transfer/push_announcer.h).
  bool is_on_cpu;
};

// Of a put's option `announce: { channel, session }`; null where there is none.
std::shared_ptr<const Announcement> parse_announcement(const Napi::Value& value, bool is_on_cpu);

// What a put of these layers and tokens calls when it has ended: announces it, then settles its promise.
std::function<void(KvPutResult, std::unique_ptr<Error>)> settle_put(std::shared_ptr<ThreadPromise> promise, std::shared_ptr<const Announcement> announcement,
                                                                    Range layers, Range tokens);

// The channel that an object stands for (channel.cpp). Throws REQUEST_INVALID.
std::shared_ptr<Channel> channel_of(const Napi::Value& value);

}  // namespace tpla::addon
