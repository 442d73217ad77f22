#include "cuda/bench/gpu_decode.h"

#include <cuda_bf16.h>
#include <cuda_fp8.h>

#include <algorithm>

#include "bench/host_reference.h"
#include "bench/page_tables.h"
#include "bench/random.h"
#include "cuda/attention.h"
#include "cuda/bench/gpu_reference.cuh"
#include "cuda/bench/gpu_variants.h"
#include "cuda/device.h"

namespace tpla::bench {

namespace {

constexpr int kScaleGroup = 128;  // latent values under one scale in the fp8 layout

__host__ __device__ constexpr int scale_bytes(int latent) { return (latent + kScaleGroup - 1) / kScaleGroup * 4; }

size_t align_up(size_t bytes) { return (bytes + 255) / 256 * 256; }

cuda::KvFormat kv_format(KvType kv) {
  if (kv == KvType::f32) throw cuda::AttentionError("MLA decode on GPUs takes bf16 or fp8 KV; f32 is for the CPU");
  return kv == KvType::fp8 ? cuda::KvFormat::fp8 : cuda::KvFormat::bf16;
}

// Where a token lies.
struct Pages {
  const uint8_t* base;
  const int32_t* table;  // [sequences][stride]
  int stride;
  int page_tokens;
  int64_t page_bytes;
  int token_bytes;

  __host__ __device__ int64_t offset(int sequence, int t) const {
    return static_cast<int64_t>(table[static_cast<int64_t>(sequence) * stride + t / page_tokens]) * page_bytes + static_cast<int64_t>(t % page_tokens) * token_bytes;
  }
};

struct StoredToken {
  const uint8_t* row;  // null: no query sees it, and it may not exist
  int latent;
  bool fp8;

