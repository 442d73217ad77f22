#pragma once
#include <cstdint>
#include <vector>

#include "cpu/kernels.h"

namespace tpla::reparam {

// Row-major fp32 matrix whose rows are padded with zeros to whole panels, so that it can stand on either side of a product.
class Matrix {
 public:
  Matrix() = default;
  Matrix(int64_t rows, int64_t cols);
  Matrix(int64_t rows, int64_t cols, const float* values);

  float* row(int64_t i) { return data_.data() + i * ld_; }
  const float* row(int64_t i) const { return data_.data() + i * ld_; }
  int64_t rows() const { return rows_; }
  int64_t cols() const { return cols_; }
  int64_t ld() const { return ld_; }
  void fill_zero();

 private:
  int64_t rows_ = 0;
  int64_t cols_ = 0;
  int64_t ld_ = 0;
  std::vector<float> data_;
};

// A matrix or a transposed one, or rows of one, as the left side of a product.
struct Left {
  const float* data;
  int64_t rows;
  int64_t cols;
  int64_t row_stride;
  int64_t col_stride;

  Left(const Matrix& m) : Left(m, 0, m.rows()) {}
  Left(const Matrix& m, int64_t begin, int64_t end) : data(m.row(begin)), rows(end - begin), cols(m.cols()), row_stride(m.ld()), col_stride(1) {}
  Left transposed() const {
    Left t = *this;
    std::swap(t.rows, t.cols);
    std::swap(t.row_stride, t.col_stride);
    return t;
  }
  Left first_rows(int64_t count) const {
    Left part = *this;
    part.rows = count;
    return part;
  }
};

// Rows [begin, begin + left.rows) of `out` (+)= left · right.
void multiply(const cpu::Kernels& kernels, const Left& left, const Matrix& right, Matrix& out, int64_t begin = 0, bool accumulate = false);
// Rows of `out` (+)= left · rows [right_begin, right_end) of `right`, where only those rows exist as the inner dimension.
void multiply_rows(const cpu::Kernels& kernels, const Left& left, const Matrix& right, int64_t right_begin, Matrix& out, int64_t begin = 0, bool accumulate = false);
// Rows of `out` (+)= left · rightᵀ.
void multiply_transposed(const cpu::Kernels& kernels, const Left& left, const Matrix& right, Matrix& out, int64_t begin = 0, bool accumulate = false);

// Solves (A + ridge·diag(A)) X = B in place for symmetric positive definite A [n, n] and B [n, m], both row-major fp64.
// A pivot that is not positive (a direction that calibration never saw) contributes nothing to X.
void solve_symmetric(std::vector<double>& a, std::vector<double>& b, int64_t n, int64_t m, double ridge);

}  // namespace tpla::reparam
