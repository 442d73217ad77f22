#include "reparam_compute.h"

#include <cuda_runtime.h>

#include <algorithm>
#include <cmath>
#include <map>
#include <mutex>
#include <string>

#include "core/error.h"
#include "cublaslt.h"
#include "reparam_kernels.cuh"

namespace tpla::cuda {

namespace {

using reparam::Tensor;
using reparam::Update;
using reparam::View;

constexpr int64_t kRowFloats = 64;  // 256 bytes
constexpr size_t kWorkspaceBytes = size_t{32} << 20;

void check(cudaError_t status, const char* call) {
  if (status == cudaSuccess) return;
  const bool memory = status == cudaErrorMemoryAllocation;
  throw Error(memory ? "OUT_OF_MEMORY" : "GPU_FAILED",
              std::string(call) + ": " + cudaGetErrorString(status) + (memory ? "; fewer --calibration-tokens take less, and --device cpu takes none of the GPU's" : ""));
}

// The stream that everything of one Compute runs on, in order. Memory is the stream's too, so that giving it back does not wait.
class FitStream {
 public:
  explicit FitStream(int device) : device_(device) {
    use();
    check(cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking), "cudaStreamCreateWithFlags");
    cudaMemPool_t pool = nullptr;
    check(cudaDeviceGetDefaultMemPool(&pool, device), "cudaDeviceGetDefaultMemPool");
    uint64_t keep = UINT64_MAX;  // what is given back serves the next allocation
    check(cudaMemPoolSetAttribute(pool, cudaMemPoolAttrReleaseThreshold, &keep), "cudaMemPoolSetAttribute");
    pool_ = pool;
  }
  FitStream(const FitStream&) = delete;
  ~FitStream() {
    cudaSetDevice(device_);
    cudaStreamSynchronize(stream_);
    cudaMemPoolTrimTo(pool_, 0);
    cudaStreamDestroy(stream_);
  }

  // Makes the device current for the calling thread; calls come from any.
  void use() const { check(cudaSetDevice(device_), "cudaSetDevice"); }
  cudaStream_t get() const { return stream_; }
  void finish() const { check(cudaStreamSynchronize(stream_), "cudaStreamSynchronize"); }

  template <typename T>
  T* allocate(size_t count) const {
    void* data = nullptr;
    check(cudaMallocAsync(&data, std::max<size_t>(count, 1) * sizeof(T), stream_), "cudaMallocAsync");
    return static_cast<T*>(data);
  }
  void release(void* data) const { cudaFreeAsync(data, stream_); }

 private:
  int device_;
  cudaStream_t stream_ = nullptr;
  cudaMemPool_t pool_ = nullptr;
};

template <typename T>
class Scratch {
 public:
  Scratch(const FitStream& stream, size_t count) : stream_(stream), data_(stream.allocate<T>(count)), count_(count) {}
  Scratch(const Scratch&) = delete;
  ~Scratch() { stream_.release(data_); }
  T* data() const { return data_; }
  std::vector<T> read() const {
    std::vector<T> host(count_);
    check(cudaMemcpyAsync(host.data(), data_, count_ * sizeof(T), cudaMemcpyDeviceToHost, stream_.get()), "cudaMemcpyAsync");
    stream_.finish();
    return host;
  }

 private:
  const FitStream& stream_;
  T* data_;
  size_t count_;
};

dim3 column_grid(const View& v) { return dim3(unsigned((v.cols + kColumnLanes - 1) / kColumnLanes)); }
dim3 row_grid(const View& v) { return dim3(unsigned(std::clamp<int64_t>((v.cols + kRowThreads - 1) / kRowThreads, 1, 64)), unsigned(std::min<int64_t>(v.rows, 32768)), unsigned(v.count)); }

class CudaCompute final : public reparam::Compute {
 public:
  CudaCompute(int device, bool with_library) : stream_(std::make_shared<FitStream>(device)), workspace_(*stream_, with_library ? kWorkspaceBytes : 1) {
    cudaDeviceProp properties{};
    check(cudaGetDeviceProperties(&properties, device), "cudaGetDeviceProperties");
    if (with_library) library_ = CublasLt::open();
    name_ = std::string(properties.name) + ", " + (library_ ? library_->name() : "own products");
  }

  std::string name() const override { return name_; }

