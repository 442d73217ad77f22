#pragma once
#include <cstdint>
#include <memory>
#include <string>

#include "storage/file_io.h"
#include "transfer/socket.h"

namespace tpla {

// What blocks on disk are measured against: as many bytes in one file, written or read from its begin to its end with nothing done to them, by one
// thread, from and into one buffer. Nothing is synced, as with blocks.
class PlainFile {
 public:
  // Makes the file. Through io_uring with `depth` pieces under way where that is wanted and the kernel has it. Throws IO_FAILED.
  PlainFile(const std::string& path, bool use_uring, int depth);

  bool is_direct() const { return is_direct_; }
  // Seconds for `bytes` from the file's begin; what is read must have been written. Throws IO_FAILED.
  double write(uint64_t bytes);
  double read(uint64_t bytes);

 private:
  template <class Move>
  double timed(uint64_t bytes, const Move& move);

  bool is_direct_ = false;
  UniqueFd file_;
  std::unique_ptr<FileIo> io_;
  IoMemory buffer_;
};

}  // namespace tpla
