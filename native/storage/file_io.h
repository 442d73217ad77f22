#pragma once
#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>

namespace tpla {

// What direct I/O wants of memory, offsets and lengths on every disk in use.
inline constexpr size_t kIoAlignment = 4096;

// Moves aligned memory to and from a file; for one thread.
class FileIo {
 public:
  virtual ~FileIo() = default;
  // All of it. False where the file ends before; throws IO_FAILED with the system's reason.
  virtual bool read(int fd, std::byte* to, size_t bytes, uint64_t offset) = 0;
  virtual void write(int fd, const std::byte* from, size_t bytes, uint64_t offset) = 0;
};

// One call at a time.
std::unique_ptr<FileIo> make_plain_io();
// Through io_uring, cut into pieces of which at most `depth` are under way. Null where the kernel (or a container's policy) refuses it.
std::unique_ptr<FileIo> make_uring_io(int depth);

}  // namespace tpla
