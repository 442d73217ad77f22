#include "storage/block_file.h"

#include <cerrno>
#include <chrono>
#include <cstdlib>
#include <cstring>
#include <fcntl.h>
#include <map>
#include <pthread.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <unistd.h>

#include "core/error.h"

namespace tpla {

namespace {

constexpr uint64_t kFileMagic = 0x31304b4c42415054;  // "TPABLK01"
constexpr uint64_t kSlotMagic = 0x31304b4c42544c53;  // "SLTBLK01"
constexpr size_t kIdBytes = 32;
constexpr std::chrono::milliseconds kLockTimeout{2000};

// FNV-1a: a header is a hundred bytes.
uint64_t hash_of(const void* data, size_t bytes) {
  uint64_t hash = 0xcbf29ce484222325;
  for (size_t i = 0; i < bytes; i++) hash = (hash ^ static_cast<const unsigned char*>(data)[i]) * 0x100000001b3;
  return hash;
}

// First bytes of the file.
struct FileHeader {
  uint64_t magic;
  int32_t layers;
  int32_t latent;
  int32_t rope;
  int32_t page_tokens;
  uint32_t dtype;
  int32_t pages_per_block;
  uint64_t hash;
};

// First bytes of a slot.
struct SlotHeader {
  uint64_t magic;
  uint64_t slot;
  char id[kIdBytes];
  uint64_t index;
  uint64_t checksum;
  uint32_t tokens;
  uint32_t padding;
  uint64_t hash;
};

template <class Header>
void seal(Header& header) {
  header.hash = hash_of(&header, offsetof(Header, hash));
}

template <class Header>
bool is_sealed(const Header& header, uint64_t magic) {
  return header.magic == magic && header.hash == hash_of(&header, offsetof(Header, hash));
}

[[noreturn]] void fail(const std::string& what, const std::string& path) { throw Error("IO_FAILED", what + " " + path + ": " + std::strerror(errno)); }

// Canonical ones have no shared columns to differ in.
bool is_same(const KvLayout& a, const KvLayout& b) {
  return a.form == b.form && a.ranks == b.ranks && a.layers == b.layers && a.latent == b.latent && a.rope == b.rope && a.dtype == b.dtype && a.page_tokens == b.page_tokens;
}

}  // namespace

// What a thread moves blocks with.
struct BlockFile::Tools {
  std::unique_ptr<FileIo> io;
  IoMemory header;
  // By device, -1 for the host.
  std::map<int, std::unique_ptr<BlockMover>> movers;
};

BlockFile::BlockFile(const BlockFileOptions& options, Engine engine)
    : layout_(options.layout), pages_per_block_(options.pages_per_block),
      stride_(kIoAlignment + io_aligned(layout_.token_bytes() * size_t(layout_.page_tokens) * size_t(pages_per_block_))), engine_(engine), depth_(options.depth),
      device_movers_(options.device_movers) {
  if (layout_.form != KvForm::mla || layout_.memories() != 1) throw Error("REQUEST_INVALID", "a block file holds canonical blocks (mla, one rank)");
  const uint64_t slots = options.bytes < kIoAlignment ? 0 : (options.bytes - kIoAlignment) / stride_;
  if (slots < 1) throw Error("REQUEST_INVALID", std::to_string(options.bytes) + " bytes hold no block, which takes " + std::to_string(stride_ + kIoAlignment));
  slots_ = static_cast<int>(std::min<uint64_t>(slots, INT32_MAX / 2));
  if (engine != Engine::threads) uses_uring_ = make_uring_io(1) != nullptr;
  if (engine == Engine::uring && !uses_uring_) throw Error("IO_FAILED", "the kernel refuses io_uring");
  open_file(options.path);
  if (engine == Engine::cufile) std::call_once(device_once_, [this] { choose_for_device(); });
  for (int i = 0; i < options.threads; i++) {
    threads_.emplace_back([this] {
      pthread_setname_np(pthread_self(), "tpla-blocks");
      run_tasks();
    });
  }
}

BlockFile::~BlockFile() {
  {
    const std::lock_guard lock(mutex_);
    is_closing_ = true;
    work_.notify_all();
  }
  for (std::thread& thread : threads_) thread.join();
}

void BlockFile::open_file(const std::string& path) {
  file_ = open_io_file(path, &is_direct_);
  lock_file(path);
  FileHeader wanted{kFileMagic, layout_.layers, layout_.latent, layout_.rope, layout_.page_tokens, static_cast<uint32_t>(layout_.dtype), pages_per_block_, 0};
  seal(wanted);
  const IoMemory block = make_io_memory(kIoAlignment);
  const std::unique_ptr<FileIo> io = make_plain_io();
  const bool is_ours = io->read(file_.get(), block.get(), kIoAlignment, 0) && std::memcmp(block.get(), &wanted, sizeof(wanted)) == 0;
  if (!is_ours) {
    is_fresh_ = true;
    std::memset(block.get(), 0, kIoAlignment);
    std::memcpy(block.get(), &wanted, sizeof(wanted));
    if (ftruncate(file_.get(), 0) != 0) fail("cannot empty the block file", path);
    io->write(file_.get(), block.get(), kIoAlignment, 0);
  }
  // Slots take room on the disk as they are filled.
  if (ftruncate(file_.get(), static_cast<off_t>(offset_of(slots_))) != 0) fail("cannot size the block file", path);
}

// The kernel takes a moment to end the io_uring of a process that was killed, and the lock with it.
void BlockFile::lock_file(const std::string& path) {
  const auto limit = std::chrono::steady_clock::now() + kLockTimeout;
  while (flock(file_.get(), LOCK_EX | LOCK_NB) != 0) {
    if (errno != EWOULDBLOCK) fail("cannot lock the block file", path);
    if (std::chrono::steady_clock::now() > limit) {
      throw Error("IO_FAILED", "the block file " + path + " is in use by another process; give each pool a file of its own");
    }
    std::this_thread::sleep_for(std::chrono::milliseconds(10));
  }
}

void BlockFile::post(std::function<void(BlockFile&)> task) {
  const std::lock_guard lock(mutex_);
  tasks_.push_back(std::move(task));
  work_.notify_one();
}

void BlockFile::run_tasks() {
  while (true) {
    std::function<void(BlockFile&)> task;
    {
      std::unique_lock lock(mutex_);
      work_.wait(lock, [this] { return !tasks_.empty() || is_closing_; });
      if (tasks_.empty()) return;
      task = std::move(tasks_.front());
      tasks_.pop_front();
    }
    task(*this);
  }
}

std::unique_ptr<FileIo> BlockFile::make_io() const {
  std::unique_ptr<FileIo> io = uses_uring_ ? make_uring_io(depth_) : nullptr;
  return io ? std::move(io) : make_plain_io();
}

BlockFile::Tools& BlockFile::tools() {
  // A thread serves one file.
  thread_local Tools own;
  if (!own.io) {
    own.io = make_io();
    own.header = make_io_memory(kIoAlignment);
  }
  return own;
}

void BlockFile::choose_for_device() {
  try {
    if (engine_ == Engine::cufile || (engine_ == Engine::automatic && CuFile::shared().reaches(file_.get()))) {
      cufile_ = std::make_shared<const CuFileHandle>(file_.get());
    }
    if (engine_ == Engine::automatic && !cufile_) passed_over_ = CuFile::shared().describe() + (CuFile::shared().has_gds() ? ", not for this filesystem" : "");
  } catch (const Error& error) {
    if (engine_ == Engine::cufile) throw;
    passed_over_ = error.what();
  }
}

BlockFile::Mechanism BlockFile::mechanism(const KvRegion& region) {
  if (region.device < 0) {
    if (engine_ == Engine::cufile) throw Error("REQUEST_INVALID", "cuFile moves GPU memory; these pages are in host memory");
    return uses_uring_ ? Mechanism::uring : Mechanism::threads;
  }
  if (device_movers_ == nullptr) throw Error("REQUEST_INVALID", "this addon was built without CUDA; build it with TPLA_CUDA=on");
  std::call_once(device_once_, [this] { choose_for_device(); });
  if (cufile_) return cufile_->is_gds() ? Mechanism::cufile_gds : Mechanism::cufile_compat;
  return uses_uring_ ? Mechanism::uring : Mechanism::threads;
}

BlockMover& BlockFile::mover_of(const KvRegion& region) {
  std::unique_ptr<BlockMover>& mover = tools().movers[region.device];
  if (!mover) {
    mechanism(region);
    if (region.device < 0) mover = make_host_mover(make_io());
    else mover = cufile_ ? device_movers_->cufile(region.device, cufile_) : device_movers_->staged(region.device, make_io());
  }
  return *mover;
}

void BlockFile::check_block(const BlockPages& block, const BlockRecord& record) const {
  if (!is_same(block.region->layout, layout_)) throw Error("REQUEST_INVALID", "these pages have another layout than the block file");
  const size_t filled = (size_t(record.tokens) + layout_.page_tokens - 1) / layout_.page_tokens;
  if (block.pages.empty() || block.pages.size() != filled || filled > size_t(pages_per_block_)) {
    throw Error("REQUEST_INVALID", std::to_string(block.pages.size()) + " pages came for " + std::to_string(record.tokens) + " tokens; a block has up to " +
                                       std::to_string(pages_per_block_) + " pages of " + std::to_string(layout_.page_tokens));
  }
}

std::vector<std::pair<int, BlockRecord>> BlockFile::scan() {
  Tools& use = tools();
  std::vector<std::pair<int, BlockRecord>> found;
  for (int slot = 0; slot < slots_; slot++) {
    if (!use.io->read(file_.get(), use.header.get(), kIoAlignment, offset_of(slot))) break;
    SlotHeader header;
    std::memcpy(&header, use.header.get(), sizeof(header));
    if (!is_sealed(header, kSlotMagic) || header.slot != uint64_t(slot)) continue;
    if (header.tokens < 1 || header.tokens > uint32_t(layout_.page_tokens * pages_per_block_)) continue;
    found.push_back({slot, {std::string(header.id, kIdBytes), header.index, header.tokens, header.checksum}});
  }
  return found;
}

void BlockFile::write(int slot, const BlockPages& from, const BlockRecord& record) {
  if (record.id.size() != kIdBytes) throw Error("REQUEST_INVALID", "a block id has " + std::to_string(kIdBytes) + " characters");
  check_block(from, record);
  erase(slot);
  mover_of(*from.region).write(from, file_.get(), offset_of(slot) + kIoAlignment);
  SlotHeader header{};
  header.magic = kSlotMagic;
  header.slot = static_cast<uint64_t>(slot);
  std::memcpy(header.id, record.id.data(), kIdBytes);
  header.index = record.index;
  header.checksum = record.checksum;
  header.tokens = record.tokens;
  seal(header);
  Tools& use = tools();
  std::memset(use.header.get(), 0, kIoAlignment);
  std::memcpy(use.header.get(), &header, sizeof(header));
  use.io->write(file_.get(), use.header.get(), kIoAlignment, offset_of(slot));
}

bool BlockFile::read(int slot, const BlockPages& to, const BlockRecord& record) {
  check_block(to, record);
  Tools& use = tools();
  if (!use.io->read(file_.get(), use.header.get(), kIoAlignment, offset_of(slot))) return false;
  SlotHeader header;
  std::memcpy(&header, use.header.get(), sizeof(header));
  if (!is_sealed(header, kSlotMagic) || header.slot != uint64_t(slot) || std::string(header.id, kIdBytes) != record.id || header.index != record.index ||
      header.tokens != record.tokens || header.checksum != record.checksum) {
    return false;
  }
  BlockMover& mover = mover_of(*to.region);
  if (!mover.read(to, file_.get(), offset_of(slot) + kIoAlignment)) return false;
  // The sums of its pages add up to that of the block.
  PageTables table;
  table.tables.emplace_back(record.index * size_t(pages_per_block_), 0);
  table.tables[0].insert(table.tables[0].end(), to.pages.begin(), to.pages.end());
  const int first = static_cast<int>(record.index) * pages_per_block_ * layout_.page_tokens;
  uint64_t sum = 0;
  for (const uint64_t page : mover.checksum(to.region, table, {0, layout_.layers}, {first, first + static_cast<int>(record.tokens)})) sum += page;
  return sum == record.checksum;
}

void BlockFile::erase(int slot) {
  Tools& use = tools();
  std::memset(use.header.get(), 0, kIoAlignment);
  use.io->write(file_.get(), use.header.get(), kIoAlignment, offset_of(slot));
}

}  // namespace tpla
