#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <map>
#include <memory>
#include <mutex>
#include <thread>

#include "core/error.h"
#include "cpu/bf16_tiles.h"
#include "cpu/kernels.h"
#include "cpu/thread_team.h"
#include "reparam/compute.h"
#include "reparam/symmetric_solve.h"

namespace tpla::reparam {

namespace {

constexpr int64_t kRowFloats = 64;  // 256 bytes
// Inner dimension that is packed at a time: with a panel's width it stays in the second-level cache.
constexpr int64_t kDepth = 512;
// Rows of a product below which packing its right side again costs more than a further thread gains.
constexpr int64_t kLeastRows = 48;

// The same for products on bf16 tiles: columns and depth of the right side that are packed at a time, and rows of the left; all stay in the
// second-level cache. Smaller products than the last are not worth packing.
constexpr int64_t kTileColumns = 512;
constexpr int64_t kTileDepths = 256;
constexpr int64_t kTileRows = 128;
constexpr int64_t kLeastTileSide = 16;
constexpr int64_t kLeastTileProduct = 1 << 15;

const float* at(const View& v, int64_t i) { return v.data + i * v.step; }
float* at_mutable(const View& v, int64_t i) { return v.data + i * v.step; }

// Memory of tensors that are gone, for new ones of the same size: a fit asks for the same sizes again and again, and pages that the system
// has to clear each time cost as much as products do.
class MemoryPool : public std::enable_shared_from_this<MemoryPool> {
 public:
  ~MemoryPool() {
    for (const auto& [bytes, memory] : kept_) std::free(memory);
  }

  Tensor::Memory take(size_t bytes) {
    float* memory = reuse(bytes);
    if (!memory) memory = static_cast<float*>(std::aligned_alloc(kRowFloats * sizeof(float), bytes));
    if (!memory) throw Error("OUT_OF_MEMORY", "the system refused " + std::to_string(bytes) + " bytes");
    return {memory, [pool = shared_from_this(), bytes](float* gone) { pool->give(bytes, gone); }};
  }

 private:
  static constexpr size_t kMostKept = size_t{256} << 20;

  float* reuse(size_t bytes) {
    const std::lock_guard<std::mutex> lock(mutex_);
    const auto found = kept_.find(bytes);
    if (found == kept_.end()) return nullptr;
    float* memory = found->second;
    kept_.erase(found);
    kept_bytes_ -= bytes;
    return memory;
  }
  void give(size_t bytes, float* memory) {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (kept_bytes_ + bytes > kMostKept) {
      std::free(memory);
      return;
    }
    kept_.emplace(bytes, memory);
    kept_bytes_ += bytes;
  }

  std::mutex mutex_;
  std::multimap<size_t, float*> kept_;
  size_t kept_bytes_ = 0;
};

// Memory for tiles, on whole cache lines.
class TileMemory {
 public:
  explicit TileMemory(int64_t elements) : data_(static_cast<uint16_t*>(std::aligned_alloc(64, size_t(elements) * sizeof(uint16_t))), &std::free) {
    if (!data_) throw Error("OUT_OF_MEMORY", "the system refused " + std::to_string(elements * 2) + " bytes");
  }
  uint16_t* data() { return data_.get(); }

 private:
  std::unique_ptr<uint16_t, decltype(&std::free)> data_;
};

class CpuCompute final : public Compute {
 public:
  explicit CpuCompute(int threads) : CpuCompute(cpu::select_instruction_set(nullptr), threads) {}
  CpuCompute(const cpu::InstructionSet& set, int threads) : kernels_(*set.kernels), tiles_(set.tiles_for_fp32 ? set.tiles : nullptr), team_(threads) {}

  std::string name() const override { return std::string(tiles_ ? tiles_->name : kernels_.name) + ", " + std::to_string(team_.size()) + (team_.size() == 1 ? " thread" : " threads"); }

