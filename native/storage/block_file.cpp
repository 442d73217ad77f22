#include "storage/block_file.h"

#include <cerrno>
#include <chrono>
#include <cstdlib>
#include <cstring>
#include <fcntl.h>
#include <pthread.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <unistd.h>

#include "core/error.h"
#include "transfer/kv_put.h"

namespace tpla {

namespace {

constexpr uint64_t kFileMagic = 0x31304b4c42415054;  // "TPABLK01"
constexpr uint64_t kSlotMagic = 0x31304b4c42544c53;  // "SLTBLK01"
constexpr size_t kIdBytes = 32;
constexpr std::chrono::milliseconds kLockTimeout{2000};

size_t aligned(size_t bytes) { return (bytes + kIoAlignment - 1) / kIoAlignment * kIoAlignment; }

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
  uint32_t padding;
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

struct Free {
  void operator()(std::byte* memory) const { std::free(memory); }
};
using AlignedMemory = std::unique_ptr<std::byte, Free>;

AlignedMemory aligned_memory(size_t bytes) {
  AlignedMemory memory(static_cast<std::byte*>(std::aligned_alloc(kIoAlignment, aligned(bytes))));
  if (!memory) throw Error("OUT_OF_MEMORY", "no memory for a buffer of " + std::to_string(bytes) + " bytes");
  std::memset(memory.get(), 0, aligned(bytes));
  return memory;
}

}  // namespace

// What a thread moves blocks with.
struct BlockFile::Buffers {
  std::unique_ptr<FileIo> io;
  AlignedMemory header;
  AlignedMemory payload;
};

BlockFile::BlockFile(const BlockFileOptions& options, Engine engine)
    : layout_(options.layout), payload_bytes_(layout_.token_bytes() * size_t(layout_.page_tokens)), stride_(kIoAlignment + aligned(payload_bytes_)), engine_(engine),
      depth_(options.depth) {
  if (layout_.form != KvForm::mla || layout_.memories() != 1) throw Error("REQUEST_INVALID", "a block file holds canonical blocks (mla, one rank)");
  const uint64_t slots = options.bytes < kIoAlignment ? 0 : (options.bytes - kIoAlignment) / stride_;
  if (slots < 1) throw Error("REQUEST_INVALID", std::to_string(options.bytes) + " bytes hold no block, which takes " + std::to_string(stride_ + kIoAlignment));
  slots_ = static_cast<int>(std::min<uint64_t>(slots, INT32_MAX / 2));
  if (engine != Engine::threads) uses_uring_ = make_uring_io(1) != nullptr;
  if (engine == Engine::uring && !uses_uring_) throw Error("IO_FAILED", "the kernel refuses io_uring");
  open_file(options.path);
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
  file_ = UniqueFd(open(path.c_str(), O_RDWR | O_CREAT | O_CLOEXEC | O_DIRECT, 0600));
  is_direct_ = bool(file_);
  // Where the filesystem knows no direct I/O, the page cache does.
  if (!file_ && errno == EINVAL) file_ = UniqueFd(open(path.c_str(), O_RDWR | O_CREAT | O_CLOEXEC, 0600));
  if (!file_) fail("cannot open the block file", path);
  lock_file(path);
  FileHeader wanted{kFileMagic, layout_.layers, layout_.latent, layout_.rope, layout_.page_tokens, static_cast<uint32_t>(layout_.dtype), 0, 0};
  seal(wanted);
  const AlignedMemory block = aligned_memory(kIoAlignment);
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

BlockFile::Buffers& BlockFile::buffers() {
  // A thread serves one file.
  thread_local Buffers own;
  if (!own.io) {
    own.io = uses_uring_ ? make_uring_io(depth_) : nullptr;
    if (!own.io) own.io = make_plain_io();
    own.header = aligned_memory(kIoAlignment);
    own.payload = aligned_memory(payload_bytes_);
  }
  return own;
}

std::vector<std::pair<int, BlockRecord>> BlockFile::scan() {
  Buffers& use = buffers();
  std::vector<std::pair<int, BlockRecord>> found;
  for (int slot = 0; slot < slots_; slot++) {
    if (!use.io->read(file_.get(), use.header.get(), kIoAlignment, offset_of(slot))) break;
    SlotHeader header;
    std::memcpy(&header, use.header.get(), sizeof(header));
    if (!is_sealed(header, kSlotMagic) || header.slot != uint64_t(slot)) continue;
    if (header.tokens < 1 || header.tokens > uint32_t(layout_.page_tokens)) continue;
    found.push_back({slot, {std::string(header.id, kIdBytes), header.index, header.tokens, header.checksum}});
  }
  return found;
}

void BlockFile::write(int slot, const KvRegion& region, int page, const BlockRecord& record) {
  if (record.id.size() != kIdBytes) throw Error("REQUEST_INVALID", "a block id has " + std::to_string(kIdBytes) + " characters");
  erase(slot);
  Buffers& use = buffers();
  for (int layer = 0; layer < layout_.layers; layer++) std::memcpy(use.payload.get() + layout_.page_bytes(layer) * layer, region.page(0, layer, page), layout_.page_bytes(layer));
  use.io->write(file_.get(), use.payload.get(), aligned(payload_bytes_), offset_of(slot) + kIoAlignment);
  SlotHeader header{};
  header.magic = kSlotMagic;
  header.slot = static_cast<uint64_t>(slot);
  std::memcpy(header.id, record.id.data(), kIdBytes);
  header.index = record.index;
  header.checksum = record.checksum;
  header.tokens = record.tokens;
  seal(header);
  std::memset(use.header.get(), 0, kIoAlignment);
  std::memcpy(use.header.get(), &header, sizeof(header));
  use.io->write(file_.get(), use.header.get(), kIoAlignment, offset_of(slot));
}

bool BlockFile::read(int slot, const KvRegion& region, int page, const BlockRecord& record) {
  Buffers& use = buffers();
  if (!use.io->read(file_.get(), use.header.get(), kIoAlignment, offset_of(slot))) return false;
  SlotHeader header;
  std::memcpy(&header, use.header.get(), sizeof(header));
  if (!is_sealed(header, kSlotMagic) || header.slot != uint64_t(slot) || std::string(header.id, kIdBytes) != record.id || header.index != record.index ||
      header.tokens != record.tokens || header.checksum != record.checksum) {
    return false;
  }
  if (!use.io->read(file_.get(), use.payload.get(), aligned(payload_bytes_), offset_of(slot) + kIoAlignment)) return false;
  for (int layer = 0; layer < layout_.layers; layer++) std::memcpy(region.page(0, layer, page), use.payload.get() + layout_.page_bytes(layer) * layer, layout_.page_bytes(layer));
  PageTables table;
  table.tables.emplace_back(record.index + 1, 0);
  table.tables[0].back() = page;
  const int first = static_cast<int>(record.index) * layout_.page_tokens;
  const std::vector<uint64_t> sums = kv_checksum(region, table, {0, layout_.layers}, {first, first + static_cast<int>(record.tokens)});
  return sums.size() == 1 && sums[0] == record.checksum;
}

void BlockFile::erase(int slot) {
  Buffers& use = buffers();
  std::memset(use.header.get(), 0, kIoAlignment);
  use.io->write(file_.get(), use.header.get(), kIoAlignment, offset_of(slot));
}

}  // namespace tpla
