#pragma once
#include <memory>

#include "addon/addon.h"
#include "transfer/kv_link.h"

namespace tpla::addon {

// KvLinkReceiver and KvLinkSender of src/native/types.ts: what every kind of link can do. The caller adds what is its own.
Napi::Object link_receiver_to_js(Napi::Env env, const std::shared_ptr<LinkReceiver>& receiver);
Napi::Object link_sender_to_js(Napi::Env env, const std::shared_ptr<LinkSender>& sender);

}  // namespace tpla::addon
