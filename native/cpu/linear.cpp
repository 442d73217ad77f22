// Matrix products of CpuBackend: how they are cut into tasks, and the two ways a task is computed.
#include <algorithm>

#include "cpu/cpu_backend.h"

namespace tpla::cpu {

namespace {

// Up to this many rows of x the weights are streamed once through dot products; beyond, unpacking them into panels pays.
constexpr int64_t kFewRows = 12;
// Weight bytes that make a task worth handing to a thread, and columns and depth of a packed block (64 x 512 floats fit L2 twice).
constexpr int64_t kStreamBytes = 32 << 10;
constexpr int64_t kBlockColumns = 64;
constexpr int64_t kBlockDepth = 512;
constexpr int64_t kBlockRows = 256;

int64_t inputs(const Linear& l) { return l.transposed ? l.w.rows : l.w.cols; }
int64_t outputs(const Linear& l) { return l.transposed ? l.w.cols : l.w.rows; }

}  // namespace

void CpuBackend::linear(std::span<const Linear> batch) {
  linear_tasks_.clear();
  for (const Linear& l : batch) plan_linear(l, linear_tasks_);
  team_.run(int64_t(linear_tasks_.size()), [&](int64_t index, int thread) {
    const LinearTask& task = linear_tasks_[size_t(index)];
    if (task.linear->m <= kFewRows) {
      run_few_rows(task);
    } else {
      run_packed(task, thread);
    }
  });
}

void CpuBackend::plan_linear(const Linear& l, std::vector<LinearTask>& tasks) const {
  const int64_t out = outputs(l);
  if (l.m == 0 || out == 0) return;
  const int64_t threads = team_.size();
  if (l.m <= kFewRows) {
    const int64_t bytes_per_output = std::max<int64_t>(1, inputs(l) * int64_t(dtype_bytes(l.w.dtype)));
    // Whole groups of rows (or of column vectors) that the kernels take together.
    const int64_t unit = l.transposed ? 64 : 4;
    int64_t step = std::max<int64_t>(unit, kStreamBytes / bytes_per_output / unit * unit);
    if (threads == 1) step = out;
    for (int64_t begin = 0; begin < out; begin += step) tasks.push_back({&l, begin, std::min(out, begin + step), 0, l.m});
    return;
  }
  const int64_t column_blocks = (out + kBlockColumns - 1) / kBlockColumns;
  // Splitting rows repeats the unpacking of weights, so it is done only where columns cannot keep all threads busy.
  const int64_t most_row_blocks = (l.m + kBlockRows - 1) / kBlockRows;
  const int64_t row_blocks = std::clamp<int64_t>((3 * threads + column_blocks - 1) / column_blocks, 1, threads == 1 ? 1 : most_row_blocks);
  for (int64_t c = 0; c < column_blocks; ++c) {
    for (int64_t r = 0; r < row_blocks; ++r) {
      tasks.push_back({&l, c * kBlockColumns, std::min(out, (c + 1) * kBlockColumns), l.m * r / row_blocks, l.m * (r + 1) / row_blocks});
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

}  // namespace tpla::cpu
