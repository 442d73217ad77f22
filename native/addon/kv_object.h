#pragma once
#include <memory>
#include <napi.h>

#include "core/kv_layout.h"

namespace tpla::addon {

// KvLayout of src/native/types.ts, both ways. Throws REQUEST_INVALID naming the field; ranges are check_kv_layout's.
KvLayout parse_kv_layout(Napi::Value value);
Napi::Object kv_layout_to_js(Napi::Env env, const KvLayout& layout);

// A number, or an array of one for each layer. Throws REQUEST_INVALID.
SharedWidths parse_shared_widths(const Napi::Value& value);
Napi::Value shared_widths_to_js(Napi::Env env, const SharedWidths& shared);

// Bytes of KV that one token takes on a rank, over all layers; where ranks hold different tokens, on average.
double kv_token_bytes(const KvLayout& layout);

// KvArena and KvRegion objects both carry their region, so that kvPut and its kin take either. The pointer keeps the memory
// mapped while work is in flight: alias it to its owner, shared_ptr<const KvRegion>(memory, &memory->region()).
void attach_kv_region(Napi::Object object, std::shared_ptr<const KvRegion> region);
// After close(): kv_region_of throws.
void detach_kv_region(Napi::Object object);
std::shared_ptr<const KvRegion> kv_region_of(Napi::Value value);

}  // namespace tpla::addon
