#include "addon/addon.h"
#include "core/sd_notify.h"

namespace tpla::addon {

// notifyServiceManager(socket: string, state: string): void
static void notify_service_manager(const Napi::CallbackInfo& info) {
  try {
    sd_notify(info[0].As<Napi::String>(), info[1].As<Napi::String>());
  } catch (const std::exception& error) {
    throw to_js_error(info.Env(), error);
  }
}

void export_notify(Napi::Env env, Napi::Object exports) {
  exports.Set("notifyServiceManager", Napi::Function::New(env, notify_service_manager));
}

}  // namespace tpla::addon
