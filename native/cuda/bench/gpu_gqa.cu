#include "cuda/bench/gpu_gqa.h"

#include <cuda_bf16.h>

#include <algorithm>

#include "bench/host_reference.h"
#include "bench/page_tables.h"
#include "bench/random.h"
#include "cuda/bench/gpu_reference.cuh"
#include "cuda/bench/gpu_tensors.h"
#include "cuda/bench/gpu_variants.h"

namespace tpla::bench {

namespace {

// Where keys and values lie: a page holds the keys of its tokens, then their values.
struct KvPages {
  const uint8_t* base;
  const int32_t* table;  // [sequences][stride]
  int stride;
  int page_tokens;
  int64_t page_bytes, token_bytes, head_bytes;
  int64_t value_bytes;  // from a key to its value

  __host__ __device__ int64_t offset(int sequence, int t, int head) const {
    return static_cast<int64_t>(table[static_cast<int64_t>(sequence) * stride + t / page_tokens]) * page_bytes + (t % page_tokens) * token_bytes + head * head_bytes;
  }
};

struct StoredKv {
  const __nv_bfloat16* k;  // null: no query sees it, and it may not exist
  const __nv_bfloat16* v;

  __device__ double operator[](int c) const { return k ? __bfloat162float(k[c]) : 0.0f; }
  __device__ double value(int c) const { return k ? __bfloat162float(v[c]) : 0.0f; }
};

// `head` is a KV head; its rows are its query heads, token by token.
struct GqaView {
  int key_dim, value_dim;
  int kv_heads, group;
  bool causal;
  const __nv_bfloat16* q;
  const int32_t *q_indptr, *kv_lens;
  KvPages pages;
  LogitRule rule;

