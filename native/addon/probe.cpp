#include "addon/addon.h"
#include "core/cuda_driver.h"
#include "core/probe_cpu.h"
#include "core/probe_libraries.h"
#include "cpu/blas.h"

namespace tpla::addon {

namespace {

Napi::Value text_or_null(Napi::Env env, const std::string& text) {
  return text.empty() ? env.Null() : Napi::String::New(env, text).As<Napi::Value>();
}

template <typename Items, typename Convert>
Napi::Array array_of(Napi::Env env, const Items& items, Convert convert) {
  Napi::Array array = Napi::Array::New(env, items.size());
  for (size_t i = 0; i < items.size(); ++i) array.Set(static_cast<uint32_t>(i), convert(items[i]));
  return array;
}

Napi::Object cpu_object(Napi::Env env) {
  const CpuProbe probe = probe_cpu();
  Napi::Object cpu = Napi::Object::New(env);
  cpu.Set("model", probe.model);
  cpu.Set("cores", probe.cores);
  cpu.Set("features", array_of(env, probe.features, [&](const std::string& name) { return Napi::String::New(env, name); }));
  cpu.Set("kernel", probe.kernels);
  cpu.Set("blas", text_or_null(env, cpu::blas_name() ? cpu::blas_name() : ""));
  return cpu;
}

Napi::Object device_object(Napi::Env env, const CudaDevice& device) {
  Napi::Object object = Napi::Object::New(env);
  object.Set("index", device.index);
  object.Set("name", device.name);
  object.Set("capability", device.capability);
  object.Set("memoryBytes", static_cast<double>(device.memory_bytes));
  object.Set("multiprocessors", device.multiprocessors);
  object.Set("peers", array_of(env, device.peers, [&](int peer) { return Napi::Number::New(env, peer); }));
  return object;
}

Napi::Object cuda_object(Napi::Env env) {
  const CudaProbe probe = probe_cuda();
  Napi::Object cuda = Napi::Object::New(env);
#ifdef TPLA_WITH_CUDA
  cuda.Set("compiled", true);
#else
  cuda.Set("compiled", false);
#endif
  cuda.Set("driver", text_or_null(env, probe.driver));
  cuda.Set("reason", text_or_null(env, probe.reason));
  cuda.Set("devices", array_of(env, probe.devices, [&](const CudaDevice& device) { return device_object(env, device); }));
  return cuda;
}

Napi::Object library_object(Napi::Env env, const LibraryProbe& library) {
  Napi::Object object = Napi::Object::New(env);
  object.Set("name", library.name);
  object.Set("path", text_or_null(env, library.path));
  object.Set("detail", library.detail);
  return object;
}

// probe(): ProbeResult. Starts the CUDA driver, which may take a second; the loader asks `version` alone.
Napi::Value probe(const Napi::CallbackInfo& info) {
  Napi::Env env = info.Env();
  Napi::Object result = Napi::Object::New(env);
  result.Set("version", TPLA_VERSION);
  result.Set("cpu", cpu_object(env));
  result.Set("cuda", cuda_object(env));
  result.Set("libraries", array_of(env, probe_libraries(), [&](const LibraryProbe& library) { return library_object(env, library); }));
  return result;
}

}  // namespace

void export_probe(Napi::Env env, Napi::Object exports) {
  exports.Set("version", TPLA_VERSION);
  exports.Set("probe", Napi::Function::New(env, probe));
}

}  // namespace tpla::addon
