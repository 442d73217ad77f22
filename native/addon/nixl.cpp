#include "addon/arguments.h"
#include "addon/async_work.h"
#include "addon/messenger.h"
#include "addon/ucx.h"
#include "transfer/nixl/agent.h"

namespace tpla::addon {

namespace {

using nixl::Agent;

Napi::Object backend_to_js(Napi::Env env, const nixl::Capabilities::InUse& backend) {
  static constexpr const char* kNames[] = {"DRAM", "VRAM", "BLOCK", "OBJECT", "FILE"};
  std::vector<std::string> memories;
  for (const nixl::MemoryType type : backend.memories) memories.push_back(type >= 0 && size_t(type) < std::size(kNames) ? kNames[type] : "UNKNOWN");
  Napi::Object object = Napi::Object::New(env);
  object.Set("name", backend.name);
  object.Set("memories", texts_to_js(env, memories));
  return object;
}

Napi::Value agent_to_js(Napi::Env env, const std::shared_ptr<Agent>& agent) {
  const nixl::Capabilities& found = agent->capabilities();
  Napi::Object object = messenger_to_js(env, agent);
  object.Set("library", agent->library().file());
  object.Set("plugins", texts_to_js(env, found.plugins));
  Napi::Array backends = Napi::Array::New(env, found.backends.size());
  for (size_t i = 0; i < found.backends.size(); i++) backends.Set(static_cast<uint32_t>(i), backend_to_js(env, found.backends[i]));
  object.Set("backends", backends);
  object.Set("ucx", found.ucx ? ucx_to_js(env, found.ucx->file, found.ucx->version, found.ucx->found) : env.Null());
  return object;
}

Napi::Value open_nixl(const Napi::CallbackInfo& info) {
  const Napi::Env env = info.Env();
  return guarded(env, [&]() -> Napi::Value {
    std::vector<std::string> backends;
    const Napi::Array names = to_array(info[1], "backends");
    for (uint32_t i = 0; i < names.Length(); i++) backends.push_back(to_text(names.Get(i), "backends"));
    return AsyncWork<std::shared_ptr<Agent>>::start(
        env, "tpla nixl", [file = to_text(info[0], "library"), backends] { return Agent::start(nixl::Library::load(file), backends); }, agent_to_js);
  });
}

}  // namespace

void export_nixl(Napi::Env env, Napi::Object exports) {
  exports.Set("openNixl", Napi::Function::New(env, open_nixl, "openNixl"));
}

}  // namespace tpla::addon
