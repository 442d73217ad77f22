#pragma once
#include <cstdint>
#include <vector>

namespace tpla::reparam {

// Solves (A + ridge·diag(A)) X = B in place for symmetric positive definite A [n, n] and B [n, m], both row-major fp64.
// A pivot that is not positive (a direction that calibration never saw) contributes nothing to X.
void solve_symmetric(std::vector<double>& a, std::vector<double>& b, int64_t n, int64_t m, double ridge);

}  // namespace tpla::reparam
