#include "addon/arguments.h"

#ifdef TPLA_WITH_CUDA
#include <functional>
#include <optional>

#include "cuda/attention_bench.h"
#endif

namespace tpla::addon {

namespace {

#ifdef TPLA_WITH_CUDA

using cuda::AttentionPath;
using cuda::DecodeShape;
using cuda::PrefillShape;

constexpr int64_t kMaxTokens = 1 << 24;

AttentionPath path_of(const Napi::Object& object) {
  const std::string name = to_text(object.Get("path"), "path");
  if (name == "auto") return AttentionPath::automatic;
  if (name == "sm90") return AttentionPath::sm90;
  if (name == "sm80") return AttentionPath::sm80;
  refuse("path", "auto, sm90 or sm80");
}

std::vector<int> lengths_of(const Napi::Object& object, const char* field) {
  const std::vector<int32_t> lengths = to_int32s(object.Get(field), field);
  if (lengths.empty()) refuse(field, "at least one length");
  for (const int32_t length : lengths) {
    if (length < 0 || length > kMaxTokens) refuse(field, "lengths from 0 to " + std::to_string(kMaxTokens));
  }
  return {lengths.begin(), lengths.end()};
}

DecodeShape decode_shape(const Napi::Object& object) {
  DecodeShape shape;
  shape.latent = int(to_integer(object.Get("latent"), "latent", 1, 4096));
  shape.heads = int(to_integer(object.Get("heads"), "heads", 1, 1024));
  shape.q_tokens = int(to_integer(object.Get("qTokens"), "qTokens", 1, 1024));
  shape.page_size = int(to_integer(object.Get("pageSize"), "pageSize", 1, 4096));
  shape.kv_lens = lengths_of(object, "kvLens");
  shape.causal = to_bool(object.Get("causal"), "causal");
  shape.path = path_of(object);
  shape.seed = unsigned(to_integer(object.Get("seed"), "seed", 0));
  return shape;
}

PrefillShape prefill_shape(const Napi::Object& object) {
  PrefillShape shape;
  shape.heads = int(to_integer(object.Get("heads"), "heads", 1, 1024));
  shape.q_lens = lengths_of(object, "qLens");
  shape.kv_lens = lengths_of(object, "kvLens");
  if (shape.q_lens.size() != shape.kv_lens.size()) refuse("kvLens", "as many lengths as qLens has");
  shape.causal = to_bool(object.Get("causal"), "causal");
  shape.seed = unsigned(to_integer(object.Get("seed"), "seed", 0));
  return shape;
}

// What a request computes off the event loop; sets what the promise resolves to on the event loop.
using Publish = std::function<void(Napi::Env, Napi::Object)>;
using Work = std::function<Publish()>;

Publish publish_verdict(const cuda::Verdict& verdict, const std::string& name) {
  return [=](Napi::Env, Napi::Object result) {
    result.Set("name", name);
    result.Set("ok", verdict.ok);
    result.Set("error", verdict.error);
    result.Set("lseError", verdict.lse_error);
    result.Set("sameBits", verdict.same_bits);
  };
}

Publish publish_timing(const cuda::Timing& timing) {
  return [=](Napi::Env, Napi::Object result) {
    result.Set("ms", timing.ms);
    result.Set("bytes", timing.bytes);
    result.Set("flops", timing.flops);
  };
}

Work work_of(const Napi::Object& request) {
  const std::string operation = to_text(request.Get("operation"), "operation");
  if (operation == "machine") {
    return [] {
      const cuda::MachineRates rates = cuda::measure_machine();
      return [=](Napi::Env, Napi::Object result) {
        result.Set("name", rates.name);
        result.Set("copyBytesPerSecond", rates.copy_bytes_per_s);
        result.Set("matrixFlopsPerSecond", rates.matrix_flops_per_s);
      };
    };
  }
  const std::string kind = to_text(request.Get("kind"), "kind");
  if (kind != "decode" && kind != "prefill") refuse("kind", "decode or prefill");
  const bool decode = kind == "decode";
  if (operation == "checkRandom") {
    const unsigned seed = unsigned(to_integer(request.Get("seed"), "seed", 0));
    const int repeats = int(to_integer(request.Get("repeats"), "repeats", 1, 1000));
    if (!decode) return [=] { const auto shape = cuda::random_prefill_shape(seed); return publish_verdict(cuda::check_prefill(shape, repeats), cuda::describe(shape)); };
    const AttentionPath path = path_of(request);
    return [=] { const auto shape = cuda::random_decode_shape(seed, path); return publish_verdict(cuda::check_decode(shape, repeats), cuda::describe(shape)); };
  }
  if (operation == "check") {
    const int repeats = int(to_integer(request.Get("repeats"), "repeats", 1, 1000));
    if (decode) return [=, shape = decode_shape(request)] { return publish_verdict(cuda::check_decode(shape, repeats), cuda::describe(shape)); };
    return [=, shape = prefill_shape(request)] { return publish_verdict(cuda::check_prefill(shape, repeats), cuda::describe(shape)); };
  }
  if (operation == "time") {
    if (decode) return [shape = decode_shape(request)] { return publish_timing(cuda::time_decode(shape)); };
    return [shape = prefill_shape(request)] { return publish_timing(cuda::time_prefill(shape)); };
  }
  refuse("operation", "machine, check, checkRandom or time");
}

class BenchWorker : public Napi::AsyncWorker {
 public:
  BenchWorker(Napi::Env env, Work work) : Napi::AsyncWorker(env), deferred_(Napi::Promise::Deferred::New(env)), work_(std::move(work)) {}
  Napi::Promise promise() const { return deferred_.Promise(); }

 protected:
  void Execute() override {
    try {
      publish_ = work_();
    } catch (const tpla::Error& error) {
      error_.emplace(error);
    } catch (const cuda::AttentionError& error) {
      error_.emplace("REQUEST_INVALID", error.what());
    } catch (const std::exception& error) {
      error_.emplace("INTERNAL", error.what());
    }
  }

  void OnOK() override {
    const Napi::Env env = Env();
    if (error_) {
      deferred_.Reject(to_js_error(env, *error_).Value());
      return;
    }
    Napi::Object result = Napi::Object::New(env);
    publish_(env, result);
    deferred_.Resolve(result);
  }

 private:
  Napi::Promise::Deferred deferred_;
  Work work_;
  Publish publish_;
  std::optional<tpla::Error> error_;
};

#endif

// benchAttention(request): Promise; see src/native/attention.ts.
Napi::Value bench_attention(const Napi::CallbackInfo& info) {
  const Napi::Env env = info.Env();
  return guarded(env, [&]() -> Napi::Value {
#ifdef TPLA_WITH_CUDA
    auto* worker = new BenchWorker(env, work_of(to_object(info[0], "request")));
    worker->Queue();
    return worker->promise();
#else
    throw Error("GPU_UNAVAILABLE", "this addon was built without CUDA: install the CUDA toolkit (nvcc) and rebuild with TPLA_CUDA=on npm run build:native");
#endif
  });
}

}  // namespace

void export_attention(Napi::Env env, Napi::Object exports) { exports.Set("benchAttention", Napi::Function::New(env, bench_attention)); }

}  // namespace tpla::addon
