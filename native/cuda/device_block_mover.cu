#include "device_block_mover.h"

#include <algorithm>
#include <climits>
#include <future>
#include <numeric>
#include <utility>

#include "device_kv.h"
#include "runtime.h"

namespace tpla::cuda {

namespace {

// Enough for a disk's queue; two of them hide the copy behind the disk.
constexpr size_t kChunkBytes = 4u << 20;

// Memory that a FileIo and the GPU both use.
struct Stage {
  enum class Kind { host, device };
  Stage(Kind of, size_t bytes) : kind(of) {
    void* memory = nullptr;
    if (kind == Kind::host) check_runtime(cudaHostAlloc(&memory, bytes, cudaHostAllocDefault), "cudaHostAlloc");
    else check_runtime(cudaMalloc(&memory, bytes), "cudaMalloc");
    data = static_cast<std::byte*>(memory);
    // What a block's last chunk has behind its rows goes to the disk, too.
    check_runtime(cudaMemset(data, 0, bytes), "cudaMemset");
    if (kind == Kind::device) registered = std::make_unique<CuFileMemory>(data, bytes);
    check_runtime(cudaEventCreateWithFlags(&copied, cudaEventDisableTiming | cudaEventBlockingSync), "cudaEventCreateWithFlags");
  }
  Stage(const Stage&) = delete;
  ~Stage() {
    registered.reset();
    if (copied != nullptr) cudaEventDestroy(copied);
    if (kind == Kind::host) cudaFreeHost(data);
    else cudaFree(data);
  }

  const Kind kind;
  std::byte* data = nullptr;
  std::unique_ptr<CuFileMemory> registered;
  cudaEvent_t copied = nullptr;  // the copy that last used it
};

// A chunk of a block, counted in layers of pages: [page][layer].
struct Chunk {
  size_t begin;
  size_t end;
};

class DeviceMover : public BlockMover {
 public:
  DeviceMover(int device, Stage::Kind kind, std::unique_ptr<FileIo> io) : device_(device), kind_(kind), io_(std::move(io)) {}

  ~DeviceMover() override {
    int before = 0;
    cudaGetDevice(&before);
    cudaSetDevice(device_);
    for (auto& stage : stages_) stage.reset();
    if (stream_ != nullptr) cudaStreamDestroy(stream_);
    cudaSetDevice(before);
  }

  void write(const BlockPages& from, int fd, uint64_t offset) override {
    const OnDevice on(device_);
    prepare(from);
    const std::vector<Chunk> chunks = chunks_of(from);
    const size_t page_bytes = from.page_bytes();
    copy(from, chunks[0], *stages_[0], Direction::out);
    for (size_t i = 0; i < chunks.size(); i++) {
      Stage& stage = *stages_[i % 2];
      check_runtime(cudaEventSynchronize(stage.copied), "a block's copy from the GPU");
      if (i + 1 < chunks.size()) copy(from, chunks[i + 1], *stages_[(i + 1) % 2], Direction::out);
      io_->write(fd, stage.data, io_aligned((chunks[i].end - chunks[i].begin) * page_bytes), offset + chunks[i].begin * page_bytes);
    }
  }

  bool read(const BlockPages& to, int fd, uint64_t offset) override {
    const OnDevice on(device_);
    prepare(to);
    const std::vector<Chunk> chunks = chunks_of(to);
    const size_t page_bytes = to.page_bytes();
    bool is_whole = true;
    for (size_t i = 0; i < chunks.size() && is_whole; i++) {
      Stage& stage = *stages_[i % 2];
      check_runtime(cudaEventSynchronize(stage.copied), "a block's copy to the GPU");
      is_whole = io_->read(fd, stage.data, io_aligned((chunks[i].end - chunks[i].begin) * page_bytes), offset + chunks[i].begin * page_bytes);
      if (is_whole) copy(to, chunks[i], stage, Direction::in);
    }
    check_runtime(cudaStreamSynchronize(stream_), "a block's copy to the GPU");
    return is_whole;
  }

  std::vector<uint64_t> checksum(const std::shared_ptr<const KvRegion>& region, const PageTables& pages, Range layers, Range tokens) override {
    std::promise<std::vector<uint64_t>> sums;
    device_checksum(region, pages, layers, tokens, [&sums](std::vector<uint64_t> found, std::unique_ptr<Error> error) {
      if (error) sums.set_exception(std::make_exception_ptr(*error));
      else sums.set_value(std::move(found));
    });
    return sums.get_future().get();
  }

