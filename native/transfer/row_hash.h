#pragma once
#include <cstddef>
#include <cstdint>

#include "transfer/row_kernels.h"

namespace tpla {

// Rows of one layer that stand together, of consecutive tokens.
struct StandingRows {
  const std::byte* at;
  size_t row_bytes;
  int count;
  int copy;
  int layer;
  int first_token;
};

// Their share of a checksum (kv_checksum.h). What is hashed after them is fetched meanwhile; `next` may be they themselves.
uint64_t hash_rows(const RowKernels& kernels, const StandingRows& rows, const StandingRows& next);

// Where the row `index` of each lane stands, of rows that are cut into lanes of `depth`; of a lane's end on, in those that come next.
inline Lanes lanes_ahead(int index, const std::byte* at, int depth, const std::byte* next, int next_depth, size_t row_bytes) {
  if (index < depth) return {at + size_t(index) * row_bytes, depth * row_bytes};
  const int reached = index - depth < next_depth ? index - depth : next_depth > 0 ? next_depth - 1 : 0;
  return {next + size_t(reached) * row_bytes, next_depth * row_bytes};
}

}  // namespace tpla
