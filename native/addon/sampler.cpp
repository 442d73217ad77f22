#include "core/sampler.h"

#include "addon/addon.h"
#include "addon/arguments.h"

namespace tpla::addon {

namespace {

SamplingParams params_from_js(const Napi::Value& value) {
  const Napi::Object object = to_object(value, "params");
  const auto number = [&](const char* name) { return float(to_number(object.Get(name), name)); };
  SamplingParams params;
  params.temperature = number("temperature");
  params.top_k = int(to_integer(object.Get("topK"), "topK"));
  params.top_p = number("topP");
  params.min_p = number("minP");
  params.repetition_penalty = number("repetitionPenalty");
  params.presence_penalty = number("presencePenalty");
  params.frequency_penalty = number("frequencyPenalty");
  params.logprobs = int(to_integer(object.Get("logprobs"), "logprobs"));
  const Napi::Value seed = object.Get("seed");
  if (!seed.IsBigInt()) refuse("seed", "a bigint");
  bool lossless;
  params.seed = seed.As<Napi::BigInt>().Uint64Value(&lossless);
  const Napi::Array biases = to_array(object.Get("logitBias"), "logitBias");
  for (uint32_t i = 0; i < biases.Length(); ++i) {
    const Napi::Object entry = to_object(biases.Get(i), "logitBias[]");
    params.logit_bias.emplace_back(int32_t(to_integer(entry.Get("token"), "logitBias[].token")), float(to_number(entry.Get("bias"), "logitBias[].bias")));
  }
  return params;
}

class SamplerHandle : public Napi::ObjectWrap<SamplerHandle> {
 public:
  static void define(Napi::Env env, Napi::Object exports) {
    exports.Set("Sampler", DefineClass(env, "Sampler", {InstanceMethod<&SamplerHandle::accept>("accept"), InstanceMethod<&SamplerHandle::sample>("sample")}));
  }

  explicit SamplerHandle(const Napi::CallbackInfo& info) : Napi::ObjectWrap<SamplerHandle>(info) {
    guarded(info.Env(), [&] { sampler_ = std::make_unique<Sampler>(params_from_js(info[0])); });
  }

 private:
  Napi::Value accept(const Napi::CallbackInfo& info) {
    return guarded(info.Env(), [&] {
      sampler_->accept(to_int32s(info[0], "tokens"), to_bool(info[1], "isPrompt"));
      return info.Env().Undefined();
    });
  }

  Napi::Value sample(const Napi::CallbackInfo& info) {
    return guarded(info.Env(), [&] {
      if (!info[0].IsTypedArray() || info[0].As<Napi::TypedArray>().TypedArrayType() != napi_float32_array || info[0].As<Napi::Float32Array>().ElementLength() == 0) {
        refuse("logits", "a Float32Array of the vocabulary");
      }
      const auto logits = info[0].As<Napi::Float32Array>();
      const int64_t step = to_integer(info[1], "step", 0, (int64_t(1) << 53) - 1);
      const SampledToken sampled = sampler_->sample({logits.Data(), logits.ElementLength()}, uint64_t(step));
      Napi::Object result = Napi::Object::New(info.Env());
      result.Set("token", sampled.token);
      result.Set("logprob", double(sampled.logprob));
      Napi::Array top = Napi::Array::New(info.Env(), sampled.top.size());
      for (size_t i = 0; i < sampled.top.size(); ++i) {
        Napi::Object entry = Napi::Object::New(info.Env());
        entry.Set("token", sampled.top[i].token);
        entry.Set("logprob", double(sampled.top[i].logprob));
        top.Set(uint32_t(i), entry);
      }
      result.Set("top", top);
      return result;
    });
  }

  std::unique_ptr<Sampler> sampler_;
};

}  // namespace

void export_sampler(Napi::Env env, Napi::Object exports) { SamplerHandle::define(env, exports); }

}  // namespace tpla::addon
