#include "addon/arguments.h"
#include "addon/kv_object.h"
#include "addon/transfer_arguments.h"

#ifdef TPLA_WITH_CUDA
#include "cuda/device_kv.h"
#endif

namespace tpla::addon {

namespace {

#ifdef TPLA_WITH_CUDA

using cuda::DeviceKv;
using cuda::DeviceMemory;

std::vector<int> parse_devices(const Napi::Value& value) {
  std::vector<int> devices;
  const Napi::Array array = to_array(value, "devices");
  for (uint32_t i = 0; i < array.Length(); i++) devices.push_back(int(to_integer(array.Get(i), "devices", 0, 63)));
  return devices;
}

DeviceMemory::IpcHandle parse_handle(const Napi::Value& value) {
  const std::string hex = to_text(value, "handles");
  DeviceMemory::IpcHandle handle;
  if (hex.size() != 2 * handle.size() || hex.find_first_not_of("0123456789abcdef") != std::string::npos) refuse("handles", "128 hex digits each");
  for (size_t i = 0; i < handle.size(); i++) handle[i] = static_cast<std::byte>(std::stoi(hex.substr(2 * i, 2), nullptr, 16));
  return handle;
}

std::string handle_text(const DeviceMemory::IpcHandle& handle) {
  static constexpr char kDigits[] = "0123456789abcdef";
  std::string text;
  for (const std::byte byte : handle) {
    text += kDigits[std::to_integer<int>(byte) >> 4];
    text += kDigits[std::to_integer<int>(byte) & 15];
  }
  return text;
}

Napi::Object region_object(Napi::Env env, std::shared_ptr<const KvRegion> region) {
  Napi::Object object = Napi::Object::New(env);
  object.Set("layout", kv_layout_to_js(env, region->layout));
  object.Set("pages", region->pages);
  object.Set("close", Napi::Function::New(env, [](const Napi::CallbackInfo& call) { detach_kv_region(call.This().As<Napi::Object>()); }, "close"));
  attach_kv_region(object, std::move(region));
  return object;
}

// new CudaKvArena(layout, pages, devices, sharing)
class CudaArena : public Napi::ObjectWrap<CudaArena> {
 public:
  static Napi::Function define(Napi::Env env) {
    return DefineClass(env, "CudaKvArena",
                       {InstanceAccessor<&CudaArena::layout>("layout"), InstanceAccessor<&CudaArena::pages>("pages"), InstanceAccessor<&CudaArena::bytes>("bytes"),
                        InstanceAccessor<&CudaArena::token_bytes>("bytesPerTokenPerRank"), InstanceAccessor<&CudaArena::device>("device"),
                        InstanceAccessor<&CudaArena::devices>("devices"),
                        InstanceMethod<&CudaArena::fds>("fds"), InstanceMethod<&CudaArena::handles>("ipcHandles"), InstanceMethod<&CudaArena::page>("page"),
                        InstanceMethod<&CudaArena::close>("close")});
  }

  explicit CudaArena(const Napi::CallbackInfo& info) : Napi::ObjectWrap<CudaArena>(info) {
    guarded(info.Env(), [&] {
      const bool is_ipc = info.Length() > 3 && to_text(info[3], "sharing") == "ipc";
      memory_ = DeviceKv::create(parse_kv_layout(info[0]), int(to_integer(info[1], "pages")), parse_devices(info[2]),
                                 is_ipc ? DeviceMemory::Sharing::ipc : DeviceMemory::Sharing::descriptor);
      attach_kv_region(info.This().As<Napi::Object>(), std::shared_ptr<const KvRegion>(memory_, &memory_->region()));
    });
  }

