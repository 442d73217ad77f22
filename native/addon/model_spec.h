#pragma once
#include "addon/addon.h"
#include "core/model_spec.h"

namespace tpla::addon {

// ModelSpec of src/model/spec.ts. Throws REQUEST_INVALID naming a field whose type or range makes no model.
ModelSpec spec_from_js(const Napi::Value& value);

}  // namespace tpla::addon
