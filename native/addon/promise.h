#pragma once
#include <functional>
#include <memory>
#include <mutex>
#include <napi.h>
#include <thread>

#include "addon/addon.h"

namespace tpla::addon {

// A promise that any thread settles, once. Until then it keeps the process alive; after the environment's end settling does nothing.
class ThreadPromise {
 public:
  // Makes the value, or throws the Error that the promise is rejected with; on the JavaScript thread.
  using Convert = std::function<Napi::Value(Napi::Env)>;

  static std::shared_ptr<ThreadPromise> create(Napi::Env env) {
    auto promise = std::make_shared<ThreadPromise>(env);
    promise->function_ = ThreadSafeFunction::New(
        env, "tpla promise", 0, 1, promise.get(), [](Napi::Env, std::shared_ptr<ThreadPromise>* owner, ThreadPromise*) { delete owner; },
        new std::shared_ptr<ThreadPromise>(promise));
    // After the function's own hook, so that it runs before it.
    napi_add_env_cleanup_hook(env, on_environment_exit, promise.get());
    return promise;
  }
  explicit ThreadPromise(Napi::Env env) : env_(env), deferred_(env) {}

  Napi::Promise promise() const { return deferred_.Promise(); }

  void settle(Convert convert) {
    auto* held = new Convert(std::move(convert));
    const std::lock_guard lock(mutex_);
    if (is_over_ || function_.NonBlockingCall(held) != napi_ok) delete held;
  }

 private:
  static void call_js(Napi::Env env, Napi::Function, ThreadPromise* self, Convert* convert) {
    const std::unique_ptr<Convert> owned(convert);
    if (static_cast<napi_env>(env) == nullptr) return;
    const Napi::HandleScope scope(env);
    napi_remove_env_cleanup_hook(self->env_, on_environment_exit, self);
    try {
      self->deferred_.Resolve((*owned)(env));
    } catch (const Error& error) {
      self->deferred_.Reject(to_js_error(env, error).Value());
    }
    const std::lock_guard lock(self->mutex_);
    self->is_over_ = true;
    self->function_.Release();
  }
  static void on_environment_exit(void* promise) {
    auto* self = static_cast<ThreadPromise*>(promise);
    const std::lock_guard lock(self->mutex_);
    self->is_over_ = true;
  }
  using ThreadSafeFunction = Napi::TypedThreadSafeFunction<ThreadPromise, Convert, call_js>;

  const napi_env env_;
  Napi::Promise::Deferred deferred_;
  std::mutex mutex_;
  bool is_over_ = false;
  ThreadSafeFunction function_;
};

// A promise of what `body` gives, run on a thread of its own: a benchmark must not wait for Node's four.
inline Napi::Value on_thread(Napi::Env env, std::function<ThreadPromise::Convert()> body) {
  const auto promise = ThreadPromise::create(env);
  std::thread([promise, body = std::move(body)] {
    try {
      promise->settle(body());
    } catch (const Error& error) {
      promise->settle([error](Napi::Env) -> Napi::Value { throw error; });
    } catch (const std::exception& error) {
      promise->settle([text = std::string(error.what())](Napi::Env) -> Napi::Value { throw Error("INTERNAL", text); });
    }
  }).detach();
  return promise->promise();
}

}  // namespace tpla::addon
