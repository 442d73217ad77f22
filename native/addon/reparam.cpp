#include <functional>
#include <memory>

#include "addon/arguments.h"
#include "addon/async_work.h"
#include "reparam/layer_fit.h"

namespace tpla::addon {

namespace {

using reparam::Design;
using reparam::LayerFit;
using reparam::LayerShape;
using reparam::Matrix;
using reparam::RankDesign;

const float* floats(const Napi::Value& value, const std::string& field, size_t count) {
  if (!value.IsTypedArray() || value.As<Napi::TypedArray>().TypedArrayType() != napi_float32_array) refuse(field, "a Float32Array");
  const auto array = value.As<Napi::Float32Array>();
  if (array.ElementLength() != count) {
    refuse(field, std::to_string(count) + " numbers, got " + std::to_string(array.ElementLength()));
  }
  return array.Data();
}

Matrix matrix(const Napi::Value& value, const std::string& field, int64_t rows, int64_t cols) {
  return Matrix(rows, cols, floats(value, field, size_t(rows * cols)));
}

Napi::Float32Array to_js(Napi::Env env, const Matrix& m) {
  Napi::Float32Array out = Napi::Float32Array::New(env, size_t(m.rows() * m.cols()));
  for (int64_t i = 0; i < m.rows(); ++i) std::copy_n(m.row(i), m.cols(), out.Data() + i * m.cols());
  return out;
}

int threads_of(const Napi::Value& value) {
  const int threads = int(to_integer(value, "threads", 0, 4096));
  return threads > 0 ? threads : int(std::max(1u, std::thread::hardware_concurrency()));
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

std::vector<reparam::Sequence> sequences_of(const LayerShape& shape, const Napi::Object& sample) {
  const std::vector<int32_t> bounds = to_int32s(sample.Get("sequences"), "sample.sequences");
  const std::vector<int32_t> query_tokens = to_int32s(sample.Get("queryTokens"), "sample.queryTokens");
  if (bounds.size() < 2 || bounds.front() != 0 || !std::is_sorted(bounds.begin(), bounds.end())) refuse("sample.sequences", "ascending token offsets from 0");
  if (!std::is_sorted(query_tokens.begin(), query_tokens.end()) || (!query_tokens.empty() && (query_tokens.front() < 0 || query_tokens.back() >= bounds.back()))) {
    refuse("sample.queryTokens", "ascending tokens of the sample");
  }
  const size_t tokens = size_t(bounds.back()), head_dim = size_t(shape.nope + shape.rope);
  const float* latents = floats(sample.Get("latents"), "sample.latents", tokens * size_t(shape.latent));
  const float* rope_keys = floats(sample.Get("ropeKeys"), "sample.ropeKeys", tokens * size_t(shape.rope));
  const float* queries = floats(sample.Get("queries"), "sample.queries", query_tokens.size() * size_t(shape.heads) * head_dim);
  std::vector<reparam::Sequence> sequences;
  size_t query = 0;
  for (size_t i = 0; i + 1 < bounds.size(); ++i) {
    const int begin = bounds[i], end = bounds[i + 1];
    const size_t first = query;
    reparam::Sequence sequence;
    for (; query < query_tokens.size() && query_tokens[query] < end; ++query) sequence.query_token.push_back(query_tokens[query] - begin);
    const int64_t count = int64_t(sequence.query_token.size());
    if (count == 0) continue;
    sequence.latents = Matrix(end - begin, shape.latent, latents + size_t(begin) * size_t(shape.latent));
    sequence.rope_keys = Matrix(end - begin, shape.rope, rope_keys + size_t(begin) * size_t(shape.rope));
    for (int head = 0; head < shape.heads; ++head) {
      Matrix of_head(int64_t(head_dim), count);
      for (int64_t q = 0; q < count; ++q) {
        const float* from = queries + ((first + size_t(q)) * size_t(shape.heads) + size_t(head)) * head_dim;
        for (size_t d = 0; d < head_dim; ++d) of_head.row(int64_t(d))[q] = from[d];
      }
      sequence.queries.push_back(std::move(of_head));
    }
    sequences.push_back(std::move(sequence));
  }
  if (sequences.empty()) refuse("sample.queryTokens", "at least one query");
  return sequences;
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

using Step = std::function<void(LayerFit&, Design&)>;

Step step_of(const Napi::Value& value) {
  const Napi::Object step = to_object(value, "steps[]");
  const std::string kind = to_text(step.Get("kind"), "steps[].kind");
  if (kind == "scales") {
    const bool per_head = to_bool(step.Get("perHead"), "steps[].perHead");
    return [per_head](LayerFit& fit, Design& design) { fit.fit_scales(design, per_head); };
  }
  if (kind == "queries") return [](LayerFit& fit, Design& design) { fit.fit_queries(design); };
  if (kind == "values") {
    const double ridge = to_number(step.Get("ridge"), "steps[].ridge");
    return [ridge](LayerFit& fit, Design& design) { fit.fit_values(design, ridge); };
  }
  if (kind != "refine") refuse("steps[].kind", "scales, queries, values or refine");
  reparam::RefineOptions options;
  options.steps = int(to_integer(step.Get("steps"), "steps[].steps", 0));
  options.rate = float(to_number(step.Get("rate"), "steps[].rate"));
  options.basis = to_bool(step.Get("basis"), "steps[].basis");
  options.shared = int(to_integer(step.Get("shared"), "steps[].shared", 0));
  options.seed = uint64_t(to_integer(step.Get("seed"), "steps[].seed", 0));
  return [options](LayerFit& fit, Design& design) { fit.refine(design, options); };
}

struct Fitted {
  Design design;
  double train_error = 0;
  double test_error = 0;
};

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
      auto sequences = sequences_of(shape_, to_object(info[2], "sample"));
      const Napi::Object options = to_object(info[3], "options");
      const int train = int(to_integer(options.Get("train"), "options.train", 1, int64_t(sequences.size())));
      fit_ = std::make_shared<LayerFit>(shape_, matrix(weights.Get("uk"), "weights.uk", int64_t(shape_.heads) * shape_.nope, shape_.latent),
                                        matrix(weights.Get("uv"), "weights.uv", int64_t(shape_.heads) * shape_.v, shape_.latent),
                                        matrix(weights.Get("wo"), "weights.wo", shape_.hidden, int64_t(shape_.heads) * shape_.v), std::move(sequences), train,
                                        threads_of(options.Get("threads")));
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
          [fit = open(), design = std::move(design), steps = std::move(steps)] {
            Fitted result{design, 0, 0};
            for (const Step& step : steps) step(*fit, result.design);
            result.train_error = fit->train_error(result.design);
            result.test_error = fit->test_error(result.design);
            return result;
          },
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
            return object;
          });
    });
  }

  void close(const Napi::CallbackInfo&) { fit_.reset(); }

  LayerShape shape_;
  std::shared_ptr<LayerFit> fit_;
};

