#include "core/shared_memory.h"

#include <cerrno>
#include <cstring>
#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>
#include <utility>

#include "core/error.h"

namespace tpla {

namespace {

std::byte* map_whole(int fd, size_t bytes) {
  void* at = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
  if (at == MAP_FAILED) {
    const int error = errno;
    close(fd);
    throw Error("OUT_OF_MEMORY", "cannot map " + std::to_string(bytes) + " bytes of shared memory: " + std::strerror(error));
  }
  return static_cast<std::byte*>(at);
}

}  // namespace

SharedMemory SharedMemory::create(size_t bytes, const std::string& name) {
  SharedMemory memory;
  const int fd = memfd_create(name.c_str(), MFD_CLOEXEC | MFD_ALLOW_SEALING);
  if (fd < 0) throw Error("OUT_OF_MEMORY", std::string("memfd_create failed: ") + std::strerror(errno));
  if (ftruncate(fd, static_cast<off_t>(bytes)) != 0) {
    const int error = errno;
    close(fd);
    throw Error("OUT_OF_MEMORY", "cannot size shared memory to " + std::to_string(bytes) + " bytes: " + std::strerror(error));
  }
  fcntl(fd, F_ADD_SEALS, F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL);
  memory.data_ = map_whole(fd, bytes);
  memory.size_ = bytes;
  memory.fd_ = fd;
  return memory;
}

SharedMemory SharedMemory::map(int fd, size_t bytes) {
  struct stat status {};
  if (fstat(fd, &status) != 0 || static_cast<size_t>(status.st_size) < bytes) {
    throw Error("PROTOCOL", "the peer's memory is " + std::to_string(status.st_size) + " bytes, expected " + std::to_string(bytes));
  }
  const int seals = fcntl(fd, F_GET_SEALS);
  if (seals < 0 || (seals & F_SEAL_SHRINK) == 0) {
    throw Error("PROTOCOL", "the peer's memory is not sealed against shrinking; it was not made by tpla");
  }
  const int own = fcntl(fd, F_DUPFD_CLOEXEC, 0);
  if (own < 0) throw Error("IO_FAILED", std::string("cannot duplicate a descriptor: ") + std::strerror(errno));
  SharedMemory memory;
  memory.data_ = map_whole(own, bytes);
  memory.size_ = bytes;
  memory.fd_ = own;
  return memory;
}

SharedMemory::SharedMemory(SharedMemory&& other) noexcept { *this = std::move(other); }

SharedMemory& SharedMemory::operator=(SharedMemory&& other) noexcept {
  std::swap(data_, other.data_);
  std::swap(size_, other.size_);
  std::swap(fd_, other.fd_);
  return *this;
}

SharedMemory::~SharedMemory() {
  if (data_ != nullptr) munmap(data_, size_);
  if (fd_ >= 0) close(fd_);
}

}  // namespace tpla
