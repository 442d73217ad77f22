#include "transfer/kv_stream.h"

#include "addon/arguments.h"
#include "addon/async_work.h"
#include "addon/kv_object.h"
#include "addon/link.h"

namespace tpla::addon {

namespace {

Napi::Value listen_stream(const Napi::CallbackInfo& info) {
  const Napi::Env env = info.Env();
  return guarded(env, [&]() -> Napi::Value {
    const auto receiver = std::make_shared<StreamReceiver>(to_text(info[0], "host"), kv_region_of(info[1]));
    Napi::Object object = link_receiver_to_js(env, receiver);
    object.Set("port", receiver->port());
    return object;
  });
}

StreamSender::ZeroCopy parse_zero_copy(const Napi::Value& value) {
  if (value.IsUndefined()) return StreamSender::ZeroCopy::automatic;
  const std::string text = to_text(value, "zeroCopy");
  if (text == "auto") return StreamSender::ZeroCopy::automatic;
  if (text == "never") return StreamSender::ZeroCopy::never;
  if (text == "always") return StreamSender::ZeroCopy::always;
  refuse("zeroCopy", "auto, never or always");
}

Napi::Value sender_to_js(Napi::Env env, const std::shared_ptr<StreamSender>& sender) {
  Napi::Object object = link_sender_to_js(env, sender);
  object.DefineProperty(Napi::PropertyDescriptor::Accessor(
      env, object, "zeroCopy", [sender](const Napi::CallbackInfo& call) { return Napi::Boolean::New(call.Env(), sender->is_zero_copy()); }, napi_enumerable));
  return object;
}

Napi::Value connect_stream(const Napi::CallbackInfo& info) {
  const Napi::Env env = info.Env();
  return guarded(env, [&]() -> Napi::Value {
    const Napi::Object options = to_object(info[0], "stream");
    SocketAddress address;
    address.host = to_text(options.Get("host"), "host");
    address.port = static_cast<uint16_t>(to_integer(options.Get("port"), "port", 1, 65535));
    const int connections = int(to_integer(options.Get("connections"), "connections", 1, 64));
    return AsyncWork<std::shared_ptr<StreamSender>>::start(
        env, "tpla stream",
        [address, key = to_text(options.Get("key"), "key"), connections, layout = parse_kv_layout(options.Get("layout")),
         zero_copy = parse_zero_copy(options.Get("zeroCopy"))] { return std::make_shared<StreamSender>(address, key, connections, layout, zero_copy); },
        sender_to_js);
  });
}

}  // namespace

void export_stream(Napi::Env env, Napi::Object exports) {
  exports.Set("listenKvStream", Napi::Function::New(env, listen_stream, "listenKvStream"));
  exports.Set("connectKvStream", Napi::Function::New(env, connect_stream, "connectKvStream"));
}

}  // namespace tpla::addon
