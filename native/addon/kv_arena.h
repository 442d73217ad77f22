#pragma once
#include <memory>

#include "addon/addon.h"
#include "core/kv_memory.h"

namespace tpla::addon {

// The memory behind a JavaScript KvArena, kept mapped by the result. Throws REQUEST_INVALID when `value` is no KvArena or was closed.
std::shared_ptr<KvMemory> arena_of(const Napi::Value& value, const char* field);

}  // namespace tpla::addon
