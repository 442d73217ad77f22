#pragma once
#include <functional>
#include <new>
#include <string>
#include <utility>

#include "addon/addon.h"

namespace tpla::addon {

// Computes off the event loop; the result becomes JavaScript on it and settles a promise. What `compute` and `convert` captured lives until then.
template <typename Result>
class AsyncWork : public Napi::AsyncWorker {
 public:
  using Compute = std::function<Result()>;
  using Convert = std::function<Napi::Value(Napi::Env, const Result&)>;

  static Napi::Value start(Napi::Env env, const char* name, Compute compute, Convert convert) {
    auto* work = new AsyncWork(env, name, std::move(compute), std::move(convert));
    const Napi::Promise promise = work->deferred_.Promise();
    work->Queue();
    return promise;
  }

  void Execute() override {
    try {
      result_ = compute_();
    } catch (const Error& error) {
      code_ = error.code();
      SetError(error.what());
    } catch (const std::bad_alloc&) {
      code_ = "OUT_OF_MEMORY";
      SetError("the system refused memory");
    } catch (const std::exception& error) {
      SetError(error.what());
    }
  }
  void OnOK() override { deferred_.Resolve(convert_(Env(), result_)); }
  void OnError(const Napi::Error& error) override { deferred_.Reject(to_js_error(Env(), Error(code_, error.Message())).Value()); }

 private:
  AsyncWork(Napi::Env env, const char* name, Compute compute, Convert convert)
      : Napi::AsyncWorker(env, name), deferred_(env), compute_(std::move(compute)), convert_(std::move(convert)) {}

  Napi::Promise::Deferred deferred_;
  const Compute compute_;
  const Convert convert_;
  Result result_{};
  std::string code_ = "INTERNAL";
};

}  // namespace tpla::addon
