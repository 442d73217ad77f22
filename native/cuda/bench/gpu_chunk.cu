#include "cuda/bench/gpu_chunk.h"

#include <cuda_bf16.h>

#include <algorithm>
#include <numeric>

#include "bench/host_reference.h"
#include "bench/page_tables.h"
#include "bench/random.h"
#include "cuda/attention.h"
#include "cuda/bench/gpu_decode.h"
#include "cuda/bench/gpu_prefill.h"
#include "cuda/bench/gpu_reference.cuh"
#include "cuda/cublaslt.h"
#include "cuda/device.h"

namespace tpla::bench {

namespace {

constexpr int kLatent = 512, kRope = 64, kHead = 128;
constexpr int kToken = kLatent + kRope, kQuery = kHead + kRope, kUp = 2 * kHead;

size_t align_up(size_t bytes) { return (bytes + 255) / 256 * 256; }

std::unique_ptr<cuda::CublasLt> open_products() {
  std::string why;
  auto products = cuda::CublasLt::open(&why);
  if (!products) throw cuda::AttentionError("a chunk behind cached latents needs cuBLASLt: " + why);
  return products;
}

__global__ void draw(__nv_bfloat16* data, size_t count, float deviation, uint64_t seed) {
  for (size_t i = blockIdx.x * size_t{blockDim.x} + threadIdx.x; i < count; i += size_t{gridDim.x} * blockDim.x) {
    data[i] = __float2bfloat16(deviation * random_normal(seed, i));
  }
}

// Tokens of every sequence and set; what no token takes of a page stays NaN. Blocks (x, sequence, set).
__global__ void draw_tokens(__nv_bfloat16* pages, const int32_t* table, int64_t entries_per_set, int stride, int page_tokens, const int32_t* kv_lens, uint64_t seed) {
  const int sequence = blockIdx.y;
  table += blockIdx.z * entries_per_set + static_cast<int64_t>(sequence) * stride;
  const int64_t count = static_cast<int64_t>(kv_lens[sequence]) * kToken;
  for (int64_t i = blockIdx.x * int64_t{blockDim.x} + threadIdx.x; i < count; i += int64_t{gridDim.x} * blockDim.x) {
    const int t = static_cast<int>(i / kToken);
    pages[(static_cast<int64_t>(table[t / page_tokens]) * page_tokens + t % page_tokens) * kToken + i % kToken] =
        __float2bfloat16(random_normal(seed + sequence * 1000003ULL, static_cast<uint64_t>(i)));
  }
}

// Keys without position and values of some heads in float64, [head][token][256]. Blocks (x, head).
__global__ void multiply_up(const __nv_bfloat16* pages, const int32_t* table, int stride, int page_tokens, const int32_t* kv_indptr, int sequences, const __nv_bfloat16* kv_b,
                            const int* heads, double* up) {
  const int64_t tokens = kv_indptr[sequences];
  const __nv_bfloat16* weights = kv_b + static_cast<int64_t>(heads[blockIdx.y]) * kUp * kLatent;
  __shared__ double token[kLatent];
  for (int64_t t = blockIdx.x; t < tokens; t += gridDim.x) {
    int sequence = 0;
    while (kv_indptr[sequence + 1] <= t) ++sequence;
    const int at = static_cast<int>(t - kv_indptr[sequence]);
    const __nv_bfloat16* row = pages + (static_cast<int64_t>(table[static_cast<int64_t>(sequence) * stride + at / page_tokens]) * page_tokens + at % page_tokens) * kToken;
    __syncthreads();
    for (int c = threadIdx.x; c < kLatent; c += blockDim.x) token[c] = __bfloat162float(row[c]);
    __syncthreads();
    double sum = 0;
    for (int c = 0; c < kLatent; ++c) sum += token[c] * static_cast<double>(__bfloat162float(weights[threadIdx.x * kLatent + c]));
    up[(blockIdx.y * tokens + t) * kUp + threadIdx.x] = sum;
  }
}

struct QueryRow {
  const __nv_bfloat16* q;
  __device__ double operator[](int c) const { return __bfloat162float(q[c]); }
};

struct ChunkKey {
  const double* up;
  const __nv_bfloat16* rope;

  __device__ double operator[](int c) const { return c < kHead ? up[c] : __bfloat162float(rope[c - kHead]); }
  __device__ double value(int c) const { return up[kHead + c]; }
};

// `head` counts the heads that are checked.
struct ChunkView {
  int key_dim, value_dim;
  int heads;
  bool causal;
  const __nv_bfloat16 *q, *pages;
  const int32_t* table;
  int stride, page_tokens;
  const int32_t *q_indptr, *kv_indptr;
  int64_t tokens;
  const int* checked;
  const double* up;

