#include "cuda/bench/gpu_chunk.h"

#include <cuda_bf16.h>

#include <algorithm>
#include <numeric>

#include "bench/host_chunk.h"
#include "bench/page_tables.h"
#include "bench/random.h"
#include "cuda/bench/gpu_latents.h"
#include "cuda/bench/gpu_reference.cuh"
#include "cuda/bench/gpu_tensors.h"
#include "cuda/cublaslt.h"

namespace tpla::bench {

namespace {

constexpr int kQuery = kChunkHead + kChunkRope, kUp = 2 * kChunkHead;
constexpr size_t kMostUpBytes = size_t{1} << 30;  // of keys and values that the reference holds at a time

std::unique_ptr<cuda::CublasLt> open_products() {
  std::string why;
  auto products = cuda::CublasLt::open(&why);
  if (!products) throw cuda::AttentionError("a chunk behind cached latents needs cuBLASLt: " + why);
  return products;
}

// The cached tokens of all sequences, one after another.
struct CachedTokens {
  LatentPages pages;
  const int32_t* kv_indptr;
  int sequences;
  bool fp8;

  __device__ int64_t count() const { return kv_indptr[sequences]; }
  __device__ StoredToken at(int sequence, int t) const { return {pages.base + pages.offset(sequence, t), kChunkLatent, fp8}; }
  __device__ StoredToken operator[](int64_t i) const {
    int sequence = 0;
    while (kv_indptr[sequence + 1] <= i) ++sequence;
    return at(sequence, static_cast<int>(i - kv_indptr[sequence]));
  }
};

// Keys without position and values of some heads in float64, [head][token][256], from each head's weights [256, 512].
// Grid: (tiles of columns, tiles of tokens, heads).
__global__ void __launch_bounds__(reference::kThreads) multiply_up(CachedTokens tokens, const __nv_bfloat16* kv_b, double* up) {
  using namespace reference;
  __shared__ double a[kDepth][kTile], b[kDepth][kTile];
  double sum[4][4] = {};
  const int64_t token0 = static_cast<int64_t>(blockIdx.y) * kTile, count = tokens.count();
  const int line = threadIdx.x / 4, quad = threadIdx.x % 4 * 4;
  const bool has_token = token0 + line < count;
  const StoredToken token = tokens[has_token ? token0 + line : 0];
  const __nv_bfloat16* weights = kv_b + (static_cast<int64_t>(blockIdx.z) * kUp + blockIdx.x * kTile + line) * kChunkLatent;
  for (int c0 = 0; c0 < kChunkLatent; c0 += kDepth) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      a[quad + i][line] = has_token ? token[c0 + quad + i] : 0;
      b[quad + i][line] = __bfloat162float(weights[c0 + quad + i]);
    }
    __syncthreads();
    multiply_step(a, b, sum);
    __syncthreads();
  }
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int64_t row = token0 + threadIdx.x / 16 * 4 + i;
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      if (row < count) up[(blockIdx.z * count + row) * kUp + blockIdx.x * kTile + threadIdx.x % 16 * 4 + j] = sum[i][j];
    }
  }
}

struct ChunkKey {
  const double* up;
  StoredToken token;

  __device__ double operator[](int c) const { return c < kChunkHead ? up[c] : token[kChunkLatent + c - kChunkHead]; }
  __device__ double value(int c) const { return up[kChunkHead + c]; }
};

// Heads from `first_head` on, which `up` holds.
struct ChunkView {
  int key_dim, value_dim;
  int heads, first_head;
  bool causal;
  const __nv_bfloat16* q;
  const int32_t* q_indptr;
  CachedTokens tokens;
  const double* up;

  __device__ int64_t index(int sequence, int head, int i) const { return static_cast<int64_t>(q_indptr[sequence] + i) * heads + first_head + head; }
  __device__ Bf16Row row(int sequence, int head, int i) const { return {q + index(sequence, head, i) * kQuery}; }
  __device__ ChunkKey key(int sequence, int head, int t) const { return {up + (head * tokens.count() + tokens.kv_indptr[sequence] + t) * kUp, tokens.at(sequence, t)}; }
  __device__ bool sees(int, int, int, int) const { return true; }
  __device__ double logit(int, int, int, int, double x) const { return x; }
  __device__ int limit(int sequence, int i) const {
    const int q_len = q_indptr[sequence + 1] - q_indptr[sequence], kv_len = tokens.kv_indptr[sequence + 1] - tokens.kv_indptr[sequence];
    return causal ? min(kv_len, max(0, kv_len - q_len + i + 1)) : kv_len;
  }
};