  Tensor allocate(int64_t rows, int64_t cols) override {
    const int64_t ld = (cols + kRowFloats - 1) / kRowFloats * kRowFloats;
    const size_t bytes = std::max<size_t>(size_t(rows) * size_t(ld), size_t(kRowFloats)) * sizeof(float);
    Tensor::Memory memory = pool_->take(bytes);
    std::memset(memory.get(), 0, bytes);
    return Tensor(std::move(memory), rows, cols, ld);
  }

  void upload(const float* host, int64_t host_ld, const View& to) override {
    for (int64_t i = 0; i < to.rows; ++i) std::memcpy(to.data + i * to.ld, host + i * host_ld, size_t(to.cols) * sizeof(float));
  }
  void download(const View& from, float* host, int64_t host_ld) override {
    for (int64_t i = 0; i < from.rows; ++i) std::memcpy(host + i * host_ld, from.data + i * from.ld, size_t(from.cols) * sizeof(float));
  }

  void allow_rounding(bool allowed) override { parts_ = allowed ? 2 : 3; }

  void multiply(const View& left, const View& right, const View& out, Update update, float alpha) override {
    const int64_t depth = left.transposed ? left.rows : left.cols;
    if (tiles_ && std::min({out.rows, out.cols, depth}) >= kLeastTileSide && out.rows * out.cols * depth >= kLeastTileProduct) {
      return multiply_on_tiles(left, right, out, depth, update, alpha);
    }
    const int64_t panel = kernels_.panel, panels = (out.cols + panel - 1) / panel;
    const int64_t tasks = out.count * panels;
    const int64_t wanted = (2 * team_.size() + tasks - 1) / tasks;
    const int64_t parts = std::max<int64_t>(1, std::min(wanted, out.rows / kLeastRows));
    team_.run(tasks * parts, [&](int64_t index, int) {
      const int64_t matrix = index / (panels * parts), rest = index % (panels * parts);
      const int64_t part = rest % parts;
      multiply_panel(left, right, out, matrix, rest / parts * panel, out.rows * part / parts, out.rows * (part + 1) / parts, update, alpha);
    });
  }

  void zero(const View& to) override {
    each_row(to, [&](int64_t i, int64_t row) { std::memset(at_mutable(to, i) + row * to.ld, 0, size_t(to.cols) * sizeof(float)); });
  }
  void copy(const View& from, const View& to) override {
    each_row(to, [&](int64_t i, int64_t row) { std::memcpy(at_mutable(to, i) + row * to.ld, at(from, i) + row * from.ld, size_t(to.cols) * sizeof(float)); });
  }
  void add(const View& from, float factor, const View& to) override {
    each_row(to, [&](int64_t i, int64_t row) { kernels_.axpy(factor, at(from, i) + row * from.ld, to.cols, at_mutable(to, i) + row * to.ld); });
  }
  void transpose(const View& from, const View& to) override {
    each_row(to, [&](int64_t i, int64_t row) {
      float* out = at_mutable(to, i) + row * to.ld;
      for (int64_t j = 0; j < to.cols; ++j) out[j] = at(from, i)[j * from.ld + row];
    });
  }

  void softmax(const View& scores, const View& last_token, float scale) override {
    each_column_range(scores, [&](int64_t begin, int64_t end) {
      for (int64_t j = begin; j < end; ++j) {
        const int64_t first_hidden = int64_t(last_token.data[j % last_token.cols]) + 1;
        for (int64_t t = std::max<int64_t>(first_hidden, 0); t < scores.rows; ++t) scores.data[t * scores.ld + j] = -std::numeric_limits<float>::infinity();
      }
      // The kernel may round the width up to whole vectors, inside the padding of a row.
      std::vector<float> max(size_t(end - begin) + 16, -std::numeric_limits<float>::infinity()), sum(max.size(), 0.0f), correction(max.size());
      kernels_.softmax_columns(scores.data + begin, scores.rows, end - begin, scores.ld, scale, max.data(), sum.data(), correction.data());
      for (int64_t j = begin; j < end; ++j) sum[size_t(j - begin)] = last_token.data[j % last_token.cols] < 0 ? 0 : 1 / sum[size_t(j - begin)];
      for (int64_t t = 0; t < scores.rows; ++t) {
        float* row = scores.data + t * scores.ld;
        for (int64_t j = begin; j < end; ++j) row[j] = sum[size_t(j - begin)] == 0 ? 0 : row[j] * sum[size_t(j - begin)];
      }
    });
  }

