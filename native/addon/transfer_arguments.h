#pragma once
#include "addon/arguments.h"
#include "transfer/kv_put.h"

namespace tpla::addon {

// Ranges and page tables as src/native/types.ts has them.

inline Range parse_range(const Napi::Value& value, const char* field) {
  const Napi::Array array = to_array(value, field);
  if (array.Length() != 2) refuse(field, "[begin, end]");
  return {int(to_integer(array.Get(0u), field, 0)), int(to_integer(array.Get(1u), field, 0))};
}

inline int parse_rank(const Napi::Value& rank) { return rank.IsUndefined() || rank.IsNull() ? 0 : int(to_integer(rank, "rank", 0)); }

inline PageTables parse_tables(const Napi::Value& pages, const Napi::Value& rank, const char* field) {
  PageTables result;
  const Napi::Array array = to_array(pages, field);
  for (uint32_t i = 0; i < array.Length(); i++) result.tables.push_back(to_int32s(array.Get(i), field));
  result.rank = parse_rank(rank);
  return result;
}

inline Napi::Value words_to_js(Napi::Env env, const std::vector<uint64_t>& words) {
  Napi::BigUint64Array array = Napi::BigUint64Array::New(env, words.size());
  std::copy(words.begin(), words.end(), array.Data());
  return array;
}

// `placed_ns`: when the last byte was in place.
inline Napi::Value put_result_to_js(Napi::Env env, const KvPutResult& result, int64_t placed_ns) {
  Napi::Object object = Napi::Object::New(env);
  object.Set("bytes", static_cast<double>(result.bytes));
  object.Set("wireBytes", static_cast<double>(result.wire_bytes));
  object.Set("placedAt", static_cast<double>(placed_ns) / 1e3);
  object.Set("checksums", words_to_js(env, result.checksums));
  return object;
}

}  // namespace tpla::addon
