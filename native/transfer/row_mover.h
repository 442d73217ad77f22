#pragma once
#include <cstddef>
#include <cstdint>
#include <vector>

#include "core/kv_layout.h"
#include "transfer/kv_put.h"
#include "transfer/reshard.h"
#include "transfer/row_kernels.h"

namespace tpla {

// Makes destination rows from source rows on the CPU: gather, reshard, convert, hash, in one pass over each row. Ranges and tables were
// checked before.
class RowMover {
 public:
  // `streams`: rows go past the caches; fence() before anyone else may look.
  RowMover(const KvRegion& src, const KvLayout& dst, bool streams);

  // Copies of a row at the destination.
  int copies() const { return copies_; }

  // Rows that stand together in one page of the source.
  struct Rows {
    PagePlace from;
    Range tokens;
    int layer;
  };

  // Moves rows: for each copy to `to[copy]`, one after another. Adds their share of the checksum to `sums[copy]`. `next` is what comes after
  // them, if that is known: its first rows are fetched meanwhile.
  void move(const Rows& rows, std::byte* const* to, uint64_t* sums, const Rows* next = nullptr) const;
  void fence() const { kernels_.fence(); }

  // Whether rows of the layer are the same on both sides, so that they can be sent from where they stand.
  bool keeps_rows(int layer) const;
  // Of a layer that keeps its rows: what move() would add, and where the first row stands. The rows are in a near cache afterwards.
  const std::byte* hash(const Rows& rows, uint64_t& sum, const Rows* next = nullptr) const;

 private:
  // How rows of some layers are made.
  struct Making {
    explicit Making(const RowGroup& group);
    RowLayout src;
    RowLayout dst;
    size_t src_bytes;
    size_t dst_bytes;
    std::vector<RowPlan> plans;
    bool is_copy;
    int ahead;  // rows
  };

  const Making& making_of(int layer) const { return makings_[making_of_layer_[size_t(layer)]]; }
  const std::byte* first_row(const Rows& rows, int memory) const;
  void copy_rows(const Making& making, const Rows& rows, const Rows* next, std::byte* const* to, uint64_t* sums) const;
  uint64_t convert_row(const Making& making, const RowPlan& plan, const Rows& rows, int token, std::byte* to) const;
  void convert_rope(const Making& making, const std::byte* from, std::byte* to, float* values) const;

  const KvRegion& region_;
  const int copies_;
  std::vector<Making> makings_;
  std::vector<uint16_t> making_of_layer_;
  const RowKernels& kernels_;
  decltype(RowKernels::copy) const write_;
  decltype(RowKernels::copy_lanes) const write_lanes_;
};

}  // namespace tpla