  __device__ int64_t index(int sequence, int head, int i) const { return static_cast<int64_t>(q_indptr[sequence] + i) * heads + checked[head]; }
  __device__ QueryRow row(int sequence, int head, int i) const { return {q + index(sequence, head, i) * kQuery}; }
  __device__ ChunkKey key(int sequence, int head, int t) const {
    const int64_t page = table[static_cast<int64_t>(sequence) * stride + t / page_tokens];
    return {up + (head * tokens + kv_indptr[sequence] + t) * kUp, pages + (page * page_tokens + t % page_tokens) * kToken + kLatent};
  }
  __device__ bool sees(int, int, int, int) const { return true; }
  __device__ double logit(int, int, int, int, double x) const { return x; }
  __device__ int limit(int sequence, int i) const {
    const int q_len = q_indptr[sequence + 1] - q_indptr[sequence], kv_len = kv_indptr[sequence + 1] - kv_indptr[sequence];
    return causal ? min(kv_len, max(0, kv_len - q_len + i + 1)) : kv_len;
  }
};

cuda::MlaChunk chunk_sizes(const ChunkShape& shape) {
  cuda::MlaChunk call;
  call.batch = static_cast<int>(shape.kv_lens.size());
  call.heads = shape.heads;
  call.q_tokens = std::accumulate(shape.q_lens.begin(), shape.q_lens.end(), int64_t{0});
  call.kv_tokens = std::accumulate(shape.kv_lens.begin(), shape.kv_lens.end(), int64_t{0});
  call.max_q_tokens = std::max(1, *std::max_element(shape.q_lens.begin(), shape.q_lens.end()));
  call.max_kv_tokens = *std::max_element(shape.kv_lens.begin(), shape.kv_lens.end());
  call.page_size = shape.page_tokens;
  call.causal = shape.causal;
  call.softmax_scale = static_cast<float>(kDecodeScale);
  call.form = shape.form == ChunkFormChoice::absorbed     ? cuda::ChunkForm::absorbed
              : shape.form == ChunkFormChoice::unabsorbed ? cuda::ChunkForm::unabsorbed
                                                          : cuda::ChunkForm::automatic;
  call.path = shape.path == KernelPath::sm80   ? cuda::AttentionPath::sm80
              : shape.path == KernelPath::sm90 ? cuda::AttentionPath::sm90
                                               : cuda::AttentionPath::automatic;
  return call;
}

class GpuChunk : public GpuProblem {
 public:
  GpuChunk(const ChunkShape& shape, uint64_t seed, bool timed)
      : shape_(shape),
        kernel_(gpu_kernel_for(shape)),
        products_(open_products()),
        page_values_(static_cast<int64_t>(shape.page_tokens) * kToken),
        q_offsets_(prefix_sums(shape.q_lens)),
        kv_offsets_(prefix_sums(shape.kv_lens)),
        rows_(static_cast<size_t>(q_offsets_.back()) * shape.heads),
        tables_(draw_page_tables(shape.kv_lens, shape.page_tokens, timed ? sets_that_outgrow_l2(pages_needed(shape.kv_lens, shape.page_tokens) * page_values_ * 2, rows_ * (kQuery + kHead) * 2) : 1,
                                 stream_seed(seed, 0))),
        pages_(static_cast<size_t>(tables_.pages * page_values_)),
        q_(rows_ * kQuery),
        kv_b_(static_cast<size_t>(shape.heads) * kUp * kLatent),
        table_(tables_.table),
        kv_lens_(shape.kv_lens),
        kept_kv_lens_(shape.kv_lens),
        q_indptr_(q_offsets_),
        kept_q_indptr_(q_offsets_),
        kv_indptr_(kv_offsets_),
        kept_kv_indptr_(kv_offsets_),
        out_bytes_(align_up(rows_ * kHead * 2)),
        outputs_(out_bytes_ + rows_ * 4) {
    pages_.fill_bytes(0xff, nullptr);
    draw<<<1024, 256>>>(q_.data(), q_.count(), shape.query_scale, stream_seed(seed, 1));
    draw<<<1024, 256>>>(kv_b_.data(), kv_b_.count(), 1 / std::sqrt(static_cast<float>(kLatent)), stream_seed(seed, 2));
    draw_tokens<<<dim3(256, static_cast<unsigned>(shape.kv_lens.size()), static_cast<unsigned>(tables_.sets)), 256>>>(
        pages_.data(), table_.data(), static_cast<int64_t>(tables_.entries_per_set()), tables_.stride, shape.page_tokens, kv_lens_.data(), stream_seed(seed, 3));
    gpu_check(cudaGetLastError(), "drawing a chunk");
    call_ = chunk_sizes(shape);
    call_.q = q_.data();
    call_.kv_b = kv_b_.data();
    call_.kv = pages_.data();
    call_.kv_lens = kv_lens_.data();
    call_.q_indptr = q_indptr_.data();
    call_.kv_indptr = kv_indptr_.data();
    call_.out = outputs_.data();
    call_.lse = lse();
    call_.num_pages = tables_.pages;
    call_.block_table_stride = tables_.stride;
    call_.workspace_bytes = cuda::mla_chunk_workspace_bytes(call_);
    workspace_ = DeviceBuffer<uint8_t>(call_.workspace_bytes);
    workspace_.fill_bytes(0, nullptr);
    call_.workspace = workspace_.data();
    gpu_check(cudaDeviceSynchronize(), "drawing a chunk");
  }