  void softmax_gradient(const View& probabilities, const View& gradient, float scale) override {
    each_column_range(gradient, [&](int64_t begin, int64_t end) {
      std::vector<float> mean(size_t(end - begin), 0.0f);
      for (int64_t t = 0; t < gradient.rows; ++t) {
        const float *p = probabilities.data + t * probabilities.ld, *g = gradient.data + t * gradient.ld;
        for (int64_t j = begin; j < end; ++j) mean[size_t(j - begin)] += p[j] * g[j];
      }
      for (int64_t t = 0; t < gradient.rows; ++t) {
        const float* p = probabilities.data + t * probabilities.ld;
        float* g = gradient.data + t * gradient.ld;
        for (int64_t j = begin; j < end; ++j) g[j] = scale * p[j] * (g[j] - mean[size_t(j - begin)]);
      }
    });
  }

  void block_sums(const View& from, const View& out) override {
    const int64_t width = from.cols / out.cols;
    each_row(out, [&](int64_t, int64_t row) {
      for (int64_t b = 0; b < out.cols; ++b) {
        const float* block = from.data + row * from.ld + b * width;
        float sum = 0;
        for (int64_t j = 0; j < width; ++j) sum += block[j];
        out.data[row * out.ld + b] = sum;
      }
    });
  }

  void weigh_rows(const View& from, const View& weight, const View& out) override {
    each_row(out, [&](int64_t i, int64_t row) {
      const float w = weight.data[row * weight.ld + i];
      const float* in = at(from, i) + row * from.ld;
      float* to = at_mutable(out, i) + row * out.ld;
      for (int64_t j = 0; j < out.cols; ++j) to[j] = w * in[j];
    });
  }

  std::vector<double> dots(const View& a, const View& b) override {
    std::vector<double> sums(static_cast<size_t>(a.count)), rows(size_t(a.count * a.rows));
    each_row(a, [&](int64_t i, int64_t row) {
      const float *x = at(a, i) + row * a.ld, *y = at(b, i) + row * b.ld;
      double sum = 0;
      for (int64_t j = 0; j < a.cols; ++j) sum += double(x[j]) * y[j];
      rows[size_t(i * a.rows + row)] = sum;
    });
    for (size_t i = 0; i < rows.size(); ++i) sums[i / size_t(a.rows)] += rows[i];
    return sums;
  }

  std::vector<double> column_sums(const View& a) override {
    std::vector<double> sums(static_cast<size_t>(a.cols));
    for (int64_t i = 0; i < a.rows; ++i) {
      for (int64_t j = 0; j < a.cols; ++j) sums[size_t(j)] += a.data[i * a.ld + j];
    }
    return sums;
  }

  void covariances(const View& probabilities, const View& x, const View& y, std::vector<double>& cross, std::vector<double>& own) override {
    cross.assign(size_t(x.cols), 0);
    own.assign(size_t(x.cols), 0);
    each_column_range(x, [&](int64_t begin, int64_t end) {
      std::vector<double> mean_x(size_t(end - begin)), mean_y(size_t(end - begin));
      for (int64_t t = 0; t < x.rows; ++t) {
        const float *p = probabilities.data + t * probabilities.ld, *u = x.data + t * x.ld, *v = y.data + t * y.ld;
        for (int64_t j = begin; j < end; ++j) {
          const double weight = p[j];
          mean_x[size_t(j - begin)] += weight * u[j];
          mean_y[size_t(j - begin)] += weight * v[j];
          cross[size_t(j)] += weight * u[j] * v[j];
          own[size_t(j)] += weight * v[j] * v[j];
        }
      }
      for (int64_t j = begin; j < end; ++j) {
        cross[size_t(j)] -= mean_x[size_t(j - begin)] * mean_y[size_t(j - begin)];
        own[size_t(j)] -= mean_y[size_t(j - begin)] * mean_y[size_t(j - begin)];
      }
    });
  }

