#include "addon/messenger.h"

#include "addon/arguments.h"
#include "addon/async_work.h"
#include "addon/kv_object.h"
#include "addon/link.h"
#include "transfer/messages/kv_messages.h"

#ifdef TPLA_WITH_CUDA
#include "cuda/device_port.h"
#endif

namespace tpla::addon {

namespace {

std::shared_ptr<DevicePort> port_for(int device) {
#ifdef TPLA_WITH_CUDA
  if (device >= 0) return cuda::device_port();
#else
  static_cast<void>(device);
#endif
  return nullptr;
}

// How rows of an end get to the library: KvMessageLink.memory of src/native/types.ts.
const char* memory_name(int device, bool is_direct) { return device < 0 ? "host" : is_direct ? "gpu" : "staged"; }

Napi::Value listen(const Napi::CallbackInfo& info, const std::shared_ptr<Messenger>& messenger) {
  const Napi::Env env = info.Env();
  return guarded(env, [&]() -> Napi::Value {
    const auto region = kv_region_of(info[0]);
    return AsyncWork<std::shared_ptr<KvMessageReceiver>>::start(
        env, "tpla listen", [messenger, region] { return std::make_shared<KvMessageReceiver>(messenger, region, port_for(region->device)); },
        [messenger, device = region->device](Napi::Env at, const std::shared_ptr<KvMessageReceiver>& receiver) -> Napi::Value {
          Napi::Object object = link_receiver_to_js(at, receiver);
          object.Set("address", Napi::Buffer<char>::Copy(at, messenger->address().data(), messenger->address().size()));
          object.Set("memory", memory_name(device, receiver->is_direct()));
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
    const int device = options.Get("device").IsUndefined() ? -1 : int(to_integer(options.Get("device"), "device", -1, 63));
    return AsyncWork<std::shared_ptr<KvMessageSender>>::start(
        env, "tpla connect",
        [messenger, device, address = std::string(bytes.Data(), bytes.Length()), key = to_text(options.Get("key"), "key"), layout = parse_kv_layout(options.Get("layout"))] {
          return std::make_shared<KvMessageSender>(messenger, address, key, layout, port_for(device), device);
        },
        [device](Napi::Env at, const std::shared_ptr<KvMessageSender>& sender) -> Napi::Value {
          Napi::Object object = link_sender_to_js(at, sender);
          object.Set("memory", memory_name(device, sender->is_direct()));
          object.Set("transports", Napi::Function::New(at, [sender](const Napi::CallbackInfo& call) { return texts_to_js(call.Env(), sender->transports()); }, "transports"));
          return object;
        });
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