  std::string kernel() const override { return kernel_; }
  int sets() const override { return tables_.sets; }
  std::vector<DeviceBuffer<uint8_t>*> outputs() override { return {&outputs_}; }

  void launch(int set, cudaStream_t stream) override {
    cuda::MlaChunk call = call_;
    call.block_table = table_.data() + static_cast<size_t>(set) * tables_.entries_per_set();
    cuda::mla_chunk(call, *products_, stream);
  }

  void set_lengths_to_zero(bool zero, cudaStream_t stream) override {
    const auto set = [&](DeviceBuffer<int32_t>& live, const DeviceBuffer<int32_t>& kept) {
      if (zero) live.fill_bytes(0, stream);
      else gpu_check(cudaMemcpyAsync(live.data(), kept.data(), live.bytes(), cudaMemcpyDeviceToDevice, stream), "cudaMemcpyAsync");
    };
    set(kv_lens_, kept_kv_lens_);
    set(q_indptr_, kept_q_indptr_);
    set(kv_indptr_, kept_kv_indptr_);
  }

  Check compare_on_gpu(GpuStream& stream) override {
    std::vector<int> heads{0, shape_.heads / 2, shape_.heads - 1};
    heads.erase(std::unique(heads.begin(), heads.end()), heads.end());
    const DeviceBuffer<int> checked(heads);
    const size_t tokens = static_cast<size_t>(kv_offsets_.back());
    const DeviceBuffer<double> up(heads.size() * tokens * kUp);
    multiply_up<<<dim3(1024, static_cast<unsigned>(heads.size())), kUp, 0, stream.get()>>>(pages_.data(), table_.data(), tables_.stride, shape_.page_tokens, kv_indptr_.data(),
                                                                                          static_cast<int>(shape_.kv_lens.size()), kv_b_.data(), checked.data(), up.data());
    gpu_check(cudaGetLastError(), "multiply_up");
    const ChunkView view{kQuery, kHead, shape_.heads, shape_.causal, q_.data(), pages_.data(), table_.data(), tables_.stride, shape_.page_tokens, q_indptr_.data(), kv_indptr_.data(),
                         static_cast<int64_t>(tokens), checked.data(), up.data()};
    std::vector<ReferenceRows> groups;
    for (size_t s = 0; s < shape_.q_lens.size(); ++s) {
      for (size_t head = 0; head < heads.size(); ++head) groups.push_back({static_cast<int>(s), static_cast<int>(head), 0, shape_.q_lens[s], shape_.kv_lens[s], 0, 0});
    }
    return compare_with_reference_on_gpu(view, groups, static_cast<double>(call_.softmax_scale), reinterpret_cast<const __nv_bfloat16*>(outputs_.data()), lse(), stream);
  }