  __device__ double operator[](int c) const {
    if (!row) return 0;
    if (!fp8) return __bfloat162float(reinterpret_cast<const __nv_bfloat16*>(row)[c]);
    if (c < latent) {
      const float scale = reinterpret_cast<const float*>(row + latent)[c / kScaleGroup];
      return static_cast<double>(float(reinterpret_cast<const __nv_fp8_e4m3*>(row)[c])) * scale;
    }
    return __bfloat162float(reinterpret_cast<const __nv_bfloat16*>(row + latent + scale_bytes(latent))[c - latent]);
  }
  __device__ double value(int c) const { return (*this)[c]; }
};

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
  Pages pages;
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

__global__ void draw_queries(__nv_bfloat16* q, size_t count, float deviation, uint64_t seed) {
  for (size_t i = blockIdx.x * size_t{blockDim.x} + threadIdx.x; i < count; i += size_t{gridDim.x} * blockDim.x) {
    q[i] = __float2bfloat16(deviation * random_normal(seed, i));
  }
}

// Grid: (tokens, sequences, sets), a warp a token. fp8: the least power of two that brings a group into range; groups differ in size, so that
// no scale can stand in for another.
__global__ void draw_tokens(Pages pages, int64_t table_per_set, const int32_t* kv_lens, const int32_t* q_indptr, LogitRule rule, int latent, int rope, float deviation, bool fp8, uint64_t seed) {
  pages.table += blockIdx.z * table_per_set;
  uint8_t* base = const_cast<uint8_t*>(pages.base);
  const int sequence = blockIdx.y, lane = threadIdx.x % 32, width = latent + rope;
  for (int t = blockIdx.x * (blockDim.x / 32) + threadIdx.x / 32; t < kv_lens[sequence]; t += gridDim.x * (blockDim.x / 32)) {
    if (!rule.present(sequence, kv_lens[sequence] - (q_indptr[sequence + 1] - q_indptr[sequence]), t)) continue;
    const int64_t offset = pages.offset(sequence, t);
    uint8_t* row = base + offset;
    const uint64_t first = static_cast<uint64_t>(offset);  // a token takes fewer values than bytes
    __nv_bfloat16* plain = reinterpret_cast<__nv_bfloat16*>(fp8 ? row + latent + scale_bytes(latent) - latent * 2 : row);
    for (int c = (fp8 ? latent : 0) + lane; c < width; c += 32) plain[c] = __float2bfloat16((c < latent ? deviation : 1.0f) * random_normal(seed, first + c));
    if (!fp8) continue;
    for (int group = 0; group < latent; group += kScaleGroup) {
      const int rounds = min(kScaleGroup, latent - group) / 32;
      const float size = deviation * exp2f(static_cast<float>((t + group / kScaleGroup) % 3 - 1));
      float values[kScaleGroup / 32], largest = 0;
      for (int i = 0; i < rounds; ++i) {
        values[i] = size * random_normal(seed, first + group + i * 32 + lane);
        largest = fmaxf(largest, fabsf(values[i]));
      }
      for (int d = 16; d > 0; d /= 2) largest = fmaxf(largest, __shfl_xor_sync(~0u, largest, d));
      const float scale = exp2f(ceilf(log2f(fmaxf(largest, 1e-30f) / 448.0f)));
      for (int i = 0; i < rounds; ++i) reinterpret_cast<__nv_fp8_e4m3*>(row)[group + i * 32 + lane] = __nv_fp8_e4m3(values[i] / scale);
      if (lane == 0) reinterpret_cast<float*>(row + latent)[group / kScaleGroup] = scale;
    }
  }
}

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
  call.path = shape.path == KernelPath::sm80   ? cuda::AttentionPath::sm80
              : shape.path == KernelPath::sm90 ? cuda::AttentionPath::sm90
                                               : cuda::AttentionPath::automatic;
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
        variants_(shape.variants, shape.kv_lens, shape.heads),
        tables_(draw_tables(draw_page_tables(shape.kv_lens, shape.page_tokens, timed ? sets_that_outgrow_l2(pages_needed(shape.kv_lens, shape.page_tokens) * page_bytes_, rows_ * (width_ + shape.latent) * 2) : 1, stream_seed(seed, 0)))),
        kv_(static_cast<size_t>(tables_.pages * page_bytes_)),
        q_(static_cast<size_t>(rows_ * width_)),
        table_(tables_.table),
        kv_lens_(shape.kv_lens),
        kept_lens_(shape.kv_lens),
        q_indptr_(q_offsets_),
        mu_(shape.latent_scale ? draw_latent_scales(shape, stream_seed(seed, 3)) : std::vector<float>{}),
        out_bytes_(align_up(static_cast<size_t>(rows_ * shape.latent) * 2)),
        outputs_(out_bytes_ + static_cast<size_t>(rows_) * 4) {
    kv_.fill_bytes(0xff, nullptr);
    draw_queries<<<1024, 256>>>(q_.data(), q_.count(), shape.query_scale, stream_seed(seed, 2));
    draw_tokens<<<dim3(64, static_cast<unsigned>(shape.kv_lens.size()), static_cast<unsigned>(tables_.sets)), 256>>>(
        pages(0), static_cast<int64_t>(tables_.entries_per_set()), kv_lens_.data(), q_indptr_.data(), variants_.device_rule(), shape.latent, shape.rope, shape.latent_deviation, shape.kv == KvType::fp8, stream_seed(seed, 1));
    gpu_check(cudaGetLastError(), "drawing a decode problem");
    call_ = decode_sizes(shape);
    call_.q = q_.data();
    call_.kv = kv_.data();
    call_.kv_lens = kv_lens_.data();
    const bool equal = std::all_of(shape.q_lens.begin(), shape.q_lens.end(), [&](int32_t len) { return len == shape.q_lens[0] && len > 0; });
    call_.q_indptr = equal ? nullptr : q_indptr_.data();
    call_.out = outputs_.data();
    call_.lse = lse();
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
  std::vector<DeviceBuffer<uint8_t>*> outputs() override { return {&outputs_}; }

  cuda::MlaDecode call(int set) const override {
    cuda::MlaDecode call = call_;
    call.block_table = table_.data() + set * tables_.entries_per_set();
    return call;
  }

  void launch(int set, cudaStream_t stream) override { cuda::mla_decode(call(set), stream); }

  void set_lengths_to_zero(bool zero, cudaStream_t stream) override {
    if (zero) kv_lens_.fill_bytes(0, stream);
    else gpu_check(cudaMemcpyAsync(kv_lens_.data(), kept_lens_.data(), kv_lens_.bytes(), cudaMemcpyDeviceToDevice, stream), "cudaMemcpyAsync");
  }

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
    return compare_with_reference_on_gpu(view, groups, static_cast<double>(call_.softmax_scale), reinterpret_cast<const __nv_bfloat16*>(outputs_.data()), lse(), stream);
  }

