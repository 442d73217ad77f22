#include <algorithm>
#include <atomic>
#include <cerrno>
#include <cstring>
#include <linux/io_uring.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>
#include <vector>

#include "core/error.h"
#include "storage/file_io.h"
#include "transfer/socket.h"

namespace tpla {

namespace {

// Large enough that a call each costs nothing, small enough that several keep a disk busy.
constexpr size_t kPieceBytes = 256 * 1024;

// Memory shared with the kernel.
class Mapping {
 public:
  Mapping() = default;
  Mapping(const Mapping&) = delete;
  Mapping& operator=(const Mapping&) = delete;
  ~Mapping() {
    if (at_ != MAP_FAILED) munmap(at_, bytes_);
  }
  bool map(int fd, size_t bytes, off_t what) {
    bytes_ = bytes;
    at_ = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_POPULATE, fd, what);
    return at_ != MAP_FAILED;
  }
  template <class T>
  T* at(size_t offset) const {
    return reinterpret_cast<T*>(static_cast<std::byte*>(at_) + offset);
  }

 private:
  void* at_ = MAP_FAILED;
  size_t bytes_ = 0;
};

class UringIo : public FileIo {
 public:
  // False where the kernel refuses.
  bool open(int depth) {
    io_uring_params params{};
    ring_ = UniqueFd(static_cast<int>(syscall(SYS_io_uring_setup, depth, &params)));
    if (!ring_) return false;
    depth_ = static_cast<size_t>(depth);
    if (!submissions_.map(ring_.get(), params.sq_off.array + params.sq_entries * sizeof(uint32_t), IORING_OFF_SQ_RING) ||
        !completions_.map(ring_.get(), params.cq_off.cqes + params.cq_entries * sizeof(io_uring_cqe), IORING_OFF_CQ_RING) ||
        !entries_.map(ring_.get(), params.sq_entries * sizeof(io_uring_sqe), IORING_OFF_SQES)) {
      return false;
    }
    params_ = params;
    return true;
  }

  bool read(int fd, std::byte* to, size_t bytes, uint64_t offset) override { return transfer(IORING_OP_READ, fd, to, bytes, offset); }
  void write(int fd, const std::byte* from, size_t bytes, uint64_t offset) override {
    if (!transfer(IORING_OP_WRITE, fd, const_cast<std::byte*>(from), bytes, offset)) throw Error("IO_FAILED", std::string("writing failed: ") + std::strerror(ENOSPC));
  }

 private:
  struct Piece {
    size_t begin;
    size_t end;
  };

  // False where the file, or the disk, ends before. What is under way is always awaited: the kernel has the memory.
  bool transfer(uint8_t operation, int fd, std::byte* memory, size_t bytes, uint64_t offset) {
    std::vector<Piece> waiting;
    for (size_t begin = 0; begin < bytes; begin += kPieceBytes) waiting.push_back({begin, std::min(bytes, begin + kPieceBytes)});
    std::vector<Piece> slots(depth_);
    std::vector<size_t> free(depth_);
    for (size_t i = 0; i < depth_; i++) free[i] = i;
    int error = 0;
    bool is_short = false;
    while (free.size() < depth_ || (!waiting.empty() && error == 0 && !is_short)) {
      unsigned queued = 0;
      while (!free.empty() && !waiting.empty() && error == 0 && !is_short) {
        const size_t slot = free.back();
        free.pop_back();
        slots[slot] = waiting.back();
        waiting.pop_back();
        queue(operation, fd, memory, offset, slots[slot], slot);
        queued++;
      }
      submit(queued);
      for (io_uring_cqe result; next_completion(result);) {
        const size_t slot = static_cast<size_t>(result.user_data);
        free.push_back(slot);
        Piece rest = slots[slot];
        if (result.res == -EINTR || result.res == -EAGAIN) {
          waiting.push_back(rest);
        } else if (result.res < 0) {
          error = -result.res;
        } else if (result.res == 0) {
          is_short = true;
        } else if ((rest.begin += static_cast<size_t>(result.res)) < rest.end) {
          waiting.push_back(rest);
        }
      }
    }
    if (error != 0) throw Error("IO_FAILED", std::string(operation == IORING_OP_READ ? "reading" : "writing") + " failed: " + std::strerror(error));
    return !is_short;
  }

  void queue(uint8_t operation, int fd, std::byte* memory, uint64_t offset, const Piece& piece, size_t slot) {
    auto& tail = *submissions_.at<uint32_t>(params_.sq_off.tail);
    const uint32_t index = tail & *submissions_.at<uint32_t>(params_.sq_off.ring_mask);
    io_uring_sqe& entry = entries_.at<io_uring_sqe>(0)[index];
    entry = {};
    entry.opcode = operation;
    entry.fd = fd;
    entry.addr = reinterpret_cast<uint64_t>(memory + piece.begin);
    entry.len = static_cast<uint32_t>(piece.end - piece.begin);
    entry.off = offset + piece.begin;
    entry.user_data = slot;
    submissions_.at<uint32_t>(params_.sq_off.array)[index] = index;
    std::atomic_ref(tail).store(tail + 1, std::memory_order_release);
  }

  // Hands over what was queued and waits for one completion.
  void submit(unsigned queued) {
    while (true) {
      const long taken = syscall(SYS_io_uring_enter, ring_.get(), queued, 1, IORING_ENTER_GETEVENTS, nullptr, 0);
      if (taken < 0 && errno == EINTR) continue;
      if (taken < 0) throw Error("IO_FAILED", std::string("io_uring failed: ") + std::strerror(errno));
      if ((queued -= static_cast<unsigned>(taken)) == 0) return;
    }
  }

  bool next_completion(io_uring_cqe& result) {
    auto& head = *completions_.at<uint32_t>(params_.cq_off.head);
    if (head == std::atomic_ref(*completions_.at<uint32_t>(params_.cq_off.tail)).load(std::memory_order_acquire)) return false;
    result = completions_.at<io_uring_cqe>(params_.cq_off.cqes)[head & *completions_.at<uint32_t>(params_.cq_off.ring_mask)];
    std::atomic_ref(head).store(head + 1, std::memory_order_release);
    return true;
  }

  UniqueFd ring_;
  io_uring_params params_{};
  size_t depth_ = 0;
  Mapping submissions_;
  Mapping completions_;
  Mapping entries_;
};

}  // namespace

std::unique_ptr<FileIo> make_uring_io(int depth) {
  auto io = std::make_unique<UringIo>();
  if (!io->open(depth)) return nullptr;
  return io;
}

}  // namespace tpla