  Check compare_on_host() override {
    const std::vector<float> q = widen(q_.read()), pages = widen(pages_.read()), kv_b = widen(kv_b_.read());
    const size_t heads = static_cast<size_t>(shape_.heads), tokens = static_cast<size_t>(kv_offsets_.back());
    // Keys and values of every head and token, in float after sums in double: its rounding is 2^16 times finer than that of the results.
    std::vector<float> keys(tokens * heads * kQuery), values(tokens * heads * kHead);
    const auto row_of = [&](size_t sequence, size_t t, size_t head) { return (static_cast<size_t>(kv_offsets_[sequence]) + t) * heads + head; };
    for (size_t s = 0; s < shape_.kv_lens.size(); ++s) {
      for (size_t t = 0; t < static_cast<size_t>(shape_.kv_lens[s]); ++t) {
        const size_t page_tokens = static_cast<size_t>(shape_.page_tokens), page = static_cast<size_t>(tables_.table[s * static_cast<size_t>(tables_.stride) + t / page_tokens]);
        const float* token = pages.data() + (page * page_tokens + t % page_tokens) * kToken;
        for (size_t head = 0; head < heads; ++head) {
          float* key = keys.data() + row_of(s, t, head) * kQuery;
          float* value = values.data() + row_of(s, t, head) * kHead;
          for (int c = 0; c < kUp; ++c) {
            const float* weights = kv_b.data() + (head * kUp + static_cast<size_t>(c)) * kLatent;
            double sum = 0;
            for (int i = 0; i < kLatent; ++i) sum += static_cast<double>(weights[i]) * token[i];
            (c < kHead ? key[c] : value[c - kHead]) = static_cast<float>(sum);
          }
          std::copy_n(token + kLatent, kRope, key + kHead);
        }
      }
    }
    HostAttention problem;
    problem.q_lens = shape_.q_lens;
    problem.kv_lens = shape_.kv_lens;
    problem.heads = shape_.heads;
    problem.key_dim = kQuery;
    problem.value_dim = kHead;
    problem.causal = shape_.causal;
    problem.scale = call_.softmax_scale;
    problem.q = q.data();
    problem.key = [&](int sequence, int t, int head) { return keys.data() + row_of(static_cast<size_t>(sequence), static_cast<size_t>(t), static_cast<size_t>(head)) * kQuery; };
    problem.value = [&](int sequence, int t, int head) { return values.data() + row_of(static_cast<size_t>(sequence), static_cast<size_t>(t), static_cast<size_t>(head)) * kHead; };
    const std::vector<uint8_t> bytes = outputs_.read();
    const auto* out = reinterpret_cast<const __nv_bfloat16*>(bytes.data());
    const auto* lse_values = reinterpret_cast<const float*>(bytes.data() + out_bytes_);
    HostResult result;
    for (size_t i = 0; i < rows_ * kHead; ++i) result.out.push_back(__bfloat162float(out[i]));
    result.lse.assign(lse_values, lse_values + rows_);
    return compare_with_reference(problem, result);
  }

 private:
  float* lse() const { return reinterpret_cast<float*>(outputs_.data() + out_bytes_); }

  static std::vector<float> widen(const std::vector<__nv_bfloat16>& stored) {
    std::vector<float> values(stored.size());
    for (size_t i = 0; i < stored.size(); ++i) values[i] = __bfloat162float(stored[i]);
    return values;
  }

  const ChunkShape shape_;
  const std::string kernel_;
  const std::unique_ptr<cuda::CublasLt> products_;
  const int64_t page_values_;
  const std::vector<int32_t> q_offsets_, kv_offsets_;
  const size_t rows_;
  const PageTables tables_;
  DeviceBuffer<__nv_bfloat16> pages_, q_, kv_b_;
  DeviceBuffer<int32_t> table_, kv_lens_, kept_kv_lens_, q_indptr_, kept_q_indptr_, kv_indptr_, kept_kv_indptr_;
  const size_t out_bytes_;
  DeviceBuffer<uint8_t> outputs_;
  DeviceBuffer<uint8_t> workspace_;
  cuda::MlaChunk call_;
};

}  // namespace

std::string gpu_kernel_for(const ChunkShape& shape) {
  const cuda::MlaChunk call = chunk_sizes(shape);
  open_products();
  if (cuda::mla_chunk_form(call) == cuda::ChunkForm::absorbed) {
    DecodeShape decode;
    decode.kv_lens = shape.kv_lens;
    decode.q_lens = shape.q_lens;
    decode.heads = shape.heads;
    decode.page_tokens = shape.page_tokens;
    decode.causal = shape.causal;
    decode.path = shape.path;
    return "absorbed, " + gpu_kernel_for(decode);
  }
  PrefillShape prefill;
  prefill.heads = shape.heads;
  prefill.causal = shape.causal;
  prefill.path = shape.path;
  return "un-absorbed, " + gpu_kernel_for(prefill);
}

std::unique_ptr<GpuProblem> make_gpu_chunk(const ChunkShape& shape, uint64_t seed, bool timed) { return std::make_unique<GpuChunk>(shape, seed, timed); }

}  // namespace tpla::bench
