#include "transfer/row_hash.h"

#include "transfer/kv_checksum.h"
#include "transfer/prefetch.h"

namespace tpla {

uint64_t hash_rows(const RowKernels& kernels, const StandingRows& rows, const StandingRows& next) {
  const size_t words = rows.row_bytes / 4;
  const int depth = rows.count / static_cast<int>(kLanes);
  const int ahead = rows_ahead(rows.row_bytes);
  uint64_t sum = 0;
  for (int row = 0; row < depth; row++) {
    uint64_t hashes[kLanes];
    kernels.hash_lanes({rows.at + row * rows.row_bytes, depth * rows.row_bytes}, words, 0,
                       lanes_ahead(row + ahead, rows.at, depth, next.at, next.count / static_cast<int>(kLanes), rows.row_bytes), hashes);
    for (size_t lane = 0; lane < kLanes; lane++) sum += row_value(hashes[lane], rows.copy, rows.layer, rows.first_token + static_cast<int>(lane) * depth + row);
  }
  for (int row = depth * static_cast<int>(kLanes); row < rows.count; row++) {
    sum += row_value(kernels.hash(rows.at + row * rows.row_bytes, words, 0), rows.copy, rows.layer, rows.first_token + row);
  }
  return sum;
}

}  // namespace tpla
