#pragma once
#include <cstdio>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "transfer/ucx/api.h"

namespace tpla::ucx {

// One installation of UCX, loaded at run time. It is never unloaded: UCX keeps threads, hooks and exit handlers of its own.
class Library {
 public:
  // Loads libucp from `file`, an absolute path, with libucs, libuct and libucm from beside it, so that two installations never mix. A process
  // has one: a second call must name the same file. Throws CONFIG_INVALID saying what is wrong with it, or which version is needed.
  static const Library& load(const std::string& file);
  // One that something else has loaded from `file`, to ask it. Throws CONFIG_INVALID.
  static std::unique_ptr<const Library> attach(const std::string& file);

  const Api& api() const { return api_; }
  const std::string& file() const { return file_; }
  // As the library says it, such as 1.13.1.
  const std::string& version() const { return version_; }

 private:
  explicit Library(const std::string& file);
  void load_siblings() const;
  void bind_all();
  template <class Function>
  void bind(Function& function, const char* name);

  void* handle_ = nullptr;
  std::string file_;
  std::string version_;
  Api api_{};
};

// What the library can do on this machine under its settings, asked of it.
struct Capabilities {
  // Transport and device, such as rc_mlx5/mlx5_0:1 or tcp/eth0.
  std::vector<std::string> resources;
  // Any of them moves bytes without a kernel on the way.
  bool rdma = false;
  // It takes GPU memory: with rdma that is GPUDirect.
  bool cuda = false;
};

// A UCP context for active messages, under the UCX_… settings that the environment has at this moment.
class ContextHandle {
 public:
  // Throws CONFIG_INVALID for settings that UCX cannot meet.
  explicit ContextHandle(const Library& library);
  ~ContextHandle();
  ContextHandle(const ContextHandle&) = delete;
  ContextHandle& operator=(const ContextHandle&) = delete;

  const Library& library() const { return library_; }
  const Api& api() const { return library_.api(); }
  Context* get() const { return context_; }
  Capabilities capabilities() const;

 private:
  const Library& library_;
  Context* context_ = nullptr;
};

// What UCX prints.
std::string printed(const std::function<void(FILE* out)>& print);

// Whether a transport, by its name or `transport/device`, leaves the bytes to a network device.
bool is_rdma(const std::string& transport);
// Whether it is one by which a GPU reads another GPU's memory.
bool is_gpu_to_gpu(const std::string& transport);

// ucs_status_t in words.
std::string status_text(Status status);

}  // namespace tpla::ucx
