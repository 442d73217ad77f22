#include "storage/plain_file.h"

#include <algorithm>
#include <chrono>

#include "core/error.h"

namespace tpla {

namespace {

constexpr uint64_t kBufferBytes = 64u << 20;

}  // namespace

PlainFile::PlainFile(const std::string& path, bool use_uring, int depth)
    : file_(open_io_file(path, &is_direct_)), io_(use_uring ? make_uring_io(depth) : nullptr), buffer_(make_io_memory(kBufferBytes)) {
  if (!io_) io_ = make_plain_io();
}

double PlainFile::write(uint64_t bytes) {
  return timed(bytes, [this](size_t piece, uint64_t offset) { io_->write(file_.get(), buffer_.get(), piece, offset); });
}

double PlainFile::read(uint64_t bytes) {
  return timed(bytes, [this](size_t piece, uint64_t offset) {
    if (!io_->read(file_.get(), buffer_.get(), piece, offset)) throw Error("IO_FAILED", "reading failed: the file is shorter than what is read");
  });
}

template <class Move>
double PlainFile::timed(uint64_t bytes, const Move& move) {
  const auto start = std::chrono::steady_clock::now();
  for (uint64_t offset = 0; offset < bytes; offset += kBufferBytes) move(io_aligned(std::min(kBufferBytes, bytes - offset)), offset);
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

}  // namespace tpla
