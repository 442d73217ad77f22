#pragma once
#include <napi.h>

#include "core/error.h"

namespace tpla::addon {

// Each file of this folder exports one object or family of functions.
void export_probe(Napi::Env env, Napi::Object exports);
void export_shared_memory(Napi::Env env, Napi::Object exports);
void export_channel(Napi::Env env, Napi::Object exports);
void export_transfer(Napi::Env env, Napi::Object exports);
void export_write_gate(Napi::Env env, Napi::Object exports);
void export_stream(Napi::Env env, Napi::Object exports);
void export_nixl(Napi::Env env, Napi::Object exports);
void export_ucx(Napi::Env env, Napi::Object exports);
void export_block_file(Napi::Env env, Napi::Object exports);
void export_cuda_kv(Napi::Env env, Napi::Object exports);
void export_baseline(Napi::Env env, Napi::Object exports);
void export_weights(Napi::Env env, Napi::Object exports);
void export_kv_arena(Napi::Env env, Napi::Object exports);
void export_notify(Napi::Env env, Napi::Object exports);
void export_engine(Napi::Env env, Napi::Object exports);
void export_sampler(Napi::Env env, Napi::Object exports);
void export_reparam(Napi::Env env, Napi::Object exports);
void export_attention(Napi::Env env, Napi::Object exports);
void export_machine(Napi::Env env, Napi::Object exports);

// Turns a tpla::Error (or any exception) into a JavaScript Error whose `code` is of src/errors.ts.
Napi::Error to_js_error(Napi::Env env, const std::exception& error);

}  // namespace tpla::addon