cuda::ChunkForm chunk_form(ChunkFormChoice form) {
  if (form == ChunkFormChoice::absorbed) return cuda::ChunkForm::absorbed;
  return form == ChunkFormChoice::unabsorbed ? cuda::ChunkForm::unabsorbed : cuda::ChunkForm::automatic;
}

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
  call.format = kv_format(shape.kv);
  call.form = chunk_form(shape.form);
  call.path = attention_path(shape.path);
  return call;
}

class GpuChunk : public GpuChunkProblem {
 public:
  GpuChunk(const ChunkShape& shape, uint64_t seed, bool timed)
      : shape_(shape),
        kernel_(gpu_kernel_for(shape)),
        products_(open_products()),
        token_bytes_(cuda::kv_token_bytes(kv_format(shape.kv), kChunkLatent)),
        page_bytes_(static_cast<int64_t>(shape.page_tokens) * token_bytes_),
        q_offsets_(prefix_sums(shape.q_lens)),
        kv_offsets_(prefix_sums(shape.kv_lens)),
        rows_(static_cast<size_t>(q_offsets_.back()) * shape.heads),
        tables_(draw_page_tables(shape.kv_lens, shape.page_tokens, timed ? input_sets() : 1, stream_seed(seed, 0))),
        pages_(static_cast<size_t>(tables_.pages * page_bytes_)),
        q_(rows_ * kQuery),
        kv_b_(static_cast<size_t>(shape.heads) * kUp * kChunkLatent),
        table_(tables_.table),
        kv_lens_(shape.kv_lens),
        q_indptr_(q_offsets_),
        kv_indptr_(kv_offsets_),
        outputs_(rows_, kChunkHead) {
    pages_.fill_bytes(0xff, nullptr);
    draw_normals(q_.data(), q_.count(), shape.query_scale, stream_seed(seed, 1));
    draw_normals(kv_b_.data(), kv_b_.count(), 1 / std::sqrt(static_cast<float>(kChunkLatent)), stream_seed(seed, 2));
    draw_latents(pages(), static_cast<int64_t>(tables_.entries_per_set()), static_cast<int>(shape.kv_lens.size()), tables_.sets, kv_lens_.data(), q_indptr_.data(), LogitRule{},
                 {kChunkLatent, kChunkRope, shape.kv == KvType::fp8, 1.0f}, stream_seed(seed, 3));
    call_ = chunk_sizes(shape);
    call_.q = q_.data();
    call_.kv_b = kv_b_.data();
    call_.kv = pages_.data();
    call_.kv_lens = kv_lens_.data();
    call_.q_indptr = q_indptr_.data();
    call_.kv_indptr = kv_indptr_.data();
    call_.out = outputs_.out();
    call_.lse = outputs_.lse();
    call_.num_pages = tables_.pages;
    call_.block_table_stride = tables_.stride;
    // One workspace for whatever form runs: what must stay zero between launches lies in the same place.
    for (const cuda::ChunkForm form : {cuda::ChunkForm::absorbed, cuda::ChunkForm::unabsorbed}) {
      cuda::MlaChunk call = call_;
      call.form = form;
      call_.workspace_bytes = std::max(call_.workspace_bytes, cuda::mla_chunk_workspace_bytes(call));
    }
    workspace_ = DeviceBuffer<uint8_t>(call_.workspace_bytes);
    workspace_.fill_bytes(0, nullptr);
    call_.workspace = workspace_.data();
    gpu_check(cudaDeviceSynchronize(), "drawing a chunk");
  }

  std::string kernel() const override { return kernel_; }
  int sets() const override { return tables_.sets; }
  std::vector<DeviceBuffer<uint8_t>*> outputs() override { return {&outputs_.buffer()}; }
  void run_as(ChunkFormChoice form) override { call_.form = chunk_form(form); }
  bool runs_absorbed() const override { return cuda::mla_chunk_form(call_) == cuda::ChunkForm::absorbed; }

  void launch(int set, cudaStream_t stream) override {
    cuda::MlaChunk call = call_;
    call.block_table = table_.data() + static_cast<size_t>(set) * tables_.entries_per_set();
    cuda::mla_chunk(call, *products_, stream);
  }

  void set_lengths_to_zero(bool zero, cudaStream_t stream) override {
    for (DeviceLengths* lengths : {&kv_lens_, &q_indptr_, &kv_indptr_}) lengths->set_to_zero(zero, stream);
  }