  void solve(const View& a, const View& b, double ridge) override {
    const int64_t n = a.rows, m = b.cols;
    team_.run(a.count, [&](int64_t i, int) {
      std::vector<double> left(size_t(n * n)), right(size_t(n * m));
      const float* from = at(a, i);
      for (int64_t row = 0; row < n; ++row) {
        for (int64_t j = 0; j < n; ++j) left[size_t(row * n + j)] = 0.5 * (double(from[row * a.ld + j]) + from[j * a.ld + row]);
        for (int64_t j = 0; j < m; ++j) right[size_t(row * m + j)] = at(b, i)[row * b.ld + j];
      }
      solve_symmetric(left, right, n, m, ridge);
      for (int64_t row = 0; row < n; ++row) {
        for (int64_t j = 0; j < m; ++j) at_mutable(b, i)[row * b.ld + j] = float(right[size_t(row * m + j)]);
      }
    });
  }

  void normalise(const View& matrices) override {
    const std::vector<double> squares = dots(matrices, matrices);
    each_row(matrices, [&](int64_t i, int64_t row) {
      const float factor = squares[size_t(i)] > 0 ? float(1 / std::sqrt(squares[size_t(i)])) : 0;
      float* x = at_mutable(matrices, i) + row * matrices.ld;
      for (int64_t j = 0; j < matrices.cols; ++j) x[j] *= factor;
    });
  }

 private:
  // task(matrix, row) for all rows of all matrices.
  template <typename Task>
  void each_row(const View& v, Task&& task) {
    team_.run_ranges(v.count * v.rows, 64, [&](int64_t begin, int64_t end, int) {
      for (int64_t i = begin; i < end; ++i) task(i / v.rows, i % v.rows);
    });
  }
  // task(begin, end) over columns, in whole vectors and cache lines.
  template <typename Task>
  void each_column_range(const View& v, Task&& task) {
    team_.run_ranges((v.cols + kRowFloats - 1) / kRowFloats, 1, [&](int64_t begin, int64_t end, int) { task(begin * kRowFloats, std::min(end * kRowFloats, v.cols)); });
  }

  void multiply_on_tiles(const View& left, const View& right, const View& out, int64_t depth, Update update, float alpha) {
    const int64_t panels = (out.cols + kTileColumns - 1) / kTileColumns, tasks = out.count * panels;
    const int64_t wanted = (2 * team_.size() + tasks - 1) / tasks, blocks = (out.rows + 31) / 32;
    const int64_t parts = std::clamp<int64_t>(std::min(wanted, out.rows / kTileRows), 1, blocks);
    team_.run(tasks * parts, [&](int64_t index, int) {
      const int64_t matrix = index / (panels * parts), part = index % parts, column = index / parts % panels * kTileColumns;
      const int64_t begin = blocks * part / parts * 32, end = std::min(blocks * (part + 1) / parts * 32, out.rows);
      multiply_tile_panel(left, right, out, matrix, column, begin, end, depth, update, alpha);
    });
  }

