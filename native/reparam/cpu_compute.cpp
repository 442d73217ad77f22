#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <thread>

#include "core/error.h"
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

const float* at(const View& v, int64_t i) { return v.data + i * v.step; }
float* at_mutable(const View& v, int64_t i) { return v.data + i * v.step; }

class CpuCompute final : public Compute {
 public:
  explicit CpuCompute(int threads) : kernels_(cpu::select_kernels(nullptr)), team_(threads) {}

  std::string name() const override { return std::string(kernels_.name) + ", " + std::to_string(team_.size()) + (team_.size() == 1 ? " thread" : " threads"); }

  Tensor allocate(int64_t rows, int64_t cols) override {
    const int64_t ld = (cols + kRowFloats - 1) / kRowFloats * kRowFloats;
    const size_t bytes = std::max<size_t>(size_t(rows) * size_t(ld), size_t(kRowFloats)) * sizeof(float);
    auto* data = static_cast<float*>(std::aligned_alloc(kRowFloats * sizeof(float), bytes));
    if (!data) throw Error("OUT_OF_MEMORY", "the system refused " + std::to_string(bytes) + " bytes");
    std::memset(data, 0, bytes);
    return Tensor(Tensor::Memory(data, [](float* memory) { std::free(memory); }), rows, cols, ld);
  }

  void upload(const float* host, int64_t host_ld, const View& to) override {
    for (int64_t i = 0; i < to.rows; ++i) std::memcpy(to.data + i * to.ld, host + i * host_ld, size_t(to.cols) * sizeof(float));
  }
  void download(const View& from, float* host, int64_t host_ld) override {
    for (int64_t i = 0; i < from.rows; ++i) std::memcpy(host + i * host_ld, from.data + i * from.ld, size_t(from.cols) * sizeof(float));
  }

  void multiply(const View& left, const View& right, const View& out, Update update, float alpha) override {
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

  void adam(const View& parameters, const View& gradient, const View& first, const View& second, const AdamStep& step) override {
    const float correct1 = 1 - std::pow(step.beta1, float(step.time)), correct2 = 1 - std::pow(step.beta2, float(step.time));
    each_row(parameters, [&](int64_t, int64_t row) {
      float *x = parameters.data + row * parameters.ld, *m = first.data + row * first.ld, *v = second.data + row * second.ld;
      const float* g = gradient.data + row * gradient.ld;
      for (int64_t j = 0; j < parameters.cols; ++j) {
        m[j] = step.beta1 * m[j] + (1 - step.beta1) * g[j];
        v[j] = step.beta2 * v[j] + (1 - step.beta2) * g[j] * g[j];
        x[j] -= step.rate * (m[j] / correct1) / (std::sqrt(v[j] / correct2) + 1e-20f);
      }
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
  cpu::ThreadTeam team_;
};

}  // namespace

std::shared_ptr<Compute> make_cpu_compute(int threads) {
  return std::make_shared<CpuCompute>(threads > 0 ? threads : int(std::max(1u, std::thread::hardware_concurrency())));
}

}  // namespace tpla::reparam
