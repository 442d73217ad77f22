#include "core/engine.h"

#include <cstring>
#include <future>

#include "addon/addon.h"
#include "addon/arguments.h"
#include "addon/kv_arena.h"
#include "addon/model_spec.h"
#include "addon/weights.h"

namespace tpla::addon {

namespace {

Napi::Float32Array to_float32_array(Napi::Env env, const std::vector<float>& values) {
  Napi::Float32Array array = Napi::Float32Array::New(env, values.size());
  if (!values.empty()) std::memcpy(array.Data(), values.data(), values.size() * sizeof(float));
  return array;
}

// One asynchronous call: carries progress and the outcome from the engine's thread to JavaScript, in order, and keeps the event loop
// alive until then.
class Call : public std::enable_shared_from_this<Call> {
 public:
  Call(Napi::Env env, Napi::Value on_layer)
      : deferred_(Napi::Promise::Deferred::New(env)),
        channel_(Napi::ThreadSafeFunction::New(env, on_layer.IsFunction() ? on_layer.As<Napi::Function>() : Napi::Function::New(env, [](const Napi::CallbackInfo&) {}),
                                               "tpla-engine", 0, 1)) {}

  Napi::Promise promise() const { return deferred_.Promise(); }
  // Keeps a JavaScript object alive until the call has settled.
  void hold(Napi::Value value) { held_.push_back(Napi::Persistent(value.As<Napi::Object>())); }

  // Engine's thread.
  void layer_done(int layer) {
    channel_.NonBlockingCall([layer](Napi::Env env, Napi::Function on_layer) { on_layer.Call({Napi::Number::New(env, layer)}); });
  }
  // Engine's thread, which waits until JavaScript has taken the queries of a layer: the pass never runs ahead of whoever stores them.
  void queries_done(int layer, std::vector<float> queries) {
    auto taken = std::make_shared<std::promise<void>>();
    channel_.NonBlockingCall([layer, taken, queries = std::move(queries)](Napi::Env env, Napi::Function on_layer) {
      const Napi::HandleScope scope(env);
      try {
        on_layer.Call({Napi::Number::New(env, layer), to_float32_array(env, queries)});
        taken->set_value();
      } catch (const Napi::Error& error) {
        taken->set_exception(std::make_exception_ptr(Error("INTERNAL", error.Message())));
      }
    });
    taken->get_future().get();
  }
  // Engine's thread; `convert(env)` makes the promise's value on the JavaScript thread.
  void settle(std::exception_ptr error, std::function<Napi::Value(Napi::Env)> convert) {
    const auto self = shared_from_this();
    channel_.NonBlockingCall([self, error, convert = std::move(convert)](Napi::Env env, Napi::Function) { self->deliver(env, error, convert); });
    channel_.Release();
  }
  // JavaScript thread: the call was refused before it was queued.
  void refuse_now(Napi::Error error) {
    deferred_.Reject(error.Value());
    held_.clear();
    channel_.Release();
  }

 private:
  void deliver(Napi::Env env, std::exception_ptr error, const std::function<Napi::Value(Napi::Env)>& convert) {
    held_.clear();
    try {
      if (error) std::rethrow_exception(error);
      deferred_.Resolve(convert(env));
    } catch (const Napi::Error& thrown) {
      deferred_.Reject(thrown.Value());
    } catch (const std::exception& thrown) {
      deferred_.Reject(to_js_error(env, thrown).Value());
    }
  }

  Napi::Promise::Deferred deferred_;
  Napi::ThreadSafeFunction channel_;
  std::vector<Napi::ObjectReference> held_;
};

PrefillItem prefill_item_from_js(const Napi::Value& value) {
  const Napi::Object object = to_object(value, "items[]");
  PrefillItem item;
  item.tokens = to_int32s(object.Get("tokens"), "items[].tokens");
  item.position = int32_t(to_integer(object.Get("position"), "items[].position", 0));
  item.pages = to_int32s(object.Get("pages"), "items[].pages");
  const std::string logits = to_text(object.Get("logits"), "items[].logits");
  if (logits == "none") {
    item.logits = LogitsWanted::none;
  } else if (logits == "last") {
    item.logits = LogitsWanted::last;
  } else if (logits == "all") {
    item.logits = LogitsWanted::all;
  } else {
    refuse("items[].logits", "none, last or all, got \"" + logits + "\"");
  }
  return item;
}

DecodeItem decode_item_from_js(const Napi::Value& value) {
  const Napi::Object object = to_object(value, "items[]");
  DecodeItem item;
  item.token = int32_t(to_integer(object.Get("token"), "items[].token"));
  item.position = int32_t(to_integer(object.Get("position"), "items[].position", 0));
  const Napi::Array pages = to_array(object.Get("pages"), "items[].pages");
  for (uint32_t i = 0; i < pages.Length(); ++i) item.pages.push_back(to_int32s(pages.Get(i), "items[].pages[]"));
  const Napi::Value rank = object.Get("rank");
  if (!rank.IsUndefined()) item.rank = int(to_integer(rank, "items[].rank", 0));
  return item;
}

template <typename Item>
std::vector<Item> items_from_js(const Napi::Value& value, Item (*convert)(const Napi::Value&)) {
  const Napi::Array array = to_array(value, "items");
  std::vector<Item> items;
  for (uint32_t i = 0; i < array.Length(); ++i) items.push_back(convert(array.Get(i)));
  return items;
}

class EngineHandle : public Napi::ObjectWrap<EngineHandle> {
 public:
  static void define(Napi::Env env, Napi::Object exports) {
    exports.Set("Engine", DefineClass(env, "Engine",
                                      {
                                          InstanceMethod<&EngineHandle::prefill>("prefill"),
                                          InstanceMethod<&EngineHandle::capture_queries>("captureQueries"),
                                          InstanceMethod<&EngineHandle::decode>("decode"),
                                          InstanceMethod<&EngineHandle::close>("close"),
                                      }));
  }

