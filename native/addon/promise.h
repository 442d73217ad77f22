#pragma once
#include <functional>
#include <memory>
#include <mutex>
#include <napi.h>
#include <thread>

#include "addon/addon.h"

namespace tpla::addon {

// A promise that any thread settles, once. Until then it keeps the process alive; after the environment's end settling does nothing.
class ThreadPromise : public std::enable_shared_from_this<ThreadPromise> {
 public:
  // Makes the value, or throws the Error that the promise is rejected with; on the JavaScript thread.
  using Convert = std::function<Napi::Value(Napi::Env)>;

  static std::shared_ptr<ThreadPromise> create(Napi::Env env) {
    auto promise = std::make_shared<ThreadPromise>(env);
    promise->queue_->hold(env);
    return promise;
  }
  explicit ThreadPromise(Napi::Env env) : queue_(Queue::of(env)), deferred_(env) {}

  Napi::Promise promise() const { return deferred_.Promise(); }
  void settle(Convert convert) { queue_->push(new Settlement{shared_from_this(), std::move(convert)}); }

 private:
  struct Settlement {
    std::shared_ptr<ThreadPromise> promise;
    Convert convert;
  };

  // The way of all promises of an environment to its thread: a thread-safe function of its own would be most of what a promise costs.
  class Queue {
   public:
    static std::shared_ptr<Queue> of(Napi::Env env) {
      // An environment has one thread, and a thread one environment at a time.
      static thread_local std::weak_ptr<Queue> current;
      std::shared_ptr<Queue> queue = current.lock();
      if (queue) return queue;
      queue = std::make_shared<Queue>();
      current = queue;
      auto* const owner = new std::shared_ptr<Queue>(queue);
      queue->function_ = ThreadSafeFunction::New(env, "tpla promises", 0, 1, queue.get(), [](Napi::Env, std::shared_ptr<Queue>* held, Queue*) { delete held; }, owner);
      queue->function_.Unref(env);
      // After the function's own hook, so that it runs before it.
      napi_add_env_cleanup_hook(env, on_environment_exit, queue.get());
      return queue;
    }

    // JavaScript thread: the process lives until as many have been settled as were held.
    void hold(Napi::Env env) {
      if (held_++ == 0) function_.Ref(env);
    }
    void push(Settlement* settlement) {
      const std::lock_guard lock(mutex_);
      if (is_over_ || function_.NonBlockingCall(settlement) != napi_ok) delete settlement;
    }

   private:
    static void call_js(Napi::Env env, Napi::Function, Queue* self, Settlement* settlement) {
      const std::unique_ptr<Settlement> owned(settlement);
      if (static_cast<napi_env>(env) == nullptr) return;
      const Napi::HandleScope scope(env);
      if (--self->held_ == 0) self->function_.Unref(env);
      try {
        owned->promise->deferred_.Resolve(owned->convert(env));
      } catch (const Error& error) {
        owned->promise->deferred_.Reject(to_js_error(env, error).Value());
      }
    }
    static void on_environment_exit(void* queue) {
      auto* self = static_cast<Queue*>(queue);
      const std::lock_guard lock(self->mutex_);
      self->is_over_ = true;
    }
    using ThreadSafeFunction = Napi::TypedThreadSafeFunction<Queue, Settlement, call_js>;

    std::mutex mutex_;
    bool is_over_ = false;
    int held_ = 0;
    ThreadSafeFunction function_;
  };

  const std::shared_ptr<Queue> queue_;
  const Napi::Promise::Deferred deferred_;
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
