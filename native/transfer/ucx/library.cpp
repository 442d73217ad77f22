#include "transfer/ucx/library.h"

#include <algorithm>
#include <cstdlib>
#include <dlfcn.h>
#include <link.h>
#include <map>
#include <memory>
#include <mutex>
#include <sstream>

#include "core/error.h"

namespace tpla::ucx {

namespace {

constexpr const char* kSiblings[] = {"libucm.so.0", "libucs.so.0", "libuct.so.0"};

std::string directory_of(const std::string& file) { return file.substr(0, file.rfind('/') + 1); }

std::string real_path(const std::string& file) {
  const std::unique_ptr<char, void (*)(void*)> resolved(realpath(file.c_str(), nullptr), std::free);
  return resolved ? resolved.get() : file;
}

std::string loaded_from(void* handle) {
  link_map* map = nullptr;
  return dlinfo(handle, RTLD_DI_LINKMAP, &map) == 0 ? real_path(map->l_name) : "";
}

}  // namespace

const Library& Library::load(const std::string& file) {
  static std::mutex mutex;
  static std::unique_ptr<const Library> loaded;
  const std::lock_guard lock(mutex);
  const std::string wanted = real_path(file);
  if (!loaded) {
    std::unique_ptr<Library> library(new Library(wanted));
    library->load_siblings();
    library->bind_all();
    loaded = std::move(library);
  } else if (loaded->file() != wanted) {
    throw Error("CONFIG_INVALID", "this process has loaded UCX from " + loaded->file() + " already and cannot load " + wanted + " too");
  }
  return *loaded;
}

std::unique_ptr<const Library> Library::attach(const std::string& file) {
  std::unique_ptr<Library> library(new Library(file));
  library->bind_all();
  return library;
}

Library::Library(const std::string& file) : file_(file) {}

void Library::bind_all() {
  handle_ = dlopen(file_.c_str(), RTLD_NOW | RTLD_LOCAL);
  if (handle_ == nullptr) throw Error("CONFIG_INVALID", std::string("UCX cannot be loaded: ") + dlerror());
  bind(api_.get_version, "ucp_get_version");
  bind(api_.get_version_string, "ucp_get_version_string");
  version_ = api_.get_version_string();
  unsigned major = 0;
  unsigned minor = 0;
  unsigned release = 0;
  api_.get_version(&major, &minor, &release);
  if (major != kApiMajor || minor < kApiMinor) {
    throw Error("CONFIG_INVALID", "UCX " + version_ + " at " + file_ + " is not supported; tpla works with UCX 1.13 and later 1.x");
  }
  bind(api_.config_read, "ucp_config_read");
  bind(api_.config_release, "ucp_config_release");
  bind(api_.init_version, "ucp_init_version");
  bind(api_.cleanup, "ucp_cleanup");
  bind(api_.context_query, "ucp_context_query");
  bind(api_.context_print_info, "ucp_context_print_info");
  bind(api_.mem_map, "ucp_mem_map");
  bind(api_.mem_unmap, "ucp_mem_unmap");
  bind(api_.worker_create, "ucp_worker_create");
  bind(api_.worker_destroy, "ucp_worker_destroy");
  bind(api_.worker_get_address, "ucp_worker_get_address");
  bind(api_.worker_release_address, "ucp_worker_release_address");
  bind(api_.worker_progress, "ucp_worker_progress");
  bind(api_.worker_get_efd, "ucp_worker_get_efd");
  bind(api_.worker_arm, "ucp_worker_arm");
  bind(api_.worker_set_am_recv_handler, "ucp_worker_set_am_recv_handler");
  bind(api_.ep_create, "ucp_ep_create");
  bind(api_.ep_print_info, "ucp_ep_print_info");
  bind(api_.ep_close_nbx, "ucp_ep_close_nbx");
  bind(api_.am_send_nbx, "ucp_am_send_nbx");
  bind(api_.am_recv_data_nbx, "ucp_am_recv_data_nbx");
  bind(api_.request_free, "ucp_request_free");
}

// A dependency that is loaded already satisfies libucp, whatever its search path would have found.
void Library::load_siblings() const {
  const std::string directory = directory_of(file_);
  for (const char* name : kSiblings) {
    void* loaded = dlopen(name, RTLD_NOLOAD | RTLD_LAZY);
    if (loaded != nullptr) {
      const std::string from = loaded_from(loaded);
      dlclose(loaded);
      if (directory_of(from) != directory) {
        throw Error("CONFIG_INVALID", "UCX at " + file_ + " cannot be used: this process has " + from + " of another installation loaded");
      }
      continue;
    }
    // Where it is missing, what libucp finds by itself will do, or its own load says what is wrong.
    dlopen((directory + name).c_str(), RTLD_NOW | RTLD_LOCAL);
  }
}

template <class Function>
void Library::bind(Function& function, const char* name) {
  function = reinterpret_cast<Function>(dlsym(handle_, name));
  if (function == nullptr) throw Error("CONFIG_INVALID", file_ + " has no " + name + "; tpla works with UCX 1.13 and later 1.x");
}

ContextHandle::ContextHandle(const Library& library) : library_(library) {
  const Api& ucp = library.api();
  Config* config = nullptr;
  if (const Status status = ucp.config_read(nullptr, nullptr, &config); status != kOk) {
    throw Error("CONFIG_INVALID", "UCX " + library.version() + " refuses its UCX_… settings: " + status_text(status) + "; its own message above names the one");
  }
  const std::unique_ptr<Config, void (*)(Config*)> held(config, ucp.config_release);
  Params params{};
  params.field_mask = Params::kFeatures | Params::kName;
  params.features = kFeatureAm | kFeatureWakeup;
  params.name = "tpla";
  if (const Status status = ucp.init_version(kApiMajor, kApiMinor, &params, config, &context_); status != kOk) {
    throw Error("CONFIG_INVALID", "UCX " + library.version() + " cannot be started: " + status_text(status) + "; check UCX_TLS and UCX_NET_DEVICES");
  }
}

ContextHandle::~ContextHandle() { api().cleanup(context_); }

Capabilities ContextHandle::capabilities() const {
  Capabilities found;
  std::istringstream lines(printed([this](FILE* out) { api().context_print_info(context_, out); }));
  // `#      resource 1  :  md 1  dev 1  flags -- tcp/lo`
  for (std::string line; std::getline(lines, line);) {
    const size_t at = line.find(" -- ");
    if (line.find("resource") == std::string::npos || at == std::string::npos) continue;
    std::istringstream rest(line.substr(at + 4));
    std::string resource;
    if (rest >> resource) found.resources.push_back(resource);
  }
  found.rdma = std::any_of(found.resources.begin(), found.resources.end(), is_rdma);
  ContextAttributes attributes{};
  attributes.field_mask = ContextAttributes::kMemoryTypes;
  found.cuda = api().context_query(context_, &attributes) == kOk && (attributes.memory_types >> kMemoryTypeCuda & 1) != 0;
  return found;
}

std::string printed(const std::function<void(FILE* out)>& print) {
  char* text = nullptr;
  size_t bytes = 0;
  FILE* out = open_memstream(&text, &bytes);
  if (out == nullptr) return "";
  print(out);
  fclose(out);
  std::string whole(text, bytes);
  std::free(text);
  return whole;
}

bool is_rdma(const std::string& transport) {
  for (const char* prefix : {"rc_", "dc_", "ud_", "srd", "gga_", "ib_"}) {
    if (transport.starts_with(prefix)) return true;
  }
  return false;
}

bool is_gpu_to_gpu(const std::string& transport) { return transport.starts_with("cuda_ipc"); }

std::string status_text(Status status) {
  static const std::map<Status, const char*> kTexts = {
      {-1, "no message"}, {-2, "no resources"}, {-3, "input/output error"}, {-4, "out of memory"}, {-5, "invalid parameter"},
      {-6, "destination is unreachable"}, {-7, "address not valid"}, {-8, "not implemented"}, {-9, "message truncated"},
      {-12, "no such element"}, {-14, "no such device"}, {-15, "busy"}, {-16, "cancelled"}, {-17, "shared memory error"},
      {-20, "timed out"}, {-21, "exceeds a limit"}, {-22, "unsupported"}, {-23, "rejected"}, {-24, "not connected"},
      {-25, "connection reset by the remote peer"}, {-80, "endpoint timeout"},
  };
  const auto found = kTexts.find(status);
  return found == kTexts.end() ? "status " + std::to_string(status) : std::string(found->second);
}

}  // namespace tpla::ucx
