// Attention in float64 on the GPU, and how far a result is from it. Two tiled products with a softmax between them, over as many query
// rows at a time as their logits fit into memory.
//
// A View says what the rows and keys of a problem are:
//   int key_dim, value_dim;
//   Row row(int sequence, int head, int i)  ->  row[c], c < key_dim, as double
//   Key key(int sequence, int head, int t)  ->  key[c] and, for the value, key.value(c)
//   int limit(int sequence, int i)           ->  keys that row i sees, the first ones
//   int64_t index(int sequence, int head, int i)  ->  row of out and lse
//   bool sees(int sequence, int head, int i, int t)               ->  whether row i sees key t < limit
//   double logit(int sequence, int head, int i, int t, double x)  ->  the logit, x being the scaled product
#pragma once

#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include "bench/attention_shape.h"
#include "cuda/bench/gpu.h"

namespace tpla::bench {

// Query rows of one sequence (and head) that are worked on together.
struct ReferenceRows {
  int sequence;
  int head;
  int first;
  int count;
  int keys;         // most that any of them sees
  int64_t state;    // first row in the chunk's memory
  int64_t logits;   // first element of its [count][keys] logits
};

// Worst values travel as the bits of non-negative doubles, whose order is that of unsigned integers; NaN is above all.
struct ErrorSums {
  unsigned long long worst_row = 0;
  unsigned long long worst_lse = 0;
  double squares = 0;
  double norm = 0;
};

// A query row as it is stored.
struct Bf16Row {
  const __nv_bfloat16* values;
  __device__ double operator[](int c) const { return __bfloat162float(values[c]); }
};

namespace reference {

constexpr int kTile = 64;   // rows, keys or columns of a block's tile
constexpr int kDepth = 16;  // of one step of a product
constexpr int kThreads = 256;

// 4×4 outputs a thread: rows 4·(t / 16).., columns 4·(t % 16)...
__device__ inline void multiply_step(const double (&a)[kDepth][kTile], const double (&b)[kDepth][kTile], double (&sum)[4][4]) {
  const int row = threadIdx.x / 16 * 4, column = threadIdx.x % 16 * 4;
#pragma unroll
  for (int k = 0; k < kDepth; ++k) {
    double x[4], y[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      x[i] = a[k][row + i];
      y[i] = b[k][column + i];
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) {
#pragma unroll
      for (int j = 0; j < 4; ++j) sum[i][j] += x[i] * y[j];
    }
  }
}

// Grid: (tiles of keys, tiles of rows, items).
template <class View>
__global__ void __launch_bounds__(kThreads) logits_kernel(View view, const ReferenceRows* items, double scale, double* logits) {
  const ReferenceRows item = items[blockIdx.z];
  const int row0 = blockIdx.y * kTile, key0 = blockIdx.x * kTile;
  if (row0 >= item.count || key0 >= item.keys) return;
  __shared__ double a[kDepth][kTile], b[kDepth][kTile];
  double sum[4][4] = {};
  const int line = threadIdx.x / 4, quad = threadIdx.x % 4 * 4;
  const bool has_row = row0 + line < item.count, has_key = key0 + line < item.keys;
  const auto row = view.row(item.sequence, item.head, item.first + (has_row ? row0 + line : 0));
  const auto key = view.key(item.sequence, item.head, has_key ? key0 + line : 0);
  for (int c0 = 0; c0 < view.key_dim; c0 += kDepth) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int c = c0 + quad + i;
      a[quad + i][line] = has_row && c < view.key_dim ? row[c] : 0;
      b[quad + i][line] = has_key && c < view.key_dim ? key[c] : 0;
    }
    __syncthreads();
    multiply_step(a, b, sum);
    __syncthreads();
  }
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int r = row0 + threadIdx.x / 16 * 4 + i;
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const int t = key0 + threadIdx.x % 16 * 4 + j;
      if (r < item.count && t < item.keys) {
        logits[item.logits + static_cast<int64_t>(r) * item.keys + t] = view.logit(item.sequence, item.head, item.first + r, t, sum[i][j] * scale);
      }
    }
  }
}

__device__ inline double block_reduce(double value, double* scratch, bool maximum) {
  scratch[threadIdx.x] = value;
  __syncthreads();
  for (int d = kThreads / 2; d > 0; d /= 2) {
    if (threadIdx.x < d) {
      const double other = scratch[threadIdx.x + d];
      scratch[threadIdx.x] = maximum ? fmax(scratch[threadIdx.x], other) : scratch[threadIdx.x] + other;
    }
    __syncthreads();
  }
  const double result = scratch[0];
  __syncthreads();
  return result;
}

