#include <algorithm>
#include <chrono>
#include <functional>
#include <memory>
#include <tuple>

#include "addon/arguments.h"
#include "addon/async_work.h"
#include "reparam/layer_fit.h"
#ifdef TPLA_WITH_CUDA
#include "cuda/reparam_compute.h"
#endif

namespace tpla::addon {

namespace {

using reparam::Compute;
using reparam::Design;
using reparam::HostMatrix;
using reparam::LayerFit;
using reparam::LayerShape;

const float* floats(const Napi::Value& value, const std::string& field, size_t count) {
  if (!value.IsTypedArray() || value.As<Napi::TypedArray>().TypedArrayType() != napi_float32_array) refuse(field, "a Float32Array");
  const auto array = value.As<Napi::Float32Array>();
  if (array.ElementLength() != count) {
    refuse(field, std::to_string(count) + " numbers, got " + std::to_string(array.ElementLength()));
  }
  return array.Data();
}

HostMatrix matrix(const Napi::Value& value, const std::string& field, int64_t rows, int64_t cols) {
  return HostMatrix(rows, cols, floats(value, field, size_t(rows * cols)));
}

Napi::Float32Array to_js(Napi::Env env, const HostMatrix& m) {
  Napi::Float32Array out = Napi::Float32Array::New(env, m.values.size());
  std::copy(m.values.begin(), m.values.end(), out.Data());
  return out;
}

// { device: 'cpu', threads } or { device: 'cuda', index, library? }
std::shared_ptr<Compute> compute_of(const Napi::Value& value) {
  const Napi::Object object = to_object(value, "target");
  const std::string device = to_text(object.Get("device"), "target.device");
  if (device == "cpu") return reparam::make_cpu_compute(int(to_integer(object.Get("threads"), "target.threads", 0, 4096)));
  if (device != "cuda") refuse("target.device", "cpu or cuda");
#ifdef TPLA_WITH_CUDA
  const Napi::Value library = object.Get("library");
  return cuda::make_reparam_compute(int(to_integer(object.Get("index"), "target.index", 0, 63)), library.IsUndefined() || to_bool(library, "target.library"));
#else
  throw Error("GPU_UNAVAILABLE", "this addon was built without CUDA; rebuild it where nvcc is installed with TPLA_CUDA=on npm run build:native, or use --device cpu");
#endif
}

LayerShape shape_of(const Napi::Object& object) {
  const auto field = [&](const char* name) { return int(to_integer(object.Get(name), std::string("shape.") + name, 1)); };
  LayerShape shape;
  shape.heads = field("heads");
  shape.nope = field("nope");
  shape.rope = field("rope");
  shape.v = field("v");
  shape.latent = field("latent");
  shape.hidden = field("hidden");
  shape.softmax_scale = float(to_number(object.Get("softmaxScale"), "shape.softmaxScale"));
  return shape;
}

// Points into the arrays.
reparam::Sample sample_of(const LayerShape& shape, const Napi::Object& object) {
  reparam::Sample sample;
  sample.bounds = to_int32s(object.Get("sequences"), "sample.sequences");
  sample.query_tokens = to_int32s(object.Get("queryTokens"), "sample.queryTokens");
  const auto& [bounds, query_tokens] = std::tie(sample.bounds, sample.query_tokens);
  if (bounds.size() < 2 || bounds.front() != 0 || !std::is_sorted(bounds.begin(), bounds.end())) refuse("sample.sequences", "ascending token offsets from 0");
  if (!std::is_sorted(query_tokens.begin(), query_tokens.end()) || (!query_tokens.empty() && (query_tokens.front() < 0 || query_tokens.back() >= bounds.back()))) {
    refuse("sample.queryTokens", "ascending tokens of the sample");
  }
  const size_t tokens = size_t(bounds.back());
  sample.latents = floats(object.Get("latents"), "sample.latents", tokens * size_t(shape.latent));
  sample.rope_keys = floats(object.Get("ropeKeys"), "sample.ropeKeys", tokens * size_t(shape.rope));
  sample.queries = floats(object.Get("queries"), "sample.queries", query_tokens.size() * size_t(shape.heads) * size_t(shape.nope + shape.rope));
  return sample;
}

Design design_of(const LayerShape& shape, const Napi::Value& value) {
  const Napi::Array ranks = to_array(value, "design");
  Design design;
  for (uint32_t i = 0; i < ranks.Length(); ++i) {
    const Napi::Object rank = to_object(ranks.Get(i), "design[]");
    const Napi::Value basis = rank.Get("basis");
    if (!basis.IsTypedArray()) refuse("design[].basis", "a Float32Array");
    const int64_t width = int64_t(basis.As<Napi::TypedArray>().ElementLength()) / shape.latent;
    design.push_back({matrix(basis, "design[].basis", width, shape.latent), matrix(rank.Get("uk"), "design[].uk", int64_t(shape.heads) * shape.nope, width),
                      matrix(rank.Get("uv"), "design[].uv", int64_t(shape.heads) * shape.v, width)});
  }
  if (design.empty()) refuse("design", "at least one rank");
  return design;
}

struct Step {
  std::string kind;
  std::function<void(LayerFit&, LayerFit::Ranks&)> apply;
};

Step step_of(const Napi::Value& value) {
  const Napi::Object step = to_object(value, "steps[]");
  const std::string kind = to_text(step.Get("kind"), "steps[].kind");
  if (kind == "scales") {
    const bool per_head = to_bool(step.Get("perHead"), "steps[].perHead");
    return {kind, [per_head](LayerFit& fit, LayerFit::Ranks& ranks) { fit.fit_scales(ranks, per_head); }};
  }
  if (kind == "queries") return {kind, [](LayerFit& fit, LayerFit::Ranks& ranks) { fit.fit_queries(ranks); }};
  if (kind == "values") {
    const double ridge = to_number(step.Get("ridge"), "steps[].ridge");
    return {kind, [ridge](LayerFit& fit, LayerFit::Ranks& ranks) { fit.fit_values(ranks, ridge); }};
  }
  if (kind != "refine") refuse("steps[].kind", "scales, queries, values or refine");
  reparam::RefineOptions options;
  options.steps = int(to_integer(step.Get("steps"), "steps[].steps", 0));
  options.rate = float(to_number(step.Get("rate"), "steps[].rate"));
  options.basis = to_bool(step.Get("basis"), "steps[].basis");
  options.shared = int(to_integer(step.Get("shared"), "steps[].shared", 0));
  options.batch = int(to_integer(step.Get("batch"), "steps[].batch", 1));
  options.seed = uint64_t(to_integer(step.Get("seed"), "steps[].seed", 0));
  return {kind, [options](LayerFit& fit, LayerFit::Ranks& ranks) { fit.refine(ranks, options); }};
}

struct Fitted {
  Design design;
  double train_error = 0;
  double test_error = 0;
  std::vector<std::pair<std::string, double>> seconds;  // by kind of step, and "error"
};

// Runs the steps in order and takes the time of each kind.
Fitted apply(LayerFit& fit, const Design& design, const std::vector<Step>& steps, Compute& compute) {
  Fitted result;
  const auto timed = [&](const std::string& kind, const std::function<void()>& work) {
    const auto started = std::chrono::steady_clock::now();
    work();
    compute.finish();
    const double seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - started).count();
    const auto known = std::find_if(result.seconds.begin(), result.seconds.end(), [&](const auto& entry) { return entry.first == kind; });
    if (known == result.seconds.end()) {
      result.seconds.emplace_back(kind, seconds);
    } else {
      known->second += seconds;
    }
  };
  LayerFit::Ranks ranks = fit.upload(design);
  for (const Step& step : steps) timed(step.kind, [&] { step.apply(fit, ranks); });
  timed("error", [&] {
    result.train_error = fit.train_error(ranks);
    result.test_error = fit.test_error(ranks);
  });
  result.design = fit.download(ranks);
  return result;
}

class LayerFitHandle : public Napi::ObjectWrap<LayerFitHandle> {
 public:
  static void define(Napi::Env env, Napi::Object exports) {
    exports.Set("LayerFit", DefineClass(env, "LayerFit",
                                        {
                                            InstanceMethod<&LayerFitHandle::sensitivity>("sensitivity"),
                                            InstanceMethod<&LayerFitHandle::run>("run"),
                                            InstanceMethod<&LayerFitHandle::close>("close"),
                                        }));
  }

