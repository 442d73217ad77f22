#pragma once
#include <cmath>
#include <cstdint>
#include <limits>
#include <string>
#include <vector>

#include "addon/addon.h"

namespace tpla::addon {

// Reading values that come from JavaScript: a wrong type or range is REQUEST_INVALID naming the field, never undefined behaviour.

// Runs `body`, turning what it throws into a JavaScript error with a code.
template <typename Body>
auto guarded(Napi::Env env, Body&& body) -> decltype(body()) {
  try {
    return body();
  } catch (const Napi::Error&) {
    throw;
  } catch (const std::bad_alloc&) {
    throw to_js_error(env, Error("OUT_OF_MEMORY", "the system refused memory"));
  } catch (const std::exception& error) {
    throw to_js_error(env, error);
  }
}

[[noreturn]] inline void refuse(const std::string& field, const std::string& expected) {
  throw Error("REQUEST_INVALID", field + ": expected " + expected);
}

inline Napi::Object to_object(const Napi::Value& value, const std::string& field) {
  if (!value.IsObject()) refuse(field, "an object");
  return value.As<Napi::Object>();
}

inline double to_number(const Napi::Value& value, const std::string& field) {
  if (!value.IsNumber()) refuse(field, "a number");
  return value.As<Napi::Number>().DoubleValue();
}

inline int64_t to_integer(const Napi::Value& value, const std::string& field, int64_t low = std::numeric_limits<int32_t>::min(),
                          int64_t high = std::numeric_limits<int32_t>::max()) {
  const double number = to_number(value, field);
  if (!(number >= double(low) && number <= double(high)) || number != std::floor(number)) {
    refuse(field, "an integer from " + std::to_string(low) + " to " + std::to_string(high) + ", got " + std::to_string(number));
  }
  return int64_t(number);
}

inline bool to_bool(const Napi::Value& value, const std::string& field) {
  if (!value.IsBoolean()) refuse(field, "true or false");
  return value.As<Napi::Boolean>().Value();
}

inline std::string to_text(const Napi::Value& value, const std::string& field) {
  if (!value.IsString()) refuse(field, "a string");
  return value.As<Napi::String>().Utf8Value();
}

inline Napi::Array to_array(const Napi::Value& value, const std::string& field) {
  if (!value.IsArray()) refuse(field, "an array");
  return value.As<Napi::Array>();
}

inline std::vector<int32_t> to_int32s(const Napi::Value& value, const std::string& field) {
  if (!value.IsTypedArray() || value.As<Napi::TypedArray>().TypedArrayType() != napi_int32_array) refuse(field, "an Int32Array");
  const auto array = value.As<Napi::Int32Array>();
  return {array.Data(), array.Data() + array.ElementLength()};
}

// The way back.
inline Napi::Array texts_to_js(Napi::Env env, const std::vector<std::string>& texts) {
  Napi::Array array = Napi::Array::New(env, texts.size());
  for (size_t i = 0; i < texts.size(); i++) array.Set(static_cast<uint32_t>(i), texts[i]);
  return array;
}

}  // namespace tpla::addon
