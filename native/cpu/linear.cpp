// Matrix products of CpuBackend: how they are cut into tasks, and the four ways a task is computed.
#include <algorithm>

#include "cpu/blas.h"
#include "cpu/cpu_backend.h"

namespace tpla::cpu {

namespace {

// Up to this many rows of x the weights are streamed once through dot products; beyond, unpacking them into panels, or tiles, pays.
constexpr int64_t kFewRows = 16;
constexpr int64_t kFewRowsBeforeTiles = 8;
// Weight bytes that make a task worth handing to a thread, and columns and depth of a packed block (64 x 512 floats fit L2 twice).
constexpr int64_t kStreamBytes = 32 << 10;
constexpr int64_t kBlockColumns = 64;
constexpr int64_t kBlockDepth = 512;
constexpr int64_t kBlockRows = 256;
// The same for bf16 tiles: 128 columns x 1024 deep of w (256 KiB) beside 128 rows x 1024 of x in three parts (768 KiB).
constexpr int64_t kTileBlockColumns = 128;
constexpr int64_t kTileBlockDepth = 1024;
constexpr int64_t kTileBlockRows = 128;
constexpr int64_t kTileSmallestRows = 64;
// A BLAS packs its operands itself: larger blocks, fewer calls.
constexpr int64_t kBlasBlockColumns = 256;
constexpr int64_t kBlasBlockDepth = 1024;

int64_t inputs(const Linear& l) { return l.transposed ? l.w.rows : l.w.cols; }
int64_t outputs(const Linear& l) { return l.transposed ? l.w.cols : l.w.rows; }

}  // namespace

void CpuBackend::linear(std::span<const Linear> batch) {
  linear_tasks_.clear();
  const std::vector<const uint16_t*> tiled = tile_inputs(batch);
  for (size_t i = 0; i < batch.size(); ++i) plan_linear(batch[i], tiled.empty() ? nullptr : tiled[i], linear_tasks_);
  team_.run(int64_t(linear_tasks_.size()), [&](int64_t index, int thread) {
    const LinearTask& task = linear_tasks_[size_t(index)];
    if (task.x_tiles) {
      run_tiles(task, thread);
    } else if (task.linear->m <= kFewRows) {
      run_few_rows(task);
    } else if (blas_) {
      run_blas(task, thread);
    } else {
      run_packed(task, thread);
    }
  });
}

bool CpuBackend::fits_tiles(const Linear& l) const {
  if (!tiles_ || l.transposed || l.m <= kFewRowsBeforeTiles) return false;
  // Scale blocks must begin and end on whole tiles of the depth.
  return !l.w.scale || (l.w.block_cols % kTileDepth == 0 && l.w.col0 % kTileDepth == 0);
}

std::vector<const uint16_t*> CpuBackend::tile_inputs(std::span<const Linear> batch) {
  struct Input {
    const Linear* linear;
    size_t offset;  // elements
    int64_t k_tiles;
  };
  std::vector<Input> inputs_of;
  std::vector<size_t> input_of(batch.size(), SIZE_MAX);
  size_t total = 0;
  for (size_t i = 0; i < batch.size(); ++i) {
    const Linear& l = batch[i];
    if (!fits_tiles(l)) continue;
    // Products of the same x follow one another: gate and up, query and latent.
    if (!inputs_of.empty()) {
      const Linear& last = *inputs_of.back().linear;
      if (last.x == l.x && last.ldx == l.ldx && last.m == l.m && last.w.cols == l.w.cols) {
        input_of[i] = inputs_of.size() - 1;
        continue;
      }
    }
    const int64_t k_tiles = (l.w.cols + kTileDepth - 1) / kTileDepth;
    input_of[i] = inputs_of.size();
    inputs_of.push_back({&l, total, k_tiles});
    total += size_t((l.m + kTileRows - 1) / kTileRows * k_tiles * x_parts_ * kTileElements);
  }
  if (total == 0) return {};
  auto* tiles = reinterpret_cast<uint16_t*>(x_tiles_.reserve((total + 1) / 2));
  struct Part {
    const Input* input;
    int64_t row_tile, end;
  };
  constexpr int64_t kTilesPerPart = 4;
  std::vector<Part> parts;
  for (const Input& input : inputs_of) {
    const int64_t row_tiles = (input.linear->m + kTileRows - 1) / kTileRows;
    for (int64_t t = 0; t < row_tiles; t += kTilesPerPart) parts.push_back({&input, t, std::min(row_tiles, t + kTilesPerPart)});
  }
  team_.run(int64_t(parts.size()), [&](int64_t index, int) {
    const auto& [input, row_tile, end] = parts[size_t(index)];
    const Linear& l = *input->linear;
    const int64_t row = row_tile * kTileRows;
    tiles_->pack_x(l.x + row * l.ldx, l.ldx, std::min(l.m, end * kTileRows) - row, l.w.cols, x_parts_,
                   tiles + input->offset + size_t(row_tile * input->k_tiles * x_parts_ * kTileElements));
  });
  std::vector<const uint16_t*> result(batch.size(), nullptr);
  for (size_t i = 0; i < batch.size(); ++i) {
    if (input_of[i] != SIZE_MAX) result[i] = tiles + inputs_of[input_of[i]].offset;
  }
  return result;
}

void CpuBackend::plan_linear(const Linear& l, const uint16_t* x_tiles, std::vector<LinearTask>& tasks) const {
  const int64_t out = outputs(l);
  if (l.m == 0 || out == 0) return;
  const int64_t threads = team_.size();
  if (!x_tiles && l.m <= kFewRows) {
    const int64_t bytes_per_output = std::max<int64_t>(1, inputs(l) * int64_t(dtype_bytes(l.w.dtype)));
    // Whole groups of rows (or of column vectors) that the kernels take together.
    const int64_t unit = l.transposed ? 64 : 4;
    int64_t step = std::max<int64_t>(unit, kStreamBytes / bytes_per_output / unit * unit);
    if (threads == 1) step = out;
    for (int64_t begin = 0; begin < out; begin += step) tasks.push_back({&l, begin, std::min(out, begin + step), 0, l.m, nullptr});
    return;
  }
  const int64_t block = x_tiles ? kTileBlockColumns : blas_ ? kBlasBlockColumns : kBlockColumns;
  const int64_t column_blocks = (out + block - 1) / block;
  // Splitting rows repeats the unpacking of weights, so it is done only where columns cannot keep all threads busy.
  const int64_t smallest = x_tiles ? kTileSmallestRows : kBlockRows;
  const int64_t most_row_blocks = threads == 1 ? 1 : (l.m + smallest - 1) / smallest;
  const int64_t row_blocks = std::clamp<int64_t>((3 * threads + column_blocks - 1) / column_blocks, 1, most_row_blocks);
  const int64_t unit = x_tiles ? 2 * kTileRows : 1;
  const int64_t units = (l.m + unit - 1) / unit;
  for (int64_t c = 0; c < column_blocks; ++c) {
    for (int64_t r = 0; r < row_blocks; ++r) {
      const int64_t begin = units * r / row_blocks * unit;
      const int64_t end = std::min(l.m, units * (r + 1) / row_blocks * unit);
      if (begin < end) tasks.push_back({&l, c * block, std::min(out, (c + 1) * block), begin, end, x_tiles});
    }
  }
}

void CpuBackend::run_few_rows(const LinearTask& task) const {
  const Linear& l = *task.linear;
  const auto kernel = l.transposed ? kernels_.dot_cols : kernels_.dot_rows;
  kernel(l.w, task.out_begin, task.out_end, l.x, l.ldx, l.m, l.y, l.ldy, l.accumulate);
}

void CpuBackend::run_packed(const LinearTask& task, int thread) {
  const Linear& l = *task.linear;
  const int64_t columns = task.out_end - task.out_begin;
  float* packed = scratch_[size_t(thread)].reserve(size_t(panels(columns) * kernels_.panel * kBlockDepth));
  for (int64_t k = 0; k < inputs(l); k += kBlockDepth) {
    const int64_t depth = std::min(kBlockDepth, inputs(l) - k);
    if (l.transposed) {
      kernels_.pack(l.w, k, depth, task.out_begin, columns, packed);
    } else {
      kernels_.pack_transposed(l.w, task.out_begin, columns, k, depth, packed);
    }
    kernels_.gemm({.m = task.row_end - task.row_begin,
                   .n = columns,
                   .k = depth,
                   .a = l.x + task.row_begin * l.ldx + k,
                   .a_row = l.ldx,
                   .a_col = 1,
                   .b = packed,
                   .b_panel = depth * kernels_.panel,
                   .b_row = kernels_.panel,
                   .c = l.y + task.row_begin * l.ldy + task.out_begin,
                   .ldc = l.ldy,
                   .accumulate = l.accumulate || k > 0});
  }
}

void CpuBackend::run_blas(const LinearTask& task, int thread) {
  const Linear& l = *task.linear;
  const int64_t columns = task.out_end - task.out_begin;
  float* block = scratch_[size_t(thread)].reserve(size_t(columns * kBlasBlockDepth));
  for (int64_t k = 0; k < inputs(l); k += kBlasBlockDepth) {
    const int64_t depth = std::min(kBlasBlockDepth, inputs(l) - k);
    const int64_t row0 = l.transposed ? k : task.out_begin;
    const int64_t col0 = l.transposed ? task.out_begin : k;
    const int64_t rows = l.transposed ? depth : columns;
    const int64_t cols = l.transposed ? columns : depth;
    for (int64_t r = 0; r < rows; ++r) widen_weights(l.w, row0 + r, col0, cols, block + r * cols);
    blas_gemm(task.row_end - task.row_begin, columns, depth, l.x + task.row_begin * l.ldx + k, l.ldx, block, cols, !l.transposed,
              l.y + task.row_begin * l.ldy + task.out_begin, l.ldy, l.accumulate || k > 0);
  }
}

void CpuBackend::widen_weights(const WeightView& w, int64_t row, int64_t col, int64_t count, float* out) const {
  const std::byte* stored = w.data + size_t(row * w.ld) * dtype_bytes(w.dtype);
  if (!w.scale) return kernels_.widen(w.dtype, stored + size_t(col) * dtype_bytes(w.dtype), count, 1.0f, out);
  const float* scales = w.scale + (w.row0 + row) / w.block_rows * w.scale_ld;
  for (int64_t at = col, end; at < col + count; at = end) {
    const int64_t block = (w.col0 + at) / w.block_cols;
    end = std::min(col + count, (block + 1) * w.block_cols - w.col0);
    kernels_.widen(w.dtype, stored + size_t(at) * dtype_bytes(w.dtype), end - at, scales[block], out + (at - col));
  }
}

void CpuBackend::run_tiles(const LinearTask& task, int thread) {
  const Linear& l = *task.linear;
  const WeightView& w = l.w;
  const int64_t k_tiles = (w.cols + kTileDepth - 1) / kTileDepth;
  const int64_t deepest = w.scale ? w.block_cols : kTileBlockDepth;
  const size_t packed_size = size_t(kTileBlockColumns * ((deepest + kTileDepth - 1) / kTileDepth) * kTileDepth * w_parts(w));
  auto* packed = reinterpret_cast<uint16_t*>(scratch_[size_t(thread)].reserve(packed_size / 2));
  for (int64_t n = task.out_begin, n_end; n < task.out_end; n = n_end) {
    // Columns of y, rows of W, that share their scales.
    n_end = w.scale ? std::min(task.out_end, ((w.row0 + n) / w.block_rows + 1) * w.block_rows - w.row0) : task.out_end;
    for (int64_t k = 0, k_end; k < w.cols; k = k_end) {
      k_end = w.scale ? std::min(w.cols, ((w.col0 + k) / w.block_cols + 1) * w.block_cols - w.col0) : std::min(w.cols, k + kTileBlockDepth);
      const int64_t depth_tiles = (k_end - k + kTileDepth - 1) / kTileDepth;
      tiles_->pack_w(w, n, n_end - n, k, k_end - k, w_parts(w), packed);
      const float scale = w.scale ? w.scale[(w.row0 + n) / w.block_rows * w.scale_ld + (w.col0 + k) / w.block_cols] : 1.0f;
      for (int64_t row = task.row_begin; row < task.row_end; row += kTileBlockRows) {
        tiles_->multiply({.m = std::min(kTileBlockRows, task.row_end - row),
                          .n = n_end - n,
                          .x = task.x_tiles + (row / kTileRows * k_tiles + k / kTileDepth) * x_parts_ * kTileElements,
                          .x_row_tile = k_tiles * x_parts_ * kTileElements,
                          .x_parts = x_parts_,
                          .w = packed,
                          .w_column_tile = depth_tiles * w_parts(w) * kTileElements,
                          .w_parts = w_parts(w),
                          .k_tiles = depth_tiles,
                          .scale = scale,
                          .accumulate = l.accumulate || k > 0,
                          .c = l.y + row * l.ldy + n,
                          .ldc = l.ldy});
      }
    }
  }
}

}  // namespace tpla::cpu
