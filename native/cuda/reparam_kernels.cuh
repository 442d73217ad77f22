// Kernels of a layer fit, all over views of row-major fp32 matrices. Nothing is added atomically: the same input gives the same bits.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "cublaslt.h"
#include "reparam/compute.h"

namespace tpla::cuda {

using reparam::View;

constexpr int kRowThreads = 256;
// Column kernels: lanes side by side along columns, so that loads are whole lines, and several lanes down each column.
constexpr int kColumnLanes = 32;
constexpr int kColumnRows = 16;
constexpr int kDotParts = 64;
constexpr int kSolveThreads = 512;
constexpr int kNormThreads = 512;

// ---------------------------------------------------------------- products

constexpr int kProductTile = 64;
constexpr int kProductDepth = 16;
constexpr int kProductThreads = 256;

// A block computes a tile of 64 x 64, a thread 4 x 4 of it, from slices of depth 16 in shared memory.
__global__ void __launch_bounds__(kProductThreads) product_kernel(Fp32Product p) {
  __shared__ float left[kProductDepth][kProductTile + 4], right[kProductDepth][kProductTile + 4];
  const float* a = p.a + blockIdx.z * p.step_a;
  const float* b = p.b + blockIdx.z * p.step_b;
  float* c = p.c + blockIdx.z * p.step_c;
  const int64_t row0 = int64_t{blockIdx.y} * kProductTile, col0 = int64_t{blockIdx.x} * kProductTile;
  const int thread = int(threadIdx.x), ty = thread / 16 * 4, tx = thread % 16 * 4;
  float sum[4][4] = {};
  for (int64_t k0 = 0; k0 < p.k; k0 += kProductDepth) {
    // Neighbouring threads read neighbouring addresses, along k or across it, as the matrix is stored.
    for (int e = thread; e < kProductTile * kProductDepth; e += kProductThreads) {
      const int i = p.transpose_a ? e % kProductTile : e / kProductDepth, k = p.transpose_a ? e / kProductTile : e % kProductDepth;
      left[k][i] = row0 + i < p.m && k0 + k < p.k ? a[p.transpose_a ? (k0 + k) * p.lda + row0 + i : (row0 + i) * p.lda + k0 + k] : 0.0f;
      const int j = p.transpose_b ? e / kProductDepth : e % kProductTile, l = p.transpose_b ? e % kProductDepth : e / kProductTile;
      right[l][j] = col0 + j < p.n && k0 + l < p.k ? b[p.transpose_b ? (col0 + j) * p.ldb + k0 + l : (k0 + l) * p.ldb + col0 + j] : 0.0f;
    }
    __syncthreads();
#pragma unroll
    for (int k = 0; k < kProductDepth; ++k) {
      const float4 x = *reinterpret_cast<const float4*>(&left[k][ty]), y = *reinterpret_cast<const float4*>(&right[k][tx]);
      const float xs[4] = {x.x, x.y, x.z, x.w}, ys[4] = {y.x, y.y, y.z, y.w};
#pragma unroll
      for (int i = 0; i < 4; ++i) {
#pragma unroll
        for (int j = 0; j < 4; ++j) sum[i][j] = fmaf(xs[i], ys[j], sum[i][j]);
      }
    }
    __syncthreads();
  }
  for (int i = 0; i < 4; ++i) {
    for (int j = 0; j < 4; ++j) {
      if (row0 + ty + i >= p.m || col0 + tx + j >= p.n) continue;
      float& out = c[(row0 + ty + i) * p.ldc + col0 + tx + j];
      out = p.beta == 0 ? p.alpha * sum[i][j] : fmaf(p.beta, out, p.alpha * sum[i][j]);
    }
  }
}

// ---------------------------------------------------------------- by row

// body(i, row, col) for every element of a view, i the matrix.
template <typename Body>
__device__ void each_element(const View& v, Body&& body) {
  for (int64_t row = blockIdx.y; row < v.rows; row += gridDim.y) {
    for (int64_t col = int64_t{blockIdx.x} * blockDim.x + threadIdx.x; col < v.cols; col += int64_t{gridDim.x} * blockDim.x) body(int64_t{blockIdx.z}, row, col);
  }
}

__device__ inline float& element(const View& v, int64_t i, int64_t row, int64_t col) { return v.data[i * v.step + row * v.ld + col]; }

__global__ void add_kernel(View from, float factor, View to) {
  each_element(to, [&](int64_t i, int64_t row, int64_t col) { element(to, i, row, col) += factor * element(from, i, row, col); });
}
__global__ void transpose_kernel(View from, View to) {
  each_element(to, [&](int64_t i, int64_t row, int64_t col) { element(to, i, row, col) = element(from, i, col, row); });
}
__global__ void weigh_rows_kernel(View from, View weight, View out) {
  each_element(out, [&](int64_t i, int64_t row, int64_t col) { element(out, i, row, col) = weight.data[row * weight.ld + i] * element(from, i, row, col); });
}
// One block a matrix; the sum is taken in a fixed order.
__global__ void __launch_bounds__(kNormThreads) normalise_kernel(View matrices) {
  __shared__ double sums[kNormThreads];
  const int thread = int(threadIdx.x);
  const int64_t count = matrices.rows * matrices.cols;
  const auto at = [&](int64_t e) -> float& { return element(matrices, int64_t{blockIdx.x}, e / matrices.cols, e % matrices.cols); };
  double sum = 0;
  for (int64_t e = thread; e < count; e += kNormThreads) sum += double(at(e)) * at(e);
  sums[thread] = sum;
  __syncthreads();
  for (int half = kNormThreads / 2; half > 0; half /= 2) {
    if (thread < half) sums[thread] += sums[thread + half];
    __syncthreads();
  }
  const float factor = sums[0] > 0 ? float(1 / sqrt(sums[0])) : 0.0f;
  for (int64_t e = thread; e < count; e += kNormThreads) at(e) *= factor;
}

// ---------------------------------------------------------------- by column

// Over the lanes of a column, down the block; every lane gets the result.
template <typename T, typename Join>
__device__ T over_lanes(T value, T (*shared)[kColumnLanes], Join&& join) {
  __syncthreads();
  shared[threadIdx.y][threadIdx.x] = value;
  __syncthreads();
  T all = shared[0][threadIdx.x];
  for (int lane = 1; lane < kColumnRows; ++lane) all = join(all, shared[lane][threadIdx.x]);
  return all;
}

__global__ void softmax_kernel(View scores, View last_token, float scale) {
  __shared__ float shared[kColumnRows][kColumnLanes];
  const int64_t column = int64_t{blockIdx.x} * kColumnLanes + threadIdx.x;
  const bool inside = column < scores.cols;
  const int64_t visible = inside ? static_cast<int64_t>(last_token.data[column % last_token.cols]) + 1 : 0;
  float* at = scores.data + column;
  float top = -INFINITY;
  for (int64_t t = threadIdx.y; t < visible; t += kColumnRows) top = fmaxf(top, at[t * scores.ld]);
  top = over_lanes(top, shared, [](float a, float b) { return fmaxf(a, b); });
  float sum = 0;
  for (int64_t t = threadIdx.y; t < visible; t += kColumnRows) {
    const float e = expf(scale * (at[t * scores.ld] - top));
    at[t * scores.ld] = e;
    sum += e;
  }
  sum = over_lanes(sum, shared, [](float a, float b) { return a + b; });
  if (!inside) return;
  const float factor = visible > 0 ? 1 / sum : 0;
  for (int64_t t = threadIdx.y; t < scores.rows; t += kColumnRows) at[t * scores.ld] = t < visible ? at[t * scores.ld] * factor : 0.0f;
}

__global__ void softmax_gradient_kernel(View probabilities, View gradient, float scale) {
  __shared__ float shared[kColumnRows][kColumnLanes];
  const int64_t column = int64_t{blockIdx.x} * kColumnLanes + threadIdx.x;
  const int64_t rows = column < gradient.cols ? gradient.rows : 0;
  const float* p = probabilities.data + column;
  float* g = gradient.data + column;
  float mean = 0;
  for (int64_t t = threadIdx.y; t < rows; t += kColumnRows) mean += p[t * probabilities.ld] * g[t * gradient.ld];
  mean = over_lanes(mean, shared, [](float a, float b) { return a + b; });
  for (int64_t t = threadIdx.y; t < rows; t += kColumnRows) g[t * gradient.ld] = scale * p[t * probabilities.ld] * (g[t * gradient.ld] - mean);
}

__global__ void covariances_kernel(View probabilities, View x, View y, double* cross, double* own) {
  __shared__ double shared[kColumnRows][kColumnLanes];
  const int64_t column = int64_t{blockIdx.x} * kColumnLanes + threadIdx.x;
  const int64_t rows = column < x.cols ? x.rows : 0;
  double mean_x = 0, mean_y = 0, both = 0, square = 0;
  for (int64_t t = threadIdx.y; t < rows; t += kColumnRows) {
    const double p = probabilities.data[t * probabilities.ld + column], u = x.data[t * x.ld + column], v = y.data[t * y.ld + column];
    mean_x += p * u;
    mean_y += p * v;
    both += p * u * v;
    square += p * v * v;
  }
  const auto plus = [](double a, double b) { return a + b; };
  mean_x = over_lanes(mean_x, shared, plus);
  mean_y = over_lanes(mean_y, shared, plus);
  both = over_lanes(both, shared, plus);
  square = over_lanes(square, shared, plus);
  if (rows == 0 || threadIdx.y != 0) return;
  cross[column] = both - mean_x * mean_y;
  own[column] = square - mean_y * mean_y;
}

__global__ void column_sums_kernel(View a, double* sums) {
  const int64_t column = int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
  if (column >= a.cols) return;
  double sum = 0;
  for (int64_t t = 0; t < a.rows; ++t) sum += a.data[t * a.ld + column];
  sums[column] = sum;
}

// ---------------------------------------------------------------- sums

// One warp a sum.
__global__ void block_sums_kernel(View from, View out) {
  const int64_t index = int64_t{blockIdx.x} * (kRowThreads / 32) + threadIdx.x / 32;
  if (index >= out.rows * out.cols) return;
  const int64_t row = index / out.cols, block = index % out.cols, width = from.cols / out.cols;
  const float* at = from.data + row * from.ld + block * width;
  float sum = 0;
  for (int64_t j = threadIdx.x % 32; j < width; j += 32) sum += at[j];
  for (int offset = 16; offset > 0; offset /= 2) sum += __shfl_down_sync(0xffffffffu, sum, offset);
  if (threadIdx.x % 32 == 0) out.data[row * out.ld + block] = sum;
}

// parts[matrix][part]
__global__ void dots_kernel(View a, View b, double* parts) {
  __shared__ double shared[kRowThreads];
  const int64_t matrix = blockIdx.y;
  double sum = 0;
  for (int64_t row = blockIdx.x; row < a.rows; row += gridDim.x) {
    for (int64_t col = threadIdx.x; col < a.cols; col += kRowThreads) sum += double(element(a, matrix, row, col)) * element(b, matrix, row, col);
  }
  shared[threadIdx.x] = sum;
  __syncthreads();
  for (int half = kRowThreads / 2; half > 0; half /= 2) {
    if (int(threadIdx.x) < half) shared[threadIdx.x] += shared[threadIdx.x + half];
    __syncthreads();
  }
  if (threadIdx.x == 0) parts[matrix * gridDim.x + blockIdx.x] = shared[0];
}

// ---------------------------------------------------------------- linear systems

// A block per system: A = Uᵀ U in the upper triangle of `left` (fp64, [n, n] a system), then the two triangular solves with a thread a column of
// B in `right` ([n, m]). A pivot of 0 marks a direction that takes no part; see symmetric_solve.h, which does the same on the CPU.
__global__ void __launch_bounds__(kSolveThreads) solve_kernel(View a, View b, double ridge, double* left, double* right) {
  __shared__ double shared[kSolveThreads];
  const int64_t n = a.rows, m = b.cols;
  double* u = left + int64_t{blockIdx.x} * n * n;
  double* x = right + int64_t{blockIdx.x} * n * m;
  double top = 0;
  for (int64_t e = threadIdx.x; e < n * n; e += kSolveThreads) {
    const int64_t i = e / n, j = e % n;
    const double value = 0.5 * (double(element(a, blockIdx.x, i, j)) + element(a, blockIdx.x, j, i));
    if (i == j) top = fmax(top, value);
    u[e] = i == j ? value * (1 + ridge) : value;
  }
  for (int64_t e = threadIdx.x; e < n * m; e += kSolveThreads) x[e] = element(b, blockIdx.x, e / m, e % m);
  shared[threadIdx.x] = top;
  __syncthreads();
  for (int half = kSolveThreads / 2; half > 0; half /= 2) {
    if (int(threadIdx.x) < half) shared[threadIdx.x] = fmax(shared[threadIdx.x], shared[threadIdx.x + half]);
    __syncthreads();
  }
  const double floor = shared[0] * 1e-12;

  for (int64_t j = 0; j < n; ++j) {
    for (int64_t i = j + threadIdx.x; i < n; i += kSolveThreads) {
      double sums[4] = {u[j * n + i], 0, 0, 0};
      int64_t k = 0;
      for (; k + 4 <= j; k += 4) {
#pragma unroll
        for (int s = 0; s < 4; ++s) sums[s] -= u[(k + s) * n + i] * u[(k + s) * n + j];
      }
      for (; k < j; ++k) sums[0] -= u[k * n + i] * u[k * n + j];
      u[j * n + i] = (sums[0] + sums[1]) + (sums[2] + sums[3]);
    }
    __syncthreads();
    const double square = u[j * n + j];
    __syncthreads();  // before the pivot is replaced
    const bool dead = !(square > floor);
    const double pivot = sqrt(square);
    for (int64_t i = j + threadIdx.x; i < n; i += kSolveThreads) u[j * n + i] = dead ? 0 : i == j ? pivot : u[j * n + i] / pivot;
    __syncthreads();
  }

  for (int64_t c = threadIdx.x; c < m; c += kSolveThreads) {
    for (int64_t i = 0; i < n; ++i) {  // Uᵀ Y = B
      double sums[4] = {x[i * m + c], 0, 0, 0};
      int64_t k = 0;
      for (; k + 4 <= i; k += 4) {
#pragma unroll
        for (int s = 0; s < 4; ++s) sums[s] -= u[(k + s) * n + i] * x[(k + s) * m + c];
      }
      for (; k < i; ++k) sums[0] -= u[k * n + i] * x[k * m + c];
      const double pivot = u[i * n + i];
      x[i * m + c] = pivot == 0 ? 0 : ((sums[0] + sums[1]) + (sums[2] + sums[3])) / pivot;
    }
    for (int64_t i = n - 1; i >= 0; --i) {  // U X = Y
      double sums[4] = {x[i * m + c], 0, 0, 0};
      int64_t k = i + 1;
      for (; k + 4 <= n; k += 4) {
#pragma unroll
        for (int s = 0; s < 4; ++s) sums[s] -= u[i * n + k + s] * x[(k + s) * m + c];
      }
      for (; k < n; ++k) sums[0] -= u[i * n + k] * x[k * m + c];
      const double pivot = u[i * n + i];
      x[i * m + c] = pivot == 0 ? 0 : ((sums[0] + sums[1]) + (sums[2] + sums[3])) / pivot;
    }
    for (int64_t i = 0; i < n; ++i) element(b, blockIdx.x, i, c) = static_cast<float>(x[i * m + c]);
  }
}

}  // namespace tpla::cuda
