#include "addon/weights.h"

#include <cstring>

#include "addon/arguments.h"

namespace tpla::addon {

namespace {

constexpr napi_type_tag kWeightsTag = {0x7470'6c61'7765'6967ULL, 0x6874'7300'0000'0001ULL};
constexpr int64_t kMaxSafeInteger = (int64_t(1) << 53) - 1;

WeightDType dtype_of(const std::string& name, const std::string& tensor) {
  if (name == "F32") return WeightDType::f32;
  if (name == "BF16") return WeightDType::bf16;
  if (name == "F16") return WeightDType::f16;
  if (name == "F8_E4M3") return WeightDType::f8_e4m3;
  throw Error("MODEL_UNSUPPORTED", "tensor " + tensor + " has dtype " + name + "; supported are F32, BF16, F16 and F8_E4M3");
}

TensorEntry entry_from_js(const Napi::Value& value) {
  const Napi::Object object = to_object(value, "tensors[]");
  TensorEntry entry;
  entry.name = to_text(object.Get("name"), "tensors[].name");
  entry.file = int(to_integer(object.Get("file"), entry.name + ".file", 0));
  entry.dtype = dtype_of(to_text(object.Get("dtype"), entry.name + ".dtype"), entry.name);
  const Napi::Array shape = to_array(object.Get("shape"), entry.name + ".shape");
  for (uint32_t i = 0; i < shape.Length(); ++i) entry.shape.push_back(to_integer(shape.Get(i), entry.name + ".shape", 0, kMaxSafeInteger));
  entry.begin = size_t(to_integer(object.Get("begin"), entry.name + ".begin", 0, kMaxSafeInteger));
  entry.end = size_t(to_integer(object.Get("end"), entry.name + ".end", 0, kMaxSafeInteger));
  return entry;
}

class WeightsHandle : public Napi::ObjectWrap<WeightsHandle> {
 public:
  static void define(Napi::Env env, Napi::Object exports) {
    exports.Set("Weights", DefineClass(env, "Weights",
                                       {
                                           InstanceAccessor<&WeightsHandle::bytes>("bytes"),
                                           InstanceMethod<&WeightsHandle::read>("read"),
                                           InstanceMethod<&WeightsHandle::release>("release"),
                                           InstanceMethod<&WeightsHandle::close>("close"),
                                       }));
  }

  explicit WeightsHandle(const Napi::CallbackInfo& info) : Napi::ObjectWrap<WeightsHandle>(info) {
    guarded(info.Env(), [&] {
      const Napi::Array paths = to_array(info[0], "files");
      const Napi::Array tensors = to_array(info[1], "tensors");
      std::vector<std::string> files;
      for (uint32_t i = 0; i < paths.Length(); ++i) files.push_back(to_text(paths.Get(i), "files[]"));
      std::vector<TensorEntry> entries;
      entries.reserve(tensors.Length());
      for (uint32_t i = 0; i < tensors.Length(); ++i) {
        const Napi::HandleScope scope(info.Env());
        entries.push_back(entry_from_js(tensors.Get(i)));
      }
      weights_ = std::make_shared<const Weights>(files, entries);
    });
    info.This().As<Napi::Object>().TypeTag(&kWeightsTag);
  }

  const std::shared_ptr<const Weights>& open() const {
    if (!weights_) throw Error("REQUEST_INVALID", "these Weights are closed");
    return weights_;
  }

 private:
  Napi::Value bytes(const Napi::CallbackInfo& info) {
    return guarded(info.Env(), [&] { return Napi::Number::New(info.Env(), double(open()->bytes())); });
  }

  Napi::Value read(const Napi::CallbackInfo& info) {
    return guarded(info.Env(), [&]() -> Napi::Value {
      std::string scale_name;
      int block_rows = 0;
      int block_cols = 0;
      if (info.Length() > 1 && !info[1].IsUndefined() && !info[1].IsNull()) {
        const Napi::Object scale = to_object(info[1], "scale");
        scale_name = to_text(scale.Get("name"), "scale.name");
        const Napi::Array block = to_array(scale.Get("block"), "scale.block");
        block_rows = int(to_integer(block.Get(0u), "scale.block[0]", 1));
        block_cols = int(to_integer(block.Get(1u), "scale.block[1]", 1));
      }
      const std::vector<float> values = open()->read(to_text(info[0], "name"), scale_name, block_rows, block_cols);
      Napi::Float32Array result = Napi::Float32Array::New(info.Env(), values.size());
      std::memcpy(result.Data(), values.data(), values.size() * sizeof(float));
      return result;
    });
  }

  void release(const Napi::CallbackInfo& info) {
    guarded(info.Env(), [&] { open()->release(); });
  }

  Napi::Value close(const Napi::CallbackInfo& info) {
    weights_.reset();
    return info.Env().Undefined();
  }

  std::shared_ptr<const Weights> weights_;
};

}  // namespace

std::shared_ptr<const Weights> weights_of(const Napi::Value& value, const char* field) {
  if (!value.IsObject() || !value.As<Napi::Object>().CheckTypeTag(&kWeightsTag)) refuse(field, "a Weights object");
  return WeightsHandle::Unwrap(value.As<Napi::Object>())->open();
}

void export_weights(Napi::Env env, Napi::Object exports) { WeightsHandle::define(env, exports); }

}  // namespace tpla::addon
