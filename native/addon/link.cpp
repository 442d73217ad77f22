#include "addon/link.h"

#include "addon/announcement.h"
#include "addon/arguments.h"
#include "addon/kv_object.h"
#include "addon/transfer_arguments.h"
#include "addon/write_gate.h"

namespace tpla::addon {

namespace {

template <class Call>
void method(Napi::Object object, const char* name, Call call) {
  object.Set(name, Napi::Function::New(object.Env(), call, name));
}

Napi::Value start_put(const Napi::CallbackInfo& info, LinkSender& sender) {
  const Napi::Env env = info.Env();
  return guarded(env, [&]() -> Napi::Value {
    const Napi::Object options = to_object(info[0], "put");
    LinkPut put;
    put.src = kv_region_of(options.Get("src"));
    put.layers = parse_range(options.Get("layers"), "layers");
    put.tokens = parse_range(options.Get("tokens"), "tokens");
    put.src_pages = parse_tables(options.Get("srcPages"), options.Get("srcRank"), "srcPages");
    put.slot = int(to_integer(options.Get("slot"), "slot", 0));
    put.epoch = uint32_t(to_integer(options.Get("epoch"), "epoch", 0, UINT32_MAX));
    const auto announcement = parse_announcement(options.Get("announce"), false);
    const auto promise = ThreadPromise::create(env);
    const Napi::Value result = promise->promise();
    const auto done = settle_put(promise, announcement, put.layers, put.tokens);
    try {
      sender.put(std::move(put), done);
    } catch (const Error& error) {
      done({}, std::make_unique<Error>(error));
    }
    return result;
  });
}

}  // namespace

Napi::Object link_receiver_to_js(Napi::Env env, const std::shared_ptr<LinkReceiver>& receiver) {
  Napi::Object object = Napi::Object::New(env);
  method(object, "admit", [receiver](const Napi::CallbackInfo& call) {
    guarded(call.Env(), [&] { receiver->admit(to_text(call[0], "key"), write_gate_of(call[1])); });
  });
  method(object, "grant", [receiver](const Napi::CallbackInfo& call) {
    guarded(call.Env(), [&] {
      receiver->grant(to_text(call[0], "key"), int(to_integer(call[1], "slot", 0)), uint32_t(to_integer(call[2], "epoch", 0, UINT32_MAX)),
                      parse_range(call[3], "tokens"), parse_tables(call[4], call[5], "pages"));
    });
  });
  method(object, "disconnect", [receiver](const Napi::CallbackInfo& call) {
    guarded(call.Env(), [&] { receiver->disconnect(to_text(call[0], "key")); });
  });
  method(object, "withdraw", [receiver](const Napi::CallbackInfo& call) {
    guarded(call.Env(), [&] { receiver->withdraw(to_text(call[0], "key")); });
  });
  method(object, "close", [receiver](const Napi::CallbackInfo&) { receiver->close(); });
  return object;
}

Napi::Object link_sender_to_js(Napi::Env env, const std::shared_ptr<LinkSender>& sender) {
  Napi::Object object = Napi::Object::New(env);
  method(object, "put", [sender](const Napi::CallbackInfo& call) { return start_put(call, *sender); });
  method(object, "close", [sender](const Napi::CallbackInfo&) { sender->close(); });
  return object;
}

}  // namespace tpla::addon