  explicit LayerFitHandle(const Napi::CallbackInfo& info) : Napi::ObjectWrap<LayerFitHandle>(info) {
    guarded(info.Env(), [&] {
      shape_ = shape_of(to_object(info[0], "shape"));
      const Napi::Object weights = to_object(info[1], "weights");
      const reparam::Sample sample = sample_of(shape_, to_object(info[2], "sample"));
      const Napi::Object options = to_object(info[3], "options");
      const int train = int(to_integer(options.Get("train"), "options.train", 1, int64_t(sample.bounds.size()) - 1));
      compute_ = compute_of(options.Get("target"));
      fit_ = std::make_shared<LayerFit>(compute_, shape_,
                                        reparam::LayerWeights{matrix(weights.Get("uk"), "weights.uk", int64_t(shape_.heads) * shape_.nope, shape_.latent),
                                                              matrix(weights.Get("uv"), "weights.uv", int64_t(shape_.heads) * shape_.v, shape_.latent),
                                                              matrix(weights.Get("wo"), "weights.wo", shape_.hidden, int64_t(shape_.heads) * shape_.v)},
                                        sample, train);
    });
  }

 private:
  const std::shared_ptr<LayerFit>& open() const {
    if (!fit_) throw Error("REQUEST_INVALID", "this LayerFit is closed");
    return fit_;
  }

