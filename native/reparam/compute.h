// What a layer fit is computed with: the same operations on a CPU and on a GPU, so that both run the same program.
#pragma once
#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <vector>

namespace tpla::reparam {

// Row-major fp32 matrices of one shape in a device's memory: `count` of them, `step` floats apart (0 repeats one). A view does not own.
struct View {
  float* data = nullptr;
  int64_t rows = 0;
  int64_t cols = 0;
  int64_t ld = 0;
  int64_t count = 1;
  int64_t step = 0;
  bool transposed = false;  // a product reads it as [cols, rows]

  View t() const {
    View view = *this;
    view.transposed = !view.transposed;
    return view;
  }
  View row_range(int64_t begin, int64_t end) const {
    View view = *this;
    view.data += begin * ld;
    view.rows = end - begin;
    return view;
  }
  View col_range(int64_t begin, int64_t end) const {
    View view = *this;
    view.data += begin;
    view.cols = end - begin;
    return view;
  }
  // `blocks` matrices that lie one below the other, or side by side.
  View row_blocks(int64_t blocks) const { return {data, rows / blocks, cols, ld, blocks, rows / blocks * ld, false}; }
  View col_blocks(int64_t blocks) const { return {data, rows, cols / blocks, ld, blocks, cols / blocks, false}; }
  View repeated(int64_t times) const { return {data, rows, cols, ld, times, 0, transposed}; }
};

// Memory of a device that gives itself back. Rows begin 256 bytes apart.
class Tensor {
 public:
  using Memory = std::unique_ptr<float, std::function<void(float*)>>;

  Tensor() = default;
  Tensor(Memory memory, int64_t rows, int64_t cols, int64_t ld) : memory_(std::move(memory)), view_{memory_.get(), rows, cols, ld} {}
  operator View() const { return view_; }
  const View& view() const { return view_; }
  const View* operator->() const { return &view_; }

 private:
  Memory memory_;
  View view_;
};

// Row-major fp32 in host memory.
struct HostMatrix {
  int64_t rows = 0;
  int64_t cols = 0;
  std::vector<float> values;

  HostMatrix() = default;
  HostMatrix(int64_t row_count, int64_t col_count) : rows(row_count), cols(col_count), values(size_t(row_count * col_count)) {}
  HostMatrix(int64_t row_count, int64_t col_count, const float* from) : rows(row_count), cols(col_count), values(from, from + row_count * col_count) {}
  float& at(int64_t i, int64_t j) { return values[size_t(i * cols + j)]; }
  float at(int64_t i, int64_t j) const { return values[size_t(i * cols + j)]; }
};

enum class Update { set, add };

// Products accumulate in fp32; sums that come back to the host, and the solution of linear systems, are fp64. An operation may return
// before it has run; the next one sees its result, and what returns values waits. Results do not depend on the number of threads.
class Compute {
 public:
  virtual ~Compute() = default;
  // "AVX-512, 2 threads"; "NVIDIA H100 80GB HBM3, cuBLASLt 13.1.0"
  virtual std::string name() const = 0;

  // Zeros. Throws OUT_OF_MEMORY.
  virtual Tensor allocate(int64_t rows, int64_t cols) = 0;
  virtual void upload(const float* host, int64_t host_ld, const View& to) = 0;
  virtual void download(const View& from, float* host, int64_t host_ld) = 0;

  // Whether products may round their operands to 17 bits where that is faster, as descent, whose gradients are noise beyond that, allows.
  virtual void allow_rounding(bool) {}
  // out[i] = alpha · left[i] · right[i], or is increased by it.
  virtual void multiply(const View& left, const View& right, const View& out, Update update = Update::set, float alpha = 1) = 0;

  virtual void zero(const View& to) = 0;
  virtual void copy(const View& from, const View& to) = 0;
  // to += factor · from
  virtual void add(const View& from, float factor, const View& to) = 0;
  // to[i] = from[i]ᵀ
  virtual void transpose(const View& from, const View& to) = 0;

  // Attention columns: scores [tokens, heads · queries], one block of columns a head. The column of query q sees tokens 0..last_token[0, q];
  // where that is negative it sees none and its probabilities are 0.
  virtual void softmax(const View& scores, const View& last_token, float scale) = 0;
  // gradient ← scale · p ∘ (gradient − Σ_tokens p ∘ gradient): from that of the probabilities to that of the scores.
  virtual void softmax_gradient(const View& probabilities, const View& gradient, float scale) = 0;
  // out[row, block] = Σ of the row's columns of that block; `from` has a block of columns per column of `out`.
  virtual void block_sums(const View& from, const View& out) = 0;
  // out[i][row, :] = weight[row, i] · from[i][row, :]
  virtual void weigh_rows(const View& from, const View& weight, const View& out) = 0;

  // Σ a[i] ∘ b[i], one sum per matrix.
  virtual std::vector<double> dots(const View& a, const View& b) = 0;
  virtual std::vector<double> column_sums(const View& a) = 0;
  // Per column, with x and y centred under the probabilities: Σ p x y and Σ p y².
  virtual void covariances(const View& probabilities, const View& x, const View& y, std::vector<double>& cross, std::vector<double>& own) = 0;

  // Solves (A + ridge·diag A) X = B for each pair, A symmetric positive definite [n, n], B [n, m]; X replaces B. A direction that has no
  // variance of its own (a pivot below 1e-12 of the largest diagonal entry) contributes nothing to X.
  virtual void solve(const View& a, const View& b, double ridge) = 0;

  // Divides each matrix by its Frobenius norm; zeros stay.
  virtual void normalise(const View& matrices) = 0;

  // Waits for everything enqueued so far.
  virtual void finish() {}

  Tensor upload(const HostMatrix& from);
  HostMatrix download(const View& from);
};

// `threads` 0: all cores.
std::shared_ptr<Compute> make_cpu_compute(int threads);

}  // namespace tpla::reparam
