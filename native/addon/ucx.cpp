#include "addon/arguments.h"
#include "addon/async_work.h"
#include "addon/messenger.h"
#include "addon/ucx.h"
#include "transfer/ucx/worker.h"

namespace tpla::addon {

namespace {

using ucx::Worker;

Napi::Value worker_to_js(Napi::Env env, const std::shared_ptr<Worker>& worker) {
  return ucx_to_js(env, worker->library().file(), worker->library().version(), worker->capabilities(), messenger_to_js(env, worker));
}

Napi::Value open_ucx(const Napi::CallbackInfo& info) {
  const Napi::Env env = info.Env();
  return guarded(env, [&]() -> Napi::Value {
    return AsyncWork<std::shared_ptr<Worker>>::start(
        env, "tpla ucx", [file = to_text(info[0], "library")] { return Worker::start(ucx::Library::load(file)); }, worker_to_js);
  });
}

}  // namespace

Napi::Object ucx_to_js(Napi::Env env, const std::string& file, const std::string& version, const ucx::Capabilities& found, Napi::Object object) {
  object.Set("library", file);
  object.Set("version", version);
  object.Set("resources", texts_to_js(env, found.resources));
  object.Set("rdma", found.rdma);
  object.Set("cuda", found.cuda);
  return object;
}

void export_ucx(Napi::Env env, Napi::Object exports) {
  exports.Set("openUcx", Napi::Function::New(env, open_ucx, "openUcx"));
}

}  // namespace tpla::addon
