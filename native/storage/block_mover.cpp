#include "storage/block_mover.h"

#include <cstring>

namespace tpla {

namespace {

class HostMover : public BlockMover {
 public:
  explicit HostMover(std::unique_ptr<FileIo> io) : io_(std::move(io)) {}

  void write(const BlockPages& from, int fd, uint64_t offset) override {
    reserve(from.bytes());
    each_run(from, [](std::byte* page, std::byte* buffered, size_t bytes) { std::memcpy(buffered, page, bytes); });
    io_->write(fd, buffer_.get(), io_aligned(from.bytes()), offset);
  }

  bool read(const BlockPages& to, int fd, uint64_t offset) override {
    reserve(to.bytes());
    if (!io_->read(fd, buffer_.get(), io_aligned(to.bytes()), offset)) return false;
    each_run(to, [](std::byte* page, std::byte* buffered, size_t bytes) { std::memcpy(page, buffered, bytes); });
    return true;
  }

  std::vector<uint64_t> checksum(const std::shared_ptr<const KvRegion>& region, const PageTables& pages, Range layers, Range tokens) override {
    return kv_checksum(*region, pages, layers, tokens);
  }

 private:
  void reserve(size_t bytes) {
    if (bytes <= room_) return;
    buffer_.reset();
    room_ = 0;
    buffer_ = make_io_memory(bytes);
    room_ = bytes;
  }

  // body(layer of a page in memory, its place in the buffer, bytes)
  template <class Body>
  void each_run(const BlockPages& block, const Body& body) {
    const size_t bytes = block.page_bytes();
    std::byte* at = buffer_.get();
    for (const int32_t page : block.pages) {
      for (int layer = 0; layer < block.region->layout.layers; layer++, at += bytes) body(block.region->page(0, layer, page), at, bytes);
    }
  }

  const std::unique_ptr<FileIo> io_;
  IoMemory buffer_;
  size_t room_ = 0;
};

}  // namespace

std::unique_ptr<BlockMover> make_host_mover(std::unique_ptr<FileIo> io) { return std::make_unique<HostMover>(std::move(io)); }

}  // namespace tpla
