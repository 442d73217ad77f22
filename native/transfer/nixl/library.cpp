#include "transfer/nixl/library.h"

#include <cstdlib>
#include <dlfcn.h>
#include <link.h>
#include <map>
#include <memory>
#include <mutex>
#include <set>
#include <string_view>
#include <unistd.h>
#include <utility>

#include "core/error.h"

namespace tpla::nixl {

namespace {

std::string loaded_from(void* handle, const std::string& fallback) {
  link_map* map = nullptr;
  if (dlinfo(handle, RTLD_DI_LINKMAP, &map) != 0 || map->l_name[0] == '\0') return fallback;
  const std::unique_ptr<char, void (*)(void*)> resolved(realpath(map->l_name, nullptr), std::free);
  return resolved ? resolved.get() : map->l_name;
}

// NIXL's libraries lie beside each other and mostly have no run path: what the loader misses, and is there, is loaded first.
void* open_with_siblings(const std::string& file) {
  const std::string directory = file.substr(0, file.rfind('/') + 1);
  for (std::set<std::string> tried;;) {
    void* const handle = dlopen(file.c_str(), RTLD_NOW | RTLD_LOCAL);
    if (handle != nullptr) return handle;
    const std::string reason = dlerror();
    const std::string sibling = directory + reason.substr(0, reason.find(':'));
    if (directory.empty() || sibling == file || access(sibling.c_str(), R_OK) != 0 || !tried.insert(sibling).second) {
      throw Error("CONFIG_INVALID", "NIXL cannot be loaded: " + reason);
    }
    open_with_siblings(sibling);
  }
}

}  // namespace

const Library& Library::load(const std::string& file) {
  static std::mutex mutex;
  // The loaded library by each name that it was asked for.
  static std::map<std::string, const Library*> known;
  static const Library* loaded = nullptr;
  const std::lock_guard lock(mutex);
  if (const auto found = known.find(file); found != known.end()) return *found->second;
  std::unique_ptr<const Library> library(new Library(file));
  if (loaded != nullptr && loaded->file() != library->file()) {
    throw Error("CONFIG_INVALID", "this process has loaded NIXL from " + loaded->file() + " already and cannot use " + library->file() + " too");
  }
  if (loaded == nullptr) loaded = library.release();
  known[file] = loaded;
  return *loaded;
}

Library::Library(const std::string& file) : file_(file) {
  handle_ = open_with_siblings(file);
  file_ = loaded_from(handle_, file);
  bind(api_.create_configured_agent, "create_configured_agent");
  bind(api_.destroy_agent, "destroy_agent");
  bind(api_.get_local_partial_md, "get_local_partial_md");
  bind(api_.load_remote_md, "load_remote_md");
  bind(api_.invalidate_remote_md, "invalidate_remote_md");
  bind(api_.get_available_plugins, "get_available_plugins");
  bind(api_.destroy_string_list, "destroy_string_list");
  bind(api_.string_list_size, "string_list_size");
  bind(api_.string_list_get, "string_list_get");
  bind(api_.get_plugin_params, "get_plugin_params");
  bind(api_.destroy_mem_list, "destroy_mem_list");
  bind(api_.destroy_params, "destroy_params");
  bind(api_.mem_list_size, "mem_list_size");
  bind(api_.mem_list_get, "mem_list_get");
  bind(api_.mem_type_to_string, "mem_type_to_string");
  bind(api_.create_backend, "create_backend");
  bind(api_.destroy_backend, "destroy_backend");
  bind(api_.create_opt_args, "create_opt_args");
  bind(api_.destroy_opt_args, "destroy_opt_args");
  bind(api_.opt_args_add_backend, "opt_args_add_backend");
  bind(api_.create_reg_dlist, "create_reg_dlist");
  bind(api_.destroy_reg_dlist, "destroy_reg_dlist");
  bind(api_.reg_dlist_add_desc, "reg_dlist_add_desc");
  bind(api_.register_mem, "register_mem");
  bind(api_.deregister_mem, "deregister_mem");
  bind(api_.create_xfer_dlist, "create_xfer_dlist");
  bind(api_.destroy_xfer_dlist, "destroy_xfer_dlist");
  bind(api_.xfer_dlist_add_desc, "xfer_dlist_add_desc");
  bind(api_.create_xfer_req, "create_xfer_req");
  bind(api_.post_xfer_req, "post_xfer_req");
  bind(api_.get_xfer_status, "get_xfer_status");
  bind(api_.release_xfer_req, "release_xfer_req");
  bind(api_.destroy_xfer_req, "destroy_xfer_req");
  bind(api_.create_notif_map, "create_notif_map");
  bind(api_.destroy_notif_map, "destroy_notif_map");
  bind(api_.notif_map_clear, "notif_map_clear");
  bind(api_.get_notifs, "get_notifs");
  bind(api_.notif_map_size, "notif_map_size");
  bind(api_.notif_map_get_agent_at, "notif_map_get_agent_at");
  bind(api_.notif_map_get_notifs_size, "notif_map_get_notifs_size");
  bind(api_.notif_map_get_notif, "notif_map_get_notif");
  bind(api_.gen_notif, "gen_notif");
  api_.is_stub = reinterpret_cast<bool (*)()>(dlsym(handle_, "nixl_capi_is_stub"));
  if (api_.is_stub != nullptr && api_.is_stub()) {
    throw Error("CONFIG_INVALID", "NIXL at " + file_ + " is a stub that was built without NIXL; name the libnixl_capi.so of an installation");
  }
  check_numbers();
}

// The library does not tell its version, and its numbers are compiled into us.
void Library::check_numbers() const {
  for (const auto& [type, expected] : {std::pair{kDram, "DRAM"}, {kVram, "VRAM"}}) {
    const char* name = nullptr;
    if (api_.mem_type_to_string(type, &name) == kSuccess && name != nullptr && std::string_view(name).starts_with(expected)) continue;
    throw Error("CONFIG_INVALID", "NIXL at " + file_ + " calls memory type " + std::to_string(type) + " " + (name == nullptr ? "nothing" : name) + ", not " + expected +
                ": its C API is not the one of NIXL 0.10.1 to 1.4 that tpla works with");
  }
}

template <class Function>
void Library::bind(Function& function, const char* name) {
  function = reinterpret_cast<Function>(dlsym(handle_, (std::string("nixl_capi_") + name).c_str()));
  if (function != nullptr) return;
  const std::string what = file_ + " has no nixl_capi_" + name;
  dlclose(handle_);
  throw Error("CONFIG_INVALID", what + "; tpla works with the libnixl_capi.so of NIXL 0.10.1 and later");
}

std::string Library::ucx_file() const {
  std::string plugin;
  dl_iterate_phdr([](dl_phdr_info* object, size_t, void* to) {
    const std::string_view file = object->dlpi_name;
    if (file.ends_with("/libplugin_UCX.so")) *static_cast<std::string*>(to) = file;
    return 0;
  }, &plugin);
  // Without a file it is part of the library.
  void* const handle = plugin.empty() ? nullptr : dlopen(plugin.c_str(), RTLD_NOLOAD | RTLD_LAZY);
  void* const bound = dlsym(handle == nullptr ? handle_ : handle, "ucp_get_version_string");
  if (handle != nullptr) dlclose(handle);
  Dl_info found{};
  if (bound == nullptr || dladdr(bound, &found) == 0) return "";
  const std::unique_ptr<char, void (*)(void*)> resolved(realpath(found.dli_fname, nullptr), std::free);
  return resolved ? resolved.get() : found.dli_fname;
}

std::string status_text(Status status) {
  switch (status) {
    case -1: return "invalid parameter";
    case -2: return "the backend failed";
    case -3: return "invalid state";
    case -4: return "exception";
    case -6: return "not found";
    default: return "status " + std::to_string(status);
  }
}

}  // namespace tpla::nixl
