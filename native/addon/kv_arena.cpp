#include "addon/kv_arena.h"

#include "addon/arguments.h"

namespace tpla::addon {

namespace {

constexpr napi_type_tag kArenaTag = {0x7470'6c61'6b76'6172ULL, 0x656e'6100'0000'0001ULL};

const char* form_name(KvForm form) {
  switch (form) {
    case KvForm::mla: return "mla";
    case KvForm::tpla: return "tpla";
    case KvForm::dcp: return "dcp";
    case KvForm::dp: return "dp";
  }
  return "";
}

const char* dtype_name(KvDType dtype) {
  switch (dtype) {
    case KvDType::f32: return "f32";
    case KvDType::bf16: return "bf16";
    case KvDType::fp8: return "fp8";
  }
  return "";
}

KvForm form_of(const std::string& name) {
  for (const KvForm form : {KvForm::mla, KvForm::tpla, KvForm::dcp, KvForm::dp}) {
    if (name == form_name(form)) return form;
  }
  refuse("layout.form", "mla, tpla, dcp or dp, got \"" + name + "\"");
}

KvDType dtype_of(const std::string& name) {
  for (const KvDType dtype : {KvDType::f32, KvDType::bf16, KvDType::fp8}) {
    if (name == dtype_name(dtype)) return dtype;
  }
  refuse("layout.dtype", "f32, bf16 or fp8, got \"" + name + "\"");
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
    guarded(info.Env(), [&] {
      const KvLayout layout = layout_from_js(info[0]);
      arena_ = std::make_shared<KvArena>(layout, int(to_integer(info[1], "pages")));
    });
    info.This().As<Napi::Object>().TypeTag(&kArenaTag);
  }

  const std::shared_ptr<KvArena>& open() const {
    if (!arena_) throw Error("REQUEST_INVALID", "this KvArena is closed");
    return arena_;
  }

 private:
  Napi::Value layout(const Napi::CallbackInfo& info) {
    return guarded(info.Env(), [&] { return layout_to_js(info.Env(), open()->layout()); });
  }
  Napi::Value pages(const Napi::CallbackInfo& info) {
    return guarded(info.Env(), [&] { return Napi::Number::New(info.Env(), open()->pages()); });
  }
  Napi::Value bytes(const Napi::CallbackInfo& info) {
    return guarded(info.Env(), [&] { return Napi::Number::New(info.Env(), double(open()->bytes())); });
  }
  Napi::Value token_bytes(const Napi::CallbackInfo& info) {
    return guarded(info.Env(), [&] {
      const KvLayout& layout = open()->layout();
      const double held = double(layout.row_bytes() * size_t(layout.layers));
      const bool partitioned = layout.form == KvForm::dcp || layout.form == KvForm::dp;
      return Napi::Number::New(info.Env(), partitioned ? held / layout.ranks : held);
    });
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
      const std::shared_ptr<KvArena> arena = open();
      std::byte* at = arena->page(int(to_integer(info[0], "rank")), int(to_integer(info[1], "layer")), int(to_integer(info[2], "page")));
      const size_t size = arena->layout().page_bytes();
      // The view holds the mapping, so it stays valid after close().
      auto* keep = new std::shared_ptr<KvArena>(arena);
      const auto buffer = Napi::ArrayBuffer::New(
          info.Env(), at, size, [](Napi::Env, void*, std::shared_ptr<KvArena>* held) { delete held; }, keep);
      return Napi::Uint8Array::New(info.Env(), size, buffer, 0);
    });
  }
  Napi::Value close(const Napi::CallbackInfo& info) {
    arena_.reset();
    return info.Env().Undefined();
  }

  std::shared_ptr<KvArena> arena_;
};

}  // namespace

KvLayout layout_from_js(const Napi::Value& value) {
  const Napi::Object object = to_object(value, "layout");
  KvLayout layout;
  layout.form = form_of(to_text(object.Get("form"), "layout.form"));
  layout.dtype = dtype_of(to_text(object.Get("dtype"), "layout.dtype"));
  layout.ranks = int(to_integer(object.Get("ranks"), "layout.ranks"));
  layout.layers = int(to_integer(object.Get("layers"), "layout.layers"));
  layout.latent = int(to_integer(object.Get("latent"), "layout.latent"));
  layout.rope = int(to_integer(object.Get("rope"), "layout.rope"));
  layout.shared = int(to_integer(object.Get("shared"), "layout.shared"));
  layout.page_tokens = int(to_integer(object.Get("pageTokens"), "layout.pageTokens"));
  check_layout(layout);
  return layout;
}

Napi::Object layout_to_js(Napi::Env env, const KvLayout& layout) {
  Napi::Object object = Napi::Object::New(env);
  object.Set("form", form_name(layout.form));
  object.Set("ranks", layout.ranks);
  object.Set("layers", layout.layers);
  object.Set("latent", layout.latent);
  object.Set("rope", layout.rope);
  object.Set("shared", layout.shared);
  object.Set("dtype", dtype_name(layout.dtype));
  object.Set("pageTokens", layout.page_tokens);
  return object;
}

std::shared_ptr<KvArena> try_arena(const Napi::Value& value) {
  if (!value.IsObject() || !value.As<Napi::Object>().CheckTypeTag(&kArenaTag)) return nullptr;
  return ArenaHandle::Unwrap(value.As<Napi::Object>())->open();
}

std::shared_ptr<KvArena> arena_of(const Napi::Value& value, const char* field) {
  std::shared_ptr<KvArena> arena = try_arena(value);
  if (!arena) refuse(field, "a KvArena");
  return arena;
}

void export_kv_arena(Napi::Env env, Napi::Object exports) { ArenaHandle::define(env, exports); }

}  // namespace tpla::addon
