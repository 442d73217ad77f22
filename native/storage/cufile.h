// NVIDIA's cuFile: files to and from GPU memory, by GPUDirect Storage or, in its compatibility mode, through host memory of its own.
#pragma once
#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>

#include "core/dynamic_library.h"
#include "storage/file_io.h"

namespace tpla {

// The library, opened at run time, with its driver. One a process, which stays until the process ends: cuFile has threads of its own.
class CuFile {
 public:
  // Opened on the first call. Throws REQUEST_INVALID with the reason where it is not installed or does not start, again on each call.
  static const CuFile& shared();

  const std::string& path() const { return library_.path(); }
  // "1.15"; empty where the library is too old to tell.
  const std::string& version() const { return version_; }
  // Whether cuFile says that a kernel driver (nvidia-fs, or the kernel's own peer-to-peer DMA) connects it to disks; without one there is only
  // the compatibility mode.
  bool has_gds() const { return has_driver_ || has_p2p_; }
  // has_gds() or not in words, with the driver's version.
  std::string describe() const;
  // Whether what cuFile says of its drivers covers the filesystem of this file. Files of others take the compatibility mode.
  bool reaches(int fd) const;

 private:
  friend class CuFileHandle;
  friend class CuFileMemory;
  CuFile();
  void check(int32_t status, int32_t driver_status, const std::string& what) const;
  std::string explain(int64_t status) const;

  struct Calls;
  DynamicLibrary library_;
  std::shared_ptr<const Calls> calls_;
  std::string version_;
  std::string nvidia_fs_;  // "2.25"
  uint32_t filesystems_ = 0;
  bool has_driver_ = false;
  bool has_p2p_ = false;
};

// A file known to cuFile; the descriptor must outlive it. Any number of threads use it at the same time.
class CuFileHandle {
 public:
  // Throws REQUEST_INVALID where cuFile does not take the file.
  explicit CuFileHandle(int fd);
  CuFileHandle(const CuFileHandle&) = delete;
  ~CuFileHandle();

  bool is_gds() const { return is_gds_; }
  // GPU memory on the current device. All of it: false where the file ends before; throws IO_FAILED with the reason.
  bool read(std::byte* to, size_t bytes, uint64_t offset) const;
  void write(const std::byte* from, size_t bytes, uint64_t offset) const;

 private:
  const CuFile& library_;
  void* handle_ = nullptr;
  bool is_gds_ = false;
};

// GPU memory that disks may be sent to directly, while this lasts. Where it cannot be registered cuFile goes through memory of its own.
class CuFileMemory {
 public:
  CuFileMemory(std::byte* data, size_t bytes);
  CuFileMemory(const CuFileMemory&) = delete;
  ~CuFileMemory();

 private:
  std::byte* data_;
  bool is_registered_;
};

// The handle as a FileIo over memory of the current device; the descriptor it is given is not looked at.
std::unique_ptr<FileIo> make_cufile_io(std::shared_ptr<const CuFileHandle> handle);

}  // namespace tpla