  Check compare_on_gpu(GpuStream& stream) override {
    const CachedTokens tokens{pages(), kv_indptr_.data(), static_cast<int>(shape_.kv_lens.size()), shape_.kv == KvType::fp8};
    const size_t count = static_cast<size_t>(kv_offsets_.back()), up_of_head = count * kUp;
    const int most_heads = static_cast<int>(std::clamp<size_t>(kMostUpBytes / (std::max<size_t>(up_of_head, 1) * sizeof(double)), 1, static_cast<size_t>(shape_.heads)));
    const DeviceBuffer<double> up(up_of_head * static_cast<size_t>(most_heads));
    Check check;
    for (int first = 0; first < shape_.heads; first += most_heads) {
      const int heads = std::min(most_heads, shape_.heads - first);
      if (count > 0) {
        const dim3 blocks(kUp / reference::kTile, static_cast<unsigned>((count + reference::kTile - 1) / reference::kTile), static_cast<unsigned>(heads));
        multiply_up<<<blocks, reference::kThreads, 0, stream.get()>>>(tokens, kv_b_.data() + static_cast<int64_t>(first) * kUp * kChunkLatent, up.data());
        gpu_check(cudaGetLastError(), "multiply_up");
      }
      const ChunkView view{kQuery, kChunkHead, shape_.heads, first, shape_.causal, q_.data(), q_indptr_.data(), tokens, up.data()};
      std::vector<ReferenceRows> groups;
      for (size_t s = 0; s < shape_.q_lens.size(); ++s) {
        for (int head = 0; head < heads; ++head) groups.push_back({static_cast<int>(s), head, 0, shape_.q_lens[s], shape_.kv_lens[s], 0, 0});
      }
      const Check of_heads = compare_with_reference_on_gpu(view, groups, static_cast<double>(call_.softmax_scale), outputs_.out(), outputs_.lse(), stream);
      check = first == 0 ? of_heads : worse_of(check, of_heads);
    }
    return check;
  }

  Check compare_on_host() override {
    const std::vector<uint8_t> stored = pages_.read();
    LatentPages host = pages();
    host.base = stored.data();
    host.table = tables_.table.data();
    const HostChunk chunk(shape_, widened(q_), widened(kv_b_), [&](int sequence, int t, float* row) {
      const StoredToken token{host.base + host.offset(sequence, t), kChunkLatent, shape_.kv == KvType::fp8};
      for (int c = 0; c < kChunkLatent + kChunkRope; ++c) row[c] = static_cast<float>(token[c]);
    });
    return compare_with_reference(chunk.problem(call_.softmax_scale), outputs_.read());
  }

 private:
  // What a call keeps in between goes through L2 as well: absorbed queries and outputs, or keys and values.
  int input_sets() const {
    const size_t tokens = static_cast<size_t>(kv_offsets_.back());
    const size_t between = std::min(rows_ * (2 * kChunkLatent + kChunkRope), tokens * (kChunkLatent + kChunkRope + static_cast<size_t>(shape_.heads) * kUp)) * 2;
    return sets_that_outgrow_l2(static_cast<size_t>(pages_needed(shape_.kv_lens, shape_.page_tokens) * page_bytes_) + between, rows_ * (kQuery + kChunkHead) * 2);
  }

  LatentPages pages() const { return {pages_.data(), table_.data(), tables_.stride, shape_.page_tokens, page_bytes_, token_bytes_}; }

  const ChunkShape shape_;
  const std::string kernel_;
  const std::unique_ptr<cuda::CublasLt> products_;
  const int token_bytes_;
  const int64_t page_bytes_;
  const std::vector<int32_t> q_offsets_, kv_offsets_;
  const size_t rows_;
  const PageTables tables_;
  DeviceBuffer<uint8_t> pages_;
  DeviceBuffer<__nv_bfloat16> q_, kv_b_;
  DeviceBuffer<int32_t> table_;
  DeviceLengths kv_lens_, q_indptr_, kv_indptr_;
  AttentionOutputs outputs_;
  DeviceBuffer<uint8_t> workspace_;
  cuda::MlaChunk call_;
};

}  // namespace

std::string gpu_kernel_for(const ChunkShape& shape) {
  open_products();
  const cuda::MlaChunk call = chunk_sizes(shape);
  cuda::mla_chunk_workspace_bytes(call);
  return (cuda::mla_chunk_form(call) == cuda::ChunkForm::absorbed ? "absorbed, " : "un-absorbed, ") + kernel_family(shape.path);
}

std::unique_ptr<GpuChunkProblem> make_gpu_chunk(const ChunkShape& shape, uint64_t seed, bool timed) { return std::make_unique<GpuChunk>(shape, seed, timed); }

}  // namespace tpla::bench
