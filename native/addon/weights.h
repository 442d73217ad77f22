#pragma once
#include <memory>

#include "addon/addon.h"
#include "core/weights.h"

namespace tpla::addon {

// The tensors behind a JavaScript Weights, kept mapped by the result. Throws REQUEST_INVALID when `value` is something else or was closed.
std::shared_ptr<const Weights> weights_of(const Napi::Value& value, const char* field);

}  // namespace tpla::addon
