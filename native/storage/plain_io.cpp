#include <cerrno>
#include <cstring>
#include <fcntl.h>
#include <unistd.h>

#include "core/error.h"
#include "storage/file_io.h"

namespace tpla {

namespace {

class PlainIo : public FileIo {
 public:
  bool read(int fd, std::byte* to, size_t bytes, uint64_t offset) override {
    for (size_t done = 0; done < bytes;) {
      const ssize_t got = pread(fd, to + done, bytes - done, static_cast<off_t>(offset + done));
      if (got < 0 && errno == EINTR) continue;
      if (got < 0) throw Error("IO_FAILED", std::string("reading failed: ") + std::strerror(errno));
      if (got == 0) return false;
      done += static_cast<size_t>(got);
    }
    return true;
  }

  void write(int fd, const std::byte* from, size_t bytes, uint64_t offset) override {
    for (size_t done = 0; done < bytes;) {
      const ssize_t put = pwrite(fd, from + done, bytes - done, static_cast<off_t>(offset + done));
      if (put < 0 && errno == EINTR) continue;
      if (put <= 0) throw Error("IO_FAILED", std::string("writing failed: ") + std::strerror(put < 0 ? errno : ENOSPC));
      done += static_cast<size_t>(put);
    }
  }
};

}  // namespace

IoMemory make_io_memory(size_t bytes) {
  IoMemory memory(static_cast<std::byte*>(std::aligned_alloc(kIoAlignment, io_aligned(bytes))));
  if (!memory) throw Error("OUT_OF_MEMORY", "no memory for a buffer of " + std::to_string(bytes) + " bytes");
  std::memset(memory.get(), 0, io_aligned(bytes));
  return memory;
}

UniqueFd open_io_file(const std::string& path, bool* is_direct) {
  UniqueFd file(open(path.c_str(), O_RDWR | O_CREAT | O_CLOEXEC | O_DIRECT, 0600));
  *is_direct = bool(file);
  if (!file && errno == EINVAL) file = UniqueFd(open(path.c_str(), O_RDWR | O_CREAT | O_CLOEXEC, 0600));
  if (!file) throw Error("IO_FAILED", "cannot open the file " + path + ": " + std::strerror(errno));
  return file;
}

std::unique_ptr<FileIo> make_plain_io() { return std::make_unique<PlainIo>(); }

}  // namespace tpla
