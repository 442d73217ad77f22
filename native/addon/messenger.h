#pragma once
#include <memory>

#include "addon/addon.h"
#include "transfer/messages/messenger.h"

namespace tpla::addon {

// What every library that carries KV by messages can do: listen, connect and close of Ucx and Nixl in src/native/types.ts. The caller adds what
// it says of itself.
Napi::Object messenger_to_js(Napi::Env env, const std::shared_ptr<Messenger>& messenger);

}  // namespace tpla::addon