  __device__ int first_position(int sequence) const { return kv_lens[sequence] - (q_indptr[sequence + 1] - q_indptr[sequence]); }
  __device__ int64_t index(int sequence, int head, int i) const {
    return static_cast<int64_t>(q_indptr[sequence] + i / group) * (kv_heads * group) + head * group + i % group;
  }
  __device__ Bf16Row row(int sequence, int head, int i) const { return {q + index(sequence, head, i) * key_dim}; }
  __device__ StoredKv key(int sequence, int head, int t) const {
    if (!rule.present(sequence, first_position(sequence), t)) return {nullptr, nullptr};
    const uint8_t* key = pages.base + pages.offset(sequence, t, head);
    return {reinterpret_cast<const __nv_bfloat16*>(key), reinterpret_cast<const __nv_bfloat16*>(key + pages.value_bytes)};
  }
  __device__ bool sees(int sequence, int, int i, int t) const { return rule.sees(sequence, first_position(sequence) + i / group, t); }
  __device__ double logit(int sequence, int head, int i, int t, double x) const {
    return rule.apply(head * group + i % group, first_position(sequence) + i / group, t, x);
  }
  __device__ int limit(int sequence, int i) const { return causal ? max(0, first_position(sequence) + i / group + 1) : kv_lens[sequence]; }
};

// Grid: (tokens, sequences, sets), a warp a token.
__global__ void draw_tokens(KvPages pages, int64_t table_per_set, const int32_t* kv_lens, const int32_t* q_indptr, LogitRule rule, int kv_heads, int head_dim, uint64_t seed) {
  pages.table += blockIdx.z * table_per_set;
  uint8_t* base = const_cast<uint8_t*>(pages.base);
  const int sequence = blockIdx.y, lane = threadIdx.x % 32;
  const int first_position = kv_lens[sequence] - (q_indptr[sequence + 1] - q_indptr[sequence]);
  for (int t = blockIdx.x * (blockDim.x / 32) + threadIdx.x / 32; t < kv_lens[sequence]; t += gridDim.x * (blockDim.x / 32)) {
    if (!rule.present(sequence, first_position, t)) continue;
    for (int head = 0; head < kv_heads; ++head) {
      const int64_t offset = pages.offset(sequence, t, head);
      for (int c = lane; c < head_dim; c += 32) {
        const uint64_t first = static_cast<uint64_t>(offset) + 2 * c;
        reinterpret_cast<__nv_bfloat16*>(base + offset)[c] = __float2bfloat16(random_normal(seed, first));
        reinterpret_cast<__nv_bfloat16*>(base + offset + pages.value_bytes)[c] = __float2bfloat16(random_normal(seed, first + 1));
      }
    }
  }
}

// Sizes only: enough for the kernels to say whether they take the shape.
cuda::GqaDecode describe(const GqaShape& shape) {
  cuda::GqaDecode call;
  call.batch = static_cast<int>(shape.kv_lens.size());
  call.heads = shape.heads;
  call.kv_heads = shape.kv_heads;
  call.head_dim = shape.head_dim;
  call.q_tokens = std::max(1, *std::max_element(shape.q_lens.begin(), shape.q_lens.end()));
  call.page_size = shape.page_tokens;
  call.causal = shape.causal;
  call.softmax_scale = static_cast<float>(gqa_scale(shape.head_dim));
  call.variants = GpuVariants::describe(shape.variants);
  call.path = attention_path(shape.path);
  return call;
}

class GpuGqa : public GpuProblem {
 public:
  GpuGqa(const GqaShape& shape, uint64_t seed, bool timed)
      : shape_(shape),
        kernel_(gpu_kernel_for(shape)),
        half_page_bytes_(static_cast<int64_t>(shape.page_tokens) * shape.kv_heads * shape.head_dim * 2),
        page_bytes_(2 * half_page_bytes_ + shape.page_gap_bytes),
        q_offsets_(prefix_sums(shape.q_lens)),
        rows_(static_cast<int64_t>(q_offsets_.back()) * shape.heads),
        variants_(shape.variants, shape.q_lens, shape.kv_lens, shape.heads),
        tables_(variants_.draw_tables(
            shape.page_tokens, timed ? sets_that_outgrow_l2(pages_needed(shape.kv_lens, shape.page_tokens) * page_bytes_, rows_ * shape.head_dim * 4) : 1, stream_seed(seed, 0))),
        kv_(static_cast<size_t>(tables_.pages * page_bytes_)),
        q_(static_cast<size_t>(rows_ * shape.head_dim)),
        table_(tables_.table),
        kv_lens_(shape.kv_lens),
        q_indptr_(q_offsets_),
        outputs_(static_cast<size_t>(rows_), shape.head_dim) {
    kv_.fill_bytes(0xff, nullptr);
    draw_normals(q_.data(), q_.count(), shape.query_scale, stream_seed(seed, 2));
    draw_tokens<<<dim3(64, static_cast<unsigned>(shape.kv_lens.size()), static_cast<unsigned>(tables_.sets)), 256>>>(
        pages(0), static_cast<int64_t>(tables_.entries_per_set()), kv_lens_.data(), q_indptr_.data(), variants_.device_rule(), shape.kv_heads, shape.head_dim, stream_seed(seed, 1));
    gpu_check(cudaGetLastError(), "drawing a GQA problem");
    call_ = describe(shape);
    call_.q = q_.data();
    call_.k = kv_.data();
    call_.v = kv_.data() + half_page_bytes_;
    call_.kv_lens = kv_lens_.data();
    const bool equal = std::all_of(shape.q_lens.begin(), shape.q_lens.end(), [&](int32_t len) { return len == shape.q_lens[0] && len > 0; });
    call_.q_indptr = equal ? nullptr : q_indptr_.data();
    call_.out = outputs_.out();
    call_.lse = outputs_.lse();
    call_.variants = variants_.call();
    const KvPages where = pages(0);
    call_.page_stride = where.page_bytes;
    call_.token_stride = where.token_bytes;
    call_.head_stride = where.head_bytes;
    call_.block_table_stride = tables_.stride;
    call_.workspace_bytes = cuda::gqa_decode_workspace_bytes(call_);
    workspace_ = DeviceBuffer<uint8_t>(call_.workspace_bytes);
    workspace_.fill_bytes(0, nullptr);
    call_.workspace = workspace_.data();
    gpu_check(cudaDeviceSynchronize(), "drawing a GQA problem");
  }

  std::string kernel() const override { return kernel_; }
  int sets() const override { return tables_.sets; }
  std::vector<DeviceBuffer<uint8_t>*> outputs() override { return {&outputs_.buffer()}; }

  void launch(int set, cudaStream_t stream) override {
    cuda::GqaDecode call = call_;
    call.block_table = table_.data() + set * tables_.entries_per_set();
    cuda::gqa_decode(call, stream);
  }

  void set_lengths_to_zero(bool zero, cudaStream_t stream) override { kv_lens_.set_to_zero(zero, stream); }

