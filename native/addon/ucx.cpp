#include "transfer/messages/kv_messages.h"
#include "transfer/ucx/worker.h"

#include "addon/arguments.h"
#include "addon/async_work.h"
#include "addon/kv_object.h"
#include "addon/link.h"

namespace tpla::addon {

namespace {

using ucx::Worker;

Napi::Value listen(const Napi::CallbackInfo& info, const std::shared_ptr<Worker>& worker) {
  const Napi::Env env = info.Env();
  return guarded(env, [&]() -> Napi::Value {
    return AsyncWork<std::shared_ptr<LinkReceiver>>::start(
        env, "tpla ucx", [worker, region = kv_region_of(info[0])] { return std::make_shared<KvMessageReceiver>(worker, region); },
        [worker](Napi::Env at, const std::shared_ptr<LinkReceiver>& receiver) -> Napi::Value {
          Napi::Object object = link_receiver_to_js(at, receiver);
          object.Set("address", Napi::Buffer<char>::Copy(at, worker->address().data(), worker->address().size()));
          return object;
        });
  });
}

Napi::Value connect(const Napi::CallbackInfo& info, const std::shared_ptr<Worker>& worker) {
  const Napi::Env env = info.Env();
  return guarded(env, [&]() -> Napi::Value {
    const Napi::Object options = to_object(info[0], "link");
    if (!options.Get("address").IsBuffer()) refuse("address", "a buffer");
    const auto bytes = options.Get("address").As<Napi::Buffer<char>>();
    return AsyncWork<std::shared_ptr<LinkSender>>::start(
        env, "tpla ucx",
        [worker, address = std::string(bytes.Data(), bytes.Length()), key = to_text(options.Get("key"), "key"), layout = parse_kv_layout(options.Get("layout"))] {
          return std::make_shared<KvMessageSender>(worker, address, key, layout);
        },
        link_sender_to_js);
  });
}

// The process may end without close(): UCX's exit handlers must not find our thread inside it.
void stop_with_environment(Napi::Env env, const std::shared_ptr<Worker>& worker) {
  env.AddCleanupHook([weak = std::weak_ptr<Worker>(worker)] {
    if (const auto alive = weak.lock()) alive->stop();
  });
}

Napi::Value worker_to_js(Napi::Env env, const std::shared_ptr<Worker>& worker) {
  stop_with_environment(env, worker);
  const ucx::Capabilities found = worker->capabilities();
  Napi::Object object = Napi::Object::New(env);
  object.Set("library", worker->library().file());
  object.Set("version", worker->library().version());
  Napi::Array resources = Napi::Array::New(env, found.resources.size());
  for (size_t i = 0; i < found.resources.size(); i++) resources.Set(static_cast<uint32_t>(i), found.resources[i]);
  object.Set("resources", resources);
  object.Set("rdma", found.rdma);
  object.Set("cuda", found.cuda);
  object.Set("listen", Napi::Function::New(env, [worker](const Napi::CallbackInfo& call) { return listen(call, worker); }, "listen"));
  object.Set("connect", Napi::Function::New(env, [worker](const Napi::CallbackInfo& call) { return connect(call, worker); }, "connect"));
  object.Set("close", Napi::Function::New(env, [worker](const Napi::CallbackInfo&) { worker->stop(); }, "close"));
  return object;
}

Napi::Value open_ucx(const Napi::CallbackInfo& info) {
  const Napi::Env env = info.Env();
  return guarded(env, [&]() -> Napi::Value {
    return AsyncWork<std::shared_ptr<Worker>>::start(
        env, "tpla ucx", [file = to_text(info[0], "library")] { return Worker::start(ucx::Library::load(file)); }, worker_to_js);
  });
}

}  // namespace

void export_ucx(Napi::Env env, Napi::Object exports) {
  exports.Set("openUcx", Napi::Function::New(env, open_ucx, "openUcx"));
}

}  // namespace tpla::addon