  explicit EngineHandle(const Napi::CallbackInfo& info) : Napi::ObjectWrap<EngineHandle>(info) {
    guarded(info.Env(), [&] {
      const Napi::Object object = to_object(info[0], "options");
      EngineOptions options;
      options.spec = spec_from_js(object.Get("spec"));
      options.weights = weights_of(object.Get("weights"), "options.weights");
      options.arena = arena_of(object.Get("arena"), "options.arena");
      options.threads = int(to_integer(object.Get("threads"), "options.threads", 0, 4096));
      const Napi::Value exact = object.Get("exactSoftmax");
      options.exact_softmax = !exact.IsUndefined() && to_bool(exact, "options.exactSoftmax");
      const Napi::Value isa = object.Get("isa");
      if (!isa.IsUndefined()) options.isa = to_text(isa, "options.isa");
      const Napi::Value activations = object.Get("activations");
      if (!activations.IsUndefined()) {
        const std::string name = to_text(activations, "options.activations");
        if (name != "f32" && name != "bf16x2" && name != "bf16") refuse("options.activations", "f32, bf16x2 or bf16, got \"" + name + "\"");
        options.activation_parts = name == "f32" ? 3 : name == "bf16x2" ? 2 : 1;
      }
      engine_ = std::make_unique<Engine>(std::move(options));
    });
  }

 private:
  Napi::Value prefill(const Napi::CallbackInfo& info) {
    const auto call = std::make_shared<Call>(info.Env(), info[1]);
    return started(info, call, [&] {
      PrefillHooks hooks;
      if (info[1].IsFunction()) hooks.on_layer = [call](int layer) { call->layer_done(layer); };
      const Napi::Value flag = info[2];
      if (!flag.IsUndefined() && !flag.IsNull()) {
        if (!flag.IsTypedArray() || flag.As<Napi::TypedArray>().TypedArrayType() != napi_int32_array || flag.As<Napi::Int32Array>().ElementLength() < 1) {
          refuse("signal", "an Int32Array of one element");
        }
        call->hold(flag);
        int32_t* word = flag.As<Napi::Int32Array>().Data();
        hooks.cancelled = [word] { return __atomic_load_n(word, __ATOMIC_ACQUIRE) != 0; };
      }
      open().prefill(items_from_js(info[0], prefill_item_from_js), std::move(hooks), [call](std::exception_ptr error, std::vector<std::vector<float>> logits) {
        call->settle(error, [logits = std::move(logits)](Napi::Env env) -> Napi::Value {
          Napi::Array result = Napi::Array::New(env, logits.size());
          for (size_t i = 0; i < logits.size(); ++i) result.Set(uint32_t(i), to_float32_array(env, logits[i]));
          return result;
        });
      });
    });
  }

  Napi::Value capture_queries(const Napi::CallbackInfo& info) {
    const auto call = std::make_shared<Call>(info.Env(), info[2]);
    return started(info, call, [&] {
      if (!info[2].IsFunction()) refuse("onLayer", "a function");
      std::vector<PrefillItem> items = items_from_js(info[0], prefill_item_from_js);
      std::vector<int32_t> rows = to_int32s(info[1], "rows");
      size_t tokens = 0;
      for (const PrefillItem& item : items) tokens += item.tokens.size();
      if (!std::is_sorted(rows.begin(), rows.end()) || (!rows.empty() && (rows.front() < 0 || size_t(rows.back()) >= tokens))) refuse("rows", "ascending rows of the items");
      PrefillHooks hooks;
      hooks.query_rows = std::move(rows);
      hooks.on_queries = [call](int layer, std::vector<float> queries) { call->queries_done(layer, std::move(queries)); };
      open().prefill(std::move(items), std::move(hooks), [call](std::exception_ptr error, std::vector<std::vector<float>>) {
        call->settle(error, [](Napi::Env env) -> Napi::Value { return env.Undefined(); });
      });
    });
  }

  Napi::Value decode(const Napi::CallbackInfo& info) {
    const auto call = std::make_shared<Call>(info.Env(), info.Env().Undefined());
    return started(info, call, [&] {
      open().decode(items_from_js(info[0], decode_item_from_js), [call](std::exception_ptr error, std::vector<float> logits) {
        call->settle(error, [logits = std::move(logits)](Napi::Env env) -> Napi::Value { return to_float32_array(env, logits); });
      });
    });
  }

  Napi::Value close(const Napi::CallbackInfo& info) {
    if (engine_) engine_->close();
    closed_ = true;
    return info.Env().Undefined();
  }

  Engine& open() {
    if (closed_ || !engine_) throw Error("REQUEST_INVALID", "this Engine is closed");
    return *engine_;
  }

  // Refusals reject the promise like any other failure.
  template <typename Start>
  static Napi::Value started(const Napi::CallbackInfo& info, const std::shared_ptr<Call>& call, Start&& start) {
    try {
      call->hold(info.This());
      guarded(info.Env(), start);
    } catch (const Napi::Error& error) {
      call->refuse_now(error);
    }
    return call->promise();
  }

  std::unique_ptr<Engine> engine_;
  bool closed_ = false;
};

}  // namespace

void export_engine(Napi::Env env, Napi::Object exports) { EngineHandle::define(env, exports); }

}  // namespace tpla::addon
