#pragma once
#include <memory>
#include <vector>

#include "transfer/messages/device_port.h"
#include "transfer/messages/registered_memory.h"
#include "transfer/put_job.h"

namespace tpla {

// Where a sender makes the rows of a put's units, and from where its messenger sends them: some chunks, so that units are made while others
// travel. Rows of host memory are made by the CPU, those of a GPU by that GPU: into its own memory where the messenger reaches that, else into
// pinned memory of the host.
class RowStaging {
 public:
  struct Chunk {
    std::byte* data = nullptr;
    // Where its rows are pages of `region`: those of the unit that is in it.
    std::shared_ptr<const KvRegion> region;
    PageTables pages;
    // Not yet out; the sender's.
    size_t pieces = 0;
  };

  // `device`: of the source, with its port; -1 for host memory. `is_gpu_carried`: rows may leave from a GPU's own memory. Throws IO_FAILED, OUT_OF_MEMORY.
  RowStaging(const std::shared_ptr<Messenger>& messenger, const KvLayout& dst, std::shared_ptr<DevicePort> port, int device, bool is_gpu_carried);

  std::vector<Chunk>& chunks() { return chunks_; }
  int device() const { return device_; }
  // Pages of the receiver in a unit, all layers of a put; 0 where units are PutJob's own.
  int unit_pages() const { return unit_pages_; }
  // Whether rows of a GPU leave from its own memory.
  bool is_direct() const { return is_direct_; }
  Messenger::Registration* registration() const { return registered_->get(); }

  // Makes a unit's rows in a chunk. Throws what the GPU's put throws.
  void make(PutJob& job, const PutJob::Unit& unit, Chunk& chunk) const;
  // Where each piece of the unit in a chunk stands.
  std::vector<const std::byte*> places(const Chunk& chunk, const std::vector<Piece>& pieces) const;

 private:
  void reserve_host(const std::shared_ptr<Messenger>& messenger);
  void reserve_device(const std::shared_ptr<Messenger>& messenger, bool is_gpu_carried);
  void place_chunks(std::byte* memory, size_t chunk_bytes, int count);
  PageTables tables_of(const PutJob::Unit& unit) const;

  const KvLayout dst_;
  const std::shared_ptr<DevicePort> port_;
  const int device_;
  int unit_pages_ = 0;
  bool is_direct_ = false;
  std::unique_ptr<RegisteredMemory> registered_;
  std::vector<Chunk> chunks_;
};

}  // namespace tpla
