#include "storage/block_file.h"

#include "addon/arguments.h"
#include "addon/kv_object.h"
#include "addon/promise.h"

namespace tpla::addon {

namespace {

BlockFile::Engine parse_engine(const Napi::Value& value) {
  if (value.IsUndefined()) return BlockFile::Engine::automatic;
  const std::string text = to_text(value, "engine");
  if (text == "auto") return BlockFile::Engine::automatic;
  if (text == "io_uring") return BlockFile::Engine::uring;
  if (text == "threads") return BlockFile::Engine::threads;
  refuse("engine", "auto, io_uring or threads");
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
  std::shared_ptr<const KvRegion> region;
  int page;
  BlockRecord record;
};

Transfer parse_transfer(const Napi::CallbackInfo& call, const Holder& holder) {
  Transfer transfer{parse_slot(call[0], *opened(holder)), kv_region_of(call[1]), 0, parse_record(call[3])};
  transfer.page = int(to_integer(call[2], "page", 0, transfer.region->pages - 1));
  if (transfer.region->device >= 0) refuse("region", "host memory");
  return transfer;
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
        at.write(work.slot, *work.region, work.page, work.record);
        return nothing();
      });
    });
  });
  method("read", [holder](const Napi::CallbackInfo& call) -> Napi::Value {
    return guarded(call.Env(), [&] {
      return start(call.Env(), opened(holder), [work = parse_transfer(call, holder)](BlockFile& at) -> Outcome {
        const bool whole = at.read(work.slot, *work.region, work.page, work.record);
        return [whole](Napi::Env to) -> Napi::Value { return Napi::Boolean::New(to, whole); };
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

Napi::Value open_block_file(const Napi::CallbackInfo& info) {
  const Napi::Env env = info.Env();
  return guarded(env, [&]() -> Napi::Value {
    const Napi::Object given = to_object(info[0], "block file");
    BlockFileOptions options;
    options.path = to_text(given.Get("path"), "path");
    options.layout = parse_kv_layout(given.Get("layout"));
    options.bytes = static_cast<uint64_t>(to_number(given.Get("bytes"), "bytes"));
    options.threads = int(to_integer(given.Get("threads"), "threads", 1, 64));
    options.depth = int(to_integer(given.Get("depth"), "depth", 1, 1024));
    return file_to_js(env, std::make_shared<BlockFile>(options, parse_engine(given.Get("engine"))));
  });
}

}  // namespace

void export_block_file(Napi::Env env, Napi::Object exports) {
  exports.Set("openBlockFile", Napi::Function::New(env, open_block_file, "openBlockFile"));
}

}  // namespace tpla::addon
