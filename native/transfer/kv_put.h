#pragma once
#include <cstdint>
#include <vector>

#include "core/kv_layout.h"
#include "transfer/write_gate.h"

namespace tpla {

struct Range {
  int begin = 0;
  int end = 0;
  int size() const { return end - begin; }
};

// The pages of one sequence in one region, as DecodeItem.pages of src/native/types.ts has them: one table that holds on every rank, or
// with dcp one per rank. They may cover more than is used, not less.
struct PageTables {
  std::vector<std::vector<int32_t>> tables;
  // dp only: the rank that holds the sequence.
  int rank = 0;
};

// Where logical page `page` of a sequence lies. For tpla the memory is rank 0's, and the page is the same on all.
struct PagePlace {
  int memory;
  int page;
};
PagePlace place_of(const KvLayout& layout, const PageTables& tables, int page);

// Throws REQUEST_INVALID unless `layers` and `tokens` lie in the region and the tables name, for those tokens, pages that exist, none twice.
void check_pages(const char* side, const KvRegion& region, const PageTables& tables, Range layers, Range tokens);

// Throws REQUEST_INVALID unless both hold the same values: layers, latent and rope.
void check_compatible(const KvLayout& src, const KvLayout& dst);

// Logical pages of `layout` that tokens touch.
Range pages_of(const KvLayout& layout, Range tokens);

struct KvPut {
  const KvRegion* src = nullptr;
  const KvRegion* dst = nullptr;
  Range layers;
  Range tokens;
  PageTables src_pages;
  PageTables dst_pages;
  WritePass pass;
};

struct KvPutResult {
  // Bytes written at the destination, and what travelled for them: more where frames have headers.
  size_t bytes = 0;
  size_t wire_bytes = 0;
  // Of what was written: [logical page of the destination from the first touched][copy], summed over layers and tokens of this call.
  std::vector<uint64_t> checksums;
};

// Gathers rows from the source's pages, reshards and converts them, writes them into the destination's pages and hashes them, in one pass.
// Everything is checked before memory is touched; throws REQUEST_INVALID, or CANCELLED when the destination's gate shuts on the way.
KvPutResult kv_put(const KvPut& put);

// The same checksums over what `region` holds.
std::vector<uint64_t> kv_checksum(const KvRegion& region, const PageTables& pages, Range layers, Range tokens);

// Copies page `from` to `to`, all layers, on every rank (dp and dcp: on `rank`). Throws REQUEST_INVALID.
void kv_copy_page(const KvRegion& region, int from, int to, int rank);

}  // namespace tpla
