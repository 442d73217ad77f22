#include "transfer/messages/row_staging.h"

#include <algorithm>

namespace tpla {

namespace {

constexpr int kHostChunks = 32;
// Of a GPU's rows: a launch costs some 20 us, so a chunk has to be worth it. Two travel while two are made.
constexpr int kDeviceChunks = 4;
constexpr size_t kDeviceChunkBytes = size_t(16) << 20;

}  // namespace

RowStaging::RowStaging(const std::shared_ptr<Messenger>& messenger, const KvLayout& dst, std::shared_ptr<DevicePort> port, int device, bool is_gpu_carried)
    : dst_(dst), port_(std::move(port)), device_(device) {
  if (device_ < 0) reserve_host(messenger);
  else reserve_device(messenger, is_gpu_carried);
}

void RowStaging::reserve_host(const std::shared_ptr<Messenger>& messenger) {
  const size_t bytes = PutJob::unit_capacity(dst_);
  const auto memory = std::make_shared<std::vector<std::byte>>(bytes * kHostChunks);
  registered_ = std::make_unique<RegisteredMemory>(messenger, memory, memory->data(), memory->size());
  place_chunks(memory->data(), bytes, kHostChunks);
}

void RowStaging::reserve_device(const std::shared_ptr<Messenger>& messenger, bool is_gpu_carried) {
  const size_t page_bytes = dst_.rank_bytes(1) * dst_.memories();
  unit_pages_ = static_cast<int>(std::clamp<size_t>(kDeviceChunkBytes / page_bytes, 1, 64));
  const size_t bytes = page_bytes * unit_pages_;
  std::shared_ptr<std::byte> memory;
  if (is_gpu_carried) {
    memory = port_->allocate(device_, bytes * kDeviceChunks);
    try {
      registered_ = std::make_unique<RegisteredMemory>(messenger, memory, memory.get(), bytes * kDeviceChunks, device_);
      is_direct_ = true;
    } catch (const Error&) {
      // It carries memory of GPUs, but not of this one.
    }
  }
  if (!is_direct_) {
    memory = port_->allocate_pinned(bytes * kDeviceChunks);
    registered_ = std::make_unique<RegisteredMemory>(messenger, memory, memory.get(), bytes * kDeviceChunks);
  }
  place_chunks(memory.get(), bytes, kDeviceChunks);
  for (Chunk& chunk : chunks_) {
    auto region = std::make_shared<KvRegion>(dst_, unit_pages_);
    region->device = device_;
    for (int m = 0; m < dst_.memories(); m++) region->base[m] = chunk.data + dst_.rank_bytes(unit_pages_) * m;
    chunk.region = region;
  }
}

void RowStaging::place_chunks(std::byte* memory, size_t chunk_bytes, int count) {
  chunks_.resize(count);
  for (int i = 0; i < count; i++) chunks_[i].data = memory + chunk_bytes * i;
}

// The unit's pages one after another, in whichever memory the layout has them.
PageTables RowStaging::tables_of(const PutJob::Unit& unit) const {
  const Range pages = pages_of(dst_, unit.tokens);
  const int tables = dst_.form == KvForm::dcp ? dst_.ranks : 1;
  PageTables result;
  result.tables.resize(tables);
  std::vector<int32_t> used(tables, 0);
  for (int page = 0; page < pages.end; page++) {
    const int table = page % tables;
    result.tables[table].push_back(page < pages.begin ? 0 : used[table]++);
  }
  return result;
}

void RowStaging::make(PutJob& job, const PutJob::Unit& unit, Chunk& chunk) const {
  if (!chunk.region) return job.make(unit, chunk.data);
  chunk.pages = tables_of(unit);
  KvPut what{job.what().src.get(), chunk.region.get(), {unit.layer, unit.layer + unit.layers}, unit.tokens, job.what().src_pages, chunk.pages, {}};
  job.add_checksums(unit, port_->put(job.what().src, chunk.region, what).checksums);
}

std::vector<const std::byte*> RowStaging::places(const Chunk& chunk, const std::vector<Piece>& pieces) const {
  std::vector<const std::byte*> places;
  const std::byte* next = chunk.data;
  for (const Piece& piece : pieces) {
    places.push_back(chunk.region ? place_of_piece(*chunk.region, chunk.pages, piece) : next);
    next += dst_.row_bytes(static_cast<int>(piece.layer)) * (piece.end - piece.begin);
  }
  return places;
}

}  // namespace tpla
