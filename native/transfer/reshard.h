#pragma once
#include <cstddef>
#include <vector>

#include "core/kv_layout.h"

namespace tpla {

// How one destination row is made from source rows of the same token and layer: the columns it needs, cut by where the source keeps them.

// Source memory of a piece that is decided by the page (dcp) or the request (dp), not by the column.
inline constexpr int kHolder = -1;

// Latent columns that stand together in both rows.
struct LatentPiece {
  int src_memory;
  int src_column;
  int dst_column;
  int columns;
};

// Bytes that are copied as they are.
struct ByteSegment {
  int src_memory;
  size_t src_offset;
  size_t dst_offset;
  size_t bytes;
};

struct RowPlan {
  // The row is its segments where no value changes; else its pieces go through fp32.
  bool is_copy = false;
  std::vector<ByteSegment> segments;
  std::vector<LatentPiece> pieces;
  int rope_memory = kHolder;
};

// Layers whose rows are made alike: on each side they have one layout.
struct RowGroup {
  RowLayout src;
  RowLayout dst;
  std::vector<int> layers;  // ascending
};

// In the order of their first layers. Both layouts are checked and agree in layers, latent and rope.
std::vector<RowGroup> group_layers(const KvLayout& src, const KvLayout& dst);

// One plan per copy of a logical page at the destination: tpla has one a rank, the other forms have one.
std::vector<RowPlan> plan_reshard(const RowLayout& src, const RowLayout& dst);

// Copies of a logical page that a worker of this layout keeps: what a checksum is given for.
inline int copies_per_page(const RowLayout& row) { return row.form == KvForm::tpla ? row.ranks : 1; }
inline int copies_per_page(const KvLayout& layout) { return copies_per_page(layout.row(0)); }
inline constexpr int kMaxCopies = sizeof(KvRegion::base) / sizeof(KvRegion::base[0]);

// First byte of the rope key in a row.
size_t rope_offset(const RowLayout& layout);

}  // namespace tpla
