#include "addon/addon.h"

namespace tpla::addon {

static Napi::Value probe(const Napi::CallbackInfo& info) {
  Napi::Object result = Napi::Object::New(info.Env());
  result.Set("version", "0.1.0");
  return result;
}

void export_probe(Napi::Env env, Napi::Object exports) { exports.Set("probe", Napi::Function::New(env, probe)); }

}  // namespace tpla::addon
