// The part of cuFile's C interface that native/storage/cufile.cpp calls, with answers that the environment sets. Bytes go to the file by pread and
// pwrite; where there is a CUDA driver memory is the GPU's. Layouts are those of NVIDIA's cufile.h, written down once more.
#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <dlfcn.h>
#include <sys/types.h>
#include <unistd.h>
#include <vector>

#define EXPORTED extern "C" __attribute__((visibility("default")))

namespace {

struct Error {
  int32_t code;
  int32_t driver;
};

struct Description {
  int32_t type;
  union {
    int fd;
    void* handle;
  } of;
  const void* calls;
};

struct Properties {
  struct {
    uint32_t major;
    uint32_t minor;
    size_t poll_threshold;
    size_t max_direct_io;
    uint32_t status_flags;
    uint32_t control_flags;
  } nvfs;
  uint32_t features;
  uint32_t sizes[3];
  uint32_t batch[2];
};
static_assert(sizeof(Properties) == 56 && sizeof(Description) == 24);

long setting(const char* name, long otherwise = 0) {
  const char* text = std::getenv(name);
  return text == nullptr ? otherwise : std::strtol(text, nullptr, 0);
}

// cuMemcpyDtoH and cuMemcpyHtoD.
template <class Function>
Function driver_call(const char* name) {
  static void* library = dlopen("libcuda.so.1", RTLD_NOW);
  return library == nullptr ? nullptr : reinterpret_cast<Function>(dlsym(library, name));
}

size_t piece(size_t bytes) { return std::min<size_t>(bytes, setting("CUFILE_STAND_IN_PIECE", 1L << 40)); }

}  // namespace

EXPORTED Error cuFileDriverOpen() { return {int32_t(setting("CUFILE_STAND_IN_OPEN")), int32_t(setting("CUFILE_STAND_IN_DRIVER"))}; }

EXPORTED Error cuFileDriverGetProperties(Properties* properties) {
  *properties = {};
  properties->nvfs.major = uint32_t(setting("CUFILE_STAND_IN_NVFS_MAJOR"));
  properties->nvfs.minor = uint32_t(setting("CUFILE_STAND_IN_NVFS_MINOR"));
  properties->nvfs.status_flags = uint32_t(setting("CUFILE_STAND_IN_FILESYSTEMS"));
  properties->nvfs.control_flags = 2;
  properties->features = uint32_t(setting("CUFILE_STAND_IN_FEATURES", 0xf));
  return {0, 0};
}

#ifndef OLD
EXPORTED Error cuFileGetVersion(int* version) {
  *version = 1150;
  return {0, 0};
}

EXPORTED const char* cuFileGetOpErrorString(int code) { return code == 5011 ? "nvidia-fs driver is unhappy" : nullptr; }
#endif

EXPORTED Error cuFileHandleRegister(void** handle, Description* description) {
  if (description->type != 1) return {5018, 0};
  if (const long error = setting("CUFILE_STAND_IN_REGISTER")) return {int32_t(error), 0};
  *handle = new int(dup(description->of.fd));
  return {0, 0};
}

EXPORTED void cuFileHandleDeregister(void* handle) {
  close(*static_cast<int*>(handle));
  delete static_cast<int*>(handle);
}

EXPORTED Error cuFileBufRegister(const void*, size_t, int) { return {int32_t(setting("CUFILE_STAND_IN_BUFFER")), 0}; }
EXPORTED Error cuFileBufDeregister(const void*) { return {0, 0}; }

EXPORTED ssize_t cuFileRead(void* handle, void* base, size_t bytes, off_t offset, off_t base_offset) {
  if (const long error = setting("CUFILE_STAND_IN_READ")) return -error;
  void* bounce = std::aligned_alloc(4096, (piece(bytes) + 4095) / 4096 * 4096);
  const ssize_t got = pread(*static_cast<int*>(handle), bounce, piece(bytes), offset);
  if (got > 0) {
    driver_call<int (*)(unsigned long long, const void*, size_t)>("cuMemcpyHtoD_v2")(reinterpret_cast<unsigned long long>(base) + base_offset, bounce, got);
    // From pageable memory the copy may return before it has arrived; what cuFile has read is there.
    driver_call<int (*)()>("cuCtxSynchronize")();
  }
  std::free(bounce);
  return got;
}

#ifndef INCOMPLETE
EXPORTED ssize_t cuFileWrite(void* handle, const void* base, size_t bytes, off_t offset, off_t base_offset) {
  if (const long error = setting("CUFILE_STAND_IN_WRITE")) return -error;
  void* bounce = std::aligned_alloc(4096, (piece(bytes) + 4095) / 4096 * 4096);
  driver_call<int (*)(void*, unsigned long long, size_t)>("cuMemcpyDtoH_v2")(bounce, reinterpret_cast<unsigned long long>(base) + base_offset, piece(bytes));
  const ssize_t put = pwrite(*static_cast<int*>(handle), bounce, piece(bytes), offset);
  std::free(bounce);
  return put;
}
#endif
