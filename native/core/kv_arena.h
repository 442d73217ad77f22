#pragma once
#include <vector>

#include "core/kv_layout.h"
#include "core/shared_memory.h"

namespace tpla {

// Paged KV memory of one worker: one memfd per memory of the layout, zero and untouched at first.
class KvArena {
 public:
  // Throws REQUEST_INVALID for a layout that makes no sense, OUT_OF_MEMORY naming the size.
  KvArena(const KvLayout& layout, int pages);

  const KvLayout& layout() const { return region_.layout; }
  const KvRegion& region() const { return region_; }
  int pages() const { return region_.pages; }
  size_t bytes() const;
  std::vector<int> fds() const;

  // Address of a page; throws REQUEST_INVALID when an index is out of range.
  std::byte* page(int rank, int layer, int page) const;

 private:
  std::vector<SharedMemory> memories_;
  KvRegion region_;
};

// Throws REQUEST_INVALID naming the field.
void check_layout(const KvLayout& layout);

}  // namespace tpla
