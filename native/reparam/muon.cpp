#include "reparam/muon.h"

#include <algorithm>
#include <cmath>
#include <utility>

namespace tpla::reparam {

static constexpr float kMomentum = 0.95f;
// Of the mean variance, added to that of every direction: a direction that calibration hardly saw must not move without bound.
static constexpr double kDamping = 1e-2;

// root with root · rootᵀ = (gram + damping)⁻¹, that is L⁻ᵀ of gram = L Lᵀ; both [n, n] at row `first`.
static void invert_root(HostMatrix& gram, HostMatrix& root, int64_t first) {
  const int64_t n = gram.cols;
  double trace = 0;
  for (int64_t i = 0; i < n; ++i) trace += gram.at(first + i, i);
  for (int64_t i = 0; i < n; ++i) gram.at(first + i, i) += float(kDamping * trace / double(n) + 1e-30);
  std::vector<double> lower(size_t(n * n)), inverse(size_t(n * n));
  for (int64_t i = 0; i < n; ++i) {
    for (int64_t j = 0; j <= i; ++j) {
      double sum = gram.at(first + i, j);
      for (int64_t k = 0; k < j; ++k) sum -= lower[size_t(i * n + k)] * lower[size_t(j * n + k)];
      lower[size_t(i * n + j)] = i == j ? std::sqrt(std::max(sum, 1e-30)) : sum / lower[size_t(j * n + j)];
    }
  }
  for (int64_t i = 0; i < n; ++i) {  // L · inverse = 1, by rows
    double* row = &inverse[size_t(i * n)];
    row[i] = 1;
    for (int64_t k = 0; k < i; ++k) {
      for (int64_t j = 0; j <= k; ++j) row[j] -= lower[size_t(i * n + k)] * inverse[size_t(k * n + j)];
    }
    for (int64_t j = 0; j <= i; ++j) {
      row[j] /= lower[size_t(i * n + i)];
      root.at(first + j, i) = float(row[j]);
    }
  }
}

Metric make_metric(Compute& compute, HostMatrix gram) {
  HostMatrix root(gram.rows, gram.cols);
  for (int64_t first = 0; first < gram.rows; first += gram.cols) invert_root(gram, root, first);
  return {compute.upload(gram), compute.upload(root)};
}

MuonParameter::MuonParameter(Compute& compute, const View& values, const View& gradient, int64_t matrices, const Metric* left, const Metric& right)
    : compute_(compute), values_(values), gradient_(gradient), matrices_(matrices), left_(left), right_(&right), is_wide_(values.rows / matrices <= values.cols),
      momentum_(compute.allocate(values.rows, values.cols)), next_(compute.allocate(values.rows, values.cols)) {
  const int64_t rows = values.rows / matrices, side = std::min(rows, values.cols);
  gram_ = compute.allocate(matrices * side, side);
  polynomial_ = compute.allocate(matrices * side, side);
  // ‖white values‖² = tr(valuesᵀ · left · values · right).
  const Tensor half = compute.allocate(values.rows, values.cols), whole = compute.allocate(values.rows, values.cols);
  compute.multiply(values, right.gram, half);
  if (left) {
    compute.multiply(each(left->gram), blocks(half), blocks(whole));
  } else {
    compute.copy(half, whole);
  }
  const double mean_square = compute.dots(whole, values)[0] / double(std::max<int64_t>(1, values.rows * values.cols));
  // An orthogonal matrix has entries of 1 / √(longer side).
  scale_ = float(std::sqrt(std::max(0.0, mean_square) * double(std::max(rows, values.cols))));
}

void MuonParameter::step(float rate) {
  compute_.add(momentum_, kMomentum - 1, momentum_);
  compute_.add(gradient_, 1 - kMomentum, momentum_);
  compute_.add(gradient_, -kMomentum, gradient_);  // Nesterov's: looks one step ahead
  compute_.add(momentum_, kMomentum, gradient_);
  View from = gradient_, to = next_;
  const auto move = [&](const View& left, const View& right, bool by_matrix) {
    compute_.multiply(left, right, by_matrix ? blocks(to) : to);
    std::swap(from, to);
  };
  if (left_) move(each(left_->root).t(), blocks(from), true);
  move(from, right_->root, false);
  orthogonalise(from, to);
  if (left_) move(each(left_->root), blocks(from), true);
  move(from, right_->root->t(), false);
  compute_.add(from, -rate * scale_, values_);
}

// Newton-Schulz with the coefficients of Jordan et al., after which singular values lie between 0.7 and 1.2. The result is in `from`.
void MuonParameter::orthogonalise(View& from, View& to) {
  compute_.normalise(blocks(from));
  for (int i = 0; i < 5; ++i) {
    const View x = blocks(from), gram = blocks(gram_), polynomial = blocks(polynomial_);
    compute_.multiply(is_wide_ ? x : x.t(), is_wide_ ? x.t() : x, gram);
    compute_.multiply(gram, gram, polynomial, Update::set, 2.0315f);
    compute_.add(gram_, -4.7750f, polynomial_);
    compute_.multiply(is_wide_ ? polynomial : x, is_wide_ ? x : polynomial, blocks(to));
    compute_.add(from, 3.4445f, to);
    std::swap(from, to);
  }
}

}  // namespace tpla::reparam
