#include "addon/kv_object.h"

#include <cmath>
#include <string>

#include "core/error.h"

namespace tpla::addon {

namespace {

// Marks our externals, so that a foreign one under the same property is refused instead of being read as a region.
constexpr napi_type_tag kRegionTag = {0x74706c612d6b7652ULL, 0x6567696f6e2d3031ULL};
constexpr const char* kRegionKey = "__kvRegion";

using RegionPointer = std::shared_ptr<const KvRegion>;

int int_field(const Napi::Object& object, const char* field) {
  const Napi::Value value = object.Get(field);
  const double number = value.IsNumber() ? value.As<Napi::Number>().DoubleValue() : NAN;
  if (!(std::floor(number) == number && number >= 0 && number <= 1e9)) {
    throw Error("REQUEST_INVALID", std::string("KV layout: ") + field + " is not a whole number");
  }
  return static_cast<int>(number);
}

std::string text_field(const Napi::Object& object, const char* field) {
  const Napi::Value value = object.Get(field);
  return value.IsString() ? value.As<Napi::String>().Utf8Value() : "";
}

KvForm parse_form(const std::string& text) {
  if (text == "mla") return KvForm::mla;
  if (text == "tpla") return KvForm::tpla;
  if (text == "dcp") return KvForm::dcp;
  if (text == "dp") return KvForm::dp;
  throw Error("REQUEST_INVALID", "KV layout: form is \"" + text + "\", expected mla, tpla, dcp or dp");
}

KvDType parse_dtype(const std::string& text) {
  if (text == "f32") return KvDType::f32;
  if (text == "bf16") return KvDType::bf16;
  if (text == "fp8") return KvDType::fp8;
  throw Error("REQUEST_INVALID", "KV layout: dtype is \"" + text + "\", expected f32, bf16 or fp8");
}

}  // namespace

KvLayout parse_kv_layout(Napi::Value value) {
  if (!value.IsObject()) throw Error("REQUEST_INVALID", "KV layout: expected an object");
  const Napi::Object object = value.As<Napi::Object>();
  KvLayout layout;
  layout.form = parse_form(text_field(object, "form"));
  layout.dtype = parse_dtype(text_field(object, "dtype"));
  layout.ranks = int_field(object, "ranks");
  layout.layers = int_field(object, "layers");
  layout.latent = int_field(object, "latent");
  layout.rope = int_field(object, "rope");
  layout.shared = parse_shared_widths(object.Get("shared"));
  const size_t widths = layout.shared.by_layer().size();
  if (widths != 0 && widths != size_t(layout.layers)) {
    throw Error("REQUEST_INVALID", "KV layout: shared has " + std::to_string(widths) + " widths for " + std::to_string(layout.layers) + " layers");
  }
  layout.page_tokens = int_field(object, "pageTokens");
  return layout;
}

SharedWidths parse_shared_widths(const Napi::Value& value) {
  const auto width_of = [](const Napi::Value& width) {
    const double number = width.IsNumber() ? width.As<Napi::Number>().DoubleValue() : NAN;
    if (std::floor(number) == number && number >= 0 && number <= 1e9) return static_cast<int>(number);
    throw Error("REQUEST_INVALID", "shared is neither a whole number nor one for each layer");
  };
  if (!value.IsArray()) return width_of(value);
  std::vector<int> by_layer;
  const Napi::Array array = value.As<Napi::Array>();
  for (uint32_t layer = 0; layer < array.Length(); ++layer) by_layer.push_back(width_of(array.Get(layer)));
  return SharedWidths(std::move(by_layer));
}

Napi::Value shared_widths_to_js(Napi::Env env, const SharedWidths& shared) {
  if (shared.is_uniform()) return Napi::Number::New(env, shared[0]);
  Napi::Array array = Napi::Array::New(env);
  for (const int width : shared.by_layer()) array.Set(array.Length(), width);
  return array;
}

Napi::Object kv_layout_to_js(Napi::Env env, const KvLayout& layout) {
  static constexpr const char* kForms[] = {"mla", "tpla", "dcp", "dp"};
  static constexpr const char* kDTypes[] = {"f32", "bf16", "fp8"};
  Napi::Object object = Napi::Object::New(env);
  object.Set("form", kForms[static_cast<int>(layout.form)]);
  object.Set("ranks", layout.ranks);
  object.Set("layers", layout.layers);
  object.Set("latent", layout.latent);
  object.Set("rope", layout.rope);
  object.Set("shared", shared_widths_to_js(env, layout.shared));
  object.Set("dtype", kDTypes[static_cast<int>(layout.dtype)]);
  object.Set("pageTokens", layout.page_tokens);
  return object;
}

double kv_token_bytes(const KvLayout& layout) {
  const double held = double(layout.token_bytes());
  const bool is_partitioned = layout.form == KvForm::dcp || layout.form == KvForm::dp;
  return is_partitioned ? held / layout.ranks : held;
}

void attach_kv_region(Napi::Object object, std::shared_ptr<const KvRegion> region) {
  const Napi::Env env = object.Env();
  auto external = Napi::External<RegionPointer>::New(env, new RegionPointer(std::move(region)), [](Napi::Env, RegionPointer* held) { delete held; });
  external.TypeTag(&kRegionTag);
  object.DefineProperty(Napi::PropertyDescriptor::Value(kRegionKey, external, napi_default));
}

void detach_kv_region(Napi::Object object) {
  const Napi::Value held = object.Get(kRegionKey);
  if (held.IsExternal() && held.As<Napi::External<RegionPointer>>().CheckTypeTag(&kRegionTag)) held.As<Napi::External<RegionPointer>>().Data()->reset();
}

std::shared_ptr<const KvRegion> kv_region_of(Napi::Value value) {
  if (value.IsObject()) {
    const Napi::Value held = value.As<Napi::Object>().Get(kRegionKey);
    if (held.IsExternal() && held.As<Napi::External<RegionPointer>>().CheckTypeTag(&kRegionTag)) {
      const RegionPointer& region = *held.As<Napi::External<RegionPointer>>().Data();
      if (region) return region;
      throw Error("REQUEST_INVALID", "the KV arena or region is closed");
    }
  }
  throw Error("REQUEST_INVALID", "expected a KvArena or a KvRegion");
}

}  // namespace tpla::addon
