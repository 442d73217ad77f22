#include "cuda/bench/gpu_prefill.h"

#include <cuda_bf16.h>

#include <algorithm>

#include "bench/host_reference.h"
#include "bench/page_tables.h"
#include "bench/random.h"
#include "cuda/bench/gpu_reference.cuh"
#include "cuda/bench/gpu_tensors.h"

namespace tpla::bench {

namespace {

constexpr int kPoisonedKeys = 128;  // rows of NaN behind the last sequence's keys

struct StoredKey {
  const __nv_bfloat16* k;
  const __nv_bfloat16* v;

  __device__ double operator[](int c) const { return __bfloat162float(k[c]); }
  __device__ double value(int c) const { return __bfloat162float(v[c]); }
};

struct PrefillView {
  int key_dim, value_dim;
  int heads;
  bool causal;
  const __nv_bfloat16 *q, *k, *v;
  const int32_t *q_indptr, *kv_indptr;

  __device__ int64_t index(int sequence, int head, int i) const { return static_cast<int64_t>(q_indptr[sequence] + i) * heads + head; }
  __device__ Bf16Row row(int sequence, int head, int i) const { return {q + index(sequence, head, i) * key_dim}; }
  __device__ StoredKey key(int sequence, int head, int t) const {
    const int64_t row = static_cast<int64_t>(kv_indptr[sequence] + t) * heads + head;
    return {k + row * key_dim, v + row * value_dim};
  }
  __device__ bool sees(int, int, int, int) const { return true; }
  __device__ double logit(int, int, int, int, double x) const { return x; }
  __device__ int limit(int sequence, int i) const {
    const int q_len = q_indptr[sequence + 1] - q_indptr[sequence], kv_len = kv_indptr[sequence + 1] - kv_indptr[sequence];
    return causal ? min(kv_len, max(0, kv_len - q_len + i + 1)) : kv_len;
  }
};

}  // namespace

cuda::MlaPrefill prefill_sizes(const PrefillShape& shape) {
  cuda::MlaPrefill call;
  call.heads = shape.heads;
  call.key_dim = shape.key_dim;
  call.value_dim = shape.value_dim;
  call.causal = shape.causal;
  call.softmax_scale = static_cast<float>(1.0 / std::sqrt(static_cast<double>(shape.key_dim)));
  call.path = attention_path(shape.path);
  call.workspace_bytes = cuda::mla_prefill_workspace_bytes(call);
  return call;
}

namespace {

class GpuPrefill : public GpuPrefillProblem {
 public:
  GpuPrefill(const PrefillShape& shape, uint64_t seed, bool timed)
      : shape_(shape),
        kernel_(gpu_kernel_for(shape)),
        q_offsets_(prefix_sums(shape.q_lens)),
        kv_offsets_(prefix_sums(shape.kv_lens)),
        q_rows_(static_cast<size_t>(q_offsets_.back()) * shape.heads),
        kv_rows_(static_cast<size_t>(kv_offsets_.back()) * shape.heads),
        kv_rows_held_(kv_rows_ + static_cast<size_t>(kPoisonedKeys) * shape.heads),
        sets_(timed ? sets_that_outgrow_l2((q_rows_ * shape.key_dim + kv_rows_ * (shape.key_dim + shape.value_dim)) * 2, q_rows_ * shape.value_dim * 2) : 1),
        q_(sets_ * q_rows_ * shape.key_dim),
        k_(sets_ * kv_rows_held_ * shape.key_dim),
        v_(sets_ * kv_rows_held_ * shape.value_dim),
        q_indptr_(q_offsets_),
        kv_indptr_(kv_offsets_),
        outputs_(q_rows_, shape.value_dim) {
    k_.fill_bytes(0xff, nullptr);
    v_.fill_bytes(0xff, nullptr);
    draw_normals(q_.data(), q_.count(), shape.query_scale, stream_seed(seed, 0));
    for (size_t set = 0; set < sets_; ++set) {
      draw_normals(k(set), kv_rows_ * shape.key_dim, 1.0f, stream_seed(seed, 1 + 2 * set));
      draw_normals(v(set), kv_rows_ * shape.value_dim, 1.0f, stream_seed(seed, 2 + 2 * set));
    }
    call_ = prefill_sizes(shape);
    call_.q_indptr = q_indptr_.data();
    call_.kv_indptr = kv_indptr_.data();
    call_.out = outputs_.out();
    call_.lse = outputs_.lse();
    call_.batch = static_cast<int>(shape.q_lens.size());
    call_.q_tokens = q_offsets_.back();
    call_.kv_tokens = kv_offsets_.back() + kPoisonedKeys;
    call_.max_q_tokens = *std::max_element(shape.q_lens.begin(), shape.q_lens.end());
    call_.max_kv_tokens = *std::max_element(shape.kv_lens.begin(), shape.kv_lens.end());
    call_.workspace_bytes = cuda::mla_prefill_workspace_bytes(call_);
    workspace_ = DeviceBuffer<uint8_t>(call_.workspace_bytes);
    workspace_.fill_bytes(0, nullptr);
    call_.workspace = workspace_.data();
    gpu_check(cudaDeviceSynchronize(), "drawing a prefill problem");
  }

