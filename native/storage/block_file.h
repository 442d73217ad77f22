#pragma once
#include <condition_variable>
#include <cstdint>
#include <deque>
#include <functional>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <thread>
#include <vector>

#include "core/kv_layout.h"
#include "storage/block_mover.h"
#include "storage/file_io.h"
#include "transfer/socket.h"

namespace tpla {

// What a slot of a block file says it holds.
struct BlockRecord {
  std::string id;         // 32 hexadecimal digits
  uint64_t index = 0;     // which block of its sequence it is
  uint32_t tokens = 0;    // rows that are filled
  uint64_t checksum = 0;  // of those rows, as kv_checksum gives it
};

struct BlockFileOptions {
  std::string path;
  // Canonical: form mla, one rank.
  KvLayout layout;
  uint64_t bytes = 0;
  int pages_per_block = 1;
  // Transfers at a time, each with up to `depth` pieces under way where io_uring serves.
  int threads = 2;
  int depth = 16;
  // What moves pages of GPU memory; null in a build without CUDA.
  const DeviceMovers* device_movers = nullptr;
};

// Canonical KV blocks in the slots of one file, which survive the process: [file header][slot header | [page][layer][row]]...
//
// A slot is cleared, then its rows are written, then its header: a header is never there before its rows, and what a crash of the machine
// may have reordered is found by the checksum of the rows, which every read verifies. Nothing is synced; the file is a cache.
class BlockFile {
 public:
  // Automatic: GPU memory by cuFile where that is GPUDirect Storage, else through host memory; host memory by io_uring where the kernel has it.
  // With cufile only GPU memory is moved.
  enum class Engine { automatic, cufile, uring, threads };
  enum class Mechanism { cufile_gds, cufile_compat, uring, threads };

  // Makes the file, or takes one of the same layout with what it holds; one of another layout, or no block file, starts afresh. Throws IO_FAILED,
  // also where another process uses it; REQUEST_INVALID where `bytes` hold no block, or cuFile is wanted and missing.
  BlockFile(const BlockFileOptions& options, Engine engine);
  ~BlockFile();
  BlockFile(const BlockFile&) = delete;
  BlockFile& operator=(const BlockFile&) = delete;

  int slots() const { return slots_; }
  bool is_direct() const { return is_direct_; }
  bool uses_uring() const { return uses_uring_; }
  // What moves the pages of a region. The first question about GPU memory loads cuFile. Throws REQUEST_INVALID where nothing does.
  Mechanism mechanism(const KvRegion& region);
  // Why pages of GPU memory do not go by GPUDirect Storage; empty where they do, or nobody asked yet.
  const std::string& passed_over() const { return passed_over_; }
  // It held another layout, or something else.
  bool is_fresh() const { return is_fresh_; }

  // On a thread of the file, at most `threads` at a time; the others wait in order.
  void post(std::function<void(BlockFile&)> task);

  // These block; for tasks. What every slot's header says, without its rows being looked at.
  std::vector<std::pair<int, BlockRecord>> scan();
  // Stores pages, as many as the record's tokens fill. Throws IO_FAILED, REQUEST_INVALID.
  void write(int slot, const BlockPages& from, const BlockRecord& record);
  // Fetches them back into pages that nobody else looks at. False where the slot does not hold, whole, what the record says.
  bool read(int slot, const BlockPages& to, const BlockRecord& record);
  void erase(int slot);

 private:
  struct Tools;
  Tools& tools();
  BlockMover& mover_of(const KvRegion& region);
  std::unique_ptr<FileIo> make_io() const;
  void choose_for_device();
  void check_block(const BlockPages& block, const BlockRecord& record) const;
  void open_file(const std::string& path);
  void lock_file(const std::string& path);
  uint64_t offset_of(int slot) const { return kIoAlignment + uint64_t(slot) * stride_; }
  void run_tasks();

  const KvLayout layout_;
  const int pages_per_block_;
  const uint64_t stride_;
  int slots_ = 0;
  const Engine engine_;
  const int depth_;
  const DeviceMovers* const device_movers_;
  UniqueFd file_;
  bool is_direct_ = false;
  bool uses_uring_ = false;
  bool is_fresh_ = false;

  // Decided once, when GPU memory comes up first.
  std::once_flag device_once_;
  std::shared_ptr<const CuFileHandle> cufile_;
  std::string passed_over_;

  std::mutex mutex_;
  std::condition_variable work_;
  std::deque<std::function<void(BlockFile&)>> tasks_;
  bool is_closing_ = false;
  std::vector<std::thread> threads_;
};

}  // namespace tpla
