#include "addon/messenger.h"

#include "addon/arguments.h"
#include "addon/async_work.h"
#include "addon/kv_object.h"
#include "addon/link.h"
#include "transfer/messages/kv_messages.h"

namespace tpla::addon {

namespace {

Napi::Value listen(const Napi::CallbackInfo& info, const std::shared_ptr<Messenger>& messenger) {
  const Napi::Env env = info.Env();
  return guarded(env, [&]() -> Napi::Value {
    return AsyncWork<std::shared_ptr<LinkReceiver>>::start(
        env, "tpla listen", [messenger, region = kv_region_of(info[0])] { return std::make_shared<KvMessageReceiver>(messenger, region); },
        [messenger](Napi::Env at, const std::shared_ptr<LinkReceiver>& receiver) -> Napi::Value {
          Napi::Object object = link_receiver_to_js(at, receiver);
          object.Set("address", Napi::Buffer<char>::Copy(at, messenger->address().data(), messenger->address().size()));
          return object;
        });
  });
}

Napi::Value connect(const Napi::CallbackInfo& info, const std::shared_ptr<Messenger>& messenger) {
  const Napi::Env env = info.Env();
  return guarded(env, [&]() -> Napi::Value {
    const Napi::Object options = to_object(info[0], "link");
    if (!options.Get("address").IsBuffer()) refuse("address", "a buffer");
    const auto bytes = options.Get("address").As<Napi::Buffer<char>>();
    return AsyncWork<std::shared_ptr<LinkSender>>::start(
        env, "tpla connect",
        [messenger, address = std::string(bytes.Data(), bytes.Length()), key = to_text(options.Get("key"), "key"), layout = parse_kv_layout(options.Get("layout"))] {
          return std::make_shared<KvMessageSender>(messenger, address, key, layout);
        },
        link_sender_to_js);
  });
}

}  // namespace

Napi::Object messenger_to_js(Napi::Env env, const std::shared_ptr<Messenger>& messenger) {
  // The process may end without close(): the library's exit handlers must not find our thread inside it.
  env.AddCleanupHook([weak = std::weak_ptr<Messenger>(messenger)] {
    if (const auto alive = weak.lock()) alive->stop();
  });
  Napi::Object object = Napi::Object::New(env);
  object.Set("listen", Napi::Function::New(env, [messenger](const Napi::CallbackInfo& call) { return listen(call, messenger); }, "listen"));
  object.Set("connect", Napi::Function::New(env, [messenger](const Napi::CallbackInfo& call) { return connect(call, messenger); }, "connect"));
  object.Set("close", Napi::Function::New(env, [messenger](const Napi::CallbackInfo&) { messenger->stop(); }, "close"));
  return object;
}

}  // namespace tpla::addon