  Tensor allocate(int64_t rows, int64_t cols) override {
    stream_->use();
    const int64_t ld = (cols + kRowFloats - 1) / kRowFloats * kRowFloats;
    const size_t count = size_t(rows) * size_t(ld);
    float* data = stream_->allocate<float>(count);
    Tensor::Memory memory(data, [stream = stream_](float* given) { stream->release(given); });
    check(cudaMemsetAsync(data, 0, count * sizeof(float), stream_->get()), "cudaMemsetAsync");
    return Tensor(std::move(memory), rows, cols, ld);
  }

  void upload(const float* host, int64_t host_ld, const View& to) override {
    stream_->use();
    check(cudaMemcpy2DAsync(to.data, size_t(to.ld) * 4, host, size_t(host_ld) * 4, size_t(to.cols) * 4, size_t(to.rows), cudaMemcpyHostToDevice, stream_->get()), "cudaMemcpy2DAsync");
    stream_->finish();
  }
  void download(const View& from, float* host, int64_t host_ld) override {
    stream_->use();
    check(cudaMemcpy2DAsync(host, size_t(host_ld) * 4, from.data, size_t(from.ld) * 4, size_t(from.cols) * 4, size_t(from.rows), cudaMemcpyDeviceToHost, stream_->get()), "cudaMemcpy2DAsync");
    stream_->finish();
  }

  void multiply(const View& left, const View& right, const View& out, Update update, float alpha) override {
    stream_->use();
    Fp32Product product;
    product.a = left.data;
    product.b = right.data;
    product.c = out.data;
    product.m = out.rows;
    product.n = out.cols;
    product.k = left.transposed ? left.rows : left.cols;
    product.lda = left.ld;
    product.ldb = right.ld;
    product.ldc = out.ld;
    product.count = out.count;
    product.step_a = left.count > 1 ? left.step : 0;
    product.step_b = right.count > 1 ? right.step : 0;
    product.step_c = out.step;
    product.transpose_a = left.transposed;
    product.transpose_b = right.transposed;
    product.alpha = alpha;
    product.beta = update == Update::add ? 1.0f : 0.0f;
    if (by_library(product)) return;
    const dim3 grid(unsigned((product.n + kProductTile - 1) / kProductTile), unsigned((product.m + kProductTile - 1) / kProductTile), unsigned(product.count));
    product_kernel<<<grid, kProductThreads, 0, stream_->get()>>>(product);
    check(cudaGetLastError(), "product_kernel");
  }

  void zero(const View& to) override {
    stream_->use();
    check(cudaMemset2DAsync(to.data, size_t(to.ld) * 4, 0, size_t(to.cols) * 4, size_t(to.rows), stream_->get()), "cudaMemset2DAsync");
  }
  void copy(const View& from, const View& to) override {
    stream_->use();
    check(cudaMemcpy2DAsync(to.data, size_t(to.ld) * 4, from.data, size_t(from.ld) * 4, size_t(to.cols) * 4, size_t(to.rows), cudaMemcpyDeviceToDevice, stream_->get()), "cudaMemcpy2DAsync");
  }
  void add(const View& from, float factor, const View& to) override { by_row(to, add_kernel, from, factor, to); }
  void transpose(const View& from, const View& to) override { by_row(to, transpose_kernel, from, to); }
  void weigh_rows(const View& from, const View& weight, const View& out) override { by_row(out, weigh_rows_kernel, from, weight, out); }

  void softmax(const View& scores, const View& last_token, float scale) override { by_column(scores, softmax_kernel, scores, last_token, scale); }
  void softmax_gradient(const View& probabilities, const View& gradient, float scale) override { by_column(gradient, softmax_gradient_kernel, probabilities, gradient, scale); }

  void block_sums(const View& from, const View& out) override {
    stream_->use();
    const int64_t sums = out.rows * out.cols;
    block_sums_kernel<<<unsigned((sums + kRowThreads / 32 - 1) / (kRowThreads / 32)), kRowThreads, 0, stream_->get()>>>(from, out);
    check(cudaGetLastError(), "block_sums_kernel");
  }

