#pragma once
#include <memory>
#include <napi.h>

#include "transfer/write_gate.h"

namespace tpla::addon {

// The gate behind a JavaScript WriteGate, kept mapped by the result. Throws REQUEST_INVALID for anything else, or when it is closed.
std::shared_ptr<const WriteGate> write_gate_of(const Napi::Value& value);

}  // namespace tpla::addon
