#pragma once
#include <memory>

#include "addon/addon.h"
#include "core/kv_arena.h"

namespace tpla::addon {

KvLayout layout_from_js(const Napi::Value& value);
Napi::Object layout_to_js(Napi::Env env, const KvLayout& layout);

// The arena behind a JavaScript KvArena, kept alive by the result; null when `value` is something else.
// Throws REQUEST_INVALID when it was closed.
std::shared_ptr<KvArena> try_arena(const Napi::Value& value);
// Throws REQUEST_INVALID when `value` is no KvArena.
std::shared_ptr<KvArena> arena_of(const Napi::Value& value, const char* field);

}  // namespace tpla::addon