  std::vector<double> dots(const View& a, const View& b) override {
    stream_->use();
    const Scratch<double> parts(*stream_, size_t(a.count) * kDotParts);
    dots_kernel<<<dim3(kDotParts, unsigned(a.count)), kRowThreads, 0, stream_->get()>>>(a, b, parts.data());
    check(cudaGetLastError(), "dots_kernel");
    const std::vector<double> found = parts.read();
    std::vector<double> sums(static_cast<size_t>(a.count));
    for (size_t i = 0; i < found.size(); ++i) sums[i / kDotParts] += found[i];
    return sums;
  }
  std::vector<double> column_sums(const View& a) override {
    stream_->use();
    const Scratch<double> sums(*stream_, size_t(a.cols));
    column_sums_kernel<<<unsigned((a.cols + 63) / 64), 64, 0, stream_->get()>>>(a, sums.data());
    check(cudaGetLastError(), "column_sums_kernel");
    return sums.read();
  }
  void covariances(const View& probabilities, const View& x, const View& y, std::vector<double>& cross, std::vector<double>& own) override {
    stream_->use();
    const Scratch<double> sums(*stream_, size_t(x.cols) * 2);
    covariances_kernel<<<column_grid(x), dim3(kColumnLanes, kColumnRows), 0, stream_->get()>>>(probabilities, x, y, sums.data(), sums.data() + x.cols);
    check(cudaGetLastError(), "covariances_kernel");
    const std::vector<double> found = sums.read();
    cross.assign(found.begin(), found.begin() + x.cols);
    own.assign(found.begin() + x.cols, found.end());
  }

  void solve(const View& a, const View& b, double ridge) override {
    stream_->use();
    const size_t n = size_t(a.rows), m = size_t(b.cols);
    const Scratch<double> left(*stream_, size_t(a.count) * n * n), right(*stream_, size_t(a.count) * n * m);
    solve_kernel<<<unsigned(a.count), kSolveThreads, 0, stream_->get()>>>(a, b, ridge, left.data(), right.data());
    check(cudaGetLastError(), "solve_kernel");
  }

  void normalise(const View& matrices) override {
    stream_->use();
    normalise_kernel<<<unsigned(matrices.count), kNormThreads, 0, stream_->get()>>>(matrices);
    check(cudaGetLastError(), "normalise_kernel");
  }

  void finish() override {
    stream_->use();
    stream_->finish();
  }

 private:
  template <typename... Parameters, typename... Arguments>
  void by_row(const View& shape, void (*kernel)(Parameters...), const Arguments&... arguments) {
    stream_->use();
    kernel<<<row_grid(shape), kRowThreads, 0, stream_->get()>>>(arguments...);
    check(cudaGetLastError(), "a kernel over rows");
  }
  template <typename... Parameters, typename... Arguments>
  void by_column(const View& shape, void (*kernel)(Parameters...), const Arguments&... arguments) {
    stream_->use();
    kernel<<<column_grid(shape), dim3(kColumnLanes, kColumnRows), 0, stream_->get()>>>(arguments...);
    check(cudaGetLastError(), "a kernel over columns");
  }

  bool by_library(const Fp32Product& product) {
    if (!library_) return false;
    const std::lock_guard<std::mutex> lock(library_mutex_);
    return library_->multiply(product, workspace_.data(), kWorkspaceBytes, stream_->get());
  }

  std::shared_ptr<FitStream> stream_;
  Scratch<uint8_t> workspace_;
  std::mutex library_mutex_;
  std::unique_ptr<CublasLt> library_;
  std::string name_;
};

}  // namespace

std::shared_ptr<reparam::Compute> make_reparam_compute(int device, bool with_library) {
  int count = 0;
  const cudaError_t status = cudaGetDeviceCount(&count);
  if (status != cudaSuccess || device >= count) {
    throw Error("GPU_UNAVAILABLE", "GPU " + std::to_string(device) + ": " + (status != cudaSuccess ? std::string(cudaGetErrorString(status)) : "there are " + std::to_string(count)) +
                                       "; --device cpu computes the same on the CPU");
  }
  // Kept for the next layer, with what the library answered; never destroyed, since the driver may be gone when a process ends.
  static std::mutex mutex;
  static auto* const made = new std::map<std::pair<int, bool>, std::shared_ptr<reparam::Compute>>;
  const std::lock_guard<std::mutex> lock(mutex);
  auto& kept = (*made)[{device, with_library}];
  if (!kept) kept = std::make_shared<CudaCompute>(device, with_library);
  return kept;
}

}  // namespace tpla::cuda
