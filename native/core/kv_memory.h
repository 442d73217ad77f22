#pragma once
#include <memory>
#include <string>
#include <vector>

#include "core/kv_layout.h"
#include "core/shared_memory.h"

namespace tpla {

// Throws REQUEST_INVALID naming the field that no arena could have: every later offset computation relies on these bounds.
void check_kv_layout(const KvLayout& layout, int pages);

// KV pages in shared memory, one memfd per memory of the layout: an arena of this process, or a peer's mapped here.
// Work in flight holds a reference, so that closing the object in JavaScript never unmaps under a running copy.
class KvMemory {
 public:
  // Zeroed pages; `name` shows in /proc/PID/fd. Throws OUT_OF_MEMORY.
  static std::shared_ptr<KvMemory> create(const KvLayout& layout, int pages, const std::string& name);
  // Maps one descriptor per memory; they are duplicated. Throws PROTOCOL where one is too short or could shrink.
  static std::shared_ptr<KvMemory> map(const KvLayout& layout, int pages, const std::vector<int>& fds);

  const KvRegion& region() const { return region_; }
  size_t bytes() const;
  std::vector<int> fds() const;

 private:
  KvMemory(const KvLayout& layout, int pages, std::vector<SharedMemory> memories);

  std::vector<SharedMemory> memories_;
  KvRegion region_;
};

}  // namespace tpla
