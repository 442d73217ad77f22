#include "core/kv_memory.h"

#include "core/error.h"

namespace tpla {

namespace {

constexpr int kMaxRanks = static_cast<int>(sizeof(KvRegion::base) / sizeof(KvRegion::base[0]));
// Keeps layers * pages * page bytes far from overflowing 64 bits, and page ids inside an int32 table.
constexpr int kMaxLayers = 1 << 12;
constexpr int kMaxColumns = 1 << 16;
constexpr int kMaxPageTokens = 1 << 14;
constexpr int kMaxPages = 1 << 28;

void check_range(const char* field, int value, int least, int most) {
  if (value >= least && value <= most) return;
  throw Error("REQUEST_INVALID", std::string("KV layout: ") + field + " is " + std::to_string(value) + ", expected " + std::to_string(least) + " to " +
                                     std::to_string(most));
}

void check_row(const RowLayout& row) {
  if (row.form == KvForm::tpla) {
    check_range("shared", row.shared, 0, row.latent);
    if ((row.latent - row.shared) % row.ranks != 0) {
      throw Error("REQUEST_INVALID", "KV layout: " + std::to_string(row.latent - row.shared) + " latent columns (latent - shared) do not divide over " +
                                         std::to_string(row.ranks) + " ranks");
    }
  } else if (row.shared != 0) {
    throw Error("REQUEST_INVALID", "KV layout: shared is " + std::to_string(row.shared) + ", but only the tpla form has a shared subspace");
  }
  if (row.bytes() % 4 != 0) {
    throw Error("REQUEST_INVALID", "KV layout: a token takes " + std::to_string(row.bytes()) + " bytes per layer, expected a multiple of 4");
  }
}

}  // namespace

void check_kv_layout(const KvLayout& layout, int pages) {
  check_range("ranks", layout.ranks, 1, kMaxRanks);
  check_range("layers", layout.layers, 1, kMaxLayers);
  check_range("latent", layout.latent, 1, kMaxColumns);
  check_range("rope", layout.rope, 0, kMaxColumns);
  check_range("pageTokens", layout.page_tokens, 16, kMaxPageTokens);
  check_range("pages", pages, 1, kMaxPages);
  if (layout.page_tokens % 16 != 0) {
    throw Error("REQUEST_INVALID", "KV layout: pageTokens is " + std::to_string(layout.page_tokens) + ", expected a multiple of 16");
  }
  const std::vector<int>& by_layer = layout.shared.by_layer();
  check_row(layout.row(0));
  for (size_t layer = 1; layer < by_layer.size(); layer++) check_row(layout.row(int(layer)));
}

std::shared_ptr<KvMemory> KvMemory::create(const KvLayout& layout, int pages, const std::string& name) {
  check_kv_layout(layout, pages);
  std::vector<SharedMemory> memories;
  for (int m = 0; m < layout.memories(); m++) memories.push_back(SharedMemory::create(layout.rank_bytes(pages), name + "-rank" + std::to_string(m)));
  return std::shared_ptr<KvMemory>(new KvMemory(layout, pages, std::move(memories)));
}

std::shared_ptr<KvMemory> KvMemory::map(const KvLayout& layout, int pages, const std::vector<int>& fds) {
  check_kv_layout(layout, pages);
  if (fds.size() != static_cast<size_t>(layout.memories())) {
    throw Error("PROTOCOL", std::to_string(fds.size()) + " memory descriptors came, the layout has " + std::to_string(layout.memories()));
  }
  std::vector<SharedMemory> memories;
  for (int fd : fds) memories.push_back(SharedMemory::map(fd, layout.rank_bytes(pages)));
  return std::shared_ptr<KvMemory>(new KvMemory(layout, pages, std::move(memories)));
}

KvMemory::KvMemory(const KvLayout& layout, int pages, std::vector<SharedMemory> memories) : memories_(std::move(memories)), region_(layout, pages) {
  for (size_t m = 0; m < memories_.size(); m++) region_.base[m] = memories_[m].data();
}

size_t KvMemory::bytes() const { return region_.layout.rank_bytes(region_.pages) * memories_.size(); }

std::vector<int> KvMemory::fds() const {
  std::vector<int> fds;
  for (const SharedMemory& memory : memories_) fds.push_back(memory.fd());
  return fds;
}

}  // namespace tpla