// Logits become probabilities; what a row must not see becomes 0. Grid: (rows, items), one block a row.
template <class View>
__global__ void __launch_bounds__(kThreads) softmax_kernel(View view, const ReferenceRows* items, double* logits, double* lse) {
  const ReferenceRows item = items[blockIdx.y];
  if (static_cast<int>(blockIdx.x) >= item.count) return;
  __shared__ double scratch[kThreads];
  const int limit = view.limit(item.sequence, item.first + blockIdx.x);
  const auto sees = [&](int t) { return t < limit && view.sees(item.sequence, item.head, item.first + blockIdx.x, t); };
  double* row = logits + item.logits + static_cast<int64_t>(blockIdx.x) * item.keys;
  double top = -INFINITY;
  for (int t = threadIdx.x; t < limit; t += kThreads) {
    if (sees(t)) top = fmax(top, row[t]);
  }
  top = block_reduce(top, scratch, true);
  double total = 0;
  for (int t = threadIdx.x; t < limit; t += kThreads) {
    if (!sees(t)) continue;
    row[t] = exp(row[t] - top);
    total += row[t];
  }
  total = block_reduce(total, scratch, false);
  for (int t = threadIdx.x; t < item.keys; t += kThreads) row[t] = sees(t) ? row[t] / total : 0;
  if (threadIdx.x == 0) lse[item.state + blockIdx.x] = total > 0 ? top + log(total) : -INFINITY;
}

// Grid: (tiles of value columns, tiles of rows, items).
template <class View>
__global__ void __launch_bounds__(kThreads) output_kernel(View view, const ReferenceRows* items, const double* probabilities, double* out) {
  const ReferenceRows item = items[blockIdx.z];
  const int row0 = blockIdx.y * kTile, column0 = blockIdx.x * kTile;
  if (row0 >= item.count) return;
  __shared__ double a[kDepth][kTile], b[kDepth][kTile];
  double sum[4][4] = {};
  const int line = threadIdx.x / 4, quad = threadIdx.x % 4 * 4;         // of the probabilities
  const int step = threadIdx.x / 16, columns = threadIdx.x % 16 * 4;    // of the values
  for (int t0 = 0; t0 < item.keys; t0 += kDepth) {
    const bool has_row = row0 + line < item.count, has_key = t0 + step < item.keys;
    const auto key = view.key(item.sequence, item.head, has_key ? t0 + step : 0);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int t = t0 + quad + i, c = column0 + columns + i;
      a[quad + i][line] = has_row && t < item.keys ? probabilities[item.logits + static_cast<int64_t>(row0 + line) * item.keys + t] : 0;
      b[step][columns + i] = has_key && c < view.value_dim ? key.value(c) : 0;
    }
    __syncthreads();
    multiply_step(a, b, sum);
    __syncthreads();
  }
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int r = row0 + threadIdx.x / 16 * 4 + i;
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const int c = column0 + threadIdx.x % 16 * 4 + j;
      if (r < item.count && c < view.value_dim) out[(item.state + r) * view.value_dim + c] = sum[i][j];
    }
  }
}

__device__ inline unsigned long long sortable_bits(double value) {
  return isnan(value) ? 0x7ff8000000000000ULL : static_cast<unsigned long long>(__double_as_longlong(value));
}

// Grid: (rows, items), one block a row.
template <class View>
__global__ void __launch_bounds__(kThreads) compare_kernel(View view, const ReferenceRows* items, const double* want, const double* want_lse,
                                                           const __nv_bfloat16* got, const float* got_lse, ErrorSums* errors) {
  const ReferenceRows item = items[blockIdx.y];
  if (static_cast<int>(blockIdx.x) >= item.count) return;
  __shared__ double scratch[kThreads];
  const int64_t index = view.index(item.sequence, item.head, item.first + blockIdx.x);
  double squares = 0, norm = 0;
  for (int c = threadIdx.x; c < view.value_dim; c += kThreads) {
    const double w = want[(item.state + blockIdx.x) * view.value_dim + c];
    const double error = static_cast<double>(__bfloat162float(got[index * view.value_dim + c])) - w;
    squares += error * error;
    norm += w * w;
  }
  squares = block_reduce(squares, scratch, false);
  norm = block_reduce(norm, scratch, false);
  if (threadIdx.x != 0) return;
  atomicMax(&errors->worst_row, sortable_bits(norm > 0 ? sqrt(squares / norm) : sqrt(squares)));
  atomicAdd(&errors->squares, squares);
  atomicAdd(&errors->norm, norm);
  const double lse = got_lse[index], reference_lse = want_lse[item.state + blockIdx.x];
  const double difference = isinf(reference_lse) ? (lse == reference_lse ? 0.0 : NAN) : fabs(lse - reference_lse);
  atomicMax(&errors->worst_lse, sortable_bits(difference));
}