 private:
  const std::shared_ptr<DeviceKv>& open() const {
    if (!memory_) throw Error("REQUEST_INVALID", "this KvArena is closed");
    return memory_;
  }
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
  Napi::Value device(const Napi::CallbackInfo& info) {
    return guarded(info.Env(), [&] { return Napi::Number::New(info.Env(), open()->region().device); });
  }
  // UUID of the GPU behind each memory.
  Napi::Value devices(const Napi::CallbackInfo& info) {
    return guarded(info.Env(), [&] {
      Napi::Array result = Napi::Array::New(info.Env());
      for (int m = 0; m < open()->region().layout.memories(); m++) result.Set(uint32_t(m), cuda::device_uuid(open()->device_of(m)));
      return result;
    });
  }
  Napi::Value fds(const Napi::CallbackInfo& info) {
    return guarded(info.Env(), [&] {
      Napi::Array result = Napi::Array::New(info.Env());
      for (const UniqueFd& fd : open()->fds()) result.Set(result.Length(), fd.get());
      return result;
    });
  }
  Napi::Value handles(const Napi::CallbackInfo& info) {
    return guarded(info.Env(), [&] {
      Napi::Array result = Napi::Array::New(info.Env());
      if (open()->sharing() == DeviceMemory::Sharing::ipc) {
        for (const auto& handle : open()->ipc_handles()) result.Set(result.Length(), handle_text(handle));
      }
      return result;
    });
  }
  // A copy, unlike KvArena's view.
  Napi::Value page(const Napi::CallbackInfo& info) {
    return guarded(info.Env(), [&]() -> Napi::Value {
      const KvRegion& region = open()->region();
      const int rank = int(to_integer(info[0], "rank", 0, region.layout.ranks - 1));
      const int layer = int(to_integer(info[1], "layer", 0, region.layout.layers - 1));
      const int page = int(to_integer(info[2], "page", 0, region.pages - 1));
      Napi::Uint8Array bytes = Napi::Uint8Array::New(info.Env(), region.layout.page_bytes(layer));
      open()->read_page(region.layout.memories() == 1 ? 0 : rank, layer, page, reinterpret_cast<std::byte*>(bytes.Data()));
      return bytes;
    });
  }
  void close(const Napi::CallbackInfo& info) {
    detach_kv_region(info.This().As<Napi::Object>());
    memory_.reset();
  }

  std::shared_ptr<DeviceKv> memory_;
};

Napi::Value map_device_region(const Napi::CallbackInfo& info) {
  const Napi::Env env = info.Env();
  return guarded(env, [&]() -> Napi::Value {
    const KvLayout layout = parse_kv_layout(info[0]);
    const int pages = int(to_integer(info[1], "pages"));
    const int device = int(to_integer(info[3], "device", 0, 63));
    const Napi::Array from = to_array(info[2], "memories");
    std::shared_ptr<DeviceKv> memory;
    if (from.Length() > 0 && from.Get(0u).IsString()) {
      std::vector<DeviceMemory::IpcHandle> handles;
      for (uint32_t i = 0; i < from.Length(); i++) handles.push_back(parse_handle(from.Get(i)));
      memory = DeviceKv::open(layout, pages, handles, device);
    } else {
      std::vector<int> fds;
      for (uint32_t i = 0; i < from.Length(); i++) fds.push_back(int(to_integer(from.Get(i), "memories")));
      memory = DeviceKv::map(layout, pages, fds, device);
    }
    return region_object(env, std::shared_ptr<const KvRegion>(memory, &memory->region()));
  });
}

Napi::Value pin_region(const Napi::CallbackInfo& info) {
  const Napi::Env env = info.Env();
  return guarded(env, [&]() -> Napi::Value {
    const auto pinned = std::make_shared<cuda::PinnedKv>(kv_region_of(info[0]), int(to_integer(info[1], "device", 0, 63)));
    return region_object(env, std::shared_ptr<const KvRegion>(pinned, &pinned->region()));
  });
}

Napi::Value device_uuid(const Napi::CallbackInfo& info) {
  return guarded(info.Env(), [&] { return Napi::String::New(info.Env(), cuda::device_uuid(int(to_integer(info[0], "device", 0, 63)))); });
}

#else

Napi::Value without_cuda(const Napi::CallbackInfo& info) {
  throw to_js_error(info.Env(), Error("REQUEST_INVALID", "this addon was built without CUDA; build it with TPLA_CUDA=on"));
}

#endif

}  // namespace

void export_cuda_kv(Napi::Env env, Napi::Object exports) {
#ifdef TPLA_WITH_CUDA
  exports.Set("CudaKvArena", CudaArena::define(env));
  exports.Set("mapCudaKvRegion", Napi::Function::New(env, map_device_region, "mapCudaKvRegion"));
  exports.Set("pinKvRegion", Napi::Function::New(env, pin_region, "pinKvRegion"));
  exports.Set("cudaDeviceUuid", Napi::Function::New(env, device_uuid, "cudaDeviceUuid"));
#else
  for (const char* name : {"CudaKvArena", "mapCudaKvRegion", "pinKvRegion", "cudaDeviceUuid"}) exports.Set(name, Napi::Function::New(env, without_cuda, name));
#endif
}

}  // namespace tpla::addon
