#pragma once

#include <cstdint>
#include <vector>

#include "bench/attention_shape.h"

namespace tpla::bench {

// Block tables over one pool of pages, for several sets of equal lengths: pages are handed out in random order, and some stay unused.
struct PageTables {
  int sets = 0;
  int pages = 0;                // of the pool
  int stride = 1;               // entries a sequence has in the table
  std::vector<int32_t> table;   // [sets][sequences][stride]; entries past a sequence's pages point nowhere

  size_t entries_per_set() const { return table.size() / static_cast<size_t>(sets); }
};

int64_t pages_needed(const DecodeShape& shape);

PageTables draw_page_tables(const DecodeShape& shape, int sets, uint64_t seed);

// Offsets of each sequence in a batch laid out one after another: [sequences + 1].
std::vector<int32_t> prefix_sums(const std::vector<int32_t>& lens);

}  // namespace tpla::bench
