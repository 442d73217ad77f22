#pragma once
#include <string>

#include "transfer/nixl/api.h"

namespace tpla::nixl {

// NIXL's C API, loaded at run time. It is never unloaded: NIXL and its plug-ins keep threads of their own.
class Library {
 public:
  // Loads libnixl_capi.so from `file`: a path, or a name for the loader to find. A process has one: a second call must name the same.
  // Throws CONFIG_INVALID saying what is wrong with it.
  static const Library& load(const std::string& file);

  const Api& api() const { return api_; }
  // Where the loader found it.
  const std::string& file() const { return file_; }
  // The libucp that its UCX plug-in, once started, is bound to; empty where there is none. A wheel's has a name of its own.
  std::string ucx_file() const;

 private:
  explicit Library(const std::string& file);
  template <class Function>
  void bind(Function& function, const char* name);
  void check_numbers() const;

  void* handle_ = nullptr;
  std::string file_;
  Api api_{};
};

// nixl_capi_status_t in words.
std::string status_text(Status status);

}  // namespace tpla::nixl