  void multiply_tile_panel(const View& left, const View& right, const View& out, int64_t matrix, int64_t column, int64_t begin, int64_t end, int64_t depth, Update update, float alpha) {
    thread_local TileMemory w_tiles(kTileColumns * kTileDepths * cpu::kMostParts), x_tiles(kTileRows * kTileDepths * cpu::kMostParts);
    const int64_t width = std::min(kTileColumns, out.cols - column);
    for (int64_t k = 0; k < depth; k += kTileDepths) {
      const int64_t part = std::min(kTileDepths, depth - k), k_tiles = (part + cpu::kTileDepth - 1) / cpu::kTileDepth;
      const float* w = at(right, matrix);
      if (right.transposed) {
        tiles_->pack_w(view_f32(w, right.rows, right.cols, right.ld), column, width, k, part, parts_, w_tiles.data());
      } else {
        tiles_->pack_w_transposed(w + k * right.ld + column, right.ld, width, part, parts_, w_tiles.data());
      }
      for (int64_t row = begin; row < end; row += kTileRows) {
        const int64_t rows = std::min(kTileRows, end - row);
        const float* x = at(left, matrix);
        if (left.transposed) {
          tiles_->pack_x_transposed(x + k * left.ld + row, left.ld, rows, part, parts_, x_tiles.data());
        } else {
          tiles_->pack_x(x + row * left.ld + k, left.ld, rows, part, parts_, x_tiles.data());
        }
        const int64_t tile_step = k_tiles * parts_ * cpu::kTileElements;
        tiles_->multiply({.m = rows, .n = width, .x = x_tiles.data(), .x_row_tile = tile_step, .x_parts = parts_, .w = w_tiles.data(), .w_column_tile = tile_step, .w_parts = parts_,
                          .k_tiles = k_tiles, .scale = alpha, .accumulate = update == Update::add || k > 0, .c = at_mutable(out, matrix) + row * out.ld + column, .ldc = out.ld});
      }
    }
  }

  // Columns [column, column + panel) and rows [begin, end) of one matrix of a product.
  void multiply_panel(const View& left, const View& right, const View& out, int64_t matrix, int64_t column, int64_t begin, int64_t end, Update update, float alpha) {
    thread_local std::vector<float> packed;
    const int64_t depth = left.transposed ? left.rows : left.cols, width = std::min<int64_t>(kernels_.panel, out.cols - column);
    packed.resize(size_t(kernels_.panel) * size_t(kDepth));
    const WeightView stored = view_f32(at(right, matrix), right.rows, right.cols, right.ld);
    for (int64_t k = 0; k < depth; k += kDepth) {
      const int64_t part = std::min(kDepth, depth - k);
      if (right.transposed) {
        kernels_.pack_transposed(stored, column, width, k, part, packed.data());
      } else {
        kernels_.pack(stored, k, part, column, width, packed.data());
      }
      if (alpha != 1) kernels_.scale(packed.data(), alpha, part * kernels_.panel);
      cpu::Gemm gemm{};
      gemm.m = end - begin;
      gemm.n = width;
      gemm.k = part;
      gemm.a_row = left.transposed ? 1 : left.ld;
      gemm.a_col = left.transposed ? left.ld : 1;
      gemm.a = at(left, matrix) + begin * gemm.a_row + k * gemm.a_col;
      gemm.b = packed.data();
      gemm.b_panel = part * kernels_.panel;
      gemm.b_row = kernels_.panel;
      gemm.c = at_mutable(out, matrix) + begin * out.ld + column;
      gemm.ldc = out.ld;
      gemm.accumulate = update == Update::add || k > 0;
      kernels_.gemm(gemm);
    }
  }

  const cpu::Kernels& kernels_;
  const cpu::TileKernels* tiles_;  // null where fp32 arithmetic is faster
  std::shared_ptr<MemoryPool> pool_ = std::make_shared<MemoryPool>();
  int parts_ = 3;                  // of operands on tiles; three carry all of fp32
  cpu::ThreadTeam team_;
};

}  // namespace

std::shared_ptr<Compute> make_cpu_compute(int threads) {
  return std::make_shared<CpuCompute>(threads > 0 ? threads : int(std::max(1u, std::thread::hardware_concurrency())));
}

}  // namespace tpla::reparam
