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
  int copies() const { return static_cast<int>(plans_.size()); }

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

 private:
  const std::byte* first_row(const Rows& rows, int memory) const;
  void copy_rows(const Rows& rows, const Rows* next, std::byte* const* to, uint64_t* sums) const;
  uint64_t convert_row(const RowPlan& plan, const Rows& rows, int token, std::byte* to) const;
  void convert_rope(const std::byte* from, std::byte* to, float* values) const;

  const KvRegion& region_;
  const KvLayout src_;
  const KvLayout dst_;
  const std::vector<RowPlan> plans_;
  const bool is_copy_;
  const int rows_ahead_;
  const RowKernels& kernels_;
  uint64_t (*const write_)(std::byte*, const std::byte*, size_t, size_t, const std::byte*);
};

}  // namespace tpla