  Check compare_on_host() override {
    const std::vector<uint8_t> kv = kv_.read();
    const std::vector<__nv_bfloat16> q_stored = q_.read();
    const std::vector<float> mu = mu_.read();
    std::vector<float> q(q_stored.size());
    for (size_t i = 0; i < q.size(); ++i) {
      const float value = __bfloat162float(q_stored[i]);
      const bool scaled = shape_.latent_scale && static_cast<int>(i % width_) < shape_.latent;
      q[i] = scaled ? scaled_query(value, mu[i / width_ % shape_.heads]) : value;
    }
    Pages host = pages(0);
    host.base = kv.data();
    host.table = tables_.table.data();
    std::vector<std::vector<float>> rows(shape_.kv_lens.size());  // [sequence][token][latent + rope]
    for (size_t s = 0; s < rows.size(); ++s) {
      for (int t = 0; t < shape_.kv_lens[s]; ++t) {
        if (present(static_cast<int>(s), t)) widen(host.base + host.offset(static_cast<int>(s), t), rows[s]);
        else rows[s].resize(rows[s].size() + static_cast<size_t>(width_));
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
    return compare_with_reference(problem, read_result());
  }

 private:
  Pages pages(int set) const {
    return {kv_.data(), table_.data() + set * tables_.entries_per_set(), tables_.stride, shape_.page_tokens, page_bytes_, token_bytes_};
  }
  float* lse() const { return reinterpret_cast<float*>(outputs_.data() + out_bytes_); }

  bool present(int sequence, int t) const {
    return variants_.host_rule().present(sequence, shape_.kv_lens[static_cast<size_t>(sequence)] - shape_.q_lens[static_cast<size_t>(sequence)], t);
  }
  PageTables draw_tables(PageTables tables) const {
    tables.drop_pages(shape_.kv_lens, shape_.page_tokens, [&](int sequence, int t) { return present(sequence, t); });
    return tables;
  }

  void widen(const uint8_t* row, std::vector<float>& out) const {
    const auto bf16_at = [](const uint8_t* at, int c) { return __bfloat162float(reinterpret_cast<const __nv_bfloat16*>(at)[c]); };
    if (shape_.kv == KvType::bf16) {
      for (int c = 0; c < width_; ++c) out.push_back(bf16_at(row, c));
      return;
    }
    const float* scales = reinterpret_cast<const float*>(row + shape_.latent);
    for (int c = 0; c < shape_.latent; ++c) out.push_back(float(reinterpret_cast<const __nv_fp8_e4m3*>(row)[c]) * scales[c / kScaleGroup]);
    for (int c = 0; c < shape_.rope; ++c) out.push_back(bf16_at(row + shape_.latent + scale_bytes(shape_.latent), c));
  }

  HostResult read_result() const {
    const std::vector<uint8_t> bytes = outputs_.read();
    HostResult result;
    const auto* out = reinterpret_cast<const __nv_bfloat16*>(bytes.data());
    for (int64_t i = 0; i < rows_ * shape_.latent; ++i) result.out.push_back(__bfloat162float(out[i]));
    const auto* lse = reinterpret_cast<const float*>(bytes.data() + out_bytes_);
    result.lse.assign(lse, lse + rows_);
    return result;
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
  DeviceBuffer<int32_t> table_, kv_lens_, kept_lens_, q_indptr_;
  DeviceBuffer<float> mu_;
  const size_t out_bytes_;
  DeviceBuffer<uint8_t> outputs_;
  DeviceBuffer<uint8_t> workspace_;
  cuda::MlaDecode call_;
};

}  // namespace

std::string gpu_kernel_for(const DecodeShape& shape) {
  cuda::mla_decode_workspace_bytes(decode_sizes(shape));
  return cuda::current_device().major == 9 && shape.path != KernelPath::sm80 ? "sm90" : "sm80";
}

std::unique_ptr<GpuDecodeProblem> make_gpu_decode(const DecodeShape& shape, uint64_t seed, bool timed) { return std::make_unique<GpuDecode>(shape, seed, timed); }

}  // namespace tpla::bench
