#include "reparam/matrix.h"

#include <algorithm>
#include <cmath>
#include <cstring>

namespace tpla::reparam {

// A multiple of every kernel's panel width.
static constexpr int64_t kPad = 64;

Matrix::Matrix(int64_t rows, int64_t cols)
    : rows_(rows), cols_(cols), ld_((cols + kPad - 1) / kPad * kPad), data_(size_t(rows * ld_)) {}

Matrix::Matrix(int64_t rows, int64_t cols, const float* values) : Matrix(rows, cols) {
  for (int64_t i = 0; i < rows; ++i) std::memcpy(row(i), values + i * cols, size_t(cols) * sizeof(float));
}

void Matrix::fill_zero() { std::fill(data_.begin(), data_.end(), 0.0f); }

static void run(const cpu::Kernels& kernels, const Left& left, const float* b, int64_t b_panel, int64_t b_row, int64_t n, Matrix& out, int64_t begin,
                bool accumulate) {
  cpu::Gemm gemm{};
  gemm.m = left.rows;
  gemm.n = n;
  gemm.k = left.cols;
  gemm.a = left.data;
  gemm.a_row = left.row_stride;
  gemm.a_col = left.col_stride;
  gemm.b = b;
  gemm.b_panel = b_panel;
  gemm.b_row = b_row;
  gemm.c = out.row(begin);
  gemm.ldc = out.ld();
  gemm.accumulate = accumulate;
  kernels.gemm(gemm);
}

void multiply(const cpu::Kernels& kernels, const Left& left, const Matrix& right, Matrix& out, int64_t begin, bool accumulate) {
  multiply_rows(kernels, left, right, 0, out, begin, accumulate);
}

void multiply_rows(const cpu::Kernels& kernels, const Left& left, const Matrix& right, int64_t right_begin, Matrix& out, int64_t begin, bool accumulate) {
  run(kernels, left, right.row(right_begin), kernels.panel, right.ld(), right.cols(), out, begin, accumulate);
}

void multiply_transposed(const cpu::Kernels& kernels, const Left& left, const Matrix& right, Matrix& out, int64_t begin, bool accumulate) {
  thread_local std::vector<float> panels;
  const int64_t n = right.rows(), k = right.cols(), width = kernels.panel;
  panels.resize(size_t((n + width - 1) / width * width * k));
  kernels.pack_transposed(view_f32(right.row(0), n, k, right.ld()), 0, n, 0, k, panels.data());
  run(kernels, left, panels.data(), k * width, width, n, out, begin, accumulate);
}

void solve_symmetric(std::vector<double>& a, std::vector<double>& b, int64_t n, int64_t m, double ridge) {
  double largest = 0;
  for (int64_t i = 0; i < n; ++i) largest = std::max(largest, a[size_t(i * n + i)]);
  const double floor = largest * 1e-12;
  for (int64_t i = 0; i < n; ++i) a[size_t(i * n + i)] *= 1 + ridge;

  // A = L Lᵀ, in the lower triangle; the inner loops run along rows.
  std::vector<char> dead(size_t(n), 0);
  for (int64_t i = 0; i < n; ++i) {
    double* row_i = &a[size_t(i * n)];
    for (int64_t j = 0; j <= i; ++j) {
      const double* row_j = &a[size_t(j * n)];
      double sum = row_i[j];
      for (int64_t k = 0; k < j; ++k) sum -= row_i[k] * row_j[k];
      if (j < i) {
        row_i[j] = dead[size_t(j)] ? 0 : sum / row_j[j];
      } else {
        dead[size_t(i)] = !(sum > floor);
        row_i[i] = dead[size_t(i)] ? 1 : std::sqrt(sum);
      }
    }
  }
  for (int64_t i = 0; i < n; ++i) {  // L Y = B
    double* out = &b[size_t(i * m)];
    for (int64_t k = 0; k < i; ++k) {
      const double factor = a[size_t(i * n + k)];
      if (factor == 0) continue;
      const double* in = &b[size_t(k * m)];
      for (int64_t c = 0; c < m; ++c) out[c] -= factor * in[c];
    }
    const double scale = dead[size_t(i)] ? 0 : 1 / a[size_t(i * n + i)];
    for (int64_t c = 0; c < m; ++c) out[c] *= scale;
  }
  for (int64_t i = n - 1; i >= 0; --i) {  // Lᵀ X = Y
    double* out = &b[size_t(i * m)];
    const double scale = dead[size_t(i)] ? 0 : 1 / a[size_t(i * n + i)];
    for (int64_t c = 0; c < m; ++c) out[c] *= scale;
    for (int64_t k = 0; k < i; ++k) {
      const double factor = a[size_t(i * n + k)];
      if (factor == 0) continue;
      double* target = &b[size_t(k * m)];
      for (int64_t c = 0; c < m; ++c) target[c] -= factor * out[c];
    }
  }
}

}  // namespace tpla::reparam
