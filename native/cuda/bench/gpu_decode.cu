#include "cuda/bench/gpu_decode.h"

#include <cuda_bf16.h>

#include <algorithm>

#include "bench/host_reference.h"
#include "bench/page_tables.h"
#include "bench/random.h"
#include "cuda/bench/gpu_latents.h"
#include "cuda/bench/gpu_reference.cuh"
#include "cuda/bench/gpu_tensors.h"
#include "cuda/bench/gpu_variants.h"

namespace tpla::bench {

namespace {

// What the kernel multiplies: mu is applied to the latent part, in bf16.
__host__ __device__ inline float scaled_query(float q, float mu) { return __bfloat162float(__float2bfloat16(q * mu)); }

struct QueryRow {
  const __nv_bfloat16* q;
  float mu;
  int latent;

  __device__ double operator[](int c) const {
    const float q_c = __bfloat162float(q[c]);
    return c < latent ? scaled_query(q_c, mu) : q_c;
  }
};

// Rows of a sequence are its query tokens' heads, token by token.
struct DecodeView {
  int key_dim, value_dim;
  int heads;
  bool causal, fp8;
  const __nv_bfloat16* q;
  const float* mu;
  const int32_t* q_indptr;
  const int32_t* kv_lens;
  LatentPages pages;
  LogitRule rule;

  __device__ int first_position(int sequence) const { return kv_lens[sequence] - (q_indptr[sequence + 1] - q_indptr[sequence]); }
  __device__ bool sees(int sequence, int, int i, int t) const { return rule.sees(sequence, first_position(sequence) + i / heads, t); }
  __device__ double logit(int sequence, int, int i, int t, double x) const { return rule.apply(i % heads, first_position(sequence) + i / heads, t, x); }
  __device__ QueryRow row(int sequence, int, int i) const {
    return {q + index(sequence, 0, i) * key_dim, mu ? mu[i % heads] : 1.0f, value_dim};
  }
  __device__ StoredToken key(int sequence, int, int t) const {
    return {rule.present(sequence, first_position(sequence), t) ? pages.base + pages.offset(sequence, t) : nullptr, value_dim, fp8};
  }
  __device__ int limit(int sequence, int i) const {
    const int q_len = q_indptr[sequence + 1] - q_indptr[sequence];
    return causal ? max(0, kv_lens[sequence] - q_len + i / heads + 1) : kv_lens[sequence];
  }
  __device__ int64_t index(int sequence, int, int i) const { return static_cast<int64_t>(q_indptr[sequence]) * heads + i; }
};

std::vector<float> draw_latent_scales(const DecodeShape& shape, uint64_t seed) {
  std::vector<float> mu;
  for (int h = 0; h < shape.heads; ++h) mu.push_back(random_latent_scale(seed, h));
  return mu;
}

}  // namespace

cuda::MlaDecode decode_sizes(const DecodeShape& shape) {
  cuda::MlaDecode call;
  call.batch = static_cast<int>(shape.kv_lens.size());
  call.heads = shape.heads;
  call.q_tokens = std::max(1, *std::max_element(shape.q_lens.begin(), shape.q_lens.end()));
  call.latent = shape.latent;
  call.rope = shape.rope;
  call.page_size = shape.page_tokens;
  call.causal = shape.causal;
  call.softmax_scale = static_cast<float>(kDecodeScale);
  call.format = kv_format(shape.kv);
  call.variants = GpuVariants::describe(shape.variants);
  call.path = attention_path(shape.path);
  return call;
}

namespace {

class GpuDecode : public GpuDecodeProblem {
 public:
  GpuDecode(const DecodeShape& shape, uint64_t seed, bool timed)
      : shape_(shape),
        kernel_(gpu_kernel_for(shape)),
        width_(shape.latent + shape.rope),
        token_bytes_(cuda::kv_token_bytes(kv_format(shape.kv), shape.latent)),
        page_bytes_(static_cast<int64_t>(shape.page_tokens) * token_bytes_ + shape.page_gap_bytes),
        q_offsets_(prefix_sums(shape.q_lens)),
        rows_(static_cast<int64_t>(q_offsets_.back()) * shape.heads),
        variants_(shape.variants, shape.q_lens, shape.kv_lens, shape.heads),
        tables_(variants_.draw_tables(
            shape.page_tokens, timed ? sets_that_outgrow_l2(pages_needed(shape.kv_lens, shape.page_tokens) * page_bytes_, rows_ * (width_ + shape.latent) * 2) : 1, stream_seed(seed, 0))),
        kv_(static_cast<size_t>(tables_.pages * page_bytes_)),
        q_(static_cast<size_t>(rows_ * width_)),
        table_(tables_.table),
        kv_lens_(shape.kv_lens),
        q_indptr_(q_offsets_),
        mu_(shape.latent_scale ? draw_latent_scales(shape, stream_seed(seed, 3)) : std::vector<float>{}),
        outputs_(static_cast<size_t>(rows_), shape.latent) {
    kv_.fill_bytes(0xff, nullptr);
    draw_normals(q_.data(), q_.count(), shape.query_scale, stream_seed(seed, 2));
    draw_latents(pages(0), static_cast<int64_t>(tables_.entries_per_set()), static_cast<int>(shape.kv_lens.size()), tables_.sets, kv_lens_.data(), q_indptr_.data(), variants_.device_rule(),
                 {shape.latent, shape.rope, shape.kv == KvType::fp8, shape.latent_deviation}, stream_seed(seed, 1));
    call_ = decode_sizes(shape);
    call_.q = q_.data();
    call_.kv = kv_.data();
    call_.kv_lens = kv_lens_.data();
    const bool equal = std::all_of(shape.q_lens.begin(), shape.q_lens.end(), [&](int32_t len) { return len == shape.q_lens[0] && len > 0; });
    call_.q_indptr = equal ? nullptr : q_indptr_.data();
    call_.out = outputs_.out();
    call_.lse = outputs_.lse();
    call_.latent_scale = shape.latent_scale ? mu_.data() : nullptr;
    call_.variants = variants_.call();
    call_.page_stride = page_bytes_;
    call_.num_pages = tables_.pages;
    call_.block_table_stride = tables_.stride;
    call_.workspace_bytes = cuda::mla_decode_workspace_bytes(call_);
    workspace_ = DeviceBuffer<uint8_t>(call_.workspace_bytes);
    workspace_.fill_bytes(0, nullptr);
    call_.workspace = workspace_.data();
    gpu_check(cudaDeviceSynchronize(), "drawing a decode problem");
  }

