#include "addon/announcement.h"
#include "addon/arguments.h"
#include "addon/kv_object.h"
#include "addon/promise.h"
#include "addon/start_checksum.h"
#include "addon/transfer_arguments.h"
#include "addon/write_gate.h"
#include "core/kv_memory.h"
#include "transfer/kv_put.h"
#include "transfer/row_kernels.h"
#include "transfer/task_queue.h"
#include "transfer/timeline.h"

#ifdef TPLA_WITH_CUDA
#include "cuda/device_kv.h"
#endif

namespace tpla::addon {

namespace {

using PutDone = std::function<void(KvPutResult result, std::unique_ptr<Error> error)>;

template <class Done, class Result>
void finish_with(const Done& done, const std::function<Result()>& compute) {
  Result result;
  std::unique_ptr<Error> error;
  try {
    result = compute();
  } catch (const Error& thrown) {
    error = std::make_unique<Error>(thrown);
  } catch (const std::exception& thrown) {
    error = std::make_unique<Error>("INTERNAL", thrown.what());
  }
  done(std::move(result), std::move(error));
}

// Each put fills the machine. Those of hand-offs, which requests wait for, do not wait for what goes to the pool.
TaskQueue& puts(bool is_announced) {
  static auto* announced = new TaskQueue("tpla-puts");
  static auto* others = new TaskQueue("tpla-copies");
  return is_announced ? *announced : *others;
}

// On the CPU, or on the GPU that either side names.
void start_put(const std::shared_ptr<const KvRegion>& src, const std::shared_ptr<const KvRegion>& dst, const std::shared_ptr<const WriteGate>& gate, KvPut work,
               bool is_announced, PutDone done) {
#ifdef TPLA_WITH_CUDA
  if (src->device >= 0 || dst->device >= 0) return cuda::device_put(src, dst, work, gate, std::move(done));
#endif
  puts(is_announced).post([src, dst, gate, work = std::move(work), done = std::move(done)] { finish_with<PutDone, KvPutResult>(done, [&] { return kv_put(work); }); });
}

// What a put reads, writes and passes: kept while it is under way.
struct PutEnds {
  std::shared_ptr<const KvRegion> src;
  std::shared_ptr<const KvRegion> dst;
  std::shared_ptr<const WriteGate> gate;  // null where nothing is shut out
};

// The same for puts that may follow. A peer's memory is unmapped when its region is closed, not when the garbage collector finds the function that
// could have put into it.
class ExpectedPutEnds {
 public:
  explicit ExpectedPutEnds(const PutEnds& ends) : src_(ends.src), dst_(ends.dst), gate_(ends.gate), is_gated_(ends.gate != nullptr) {}

  // Throws REQUEST_INVALID where one of them is closed.
  PutEnds open() const {
    PutEnds ends{src_.lock(), dst_.lock(), gate_.lock()};
    if (!ends.src || !ends.dst || (is_gated_ && !ends.gate)) throw Error("REQUEST_INVALID", "the KV arena, region or gate is closed");
    return ends;
  }

