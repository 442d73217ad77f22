#include "addon/arguments.h"
#include "addon/async_work.h"
#include "addon/kv_object.h"
#include "addon/transfer_arguments.h"
#include "addon/write_gate.h"
#include "core/kv_memory.h"
#include "transfer/kv_put.h"
#include "transfer/row_kernels.h"

#ifdef TPLA_WITH_CUDA
#include "cuda/device_kv.h"
#endif

namespace tpla::addon {

namespace {

// On the CPU, or on the GPU that either side names.
KvPutResult put_anywhere(const std::shared_ptr<const KvRegion>& src, const std::shared_ptr<const KvRegion>& dst, const KvPut& work) {
#ifdef TPLA_WITH_CUDA
  if (src->device >= 0 || dst->device >= 0) return cuda::device_put(src, dst, work);
#else
  static_cast<void>(src);
  static_cast<void>(dst);
#endif
  return kv_put(work);
}

std::vector<uint64_t> checksum_anywhere(const std::shared_ptr<const KvRegion>& region, const PageTables& pages, Range layers, Range tokens) {
#ifdef TPLA_WITH_CUDA
  if (region->device >= 0) return cuda::device_checksum(region, pages, layers, tokens);
#endif
  return kv_checksum(*region, pages, layers, tokens);
}

Napi::Value put(const Napi::CallbackInfo& info) {
  const Napi::Env env = info.Env();
  return guarded(env, [&] {
    const Napi::Object options = to_object(info[0], "put");
    const auto src = kv_region_of(options.Get("src"));
    const auto dst = kv_region_of(options.Get("dst"));
    KvPut work{src.get(), dst.get(), parse_range(options.Get("layers"), "layers"), parse_range(options.Get("tokens"), "tokens"),
               parse_tables(options.Get("srcPages"), options.Get("srcRank"), "srcPages"),
               parse_tables(options.Get("dstPages"), options.Get("dstRank"), "dstPages"),
               {}};
    std::shared_ptr<const WriteGate> gate;
    if (options.Get("pass").IsObject()) {
      const Napi::Object pass = options.Get("pass").As<Napi::Object>();
      gate = write_gate_of(pass.Get("gate"));
      work.pass = {gate.get(), int(to_integer(pass.Get("slot"), "slot", 0, gate->slots() - 1)), uint32_t(to_integer(pass.Get("epoch"), "epoch", 0, UINT32_MAX))};
    }
    return AsyncWork<KvPutResult>::start(
        env, "tpla transfer", [src, dst, gate, work = std::move(work)] { return put_anywhere(src, dst, work); },
        put_result_to_js);
  });
}

Napi::Value checksum(const Napi::CallbackInfo& info) {
  const Napi::Env env = info.Env();
  return guarded(env, [&] {
    const auto region = kv_region_of(info[0]);
    const Range layers = parse_range(info[1], "layers");
    const Range tokens = parse_range(info[2], "tokens");
    PageTables pages = parse_tables(info[3], info[4], "pages");
    return AsyncWork<std::vector<uint64_t>>::start(
        env, "tpla transfer", [region, layers, tokens, pages = std::move(pages)] { return checksum_anywhere(region, pages, layers, tokens); }, words_to_js);
  });
}

void copy_page(const Napi::CallbackInfo& info) {
  guarded(info.Env(), [&] {
    const bool has_rank = info.Length() > 3 && !info[3].IsUndefined();
    const auto region = kv_region_of(info[0]);
    if (region->device >= 0) refuse("arena", "host memory: pages of a GPU arena are copied by its engine");
    kv_copy_page(*region, int(to_integer(info[1], "from")), int(to_integer(info[2], "to")), has_rank ? int(to_integer(info[3], "rank")) : -1);
  });
}

Napi::Value map_region(const Napi::CallbackInfo& info) {
  const Napi::Env env = info.Env();
  return guarded(env, [&]() -> Napi::Value {
    const int pages = int(to_integer(info[1], "pages"));
    std::vector<int> fds;
    const Napi::Array array = to_array(info[2], "fds");
    for (uint32_t i = 0; i < array.Length(); i++) fds.push_back(int(to_integer(array.Get(i), "fds")));
    const auto memory = KvMemory::map(parse_kv_layout(info[0]), pages, fds);
    Napi::Object object = Napi::Object::New(env);
    object.Set("layout", kv_layout_to_js(env, memory->region().layout));
    object.Set("pages", pages);
    object.Set("close", Napi::Function::New(env, [](const Napi::CallbackInfo& call) { detach_kv_region(call.This().As<Napi::Object>()); }, "close"));
    attach_kv_region(object, std::shared_ptr<const KvRegion>(memory, &memory->region()));
    return object;
  });
}

Napi::Value kernels(const Napi::CallbackInfo& info) {
  return guarded(info.Env(), [&]() -> Napi::Value {
    if (info.Length() > 0 && !info[0].IsUndefined()) use_row_kernels(to_text(info[0], "kernels").c_str());
    return Napi::String::New(info.Env(), row_kernels().name);
  });
}

}  // namespace

void export_transfer(Napi::Env env, Napi::Object exports) {
  exports.Set("mapKvRegion", Napi::Function::New(env, map_region, "mapKvRegion"));
  exports.Set("kvPut", Napi::Function::New(env, put, "kvPut"));
  exports.Set("kvChecksum", Napi::Function::New(env, checksum, "kvChecksum"));
  exports.Set("kvCopyPage", Napi::Function::New(env, copy_page, "kvCopyPage"));
  exports.Set("kvKernels", Napi::Function::New(env, kernels, "kvKernels"));
}

}  // namespace tpla::addon
