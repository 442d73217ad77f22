#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

namespace tpla::bench {

constexpr int32_t kNowhere = -123456;  // no kernel may follow it

// Block tables over one pool of pages, for several sets of equal lengths: pages are handed out in random order, and some stay unused.
struct PageTables {
  int sets = 0;
  int pages = 0;                // of the pool
  int stride = 1;               // entries a sequence has in the table
  std::vector<int32_t> table;   // [sets][sequences][stride]; entries past a sequence's pages point nowhere

  // Makes the pages of which no token is `present(sequence, token)` point nowhere, as if they had been given back.
  template <class Present>
  void drop_pages(const std::vector<int32_t>& kv_lens, int page_tokens, Present present);

  size_t entries_per_set() const { return table.size() / static_cast<size_t>(sets); }
};

int64_t pages_needed(const std::vector<int32_t>& kv_lens, int page_tokens);

PageTables draw_page_tables(const std::vector<int32_t>& kv_lens, int page_tokens, int sets, uint64_t seed);

template <class Present>
void PageTables::drop_pages(const std::vector<int32_t>& kv_lens, int page_tokens, Present present) {
  for (size_t s = 0; s < kv_lens.size(); ++s) {
    for (int32_t begin = 0; begin < kv_lens[s]; begin += page_tokens) {
      bool any = false;
      for (int32_t t = begin; t < std::min(begin + page_tokens, kv_lens[s]) && !any; ++t) any = present(static_cast<int>(s), t);
      if (any) continue;
      for (int set = 0; set < sets; ++set) table[(static_cast<size_t>(set) * kv_lens.size() + s) * static_cast<size_t>(stride) + static_cast<size_t>(begin / page_tokens)] = kNowhere;
    }
  }
}

// Offsets of each sequence in a batch laid out one after another: [sequences + 1].
std::vector<int32_t> prefix_sums(const std::vector<int32_t>& lens);

}  // namespace tpla::bench