inline double from_bits(unsigned long long bits) {
  double value;
  static_assert(sizeof value == sizeof bits, "");
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

}  // namespace reference

// `groups` are all rows of the problem, (sequence, head, 0, count, keys) each.
template <class View>
Check compare_with_reference_on_gpu(const View& view, const std::vector<ReferenceRows>& groups, double scale, const __nv_bfloat16* out, const float* lse,
                                    GpuStream& stream) {
  using namespace reference;
  constexpr int64_t kMostDoubles = 128 << 20;  // of logits, 1 GiB
  constexpr size_t kMostItems = 32768;         // a grid's third dimension ends at 65535
  DeviceBuffer<ErrorSums> errors(std::vector<ErrorSums>(1));

  std::vector<ReferenceRows> chunk;
  int64_t rows = 0, logits = 0;
  DeviceBuffer<double> logits_memory, out_memory, lse_memory;
  const auto grown = [](DeviceBuffer<double>& buffer, int64_t count) {
    if (static_cast<int64_t>(buffer.count()) < count) buffer = DeviceBuffer<double>(count);
    return buffer.data();
  };
  const auto work = [&] {
    if (chunk.empty()) return;
    const DeviceBuffer<ReferenceRows> items(chunk);
    int most_rows = 0, most_keys = 0;
    for (const ReferenceRows& item : chunk) {
      most_rows = std::max(most_rows, item.count);
      most_keys = std::max(most_keys, item.keys);
    }
    double* p = grown(logits_memory, logits);
    double* o = grown(out_memory, rows * view.value_dim);
    double* l = grown(lse_memory, rows);
    const unsigned count = static_cast<unsigned>(chunk.size());
    const unsigned row_tiles = (most_rows + kTile - 1) / kTile, key_tiles = std::max(1, (most_keys + kTile - 1) / kTile);
    const unsigned column_tiles = (view.value_dim + kTile - 1) / kTile;
    logits_kernel<<<dim3(key_tiles, row_tiles, count), kThreads, 0, stream.get()>>>(view, items.data(), scale, p);
    softmax_kernel<<<dim3(most_rows, count), kThreads, 0, stream.get()>>>(view, items.data(), p, l);
    output_kernel<<<dim3(column_tiles, row_tiles, count), kThreads, 0, stream.get()>>>(view, items.data(), p, o);
    compare_kernel<<<dim3(most_rows, count), kThreads, 0, stream.get()>>>(view, items.data(), o, l, out, lse, errors.data());
    gpu_check(cudaGetLastError(), "the float64 reference");
    stream.finish("the float64 reference", 120);
    chunk.clear();
    rows = logits = 0;
  };

  for (ReferenceRows group : groups) {
    const int end = group.first + group.count;
    while (group.first < end) {
      // Whole groups where they fit, otherwise as many tiles of rows as do.
      const int64_t room = std::max<int64_t>(1, group.keys);
      const int64_t fitting = std::max<int64_t>(kTile, (kMostDoubles - logits) / room / kTile * kTile);
      group.count = static_cast<int>(std::min<int64_t>(end - group.first, fitting));
      if (!chunk.empty() && (logits + group.count * room > kMostDoubles || rows * view.value_dim > kMostDoubles / 2 || chunk.size() >= kMostItems)) {
        work();
        continue;
      }
      group.state = rows;
      group.logits = logits;
      chunk.push_back(group);
      rows += group.count;
      logits += static_cast<int64_t>(group.count) * group.keys;
      group.first += group.count;
    }
  }
  work();

  const ErrorSums sums = errors.read()[0];
  Check check;
  check.worst_row = from_bits(sums.worst_row);
  check.worst_lse = from_bits(sums.worst_lse);
  check.overall = sums.norm > 0 ? std::sqrt(sums.squares / sums.norm) : std::sqrt(sums.squares);
  check.reference = "float64 on the GPU";
  return check;
}

}  // namespace tpla::bench
