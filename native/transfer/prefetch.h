#pragma once
#include <cstddef>

namespace tpla {

// Rows of each lane (row_kernels.h) are asked for about this long before they are due, across pages of 4 KiB, at which hardware prefetch stops. Half and
// twice as much make no difference.
inline constexpr size_t kLaneAheadBytes = 2304;

inline int rows_ahead(size_t row_bytes) { return static_cast<int>((kLaneAheadBytes + row_bytes - 1) / row_bytes); }

}  // namespace tpla
