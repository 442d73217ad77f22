#include "core/shared_memory.h"

#include <cmath>
#include <memory>

#include "addon/addon.h"

namespace tpla::addon {

namespace {

size_t parse_bytes(Napi::Value value) {
  const double bytes = value.IsNumber() ? value.As<Napi::Number>().DoubleValue() : NAN;
  if (!(std::floor(bytes) == bytes && bytes >= 1 && bytes <= 9007199254740991.0)) {
    throw Error("REQUEST_INVALID", "shared memory: bytes is not a whole number from 1 to 2^53 - 1");
  }
  return static_cast<size_t>(bytes);
}

class SharedMemoryObject : public Napi::ObjectWrap<SharedMemoryObject> {
 public:
  static Napi::Function define(Napi::Env env) {
    return DefineClass(env, "SharedMemory",
                       {StaticMethod<&SharedMemoryObject::create>("create"), StaticMethod<&SharedMemoryObject::map>("map"),
                        InstanceAccessor<&SharedMemoryObject::bytes>("bytes"), InstanceAccessor<&SharedMemoryObject::fd>("fd"),
                        InstanceAccessor<&SharedMemoryObject::buffer>("buffer"), InstanceMethod<&SharedMemoryObject::close>("close")});
  }

  // Made by create() and map() alone, which hand the memory over in an external.
  explicit SharedMemoryObject(const Napi::CallbackInfo& info) : Napi::ObjectWrap<SharedMemoryObject>(info) {
    if (info.Length() != 1 || !info[0].IsExternal()) throw Napi::TypeError::New(info.Env(), "use SharedMemory.create or SharedMemory.map");
    memory_ = std::make_shared<std::unique_ptr<SharedMemory>>(std::make_unique<SharedMemory>(std::move(*info[0].As<Napi::External<SharedMemory>>().Data())));
  }

 private:
  static Napi::Value wrap(Napi::Env env, Napi::Value constructor, SharedMemory memory) {
    return constructor.As<Napi::Function>().New({Napi::External<SharedMemory>::New(env, &memory)});
  }

  static Napi::Value create(const Napi::CallbackInfo& info) {
    try {
      const std::string name = info.Length() > 1 && info[1].IsString() ? info[1].As<Napi::String>().Utf8Value() : "tpla";
      return wrap(info.Env(), info.This(), SharedMemory::create(parse_bytes(info[0]), name));
    } catch (const Error& error) {
      throw to_js_error(info.Env(), error);
    }
  }

  static Napi::Value map(const Napi::CallbackInfo& info) {
    try {
      if (!info[0].IsNumber()) throw Error("REQUEST_INVALID", "shared memory: fd is not a number");
      return wrap(info.Env(), info.This(), SharedMemory::map(info[0].As<Napi::Number>().Int32Value(), parse_bytes(info[1])));
    } catch (const Error& error) {
      throw to_js_error(info.Env(), error);
    }
  }

  Napi::Value bytes(const Napi::CallbackInfo& info) { return Napi::Number::New(info.Env(), memory_ ? static_cast<double>((*memory_)->size()) : 0); }
  Napi::Value fd(const Napi::CallbackInfo& info) { return Napi::Number::New(info.Env(), memory_ ? (*memory_)->fd() : -1); }

  // Made on first use: one view for the life of the object, which keeps the mapping even where this wrapper is collected first.
  Napi::Value buffer(const Napi::CallbackInfo& info) {
    if (!buffer_.IsEmpty()) return buffer_.Value();
    if (!memory_) throw to_js_error(info.Env(), Error("REQUEST_INVALID", "the shared memory is closed"));
    auto* held = new Mapping(memory_);
    Napi::ArrayBuffer view =
        Napi::ArrayBuffer::New(info.Env(), (*memory_)->data(), (*memory_)->size(), [](Napi::Env, void*, Mapping* owner) { delete owner; }, held);
    buffer_ = Napi::Persistent(view);
    return view;
  }

  void close(const Napi::CallbackInfo&) {
    if (!buffer_.IsEmpty()) {
      buffer_.Value().Detach();
      buffer_.Reset();
    }
    if (memory_) memory_->reset();
    memory_.reset();
  }

  // Shared with the ArrayBuffer's finalizer, which the collector runs late: close() empties it, so that the memory goes at once.
  using Mapping = std::shared_ptr<std::unique_ptr<SharedMemory>>;
  Mapping memory_;
  Napi::Reference<Napi::ArrayBuffer> buffer_;
};

}  // namespace

void export_shared_memory(Napi::Env env, Napi::Object exports) { exports.Set("SharedMemory", SharedMemoryObject::define(env)); }

}  // namespace tpla::addon