  Check compare_on_gpu(GpuStream& stream) override {
    const int group = shape_.heads / shape_.kv_heads;
    const GqaView view{shape_.head_dim, shape_.head_dim, shape_.kv_heads, group, shape_.causal, q_.data(), q_indptr_.data(), kv_lens_.data(), pages(0), variants_.device_rule()};
    std::vector<ReferenceRows> groups;
    for (size_t s = 0; s < shape_.kv_lens.size(); ++s) {
      for (int head = 0; head < shape_.kv_heads; ++head) groups.push_back({static_cast<int>(s), head, 0, shape_.q_lens[s] * group, shape_.kv_lens[s], 0, 0});
    }
    return compare_with_reference_on_gpu(view, groups, static_cast<double>(call_.softmax_scale), outputs_.out(), outputs_.lse(), stream);
  }

  Check compare_on_host() override {
    const std::vector<uint8_t> stored = kv_.read();
    const std::vector<float> q = widened(q_);
    KvPages host = pages(0);
    host.base = stored.data();
    host.table = tables_.table.data();
    const auto rows_of = [&](int64_t from_key) {
      std::vector<std::vector<float>> rows(shape_.kv_lens.size());  // [sequence][token][KV head][head_dim]
      for (size_t s = 0; s < rows.size(); ++s) {
        rows[s].resize(static_cast<size_t>(shape_.kv_lens[s]) * static_cast<size_t>(shape_.kv_heads * shape_.head_dim));
        for (int t = 0; t < shape_.kv_lens[s]; ++t) {
          if (!variants_.present(static_cast<int>(s), t)) continue;
          for (int head = 0; head < shape_.kv_heads; ++head) {
            const auto* row = reinterpret_cast<const __nv_bfloat16*>(host.base + host.offset(static_cast<int>(s), t, head) + from_key);
            float* target = rows[s].data() + (static_cast<size_t>(t) * static_cast<size_t>(shape_.kv_heads) + static_cast<size_t>(head)) * static_cast<size_t>(shape_.head_dim);
            for (int c = 0; c < shape_.head_dim; ++c) target[c] = __bfloat162float(row[c]);
          }
        }
      }
      return rows;
    };
    const auto keys = rows_of(0), values = rows_of(host.value_bytes);
    const auto reader = [&](const std::vector<std::vector<float>>& rows) {
      return [this, &rows](int sequence, int t, int head) {
        const size_t kv_head = static_cast<size_t>(head / (shape_.heads / shape_.kv_heads));
        return rows[static_cast<size_t>(sequence)].data() + (static_cast<size_t>(t) * static_cast<size_t>(shape_.kv_heads) + kv_head) * static_cast<size_t>(shape_.head_dim);
      };
    };
    HostAttention problem;
    problem.q_lens = shape_.q_lens;
    problem.kv_lens = shape_.kv_lens;
    problem.heads = shape_.heads;
    problem.key_dim = problem.value_dim = shape_.head_dim;
    problem.causal = shape_.causal;
    problem.scale = call_.softmax_scale;
    problem.q = q.data();
    problem.rule = variants_.host_rule();
    problem.key = reader(keys);
    problem.value = reader(values);
    return compare_with_reference(problem, outputs_.read());
  }

 private:
  KvPages pages(int set) const {
    const int64_t row = shape_.head_dim * 2;
    const bool head_major = shape_.layout == KvOrder::hnd;
    return {kv_.data(),   table_.data() + set * tables_.entries_per_set(),   tables_.stride,                                    shape_.page_tokens,
            page_bytes_,  head_major ? row : shape_.kv_heads * row,          head_major ? shape_.page_tokens * row : row,       half_page_bytes_};
  }

  const GqaShape shape_;
  const std::string kernel_;
  const int64_t half_page_bytes_;
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
  AttentionOutputs outputs_;
  DeviceBuffer<uint8_t> workspace_;
  cuda::GqaDecode call_;
};

}  // namespace

std::string gpu_kernel_for(const GqaShape& shape) {
  cuda::gqa_decode_workspace_bytes(describe(shape));
  return "sm80";
}

std::unique_ptr<GpuProblem> make_gpu_gqa(const GqaShape& shape, uint64_t seed, bool timed) { return std::make_unique<GpuGqa>(shape, seed, timed); }

}  // namespace tpla::bench
