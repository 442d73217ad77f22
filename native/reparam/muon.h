// Muon (Jordan et al. 2024) in white coordinates, for the matrices that descent moves.
#pragma once
#include "reparam/compute.h"

namespace tpla::reparam {

// How far what depends on a matrix moves, in the mean square, when its rows (or columns) do: x ↦ xᵀ · gram · x, and `root` with
// root · rootᵀ = gram⁻¹. One for all matrices of a parameter, or one for each, one below the other.
struct Metric {
  Tensor gram, root;
};

// `gram`: second moments [n, n], one or several below one another. Directions without variance get a little of the mean one.
Metric make_metric(Compute& compute, HostMatrix gram);

// Matrices of one shape, one below the other, that follow the momentum of their gradient after all its singular values have been made alike:
// directions in which the error is flat move as far as those in which it is steep. What is alike is measured where rows and columns are white,
// so that a step moves logits and outputs by as much whatever the spectrum of latents and queries is.
class MuonParameter {
 public:
  // `left` (may be null) is the metric of the rows of each matrix, `right` that of their columns; both are kept by reference.
  MuonParameter(Compute& compute, const View& values, const View& gradient, int64_t matrices, const Metric* left, const Metric& right);

  // `rate` is relative to the root mean square of the white values at the start. Overwrites the gradient.
  void step(float rate);

 private:
  View blocks(const View& m) const { return m.row_blocks(matrices_); }
  // `m` for each of the matrices.
  View each(const Tensor& m) const { return m->rows == m->cols ? m.view().repeated(matrices_) : m.view().row_blocks(matrices_); }
  void orthogonalise(View& from, View& to);

  Compute& compute_;
  View values_, gradient_;
  int64_t matrices_;
  const Metric* left_;
  const Metric* right_;
  bool is_wide_;
  Tensor momentum_, next_, gram_, polynomial_;
  float scale_ = 0;
};

}  // namespace tpla::reparam