  Napi::Value sensitivity(const Napi::CallbackInfo& info) {
    return guarded(info.Env(), [&] {
      return AsyncWork<reparam::Sensitivity>::start(
          info.Env(), "tpla reparam", [fit = open()] { return fit->sensitivity(); },
          [](Napi::Env env, const reparam::Sensitivity& sums) -> Napi::Value {
            Napi::Object object = Napi::Object::New(env);
            object.Set("tokenCovariance", to_js(env, sums.token_covariance));
            object.Set("attentionCovariance", to_js(env, sums.attention_covariance));
            object.Set("key", to_js(env, sums.key));
            object.Set("value", to_js(env, sums.value));
            object.Set("outputMoment", to_js(env, sums.output_moment));
            return object;
          });
    });
  }

  Napi::Value run(const Napi::CallbackInfo& info) {
    return guarded(info.Env(), [&] {
      Design design = design_of(shape_, info[0]);
      const Napi::Array array = to_array(info[1], "steps");
      std::vector<Step> steps;
      for (uint32_t i = 0; i < array.Length(); ++i) steps.push_back(step_of(array.Get(i)));
      return AsyncWork<Fitted>::start(
          info.Env(), "tpla reparam",
          [fit = open(), compute = compute_, design = std::move(design), steps = std::move(steps)] { return apply(*fit, design, steps, *compute); },
          [](Napi::Env env, const Fitted& fitted) -> Napi::Value {
            Napi::Array ranks = Napi::Array::New(env, fitted.design.size());
            for (size_t i = 0; i < fitted.design.size(); ++i) {
              Napi::Object rank = Napi::Object::New(env);
              rank.Set("basis", to_js(env, fitted.design[i].basis));
              rank.Set("uk", to_js(env, fitted.design[i].uk));
              rank.Set("uv", to_js(env, fitted.design[i].uv));
              ranks.Set(uint32_t(i), rank);
            }
            Napi::Object object = Napi::Object::New(env);
            object.Set("design", ranks);
            object.Set("trainError", fitted.train_error);
            object.Set("testError", fitted.test_error);
            Napi::Object seconds = Napi::Object::New(env);
            for (const auto& [kind, value] : fitted.seconds) seconds.Set(kind, value);
            object.Set("seconds", seconds);
            return object;
          });
    });
  }

  void close(const Napi::CallbackInfo&) {
    fit_.reset();
    compute_.reset();
  }

  LayerShape shape_;
  std::shared_ptr<Compute> compute_;
  std::shared_ptr<LayerFit> fit_;
};

Napi::Value multiply(const Napi::CallbackInfo& info) {
  return guarded(info.Env(), [&] {
    const int64_t m = to_integer(info[2], "m", 1), k = to_integer(info[3], "k", 1), n = to_integer(info[4], "n", 1);
    auto a = std::make_shared<HostMatrix>(matrix(info[0], "a", m, k));
    auto b = std::make_shared<HostMatrix>(matrix(info[1], "b", k, n));
    return AsyncWork<HostMatrix>::start(
        info.Env(), "tpla reparam",
        [a, b, m, n, compute = compute_of(info[5])] {
          const reparam::Tensor left = compute->upload(*a), right = compute->upload(*b), out = compute->allocate(m, n);
          compute->multiply(left, right, out);
          return compute->download(out.view());
        },
        [](Napi::Env env, const HostMatrix& out) -> Napi::Value { return to_js(env, out); });
  });
}

// reparamDevice(target): what it computes with, in words. Throws GPU_UNAVAILABLE.
Napi::Value device(const Napi::CallbackInfo& info) {
  return guarded(info.Env(), [&]() -> Napi::Value { return Napi::String::New(info.Env(), compute_of(info[0])->name()); });
}

}  // namespace

void export_reparam(Napi::Env env, Napi::Object exports) {
  LayerFitHandle::define(env, exports);
  exports.Set("multiply", Napi::Function::New(env, multiply));
  exports.Set("reparamDevice", Napi::Function::New(env, device));
}

}  // namespace tpla::addon
