#include "addon/addon.h"
#include "addon/arguments.h"
#include "cpu/machine_rates.h"

namespace tpla::addon {

static Napi::Value measure_cpu(const Napi::CallbackInfo& info) {
  const Napi::Env env = info.Env();
  return guarded(env, [&] {
    const int threads = int(to_integer(info[0], "threads", 0, 4096));
    const std::string isa = info[1].IsUndefined() ? "" : to_text(info[1], "isa");
    const cpu::MachineRates rates = cpu::measure_machine(threads, isa);
    Napi::Object result = Napi::Object::New(env);
    result.Set("isa", rates.isa);
    result.Set("threads", rates.threads);
    result.Set("fp32FlopsPerSecond", rates.fp32_flops);
    result.Set("bf16FlopsPerSecond", rates.bf16_flops);
    result.Set("readBytesPerSecond", rates.read_bytes);
    result.Set("copyBytesPerSecond", rates.copy_bytes);
    return result;
  });
}

void export_machine(Napi::Env env, Napi::Object exports) { exports.Set("measureCpu", Napi::Function::New(env, measure_cpu)); }

}  // namespace tpla::addon