 private:
  enum class Direction { out, in };

  // Whole layers of pages, cut where the disk's blocks begin; the last one ends with the block.
  static size_t chunk_units(size_t page_bytes) {
    const size_t aligned_units = kIoAlignment / std::gcd(kIoAlignment, page_bytes);
    return std::max<size_t>(1, kChunkBytes / (aligned_units * page_bytes)) * aligned_units;
  }

  static std::vector<Chunk> chunks_of(const BlockPages& block) {
    const size_t units = block.pages.size() * size_t(block.region->layout.layers);
    const size_t most = chunk_units(block.page_bytes());
    std::vector<Chunk> chunks;
    for (size_t begin = 0; begin < units; begin += most) chunks.push_back({begin, std::min(units, begin + most)});
    return chunks;
  }

  void prepare(const BlockPages& block) {
    if (block.region->device != device_) throw Error("REQUEST_INVALID", "these pages are not of GPU " + std::to_string(device_));
    if (stream_ == nullptr) check_runtime(cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking), "cudaStreamCreateWithFlags");
    const size_t page_bytes = block.page_bytes();
    const size_t units = std::min(chunk_units(page_bytes), block.pages.size() * size_t(block.region->layout.layers));
    const size_t bytes = io_aligned(units * page_bytes);
    if (bytes <= room_) return;
    for (auto& stage : stages_) stage.reset();
    room_ = 0;
    for (auto& stage : stages_) stage = std::make_unique<Stage>(kind_, bytes);
    check_runtime(cudaDeviceSynchronize(), "cudaDeviceSynchronize");
    room_ = bytes;
  }

  // Enqueued; the stage's event says when it is done. The layers of one page are a strided copy, one call.
  void copy(const BlockPages& block, Chunk chunk, Stage& stage, Direction direction) {
    const KvRegion& region = *block.region;
    const size_t page_bytes = block.page_bytes();
    const size_t layers = static_cast<size_t>(region.layout.layers);
    const size_t step = page_bytes * size_t(region.pages);
    std::byte* staged = stage.data;
    for (size_t unit = chunk.begin; unit < chunk.end;) {
      const size_t count = std::min(chunk.end - unit, layers - unit % layers);
      std::byte* page = region.page(0, static_cast<int>(unit % layers), block.pages[unit / layers]);
      copy_layers(direction == Direction::out ? staged : page, direction == Direction::out ? page_bytes : step, direction == Direction::out ? page : staged,
                  direction == Direction::out ? step : page_bytes, page_bytes, count);
      staged += count * page_bytes;
      unit += count;
    }
    check_runtime(cudaEventRecord(stage.copied, stream_), "cudaEventRecord");
  }

  void copy_layers(std::byte* to, size_t to_step, const std::byte* from, size_t from_step, size_t bytes, size_t count) {
    // The largest step that a strided copy takes.
    if (std::max(to_step, from_step) <= size_t(INT_MAX)) {
      check_runtime(cudaMemcpy2DAsync(to, to_step, from, from_step, bytes, count, cudaMemcpyDefault, stream_), "cudaMemcpy2DAsync");
      return;
    }
    for (size_t i = 0; i < count; i++) check_runtime(cudaMemcpyAsync(to + i * to_step, from + i * from_step, bytes, cudaMemcpyDefault, stream_), "cudaMemcpyAsync");
  }

  const int device_;
  const Stage::Kind kind_;
  const std::unique_ptr<FileIo> io_;
  std::unique_ptr<Stage> stages_[2];
  size_t room_ = 0;
  cudaStream_t stream_ = nullptr;
};

}  // namespace

std::unique_ptr<BlockMover> make_staged_mover(int device, std::unique_ptr<FileIo> io) {
  return std::make_unique<DeviceMover>(device, Stage::Kind::host, std::move(io));
}

std::unique_ptr<BlockMover> make_cufile_mover(int device, std::shared_ptr<const CuFileHandle> handle) {
  return std::make_unique<DeviceMover>(device, Stage::Kind::device, make_cufile_io(std::move(handle)));
}

}  // namespace tpla::cuda
