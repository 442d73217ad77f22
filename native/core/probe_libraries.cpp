#include "core/probe_libraries.h"

#include <cerrno>
#include <cstring>
#include <initializer_list>
#include <sys/syscall.h>
#include <unistd.h>

#include "core/dynamic_library.h"

namespace tpla {

namespace {

struct Candidate {
  const char* name;
  std::initializer_list<const char*> files;
  const char* use;
};

const Candidate kCandidates[] = {
    {"libcuda", {"libcuda.so.1", "libcuda.so"}, "CUDA driver"},
    {"cuBLASLt", {"libcublasLt.so.13", "libcublasLt.so.12", "libcublasLt.so"}, "dense GEMMs on GPUs"},
    {"NCCL", {"libnccl.so.2", "libnccl.so"}, "collectives between GPUs"},
    {"cuFile", {"libcufile.so.0", "libcufile.so", "/usr/local/cuda/lib64/libcufile.so.0"}, "KV blocks from NVMe straight to GPUs"},
};

LibraryProbe probe_library(const Candidate& candidate) {
  const DynamicLibrary library(candidate.files);
  return {candidate.name, library.path(), library ? candidate.use : library.error()};
}

// io_uring needs no library, only a kernel (and a container) that lets us in.
LibraryProbe probe_io_uring() {
  alignas(8) char parameters[120] = {};  // struct io_uring_params
  const long fd = syscall(SYS_io_uring_setup, 1, parameters);
  if (fd < 0) return {"io_uring", "", std::string("the kernel refuses it: ") + std::strerror(errno)};
  close(static_cast<int>(fd));
  return {"io_uring", "kernel", "asynchronous file I/O"};
}

}  // namespace

std::vector<LibraryProbe> probe_libraries() {
  std::vector<LibraryProbe> probes;
  for (const Candidate& candidate : kCandidates) probes.push_back(probe_library(candidate));
  probes.push_back(probe_io_uring());
  return probes;
}

}  // namespace tpla
