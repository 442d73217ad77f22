#include "addon/addon.h"

namespace tpla::addon {

Napi::Error to_js_error(Napi::Env env, const std::exception& error) {
  Napi::Error wrapped = Napi::Error::New(env, error.what());
  const auto* coded = dynamic_cast<const tpla::Error*>(&error);
  wrapped.Value().Set("code", Napi::String::New(env, coded ? coded->code() : "INTERNAL"));
  return wrapped;
}

static Napi::Object init(Napi::Env env, Napi::Object exports) {
  export_probe(env, exports);
  export_shared_memory(env, exports);
  export_channel(env, exports);
  export_transfer(env, exports);
  export_write_gate(env, exports);
  export_stream(env, exports);
  export_nixl(env, exports);
  export_ucx(env, exports);
  export_block_file(env, exports);
  export_cuda_kv(env, exports);
  export_baseline(env, exports);
  export_weights(env, exports);
  export_kv_arena(env, exports);
  export_notify(env, exports);
  export_engine(env, exports);
  export_sampler(env, exports);
  export_reparam(env, exports);
  export_attention(env, exports);
  export_machine(env, exports);
  return exports;
}

}  // namespace tpla::addon

static Napi::Object init_module(Napi::Env env, Napi::Object exports) { return tpla::addon::init(env, exports); }
NODE_API_MODULE(tpla, init_module)
