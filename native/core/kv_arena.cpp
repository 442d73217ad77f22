#include "core/kv_arena.h"

#include <limits>
#include <string>

#include "core/error.h"

namespace tpla {

namespace {

constexpr int kMaxRanks = sizeof(KvRegion::base) / sizeof(KvRegion::base[0]);

void require(bool condition, const std::string& message) {
  if (!condition) throw Error("REQUEST_INVALID", "KV layout: " + message);
}

}  // namespace

void check_layout(const KvLayout& layout) {
  require(layout.ranks >= 1 && layout.ranks <= kMaxRanks,
          "ranks is " + std::to_string(layout.ranks) + "; expected 1 to " + std::to_string(kMaxRanks));
  require(layout.layers >= 1, "layers is " + std::to_string(layout.layers) + "; expected at least 1");
  require(layout.latent >= 1, "latent is " + std::to_string(layout.latent) + "; expected at least 1");
  require(layout.rope >= 0 && layout.rope % 2 == 0, "rope is " + std::to_string(layout.rope) + "; expected an even number");
  require(layout.page_tokens >= 16 && layout.page_tokens % 16 == 0,
          "pageTokens is " + std::to_string(layout.page_tokens) + "; expected a multiple of 16");
  require(layout.shared >= 0 && layout.shared <= layout.latent,
          "shared is " + std::to_string(layout.shared) + "; expected 0 to latent (" + std::to_string(layout.latent) + ")");
  require(layout.form == KvForm::tpla || layout.shared == 0, "shared is only for form tpla");
  require(layout.form != KvForm::tpla || (layout.latent - layout.shared) % layout.ranks == 0,
          "latent - shared = " + std::to_string(layout.latent - layout.shared) + " is not divisible by " +
              std::to_string(layout.ranks) + " ranks");
}

KvArena::KvArena(const KvLayout& layout, int pages) {
  check_layout(layout);
  if (pages < 1) throw Error("REQUEST_INVALID", "a KV arena needs at least 1 page, got " + std::to_string(pages));
  const size_t per_page = layout.page_bytes() * size_t(layout.layers);
  if (size_t(pages) > size_t(std::numeric_limits<int64_t>::max()) / per_page) {
    throw Error("OUT_OF_MEMORY", std::to_string(pages) + " pages of " + std::to_string(per_page) + " bytes exceed the address space");
  }
  region_.layout = layout;
  region_.pages = pages;
  for (int i = 0; i < layout.memories(); ++i) {
    memories_.push_back(SharedMemory::create(layout.rank_bytes(pages), "tpla-kv-" + std::to_string(i)));
    region_.base[i] = memories_.back().data();
  }
}

size_t KvArena::bytes() const {
  size_t total = 0;
  for (const SharedMemory& memory : memories_) total += memory.size();
  return total;
}

std::vector<int> KvArena::fds() const {
  std::vector<int> fds;
  for (const SharedMemory& memory : memories_) fds.push_back(memory.fd());
  return fds;
}

std::byte* KvArena::page(int rank, int layer, int page) const {
  const KvLayout& l = layout();
  if (rank < 0 || rank >= l.ranks || layer < 0 || layer >= l.layers || page < 0 || page >= pages()) {
    throw Error("REQUEST_INVALID", "page (rank " + std::to_string(rank) + ", layer " + std::to_string(layer) + ", page " +
                                       std::to_string(page) + ") is outside an arena of " + std::to_string(l.ranks) + " ranks, " +
                                       std::to_string(l.layers) + " layers and " + std::to_string(pages()) + " pages");
  }
  return region_.page(l.memories() == 1 ? 0 : rank, layer, page);
}

}  // namespace tpla
