#include "transfer/baseline.h"

#include "addon/kv_object.h"
#include "addon/promise.h"
#include "addon/transfer_arguments.h"

#include <thread>

#ifdef TPLA_WITH_CUDA
#include "cuda/device_kv.h"
#endif

namespace tpla::addon {

namespace {

// Runs `body` on a thread of its own: a benchmark must not wait for Node's four.
Napi::Value on_thread(Napi::Env env, std::function<ThreadPromise::Convert()> body) {
  const auto promise = ThreadPromise::create(env);
  std::thread([promise, body = std::move(body)] {
    try {
      promise->settle(body());
    } catch (const Error& error) {
      promise->settle([error](Napi::Env) -> Napi::Value { throw error; });
    }
  }).detach();
  return promise->promise();
}

ThreadPromise::Convert number(double value) {
  return [value](Napi::Env env) -> Napi::Value { return Napi::Number::New(env, value); };
}

Napi::Value fill(const Napi::CallbackInfo& info) {
  return guarded(info.Env(), [&] {
    const auto region = kv_region_of(info[0]);
    PageTables pages = parse_tables(info[1], info.Env().Undefined(), "pages");
    const Range tokens = parse_range(info[2], "tokens");
    const int first_layer = int(to_integer(info[3], "firstLayer", 0));
    const uint64_t seed = uint64_t(to_integer(info[4], "seed", 0));
    return on_thread(info.Env(), [=, pages = std::move(pages)]() -> ThreadPromise::Convert {
      fill_pattern(*region, pages, tokens, first_layer, seed);
      return [](Napi::Env env) { return env.Undefined(); };
    });
  });
}

Napi::Value copy(const Napi::CallbackInfo& info) {
  return guarded(info.Env(), [&] {
    const auto src = kv_region_of(info[0]);
    const auto dst = kv_region_of(info[1]);
    const size_t bytes = size_t(to_integer(info[2], "bytes", 1, int64_t(1) << 53));
    const int threads = int(to_integer(info[3], "threads", 1, 64));
    return on_thread(info.Env(), [=] {
#ifdef TPLA_WITH_CUDA
      if (src->device >= 0) return number(cuda::device_plain_copy(*src, *dst, bytes));
#endif
      return number(plain_copy(*src, *dst, bytes, threads));
    });
  });
}

Napi::Value sink(const Napi::CallbackInfo& info) {
  const Napi::Env env = info.Env();
  return guarded(env, [&]() -> Napi::Value {
    const auto listener = SocketSink::listen(to_text(info[0], "host"));
    Napi::Object object = Napi::Object::New(env);
    object.Set("port", listener->port());
    object.Set("close", Napi::Function::New(env, [listener](const Napi::CallbackInfo&) { listener->close(); }, "close"));
    return object;
  });
}

Napi::Value send(const Napi::CallbackInfo& info) {
  return guarded(info.Env(), [&] {
    SocketAddress address;
    address.host = to_text(info[0], "host");
    address.port = static_cast<uint16_t>(to_integer(info[1], "port", 1, 65535));
    const int connections = int(to_integer(info[2], "connections", 1, 64));
    const size_t bytes = size_t(to_integer(info[3], "bytes", 1, int64_t(1) << 53));
    return on_thread(info.Env(), [=] { return number(plain_send(address, connections, bytes)); });
  });
}

}  // namespace

void export_baseline(Napi::Env env, Napi::Object exports) {
  exports.Set("kvFillPattern", Napi::Function::New(env, fill, "kvFillPattern"));
  exports.Set("kvPlainCopy", Napi::Function::New(env, copy, "kvPlainCopy"));
  exports.Set("listenSink", Napi::Function::New(env, sink, "listenSink"));
  exports.Set("plainSend", Napi::Function::New(env, send, "plainSend"));
}

}  // namespace tpla::addon
