#pragma once
#include <cstddef>

namespace tpla {

// Rows of each lane (row_kernels.h) are asked for at least this long before they are due, across pages of 4 KiB, at which hardware prefetch stops: two rows
// of DeepSeek-V3's cache, whatever its form. One row and three make no difference to whole rows, four cost narrow ones 3 %.
inline constexpr size_t kLaneAheadBytes = 1280;

inline int rows_ahead(size_t row_bytes) { return static_cast<int>((kLaneAheadBytes + row_bytes - 1) / row_bytes); }

}  // namespace tpla
