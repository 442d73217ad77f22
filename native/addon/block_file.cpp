#include "storage/block_file.h"

#include "addon/arguments.h"
#include "addon/kv_object.h"
#include "addon/promise.h"
#include "storage/plain_file.h"

#ifdef TPLA_WITH_CUDA
#include "cuda/device_block_mover.h"
#endif

namespace tpla::addon {

namespace {

BlockFile::Engine parse_engine(const Napi::Value& value) {
  if (value.IsUndefined()) return BlockFile::Engine::automatic;
  const std::string text = to_text(value, "engine");
  if (text == "auto") return BlockFile::Engine::automatic;
  if (text == "cufile") return BlockFile::Engine::cufile;
  if (text == "io_uring") return BlockFile::Engine::uring;
  if (text == "threads") return BlockFile::Engine::threads;
  refuse("engine", "auto, cufile, io_uring or threads");
}

const char* mechanism_name(BlockFile::Mechanism mechanism) {
  switch (mechanism) {
    case BlockFile::Mechanism::cufile_gds: return "cufile-gds";
    case BlockFile::Mechanism::cufile_compat: return "cufile-compat";
    case BlockFile::Mechanism::uring: return "io_uring";
    case BlockFile::Mechanism::threads: return "threads";
  }
  return "";
}

const DeviceMovers* device_movers() {
#ifdef TPLA_WITH_CUDA
  static const DeviceMovers movers{cuda::make_staged_mover, cuda::make_cufile_mover};
  return &movers;
#else
  return nullptr;
#endif
}

BlockRecord parse_record(const Napi::Value& value) {
  const Napi::Object object = to_object(value, "record");
  BlockRecord record;
  record.id = to_text(object.Get("id"), "id");
  record.index = uint64_t(to_integer(object.Get("index"), "index", 0, 1 << 24));
  record.tokens = uint32_t(to_integer(object.Get("tokens"), "tokens", 1));
  record.checksum = std::stoull(to_text(object.Get("checksum"), "checksum"));
  return record;
}

Napi::Object record_to_js(Napi::Env env, int slot, const BlockRecord& record) {
  Napi::Object object = Napi::Object::New(env);
  object.Set("slot", slot);
  object.Set("id", record.id);
  object.Set("index", static_cast<double>(record.index));
  object.Set("tokens", record.tokens);
  object.Set("checksum", std::to_string(record.checksum));
  return object;
}

using Outcome = std::function<Napi::Value(Napi::Env)>;

// Runs on a thread of the file; what it returns, or throws, settles the promise.
Napi::Value start(Napi::Env env, const std::shared_ptr<BlockFile>& file, std::function<Outcome(BlockFile&)> task) {
  const auto promise = ThreadPromise::create(env);
  const Napi::Value result = promise->promise();
  file->post([promise, task = std::move(task)](BlockFile& at) {
    try {
      promise->settle(task(at));
    } catch (const Error& error) {
      promise->settle([error](Napi::Env) -> Napi::Value { throw error; });
    } catch (const std::exception& error) {
      promise->settle([text = std::string(error.what())](Napi::Env) -> Napi::Value { throw Error("INTERNAL", text); });
    }
  });
  return result;
}

Outcome nothing() {
  return [](Napi::Env env) { return env.Undefined(); };
}

int parse_slot(const Napi::Value& value, const BlockFile& file) { return int(to_integer(value, "slot", 0, file.slots() - 1)); }

// The file behind an object, until close().
using Holder = std::shared_ptr<std::shared_ptr<BlockFile>>;

std::shared_ptr<BlockFile> opened(const Holder& holder) {
  if (!*holder) throw Error("IO_FAILED", "the block file is closed");
  return *holder;
}

// Without the file, which a task of its own must not be the last to hold.
struct Transfer {
  int slot;
  BlockPages pages;
  BlockRecord record;
};

// A page, or an Int32Array of pages that follow one another in their sequence.
std::vector<int32_t> parse_pages(const Napi::Value& value, const KvRegion& region) {
  if (value.IsNumber()) return {int32_t(to_integer(value, "page", 0, region.pages - 1))};
  std::vector<int32_t> pages = to_int32s(value, "pages");
  for (const int32_t page : pages) {
    if (page < 0 || page >= region.pages) refuse("pages", "integers from 0 to " + std::to_string(region.pages - 1) + ", got " + std::to_string(page));
  }
  return pages;
}

Transfer parse_transfer(const Napi::CallbackInfo& call, const Holder& holder) {
  const std::shared_ptr<const KvRegion> region = kv_region_of(call[1]);
  return {parse_slot(call[0], *opened(holder)), {region, parse_pages(call[2], *region)}, parse_record(call[3])};
}

Napi::Object file_to_js(Napi::Env env, const std::shared_ptr<BlockFile>& file) {
  const auto holder = std::make_shared<std::shared_ptr<BlockFile>>(file);
  Napi::Object object = Napi::Object::New(env);
  object.Set("engine", file->uses_uring() ? "io_uring" : "threads");
  object.Set("direct", file->is_direct());
  object.Set("fresh", file->is_fresh());
  object.Set("slots", file->slots());
  const auto method = [&](const char* name, auto call) { object.Set(name, Napi::Function::New(env, call, name)); };
  method("scan", [holder](const Napi::CallbackInfo& call) -> Napi::Value {
    return guarded(call.Env(), [&] {
      return start(call.Env(), opened(holder), [](BlockFile& at) -> Outcome {
        return [records = at.scan()](Napi::Env to) -> Napi::Value {
          Napi::Array array = Napi::Array::New(to, records.size());
          for (size_t i = 0; i < records.size(); i++) array.Set(static_cast<uint32_t>(i), record_to_js(to, records[i].first, records[i].second));
          return array;
        };
      });
    });
  });
  method("write", [holder](const Napi::CallbackInfo& call) -> Napi::Value {
    return guarded(call.Env(), [&] {
      return start(call.Env(), opened(holder), [work = parse_transfer(call, holder)](BlockFile& at) {
        at.write(work.slot, work.pages, work.record);
        return nothing();
      });
    });
  });
  method("read", [holder](const Napi::CallbackInfo& call) -> Napi::Value {
    return guarded(call.Env(), [&] {
      return start(call.Env(), opened(holder), [work = parse_transfer(call, holder)](BlockFile& at) -> Outcome {
        const bool whole = at.read(work.slot, work.pages, work.record);
        return [whole](Napi::Env to) -> Napi::Value { return Napi::Boolean::New(to, whole); };
      });
    });
  });
  method("mechanism", [holder](const Napi::CallbackInfo& call) -> Napi::Value {
    return guarded(call.Env(), [&] {
      return start(call.Env(), opened(holder), [region = kv_region_of(call[0])](BlockFile& at) -> Outcome {
        return [name = mechanism_name(at.mechanism(*region)), reason = at.passed_over()](Napi::Env to) -> Napi::Value {
          Napi::Object object = Napi::Object::New(to);
          object.Set("mechanism", name);
          object.Set("passedOver", reason.empty() ? to.Null() : Napi::String::New(to, reason).As<Napi::Value>());
          return object;
        };
      });
    });
  });
  method("erase", [holder](const Napi::CallbackInfo& call) -> Napi::Value {
    return guarded(call.Env(), [&] {
      return start(call.Env(), opened(holder), [slot = parse_slot(call[0], *opened(holder))](BlockFile& at) {
        at.erase(slot);
        return nothing();
      });
    });
  });
  method("close", [holder](const Napi::CallbackInfo&) { holder->reset(); });
  return object;
}

// openPlainFile(path, engine, depth) → { direct, write(bytes), read(bytes), close() }; for benchmarks.
Napi::Value open_plain_file(const Napi::CallbackInfo& info) {
  const Napi::Env env = info.Env();
  return guarded(env, [&]() -> Napi::Value {
    const bool use_uring = parse_engine(info[1]) != BlockFile::Engine::threads;
    const auto file = std::make_shared<PlainFile>(to_text(info[0], "path"), use_uring, int(to_integer(info[2], "depth", 1, 1024)));
    const auto holder = std::make_shared<std::shared_ptr<PlainFile>>(file);
    Napi::Object object = Napi::Object::New(env);
    object.Set("direct", file->is_direct());
    const auto timed = [&](const char* name, double (PlainFile::*move)(uint64_t)) {
      const auto call = [holder, move](const Napi::CallbackInfo& call) -> Napi::Value {
        return guarded(call.Env(), [&] {
          if (!*holder) throw Error("IO_FAILED", "the file is closed");
          return on_thread(call.Env(), [file = *holder, move, bytes = uint64_t(to_integer(call[0], "bytes", 1, int64_t(1) << 53))]() -> ThreadPromise::Convert {
            return [seconds = (file.get()->*move)(bytes)](Napi::Env to) -> Napi::Value { return Napi::Number::New(to, seconds); };
          });
        });
      };
      object.Set(name, Napi::Function::New(env, call, name));
    };
    timed("write", &PlainFile::write);
    timed("read", &PlainFile::read);
    object.Set("close", Napi::Function::New(env, [holder](const Napi::CallbackInfo&) { holder->reset(); }, "close"));
    return object;
  });
}

// describeCuFile() → { path, version, gds, detail }
Napi::Value describe_cufile(const Napi::CallbackInfo& info) {
  const Napi::Env env = info.Env();
  return guarded(env, [&]() -> Napi::Value {
    const CuFile& library = CuFile::shared();
    Napi::Object object = Napi::Object::New(env);
    object.Set("path", library.path());
    object.Set("version", library.version());
    object.Set("gds", library.has_gds());
    object.Set("detail", library.describe());
    return object;
  });
}

Napi::Value open_block_file(const Napi::CallbackInfo& info) {
  const Napi::Env env = info.Env();
  return guarded(env, [&]() -> Napi::Value {
    const Napi::Object given = to_object(info[0], "block file");
    BlockFileOptions options;
    options.path = to_text(given.Get("path"), "path");
    options.layout = parse_kv_layout(given.Get("layout"));
    options.bytes = static_cast<uint64_t>(to_number(given.Get("bytes"), "bytes"));
    if (!given.Get("pagesPerBlock").IsUndefined()) options.pages_per_block = int(to_integer(given.Get("pagesPerBlock"), "pagesPerBlock", 1, 1 << 16));
    options.device_movers = device_movers();
    options.threads = int(to_integer(given.Get("threads"), "threads", 1, 64));
    options.depth = int(to_integer(given.Get("depth"), "depth", 1, 1024));
    return file_to_js(env, std::make_shared<BlockFile>(options, parse_engine(given.Get("engine"))));
  });
}

}  // namespace

void export_block_file(Napi::Env env, Napi::Object exports) {
  exports.Set("openBlockFile", Napi::Function::New(env, open_block_file, "openBlockFile"));
  exports.Set("openPlainFile", Napi::Function::New(env, open_plain_file, "openPlainFile"));
  exports.Set("describeCuFile", Napi::Function::New(env, describe_cufile, "describeCuFile"));
}

}  // namespace tpla::addon