  std::string kernel() const override { return kernel_; }
  int sets() const override { return static_cast<int>(sets_); }
  std::vector<DeviceBuffer<uint8_t>*> outputs() override { return {&outputs_.buffer()}; }

  cuda::MlaPrefill call(int set) const override {
    cuda::MlaPrefill call = call_;
    call.q = q_.data() + set * q_rows_ * shape_.key_dim;
    call.k = k(set);
    call.v = v(set);
    return call;
  }

  void launch(int set, cudaStream_t stream) override { cuda::mla_prefill(call(set), stream); }

  void set_lengths_to_zero(bool zero, cudaStream_t stream) override {
    q_indptr_.set_to_zero(zero, stream);
    kv_indptr_.set_to_zero(zero, stream);
  }

  Check compare_on_gpu(GpuStream& stream) override {
    const PrefillView view{shape_.key_dim, shape_.value_dim, shape_.heads, shape_.causal, q_.data(), k(0), v(0), q_indptr_.data(), kv_indptr_.data()};
    std::vector<ReferenceRows> groups;
    for (size_t s = 0; s < shape_.q_lens.size(); ++s) {
      for (int head = 0; head < shape_.heads; ++head) groups.push_back({static_cast<int>(s), head, 0, shape_.q_lens[s], shape_.kv_lens[s], 0, 0});
    }
    return compare_with_reference_on_gpu(view, groups, static_cast<double>(call_.softmax_scale), outputs_.out(), outputs_.lse(), stream);
  }

  Check compare_on_host() override {
    const std::vector<float> q = widened(q_), keys = widened(k_), values = widened(v_);
    const auto row = [&](int sequence, int t, int head) { return (static_cast<size_t>(kv_offsets_[sequence]) + t) * shape_.heads + head; };
    HostAttention problem;
    problem.q_lens = shape_.q_lens;
    problem.kv_lens = shape_.kv_lens;
    problem.heads = shape_.heads;
    problem.key_dim = shape_.key_dim;
    problem.value_dim = shape_.value_dim;
    problem.causal = shape_.causal;
    problem.scale = call_.softmax_scale;
    problem.q = q.data();
    problem.key = [&](int sequence, int t, int head) { return keys.data() + row(sequence, t, head) * shape_.key_dim; };
    problem.value = [&](int sequence, int t, int head) { return values.data() + row(sequence, t, head) * shape_.value_dim; };
    return compare_with_reference(problem, outputs_.read());
  }

 private:
  __nv_bfloat16* k(size_t set) const { return k_.data() + set * kv_rows_held_ * shape_.key_dim; }
  __nv_bfloat16* v(size_t set) const { return v_.data() + set * kv_rows_held_ * shape_.value_dim; }

  const PrefillShape shape_;
  const std::string kernel_;
  const std::vector<int32_t> q_offsets_, kv_offsets_;
  const size_t q_rows_, kv_rows_, kv_rows_held_;
  const size_t sets_;
  DeviceBuffer<__nv_bfloat16> q_, k_, v_;
  DeviceLengths q_indptr_, kv_indptr_;
  AttentionOutputs outputs_;
  DeviceBuffer<uint8_t> workspace_;
  cuda::MlaPrefill call_;
};

}  // namespace

std::string gpu_kernel_for(const PrefillShape& shape) {
  const cuda::MlaPrefill call = prefill_sizes(shape);
  cuda::mla_prefill(call, nullptr);  // an empty batch: checks the shape and launches nothing
  return cuda::mla_prefill_path(call) == cuda::AttentionPath::sm90 ? "sm90" : "sm80";
}

std::unique_ptr<GpuPrefillProblem> make_gpu_prefill(const PrefillShape& shape, uint64_t seed, bool timed) { return std::make_unique<GpuPrefill>(shape, seed, timed); }

}  // namespace tpla::bench