  std::string kernel() const override { return kernel_; }
  int sets() const override { return tables_.sets; }
  std::vector<DeviceBuffer<uint8_t>*> outputs() override { return {&outputs_.buffer()}; }

  cuda::MlaDecode call(int set) const override {
    cuda::MlaDecode call = call_;
    call.block_table = table_.data() + set * tables_.entries_per_set();
    return call;
  }

  void launch(int set, cudaStream_t stream) override { cuda::mla_decode(call(set), stream); }

  void set_lengths_to_zero(bool zero, cudaStream_t stream) override { kv_lens_.set_to_zero(zero, stream); }

  Check compare_on_gpu(GpuStream& stream) override {
    DecodeView view{};
    view.key_dim = width_;
    view.value_dim = shape_.latent;
    view.heads = shape_.heads;
    view.causal = shape_.causal;
    view.fp8 = shape_.kv == KvType::fp8;
    view.q = q_.data();
    view.mu = shape_.latent_scale ? mu_.data() : nullptr;
    view.q_indptr = q_indptr_.data();
    view.kv_lens = kv_lens_.data();
    view.pages = pages(0);
    view.rule = variants_.device_rule();
    std::vector<ReferenceRows> groups;
    for (size_t s = 0; s < shape_.kv_lens.size(); ++s) {
      groups.push_back({static_cast<int>(s), 0, 0, shape_.q_lens[s] * shape_.heads, shape_.kv_lens[s], 0, 0});
    }
    return compare_with_reference_on_gpu(view, groups, static_cast<double>(call_.softmax_scale), outputs_.out(), outputs_.lse(), stream);
  }

  Check compare_on_host() override {
    const std::vector<uint8_t> kv = kv_.read();
    const std::vector<float> mu = mu_.read();
    std::vector<float> q = widened(q_);
    for (size_t i = 0; i < q.size(); ++i) {
      if (shape_.latent_scale && static_cast<int>(i % width_) < shape_.latent) q[i] = scaled_query(q[i], mu[i / width_ % shape_.heads]);
    }
    LatentPages host = pages(0);
    host.base = kv.data();
    host.table = tables_.table.data();
    std::vector<std::vector<float>> rows(shape_.kv_lens.size());  // [sequence][token][latent + rope]
    for (size_t s = 0; s < rows.size(); ++s) {
      for (int t = 0; t < shape_.kv_lens[s]; ++t) {
        const uint8_t* row = variants_.present(static_cast<int>(s), t) ? host.base + host.offset(static_cast<int>(s), t) : nullptr;
        const StoredToken token{row, shape_.latent, shape_.kv == KvType::fp8};
        for (int c = 0; c < width_; ++c) rows[s].push_back(static_cast<float>(token[c]));
      }
    }
    const auto row = [&](int sequence, int t, int) { return rows[sequence].data() + static_cast<size_t>(t) * width_; };

    HostAttention problem;
    problem.q_lens = shape_.q_lens;
    problem.kv_lens = shape_.kv_lens;
    problem.heads = shape_.heads;
    problem.key_dim = width_;
    problem.value_dim = shape_.latent;
    problem.causal = shape_.causal;
    problem.scale = call_.softmax_scale;
    problem.q = q.data();
    problem.rule = variants_.host_rule();
    problem.key = row;
    problem.value = row;
    return compare_with_reference(problem, outputs_.read());
  }

 private:
  LatentPages pages(int set) const {
    return {kv_.data(), table_.data() + set * tables_.entries_per_set(), tables_.stride, shape_.page_tokens, page_bytes_, token_bytes_};
  }

  const DecodeShape shape_;
  const std::string kernel_;
  const int width_;
  const int token_bytes_;
  const int64_t page_bytes_;
  const std::vector<int32_t> q_offsets_;
  const int64_t rows_;
  const GpuVariants variants_;
  const PageTables tables_;
  DeviceBuffer<uint8_t> kv_;
  DeviceBuffer<__nv_bfloat16> q_;
  DeviceBuffer<int32_t> table_;
  DeviceLengths kv_lens_;
  DeviceBuffer<int32_t> q_indptr_;
  DeviceBuffer<float> mu_;
  AttentionOutputs outputs_;
  DeviceBuffer<uint8_t> workspace_;
  cuda::MlaDecode call_;
};

}  // namespace

std::string gpu_kernel_for(const DecodeShape& shape) {
  cuda::mla_decode_workspace_bytes(decode_sizes(shape));
  return kernel_family(shape.path);
}

std::unique_ptr<GpuDecodeProblem> make_gpu_decode(const DecodeShape& shape, uint64_t seed, bool timed) { return std::make_unique<GpuDecode>(shape, seed, timed); }

}  // namespace tpla::bench