 private:
  std::weak_ptr<const KvRegion> src_;
  std::weak_ptr<const KvRegion> dst_;
  std::weak_ptr<const WriteGate> gate_;
  bool is_gated_;
};

PutEnds parse_put_ends(const Napi::Object& options) {
  PutEnds ends{kv_region_of(options.Get("src")), kv_region_of(options.Get("dst")), nullptr};
  if (options.Get("pass").IsObject()) ends.gate = write_gate_of(options.Get("pass").As<Napi::Object>().Get("gate"));
  return ends;
}

// What else the puts of one hand-off have in common, and one of them.
struct PutOptions {
  int src_rank = 0;
  PageTables dst_pages;
  WritePass pass;  // of the ends' gate
  std::shared_ptr<const Announcement> announcement;
};

PutOptions parse_put_options(const Napi::Object& options, const PutEnds& ends) {
  PutOptions put;
  put.src_rank = parse_rank(options.Get("srcRank"));
  put.dst_pages = parse_tables(options.Get("dstPages"), options.Get("dstRank"), "dstPages");
  if (ends.gate) {
    const Napi::Object pass = options.Get("pass").As<Napi::Object>();
    put.pass = {ends.gate.get(), int(to_integer(pass.Get("slot"), "slot", 0, ends.gate->slots() - 1)), uint32_t(to_integer(pass.Get("epoch"), "epoch", 0, UINT32_MAX))};
  }
  put.announcement = parse_announcement(options.Get("announce"), ends.src->device < 0 && ends.dst->device < 0);
  return put;
}

Napi::Value run_put(Napi::Env env, const PutEnds& ends, const PutOptions& options, std::vector<std::vector<int32_t>> src_tables, Range layers, Range tokens) {
  KvPut work{ends.src.get(), ends.dst.get(), layers, tokens, {std::move(src_tables), options.src_rank}, options.dst_pages, options.pass};
  const auto promise = ThreadPromise::create(env);
  const Napi::Value settled = promise->promise();
  start_put(ends.src, ends.dst, ends.gate, std::move(work), options.announcement != nullptr, settle_put(promise, options.announcement, layers, tokens));
  mark_step("put under way");
  return settled;
}

Napi::Value put(const Napi::CallbackInfo& info) {
  return guarded(info.Env(), [&]() -> Napi::Value {
    mark_step("put asked for");
    const Napi::Object options = to_object(info[0], "put");
    const PutEnds ends = parse_put_ends(options);
    return run_put(info.Env(), ends, parse_put_options(options, ends), parse_tables(options.Get("srcPages"), info.Env().Undefined(), "srcPages").tables,
                   parse_range(options.Get("layers"), "layers"), parse_range(options.Get("tokens"), "tokens"));
  });
}

void expect_puts(const Napi::CallbackInfo& info) {
  guarded(info.Env(), [&] {
    const auto src = kv_region_of(info[0]);
    const auto dst = kv_region_of(info[1]);
#ifdef TPLA_WITH_CUDA
    if (src->device >= 0 && dst->device >= 0) cuda::prepare_device_puts(src, dst);
#endif
  });
}

// prepareKvPut(options) → put(srcPages, firstLayer, endLayer, firstToken, endToken)
Napi::Value prepare_put(const Napi::CallbackInfo& info) {
  return guarded(info.Env(), [&]() -> Napi::Value {
    const Napi::Object common = to_object(info[0], "put");
    const PutEnds ends = parse_put_ends(common);
    const auto options = std::make_shared<const PutOptions>(parse_put_options(common, ends));
    return Napi::Function::New(info.Env(), [expected = ExpectedPutEnds(ends), options](const Napi::CallbackInfo& call) {
      return guarded(call.Env(), [&]() -> Napi::Value {
        mark_step("put asked for");
        const auto number = [&call](size_t at, const char* field) { return int(to_integer(call[at], field, 0)); };
        return run_put(call.Env(), expected.open(), *options, {to_int32s(call[0], "srcPages")}, {number(1, "layers"), number(2, "layers")}, {number(3, "tokens"), number(4, "tokens")});
      });
    }, "put");
  });
}

Napi::Value checksum(const Napi::CallbackInfo& info) {
  const Napi::Env env = info.Env();
  return guarded(env, [&]() -> Napi::Value {
    const auto region = kv_region_of(info[0]);
    const Range layers = parse_range(info[1], "layers");
    const Range tokens = parse_range(info[2], "tokens");
    PageTables pages = parse_tables(info[3], info[4], "pages");
    const auto promise = ThreadPromise::create(env);
    const Napi::Value settled = promise->promise();
    static auto* queue = new TaskQueue("tpla-reads");
    start_checksum(*queue, region, std::move(pages), layers, tokens, [promise](std::vector<uint64_t> words, std::unique_ptr<Error> error) {
      promise->settle([words = std::move(words), error = std::shared_ptr<Error>(std::move(error))](Napi::Env at) -> Napi::Value {
        if (error) throw *error;
        return words_to_js(at, words);
      });
    });
    return settled;
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

// keepTimeline(keep), takeTimeline() → { step, at }[], at in microseconds of the host's monotonic clock
void keep(const Napi::CallbackInfo& info) {
  guarded(info.Env(), [&] { keep_timeline(to_bool(info[0], "keep")); });
}

Napi::Value timeline(const Napi::CallbackInfo& info) {
  Napi::Array result = Napi::Array::New(info.Env());
  for (const TimelineMark& at : take_timeline()) {
    Napi::Object entry = Napi::Object::New(info.Env());
    entry.Set("step", at.step);
    entry.Set("at", static_cast<double>(at.at_ns) / 1e3);
    result.Set(result.Length(), entry);
  }
  return result;
}

}  // namespace

void start_checksum(TaskQueue& queue, std::shared_ptr<const KvRegion> region, PageTables pages, Range layers, Range tokens, ChecksumDone done) {
#ifdef TPLA_WITH_CUDA
  if (region->device >= 0) {
    try {
      cuda::device_checksum(region, pages, layers, tokens, done);
    } catch (const Error& error) {
      done({}, std::make_unique<Error>(error));
    }
    return;
  }
#endif
  queue.post([region = std::move(region), pages = std::move(pages), layers, tokens, done = std::move(done)] {
    finish_with<ChecksumDone, std::vector<uint64_t>>(done, [&] { return kv_checksum(*region, pages, layers, tokens); });
  });
}

void export_transfer(Napi::Env env, Napi::Object exports) {
  exports.Set("mapKvRegion", Napi::Function::New(env, map_region, "mapKvRegion"));
  exports.Set("kvPut", Napi::Function::New(env, put, "kvPut"));
  exports.Set("expectKvPuts", Napi::Function::New(env, expect_puts, "expectKvPuts"));
  exports.Set("prepareKvPut", Napi::Function::New(env, prepare_put, "prepareKvPut"));
  exports.Set("kvChecksum", Napi::Function::New(env, checksum, "kvChecksum"));
  exports.Set("kvCopyPage", Napi::Function::New(env, copy_page, "kvCopyPage"));
  exports.Set("keepTimeline", Napi::Function::New(env, keep, "keepTimeline"));
  exports.Set("takeTimeline", Napi::Function::New(env, timeline, "takeTimeline"));
  exports.Set("kvKernels", Napi::Function::New(env, kernels, "kvKernels"));
}

}  // namespace tpla::addon
