#pragma once
#include <cstddef>
#include <string>

namespace tpla {

// Anonymous memory with a descriptor (memfd) that another process can map. Pages are zero at first and cost nothing until touched.
class SharedMemory {
 public:
  // Throws Error OUT_OF_MEMORY naming the size when the kernel refuses.
  static SharedMemory create(size_t bytes, const std::string& name);
  // Maps a descriptor received from a peer, which is duplicated; throws PROTOCOL when it is shorter than `bytes`
  // or could still shrink (touching a mapping beyond the end of its file is SIGBUS).
  static SharedMemory map(int fd, size_t bytes);

  SharedMemory() = default;
  SharedMemory(SharedMemory&& other) noexcept;
  SharedMemory& operator=(SharedMemory&& other) noexcept;
  SharedMemory(const SharedMemory&) = delete;
  SharedMemory& operator=(const SharedMemory&) = delete;
  ~SharedMemory();

  std::byte* data() const { return data_; }
  size_t size() const { return size_; }
  int fd() const { return fd_; }

 private:
  std::byte* data_ = nullptr;
  size_t size_ = 0;
  int fd_ = -1;
};

}  // namespace tpla
