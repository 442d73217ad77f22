#include "transfer/kv_stream.h"

#include "addon/arguments.h"
#include "addon/kv_object.h"
#include "addon/promise.h"
#include "addon/transfer_arguments.h"
#include "addon/write_gate.h"

namespace tpla::addon {

namespace {

// Closes the stream when JavaScript has dropped the object without close().
template <class Stream>
std::shared_ptr<Stream> held(Stream* stream) {
  return std::shared_ptr<Stream>(stream);
}

Napi::Value listen_stream(const Napi::CallbackInfo& info) {
  const Napi::Env env = info.Env();
  return guarded(env, [&]() -> Napi::Value {
    const auto receiver = held(new StreamReceiver(to_text(info[0], "host"), kv_region_of(info[1])));
    Napi::Object object = Napi::Object::New(env);
    object.Set("port", receiver->port());
    object.Set("admit", Napi::Function::New(env, [receiver](const Napi::CallbackInfo& call) {
      guarded(call.Env(), [&] { receiver->admit(to_text(call[0], "key"), write_gate_of(call[1])); });
    }, "admit"));
    object.Set("grant", Napi::Function::New(env, [receiver](const Napi::CallbackInfo& call) {
      guarded(call.Env(), [&] {
        receiver->grant(to_text(call[0], "key"), int(to_integer(call[1], "slot", 0)), uint32_t(to_integer(call[2], "epoch", 0, UINT32_MAX)),
                        parse_range(call[3], "tokens"), parse_tables(call[4], call[5], "pages"));
      });
    }, "grant"));
    object.Set("withdraw", Napi::Function::New(env, [receiver](const Napi::CallbackInfo& call) {
      guarded(call.Env(), [&] { receiver->withdraw(to_text(call[0], "key")); });
    }, "withdraw"));
    object.Set("close", Napi::Function::New(env, [receiver](const Napi::CallbackInfo&) { receiver->close(); }, "close"));
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

Napi::Value start_put(const Napi::CallbackInfo& info, StreamSender& sender) {
  const Napi::Env env = info.Env();
  return guarded(env, [&]() -> Napi::Value {
    const Napi::Object options = to_object(info[0], "put");
    StreamPut put;
    put.src = kv_region_of(options.Get("src"));
    put.layers = parse_range(options.Get("layers"), "layers");
    put.tokens = parse_range(options.Get("tokens"), "tokens");
    put.src_pages = parse_tables(options.Get("srcPages"), options.Get("srcRank"), "srcPages");
    put.slot = int(to_integer(options.Get("slot"), "slot", 0));
    put.epoch = uint32_t(to_integer(options.Get("epoch"), "epoch", 0, UINT32_MAX));
    const auto promise = ThreadPromise::create(env);
    const Napi::Value result = promise->promise();
    const auto done = [promise](KvPutResult outcome, std::unique_ptr<Error> error) {
      promise->settle([outcome = std::move(outcome), error = std::shared_ptr<Error>(std::move(error))](Napi::Env at) -> Napi::Value {
        if (error) throw *error;
        return put_result_to_js(at, outcome);
      });
    };
    try {
      sender.put(std::move(put), done);
    } catch (const Error& error) {
      done({}, std::make_unique<Error>(error));
    }
    return result;
  });
}

class ConnectStream : public Napi::AsyncWorker {
 public:
  ConnectStream(Napi::Env env, SocketAddress address, std::string key, int connections, const KvLayout& layout, StreamSender::ZeroCopy zero_copy)
      : Napi::AsyncWorker(env, "tpla stream"), deferred_(env), address_(std::move(address)), key_(std::move(key)), connections_(connections), layout_(layout),
        zero_copy_(zero_copy) {}
  Napi::Promise promise() const { return deferred_.Promise(); }

  void Execute() override {
    try {
      sender_ = std::make_shared<StreamSender>(address_, key_, connections_, layout_, zero_copy_);
    } catch (const Error& error) {
      code_ = error.code();
      SetError(error.what());
    }
  }

  void OnOK() override {
    const auto sender = sender_;
    Napi::Object object = Napi::Object::New(Env());
    object.Set("put", Napi::Function::New(Env(), [sender](const Napi::CallbackInfo& call) { return start_put(call, *sender); }, "put"));
    object.Set("close", Napi::Function::New(Env(), [sender](const Napi::CallbackInfo&) { sender->close(); }, "close"));
    object.DefineProperty(Napi::PropertyDescriptor::Accessor(
        Env(), object, "zeroCopy", [sender](const Napi::CallbackInfo& call) { return Napi::Boolean::New(call.Env(), sender->is_zero_copy()); }, napi_enumerable));
    deferred_.Resolve(object);
  }
  void OnError(const Napi::Error& error) override { deferred_.Reject(to_js_error(Env(), Error(code_, error.Message())).Value()); }

 private:
  Napi::Promise::Deferred deferred_;
  const SocketAddress address_;
  const std::string key_;
  const int connections_;
  const KvLayout layout_;
  const StreamSender::ZeroCopy zero_copy_;
  std::shared_ptr<StreamSender> sender_;
  std::string code_ = "IO_FAILED";
};

Napi::Value connect_stream(const Napi::CallbackInfo& info) {
  const Napi::Env env = info.Env();
  return guarded(env, [&]() -> Napi::Value {
    const Napi::Object options = to_object(info[0], "stream");
    SocketAddress address;
    address.host = to_text(options.Get("host"), "host");
    address.port = static_cast<uint16_t>(to_integer(options.Get("port"), "port", 1, 65535));
    auto* worker = new ConnectStream(env, address, to_text(options.Get("key"), "key"), int(to_integer(options.Get("connections"), "connections", 1, 64)),
                                     parse_kv_layout(options.Get("layout")), parse_zero_copy(options.Get("zeroCopy")));
    worker->Queue();
    return worker->promise();
  });
}

}  // namespace

void export_stream(Napi::Env env, Napi::Object exports) {
  exports.Set("listenKvStream", Napi::Function::New(env, listen_stream, "listenKvStream"));
  exports.Set("connectKvStream", Napi::Function::New(env, connect_stream, "connectKvStream"));
}

}  // namespace tpla::addon
