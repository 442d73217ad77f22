#include "addon/write_gate.h"

#include "addon/arguments.h"

namespace tpla::addon {

namespace {

constexpr napi_type_tag kGateTag = {0x74706c6177726974ULL, 0x6567617465000001ULL};

class GateObject : public Napi::ObjectWrap<GateObject> {
 public:
  static Napi::Function define(Napi::Env env) {
    return DefineClass(env, "WriteGate",
                       {StaticMethod<&GateObject::create>("create"), StaticMethod<&GateObject::map>("map"), InstanceAccessor<&GateObject::fd>("fd"),
                        InstanceMethod<&GateObject::open>("open"), InstanceMethod<&GateObject::revoke>("revoke"),
                        InstanceMethod<&GateObject::writers>("writers"), InstanceMethod<&GateObject::close>("close")});
  }

  // Made by create() and map() alone.
  explicit GateObject(const Napi::CallbackInfo& info) : Napi::ObjectWrap<GateObject>(info) {
    if (info.Length() != 1 || !info[0].IsExternal()) throw Napi::TypeError::New(info.Env(), "use WriteGate.create or WriteGate.map");
    gate_ = std::make_shared<WriteGate>(std::move(*info[0].As<Napi::External<WriteGate>>().Data()));
    info.This().As<Napi::Object>().TypeTag(&kGateTag);
  }

  const std::shared_ptr<WriteGate>& gate() const {
    if (!gate_) throw Error("REQUEST_INVALID", "this write gate is closed");
    return gate_;
  }

 private:
  static Napi::Value wrap(const Napi::CallbackInfo& info, WriteGate gate) {
    return info.This().As<Napi::Function>().New({Napi::External<WriteGate>::New(info.Env(), &gate)});
  }
  static Napi::Value create(const Napi::CallbackInfo& info) {
    return guarded(info.Env(), [&] { return wrap(info, WriteGate::create(int(to_integer(info[0], "slots")))); });
  }
  static Napi::Value map(const Napi::CallbackInfo& info) {
    return guarded(info.Env(), [&] { return wrap(info, WriteGate::map(int(to_integer(info[0], "fd")), int(to_integer(info[1], "slots")))); });
  }

  Napi::Value fd(const Napi::CallbackInfo& info) {
    return guarded(info.Env(), [&] { return Napi::Number::New(info.Env(), gate()->fd()); });
  }
  Napi::Value open(const Napi::CallbackInfo& info) {
    return guarded(info.Env(), [&] { return Napi::Number::New(info.Env(), gate()->open(int(to_integer(info[0], "slot")))); });
  }
  Napi::Value revoke(const Napi::CallbackInfo& info) {
    return guarded(info.Env(), [&] { return Napi::Number::New(info.Env(), gate()->revoke(int(to_integer(info[0], "slot")))); });
  }
  Napi::Value writers(const Napi::CallbackInfo& info) {
    return guarded(info.Env(), [&] { return Napi::Number::New(info.Env(), gate()->writers(int(to_integer(info[0], "slot")))); });
  }
  void close(const Napi::CallbackInfo&) { gate_.reset(); }

  std::shared_ptr<WriteGate> gate_;
};

}  // namespace

std::shared_ptr<const WriteGate> write_gate_of(const Napi::Value& value) {
  if (!value.IsObject() || !value.As<Napi::Object>().CheckTypeTag(&kGateTag)) refuse("gate", "a WriteGate");
  return GateObject::Unwrap(value.As<Napi::Object>())->gate();
}

void export_write_gate(Napi::Env env, Napi::Object exports) { exports.Set("WriteGate", GateObject::define(env)); }

}  // namespace tpla::addon