Napi::Value multiply(const Napi::CallbackInfo& info) {
  return guarded(info.Env(), [&] {
    const int64_t m = to_integer(info[2], "m", 1), k = to_integer(info[3], "k", 1), n = to_integer(info[4], "n", 1);
    auto a = std::make_shared<Matrix>(matrix(info[0], "a", m, k));
    auto b = std::make_shared<Matrix>(matrix(info[1], "b", k, n));
    const int threads = threads_of(info[5]);
    return AsyncWork<Matrix>::start(
        info.Env(), "tpla reparam",
        [a, b, m, n, threads] {
          const cpu::Kernels& kernels = cpu::select_kernels(nullptr);
          cpu::ThreadTeam team(threads);
          Matrix out(m, n);
          team.run_ranges(m, 64, [&](int64_t begin, int64_t end, int) { reparam::multiply(kernels, reparam::Left(*a, begin, end), *b, out, begin); });
          return out;
        },
        [](Napi::Env env, const Matrix& out) -> Napi::Value { return to_js(env, out); });
  });
}

}  // namespace

void export_reparam(Napi::Env env, Napi::Object exports) {
  LayerFitHandle::define(env, exports);
  exports.Set("multiply", Napi::Function::New(env, multiply));
}

}  // namespace tpla::addon
