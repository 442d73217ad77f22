#include "addon/kv_arena.h"

#include "addon/arguments.h"
#include "addon/kv_object.h"

namespace tpla::addon {

namespace {

constexpr napi_type_tag kArenaTag = {0x7470'6c61'6b76'6172ULL, 0x656e'6100'0000'0001ULL};

std::byte* page_address(const KvRegion& region, int64_t rank, int64_t layer, int64_t page) {
  const KvLayout& layout = region.layout;
  if (rank < 0 || rank >= layout.ranks || layer < 0 || layer >= layout.layers || page < 0 || page >= region.pages) {
    throw Error("REQUEST_INVALID", "page (rank " + std::to_string(rank) + ", layer " + std::to_string(layer) + ", page " +
                                       std::to_string(page) + ") is outside an arena of " + std::to_string(layout.ranks) + " ranks, " +
                                       std::to_string(layout.layers) + " layers and " + std::to_string(region.pages) + " pages");
  }
  return region.page(layout.memories() == 1 ? 0 : int(rank), int(layer), int(page));
}

class ArenaHandle : public Napi::ObjectWrap<ArenaHandle> {
 public:
  static void define(Napi::Env env, Napi::Object exports) {
    exports.Set("KvArena", DefineClass(env, "KvArena",
                                       {
                                           InstanceAccessor<&ArenaHandle::layout>("layout"),
                                           InstanceAccessor<&ArenaHandle::pages>("pages"),
                                           InstanceAccessor<&ArenaHandle::bytes>("bytes"),
                                           InstanceAccessor<&ArenaHandle::token_bytes>("bytesPerTokenPerRank"),
                                           InstanceMethod<&ArenaHandle::fds>("fds"),
                                           InstanceMethod<&ArenaHandle::page>("page"),
                                           InstanceMethod<&ArenaHandle::close>("close"),
                                       }));
  }

  explicit ArenaHandle(const Napi::CallbackInfo& info) : Napi::ObjectWrap<ArenaHandle>(info) {
    const Napi::Object self = info.This().As<Napi::Object>();
    guarded(info.Env(), [&] {
      memory_ = KvMemory::create(parse_kv_layout(info[0]), int(to_integer(info[1], "pages")), "tpla-kv");
      attach_kv_region(self, std::shared_ptr<const KvRegion>(memory_, &memory_->region()));
    });
    self.TypeTag(&kArenaTag);
  }

  const std::shared_ptr<KvMemory>& open() const {
    if (!memory_) throw Error("REQUEST_INVALID", "this KvArena is closed");
    return memory_;
  }

 private:
  Napi::Value layout(const Napi::CallbackInfo& info) {
    return guarded(info.Env(), [&] { return kv_layout_to_js(info.Env(), open()->region().layout); });
  }
  Napi::Value pages(const Napi::CallbackInfo& info) {
    return guarded(info.Env(), [&] { return Napi::Number::New(info.Env(), open()->region().pages); });
  }
  Napi::Value bytes(const Napi::CallbackInfo& info) {
    return guarded(info.Env(), [&] { return Napi::Number::New(info.Env(), double(open()->bytes())); });
  }
  Napi::Value token_bytes(const Napi::CallbackInfo& info) {
    return guarded(info.Env(), [&] { return Napi::Number::New(info.Env(), kv_token_bytes(open()->region().layout)); });
  }
  Napi::Value fds(const Napi::CallbackInfo& info) {
    return guarded(info.Env(), [&] {
      const std::vector<int> fds = open()->fds();
      Napi::Array result = Napi::Array::New(info.Env(), fds.size());
      for (size_t i = 0; i < fds.size(); ++i) result.Set(uint32_t(i), fds[i]);
      return result;
    });
  }
  Napi::Value page(const Napi::CallbackInfo& info) {
    return guarded(info.Env(), [&] {
      const std::shared_ptr<KvMemory> memory = open();
      const int64_t layer = to_integer(info[1], "layer");
      std::byte* at = page_address(memory->region(), to_integer(info[0], "rank"), layer, to_integer(info[2], "page"));
      const size_t size = memory->region().layout.page_bytes(int(layer));
      // The view holds the mapping, so it stays valid after close().
      auto* keep = new std::shared_ptr<KvMemory>(memory);
      const auto buffer = Napi::ArrayBuffer::New(
          info.Env(), at, size, [](Napi::Env, void*, std::shared_ptr<KvMemory>* held) { delete held; }, keep);
      return Napi::Uint8Array::New(info.Env(), size, buffer, 0);
    });
  }
  Napi::Value close(const Napi::CallbackInfo& info) {
    memory_.reset();
    detach_kv_region(info.This().As<Napi::Object>());
    return info.Env().Undefined();
  }

  std::shared_ptr<KvMemory> memory_;
};

}  // namespace

std::shared_ptr<KvMemory> arena_of(const Napi::Value& value, const char* field) {
  if (!value.IsObject() || !value.As<Napi::Object>().CheckTypeTag(&kArenaTag)) refuse(field, "a KvArena");
  return ArenaHandle::Unwrap(value.As<Napi::Object>())->open();
}

void export_kv_arena(Napi::Env env, Napi::Object exports) { ArenaHandle::define(env, exports); }

}  // namespace tpla::addon
