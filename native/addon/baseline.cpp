#include "transfer/baseline.h"

#include "addon/kv_object.h"
#include "addon/promise.h"
#include "addon/transfer_arguments.h"

#ifdef TPLA_WITH_CUDA
#include "cuda/bench/prefill_load.h"
#include "cuda/device_kv.h"
#endif

namespace tpla::addon {

namespace {

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

// prefillLoad(device, tokens, heads) → { compute(layers), close() }
Napi::Value prefill_load(const Napi::CallbackInfo& info) {
  const Napi::Env env = info.Env();
  return guarded(env, [&]() -> Napi::Value {
    const int device = int(to_integer(info[0], "device", 0, 63));
    const int tokens = int(to_integer(info[1], "tokens", 1, 1 << 20));
    const int heads = int(to_integer(info[2], "heads", 1, 1024));
#ifdef TPLA_WITH_CUDA
    const auto load = std::make_shared<std::unique_ptr<bench::PrefillLoad>>(std::make_unique<bench::PrefillLoad>(device, tokens, heads));
    const auto compute = [load](const Napi::CallbackInfo& call) {
      return guarded(call.Env(), [&] {
        if (!*load) throw Error("REQUEST_INVALID", "this load is closed");
        return on_thread(call.Env(), [wait = (*load)->compute(int(to_integer(call[0], "layers", 1, 4096)))]() -> ThreadPromise::Convert {
          wait();
          return [](Napi::Env env) { return env.Undefined(); };
        });
      });
    };
    Napi::Object object = Napi::Object::New(env);
    object.Set("compute", Napi::Function::New(env, compute, "compute"));
    object.Set("close", Napi::Function::New(env, [load](const Napi::CallbackInfo&) { load->reset(); }, "close"));
    return object;
#else
    throw Error("GPU_UNAVAILABLE", "prefill of " + std::to_string(tokens) + " tokens, " + std::to_string(heads) + " heads on GPU " + std::to_string(device) + ": this build has no CUDA");
#endif
  });
}

}  // namespace

void export_baseline(Napi::Env env, Napi::Object exports) {
  exports.Set("kvFillPattern", Napi::Function::New(env, fill, "kvFillPattern"));
  exports.Set("kvPlainCopy", Napi::Function::New(env, copy, "kvPlainCopy"));
  exports.Set("listenSink", Napi::Function::New(env, sink, "listenSink"));
  exports.Set("prefillLoad", Napi::Function::New(env, prefill_load, "prefillLoad"));
  exports.Set("plainSend", Napi::Function::New(env, send, "plainSend"));
}

}  // namespace tpla::addon
