#pragma once
#include <initializer_list>
#include <string>

namespace tpla {

// A shared library opened at run time, so that the addon loads on machines that lack it.
class DynamicLibrary {
 public:
  // Opens the first of `names` that loads. Never throws: a library that is absent is a fact to report.
  explicit DynamicLibrary(std::initializer_list<const char*> names);
  DynamicLibrary(const DynamicLibrary&) = delete;
  DynamicLibrary& operator=(const DynamicLibrary&) = delete;
  ~DynamicLibrary();

  explicit operator bool() const { return handle_ != nullptr; }
  // File it was loaded from; empty where it was not.
  const std::string& path() const { return path_; }
  // Why it did not load; empty where it did.
  const std::string& error() const { return error_; }

  template <typename Function>
  Function* symbol(const char* name) const {
    return reinterpret_cast<Function*>(find(name));
  }

 private:
  void* find(const char* name) const;

  void* handle_ = nullptr;
  std::string path_;
  std::string error_;
};

}  // namespace tpla
