#pragma once
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <string>

#include "transfer/socket.h"

namespace tpla {

// What direct I/O wants of memory, offsets and lengths on every disk in use.
inline constexpr size_t kIoAlignment = 4096;

// Bytes up to the next multiple of that.
constexpr size_t io_aligned(size_t bytes) { return (bytes + kIoAlignment - 1) / kIoAlignment * kIoAlignment; }

struct FreeMemory {
  void operator()(std::byte* memory) const { std::free(memory); }
};
using IoMemory = std::unique_ptr<std::byte, FreeMemory>;
// Aligned, zeroed, its size rounded up. Throws OUT_OF_MEMORY.
IoMemory make_io_memory(size_t bytes);

// Opens or makes a file for reading and writing, past the page cache where the filesystem knows that. Throws IO_FAILED.
UniqueFd open_io_file(const std::string& path, bool* is_direct);

// Moves aligned memory to and from a file; for one thread. Memory of the host, but where said otherwise.
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
