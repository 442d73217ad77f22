#pragma once
#include <cstddef>
#include <cstdint>

namespace tpla {

enum class WeightDType : uint8_t { f32, bf16, f16, f8_e4m3 };

constexpr size_t dtype_bytes(WeightDType dtype) {
  return dtype == WeightDType::f32 ? 4 : dtype == WeightDType::f8_e4m3 ? 1 : 2;
}

// A matrix [rows, cols] as it is stored, or a rectangle of one: nothing is copied. Element (i, j) is at
// data + (i * ld + j) * size; fp8 is multiplied by scale[(row0 + i) / block_rows][(col0 + j) / block_cols].
struct WeightView {
  const std::byte* data = nullptr;
  WeightDType dtype = WeightDType::f32;
  int64_t rows = 0;
  int64_t cols = 0;
  int64_t ld = 0;
  // fp8 only. Offsets of this view in the stored matrix locate its scales.
  const float* scale = nullptr;
  int64_t scale_ld = 0;
  int block_rows = 1;
  int block_cols = 1;
  int64_t row0 = 0;
  int64_t col0 = 0;

  size_t bytes() const { return size_t(rows) * size_t(cols) * dtype_bytes(dtype); }

  WeightView slice(int64_t row_begin, int64_t row_end, int64_t col_begin, int64_t col_end) const {
    WeightView part = *this;
    part.data = data + size_t(row_begin * ld + col_begin) * dtype_bytes(dtype);
    part.rows = row_end - row_begin;
    part.cols = col_end - col_begin;
    part.row0 = row0 + row_begin;
    part.col0 = col0 + col_begin;
    return part;
  }
  WeightView row_slice(int64_t begin, int64_t end) const { return slice(begin, end, 0, cols); }
  WeightView col_slice(int64_t begin, int64_t end) const { return slice(0, rows, begin, end); }
};

// fp32 matrix in memory.
inline WeightView view_f32(const float* data, int64_t rows, int64_t cols, int64_t ld) {
  WeightView view;
  view.data = reinterpret_cast<const std::byte*>(data);
  view.rows = rows;
  view.cols = cols;
  view.ld = ld;
  return view;
}

}  // namespace tpla
