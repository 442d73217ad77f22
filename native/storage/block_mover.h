#pragma once
#include <cstdint>
#include <memory>
#include <vector>

#include "core/kv_layout.h"
#include "storage/cufile.h"
#include "storage/file_io.h"
#include "transfer/kv_put.h"

namespace tpla {

// Where the rows of a block are in memory: canonical pages that stand one after the other in a sequence.
struct BlockPages {
  std::shared_ptr<const KvRegion> region;
  std::vector<int32_t> pages;

  // A page of one layer: canonical rows are as wide in every layer.
  size_t page_bytes() const { return region->layout.page_bytes(0); }
  size_t bytes() const { return page_bytes() * size_t(region->layout.layers) * pages.size(); }
};

// Moves blocks between memory and their place in a file, where they lie as [page][layer][row]; for one thread. The file is opened by the
// caller, places are aligned, and what lies between a block's end and the next multiple of kIoAlignment is written over.
class BlockMover {
 public:
  virtual ~BlockMover() = default;
  // Throws IO_FAILED.
  virtual void write(const BlockPages& from, int fd, uint64_t offset) = 0;
  // False where the file ends before.
  virtual bool read(const BlockPages& to, int fd, uint64_t offset) = 0;
  // Of rows of a sequence in memory that this moves, as kv_checksum gives it.
  virtual std::vector<uint64_t> checksum(const std::shared_ptr<const KvRegion>& region, const PageTables& pages, Range layers, Range tokens) = 0;
};

// Gathers pages of host memory in a buffer of its own.
std::unique_ptr<BlockMover> make_host_mover(std::unique_ptr<FileIo> io);

// Makers of those for GPU memory, which a build with CUDA has (cuda/device_block_mover.h).
struct DeviceMovers {
  std::unique_ptr<BlockMover> (*staged)(int device, std::unique_ptr<FileIo> io);
  std::unique_ptr<BlockMover> (*cufile)(int device, std::shared_ptr<const CuFileHandle> handle);
};

}  // namespace tpla
