#pragma once
#include <napi.h>
#include <string>

#include "transfer/ucx/library.h"

namespace tpla::addon {

// A UCX as UcxFacts of src/native/types.ts.
Napi::Object ucx_to_js(Napi::Env env, const std::string& file, const std::string& version, const ucx::Capabilities& found, Napi::Object object);
inline Napi::Object ucx_to_js(Napi::Env env, const std::string& file, const std::string& version, const ucx::Capabilities& found) {
  return ucx_to_js(env, file, version, found, Napi::Object::New(env));
}

}  // namespace tpla::addon
