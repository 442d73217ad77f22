#include "reparam/symmetric_solve.h"

#include <algorithm>
#include <cmath>

namespace tpla::reparam {

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
