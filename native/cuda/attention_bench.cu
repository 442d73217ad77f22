// Checks and timings of the attention kernels; see attention_bench.h.
#include "attention_bench.h"

#include <cmath>
#include <cstring>
#include <memory>
#include <random>

#include "bench_support.cuh"
#include "sm90_matrix_rate.h"

namespace tpla::cuda {
namespace {

void add_row(Verdict& verdict, const __nv_bfloat16* got, const double* want, int width, double got_lse, double want_lse) {
  double error = 0, norm = 0;
  for (int c = 0; c < width; ++c) {
    const double difference = static_cast<double>(__bfloat162float(got[c])) - want[c];
    error += difference * difference;
    norm += want[c] * want[c];
  }
  const double relative = norm > 0 ? std::sqrt(error / norm) : std::sqrt(error);
  if (!(relative <= verdict.error)) verdict.error = relative;  // NaN stays
  const double difference = std::isinf(want_lse) ? (got_lse == want_lse ? 0.0 : NAN) : std::abs(got_lse - want_lse);
  if (!(difference <= verdict.lse_error)) verdict.lse_error = difference;
}

// Odd, so that the sample visits all heads.
int sampling(size_t rows) { return static_cast<int>(std::max<size_t>(1, rows / kReferenceRows)) | 1; }

void require_written(Verdict& verdict, const std::vector<__nv_bfloat16>& out, const std::vector<float>& lse) {
  for (const __nv_bfloat16& value : out) {
    if (std::isnan(__bfloat162float(value))) verdict.error = NAN;
  }
  for (const float value : lse) {
    if (std::isnan(value)) verdict.lse_error = NAN;
  }
}

Verdict judge(Verdict verdict) {
  verdict.ok = verdict.same_bits && verdict.error < kErrorLimit && verdict.lse_error < kLseLimit;
  return verdict;
}

// Tokens in use only; the rest of the pool keeps its NaN.
__global__ void fill_tokens(__nv_bfloat16* kv, const int* table, const int* lens, int table_stride, int page_size, int width, uint64_t seed) {
  const int sequence = blockIdx.y;
  for (int token = blockIdx.x; token < lens[sequence]; token += gridDim.x) {
    const int64_t row = static_cast<int64_t>(table[sequence * table_stride + token / page_size]) * page_size + token % page_size;
    for (int c = threadIdx.x; c < width; c += blockDim.x) kv[row * width + c] = __float2bfloat16(normal(row * width + c, seed));
  }
}

struct DecodeReference {
  const __nv_bfloat16* q;
  const __nv_bfloat16* kv;
  const int* table;
  const int* lens;
  const int* indptr;
  const float* mu;
  double* logits;  // [rows][max_len]
  double* out;
  double* lse;
  int heads, latent, page_size, table_stride, max_len, causal;
  int stride;  // rows that are multiples of it are computed, packed
  double scale;
};

__global__ void decode_reference(DecodeReference r) {
  const int sequence = blockIdx.y;
  const int tokens = r.indptr[sequence + 1] - r.indptr[sequence];
  const int width = r.latent + 64;
  __shared__ double reduce[256];
  for (int row = blockIdx.x; row < tokens * r.heads; row += gridDim.x) {
    const int64_t q_row = static_cast<int64_t>(r.indptr[sequence]) * r.heads + row;
    if (q_row % r.stride) continue;
    const int64_t packed = q_row / r.stride;
    const int limit = r.causal ? r.lens[sequence] - (tokens - 1 - row / r.heads) : r.lens[sequence];
    double* logits = r.logits + packed * r.max_len;
    double top = -INFINITY;
    for (int t = threadIdx.x; t < limit; t += blockDim.x) {
      const int64_t kv_row = static_cast<int64_t>(r.table[sequence * r.table_stride + t / r.page_size]) * r.page_size + t % r.page_size;
      double sum = 0;
      for (int c = 0; c < width; ++c) {
        float q = __bfloat162float(r.q[q_row * width + c]);
        if (r.mu && c < r.latent) q = __bfloat162float(__float2bfloat16(q * r.mu[row % r.heads]));
        sum += static_cast<double>(q) * static_cast<double>(__bfloat162float(r.kv[kv_row * width + c]));
      }
      logits[t] = sum * r.scale;
      top = fmax(top, logits[t]);
    }
    reduce[threadIdx.x] = top;
    __syncthreads();
    for (int d = 128; d > 0; d /= 2) {
      if (threadIdx.x < d) reduce[threadIdx.x] = fmax(reduce[threadIdx.x], reduce[threadIdx.x + d]);
      __syncthreads();
    }
    top = reduce[0];
    __syncthreads();
    double total = 0;
    for (int t = threadIdx.x; t < limit; t += blockDim.x) {
      logits[t] = exp(logits[t] - top);
      total += logits[t];
    }
    reduce[threadIdx.x] = total;
    __syncthreads();
    for (int d = 128; d > 0; d /= 2) {
      if (threadIdx.x < d) reduce[threadIdx.x] += reduce[threadIdx.x + d];
      __syncthreads();
    }
    total = reduce[0];
    __syncthreads();
    for (int c = threadIdx.x; c < r.latent; c += blockDim.x) {
      double sum = 0;
      for (int t = 0; t < limit; ++t) {
        const int64_t kv_row = static_cast<int64_t>(r.table[sequence * r.table_stride + t / r.page_size]) * r.page_size + t % r.page_size;
        sum += logits[t] * static_cast<double>(__bfloat162float(r.kv[kv_row * width + c]));
      }
      r.out[packed * r.latent + c] = limit > 0 ? sum / total : 0;
    }
    if (threadIdx.x == 0) r.lse[packed] = limit > 0 ? top + log(total) : -INFINITY;
    __syncthreads();
  }
}

// Device tensors of one problem.
struct DecodeProblem {
  DecodeShape shape;
  int pages_per_sequence = 1, pages = 1;
  std::vector<int> table, indptr;
  int query_tokens = 0;

  DecodeProblem(const DecodeShape& s, std::mt19937& random) : shape(s) {
    int needed = 0;
    for (int l : s.kv_lens) {
      pages_per_sequence = std::max(pages_per_sequence, (l + s.page_size - 1) / s.page_size);
      needed += (l + s.page_size - 1) / s.page_size;
    }
    pages = needed + 3;
    std::vector<int> order(pages);
    for (int i = 0; i < pages; ++i) order[i] = i;
    std::shuffle(order.begin(), order.end(), random);
    table.assign(s.kv_lens.size() * pages_per_sequence, -123456);
    int next = 0;
    for (int b = 0; b < static_cast<int>(s.kv_lens.size()); ++b) {
      for (int p = 0; p < (s.kv_lens[b] + s.page_size - 1) / s.page_size; ++p) table[b * pages_per_sequence + p] = order[next++];
    }
    indptr.push_back(0);
    for (int b = 0; b < static_cast<int>(s.kv_lens.size()); ++b) indptr.push_back(indptr.back() + (s.ragged ? static_cast<int>(random() % (s.q_tokens + 1)) : s.q_tokens));
    query_tokens = indptr.back();
  }

  MlaDecode call() const {
    MlaDecode c;
    c.batch = static_cast<int>(shape.kv_lens.size());
    c.heads = shape.heads;
    c.q_tokens = shape.q_tokens;
    c.latent = shape.latent;
    c.page_size = shape.page_size;
    c.num_pages = pages;
    c.block_table_stride = pages_per_sequence;
    c.causal = shape.causal;
    c.softmax_scale = 1.0f / std::sqrt(192.0f);
    c.path = shape.path;
    return c;
  }
};

}  // namespace

std::string describe(const DecodeShape& s) {
  char text[200];
  int longest = 0;
  for (int l : s.kv_lens) longest = std::max(longest, l);
  std::snprintf(text, sizeof text, "decode seed %u latent %d batch %zu heads %d q %d page %d longest %d%s%s%s query scale %.0f", s.seed, s.latent, s.kv_lens.size(), s.heads,
                s.q_tokens, s.page_size, longest, s.causal ? " causal" : "", s.latent_scale ? " mu" : "", s.ragged ? " ragged" : "", s.q_scale);
  return text;
}

Verdict check_decode(const DecodeShape& shape, int repeats) {
  std::mt19937 random(shape.seed);
  const int batch = static_cast<int>(shape.kv_lens.size());
  DecodeProblem problem(shape, random);
  const int width = shape.latent + 64;
  const size_t rows = static_cast<size_t>(problem.query_tokens) * shape.heads;
  Buffer<__nv_bfloat16> q(rows * width), kv(static_cast<size_t>(problem.pages) * shape.page_size * width), out(rows * shape.latent);
  Buffer<float> lse(rows);
  Buffer<int> table(problem.table), lens(shape.kv_lens), indptr(problem.indptr);
  std::vector<float> mu_host(shape.heads);
  for (float& m : mu_host) m = 0.5f + (random() % 1000) / 500.0f;
  Buffer<float> mu(mu_host);
  fill_normal<<<256, 256>>>(q.data, q.count, shape.q_scale, random());
  kv.poison();
  fill_tokens<<<dim3(64, batch), 128>>>(kv.data, table.data, lens.data, problem.pages_per_sequence, shape.page_size, width, random());

  MlaDecode call = problem.call();
  call.q = q.data;
  call.kv = kv.data;
  call.block_table = table.data;
  call.kv_lens = lens.data;
  call.q_indptr = shape.ragged ? indptr.data : nullptr;
  call.out = out.data;
  call.lse = lse.data;
  call.latent_scale = shape.latent_scale ? mu.data : nullptr;
  const size_t bytes = mla_decode_workspace_bytes(call);
  Buffer<uint8_t> workspace(bytes);
  workspace.poison();
  CUDA(cudaMemset(workspace.data, 0, 4096));
  call.workspace = workspace.data;
  call.workspace_bytes = bytes;

  std::vector<__nv_bfloat16> first_out;
  std::vector<float> first_lse;
  bool same = true;
  for (int i = 0; i < repeats; ++i) {
    out.poison();
    lse.poison();
    mla_decode(call, nullptr);
    finish(describe(shape));
    const auto got_out = out.read();
    const auto got_lse = lse.read();
    if (i == 0) {
      first_out = got_out;
      first_lse = got_lse;
    } else {
      same = same && std::memcmp(got_out.data(), first_out.data(), out.count * 2) == 0 && std::memcmp(got_lse.data(), first_lse.data(), lse.count * 4) == 0;
    }
  }

  int max_len = 1;
  for (int l : shape.kv_lens) max_len = std::max(max_len, l);
  const int stride = sampling(rows);
  const size_t compared = (rows + stride - 1) / stride;
  Buffer<double> logits(compared * max_len), ref_out(compared * shape.latent), ref_lse(compared);
  decode_reference<<<dim3(std::min(shape.heads * shape.q_tokens, 512), batch), 256>>>(
      {q.data, kv.data, table.data, lens.data, indptr.data, shape.latent_scale ? mu.data : nullptr, logits.data, ref_out.data, ref_lse.data, shape.heads, shape.latent,
       shape.page_size, problem.pages_per_sequence, max_len, shape.causal, stride, 1.0 / std::sqrt(192.0)});
  CUDA(cudaDeviceSynchronize());
  const auto want_out = ref_out.read();
  const auto want_lse = ref_lse.read();
  Verdict verdict;
  verdict.same_bits = same;
  require_written(verdict, first_out, first_lse);
  for (size_t i = 0; i < compared; ++i) {
    const size_t row = i * stride;
    add_row(verdict, first_out.data() + row * shape.latent, want_out.data() + i * shape.latent, shape.latent, first_lse[row], want_lse[i]);
  }
  return judge(verdict);
}

DecodeShape random_decode_shape(unsigned seed, AttentionPath path) {
  std::mt19937 random(seed);
  const int latents[] = {512, 256, 320, 128}, pages[] = {16, 32, 48, 64, 80, 128, 256};
  const int heads[] = {1, 2, 5, 8, 16, 16, 24, 32, 40, 64, 64, 96, 128, 128};
  DecodeShape shape;
  shape.seed = seed;
  shape.path = path;
  shape.latent = latents[seed % 4];
  shape.heads = heads[random() % 14];
  shape.q_tokens = random() % 3 == 0 ? 1 + random() % 4 : 1;
  shape.page_size = pages[random() % 7];
  shape.causal = random() % 4 != 0;
  shape.latent_scale = random() % 4 == 0;
  shape.ragged = random() % 4 == 0;
  shape.q_scale = random() % 3 == 0 ? 6.0f : 1.0f;
  const int batch = 1 + random() % (random() % 3 == 0 ? 40 : 6);
  const int longest = random() % 4 == 0 ? 6000 : random() % 2 ? 700 : 150;
  for (int b = 0; b < batch; ++b) shape.kv_lens.push_back(random() % 6 == 0 ? 0 : random() % longest);
  return shape;
}

Timing time_decode(const DecodeShape& shape) {
  std::mt19937 random(shape.seed);
  DecodeProblem problem(shape, random);
  const int width = shape.latent + 64;
  const size_t rows = static_cast<size_t>(problem.query_tokens) * shape.heads;
  const size_t kv_count = static_cast<size_t>(problem.pages) * shape.page_size * width;
  const int sets = static_cast<int>(std::clamp<size_t>(400'000'000 / (kv_count * 2), 2, 16));
  std::vector<std::unique_ptr<Buffer<__nv_bfloat16>>> kvs;
  for (int i = 0; i < sets; ++i) {
    kvs.push_back(std::make_unique<Buffer<__nv_bfloat16>>(kv_count));
    fill_normal<<<1024, 256>>>(kvs[i]->data, kv_count, 1.0f, 7 + i);
  }
  Buffer<__nv_bfloat16> q(rows * width), out(rows * shape.latent);
  Buffer<float> lse(rows);
  Buffer<int> table(problem.table), lens(shape.kv_lens);
  fill_normal<<<256, 256>>>(q.data, q.count, 1.0f, 3);
  MlaDecode call = problem.call();
  call.q = q.data;
  call.block_table = table.data;
  call.kv_lens = lens.data;
  call.out = out.data;
  call.lse = lse.data;
  call.workspace_bytes = mla_decode_workspace_bytes(call);
  Buffer<uint8_t> workspace(call.workspace_bytes);
  CUDA(cudaMemset(workspace.data, 0, 4096));
  call.workspace = workspace.data;

  call.kv = kvs[0]->data;
  mla_decode(call, nullptr);
  finish(describe(shape));
  Timing t;
  t.ms = time_replay(std::max(sets, 8), [&](int i, cudaStream_t stream) {
    call.kv = kvs[i % sets]->data;
    mla_decode(call, stream);
  });
  for (int l : shape.kv_lens) {
    t.bytes += static_cast<double>(l) * width * 2;
    t.flops += 2.0 * l * shape.heads * shape.q_tokens * (width + shape.latent);
  }
  t.bytes += rows * (width + shape.latent) * 2.0;
  return t;
}

// ---------------------------------------------------------------- prefill

namespace {

struct PrefillReference {
  const __nv_bfloat16 *q, *k, *v;
  const int *q_indptr, *kv_indptr;
  double *logits, *out, *lse;
  int heads, max_kv, causal;
  int stride;  // rows that are multiples of it are computed, packed
  double scale;
};

__global__ void prefill_reference(PrefillReference r) {
  const int sequence = blockIdx.z, head = blockIdx.y;
  const int q_begin = r.q_indptr[sequence], q_len = r.q_indptr[sequence + 1] - q_begin;
  const int kv_begin = r.kv_indptr[sequence], kv_len = r.kv_indptr[sequence + 1] - kv_begin;
  __shared__ double top, total;
  for (int i = blockIdx.x; i < q_len; i += gridDim.x) {
    const int64_t row = static_cast<int64_t>(q_begin + i) * r.heads + head;
    if (row % r.stride) continue;
    const int64_t packed = row / r.stride;
    const int limit = r.causal ? max(0, min(kv_len, kv_len - q_len + i + 1)) : kv_len;
    double* logits = r.logits + packed * r.max_kv;
    for (int t = threadIdx.x; t < limit; t += blockDim.x) {
      double sum = 0;
      for (int c = 0; c < 192; ++c) {
        sum += static_cast<double>(__bfloat162float(r.q[row * 192 + c])) * __bfloat162float(r.k[(static_cast<int64_t>(kv_begin + t) * r.heads + head) * 192 + c]);
      }
      logits[t] = sum * r.scale;
    }
    __syncthreads();
    if (threadIdx.x == 0) {
      top = -INFINITY;
      total = 0;
      for (int t = 0; t < limit; ++t) top = fmax(top, logits[t]);
      for (int t = 0; t < limit; ++t) total += exp(logits[t] - top);
      r.lse[packed] = limit > 0 ? top + log(total) : -INFINITY;
    }
    __syncthreads();
    for (int c = threadIdx.x; c < 128; c += blockDim.x) {
      double sum = 0;
      for (int t = 0; t < limit; ++t) sum += exp(logits[t] - top) * __bfloat162float(r.v[(static_cast<int64_t>(kv_begin + t) * r.heads + head) * 128 + c]);
      r.out[packed * 128 + c] = limit > 0 ? sum / total : 0;
    }
    __syncthreads();
  }
}

}  // namespace

std::string describe(const PrefillShape& s) {
  char text[160];
  int q = 0, kv = 0;
  for (int l : s.q_lens) q = std::max(q, l);
  for (int l : s.kv_lens) kv = std::max(kv, l);
  std::snprintf(text, sizeof text, "prefill seed %u batch %zu heads %d q longest %d kv longest %d%s query scale %.0f", s.seed, s.q_lens.size(), s.heads, q, kv, s.causal ? " causal" : "",
                s.q_scale);
  return text;
}

PrefillShape random_prefill_shape(unsigned seed) {
  std::mt19937 random(seed);
  PrefillShape shape;
  shape.seed = seed;
  shape.heads = 1 + random() % 5;
  shape.causal = random() % 4 != 0;
  shape.q_scale = random() % 3 == 0 ? 6.0f : 1.0f;
  const int batch = 1 + random() % 4;
  for (int b = 0; b < batch; ++b) {
    const int q_len = random() % 5 == 0 ? random() % 3 : random() % 700;
    shape.q_lens.push_back(q_len);
    shape.kv_lens.push_back(random() % 2 ? q_len : random() % 6 == 0 ? random() % 100 : q_len + random() % 500);
  }
  return shape;
}

Verdict check_prefill(const PrefillShape& s, int repeats) {
  std::mt19937 random(s.seed);
  std::vector<int> q_indptr{0}, kv_indptr{0};
  MlaPrefill call;
  for (size_t b = 0; b < s.q_lens.size(); ++b) {
    q_indptr.push_back(q_indptr.back() + s.q_lens[b]);
    kv_indptr.push_back(kv_indptr.back() + s.kv_lens[b]);
    call.max_q_tokens = std::max(call.max_q_tokens, s.q_lens[b]);
    call.max_kv_tokens = std::max(call.max_kv_tokens, s.kv_lens[b]);
  }
  const size_t q_rows = static_cast<size_t>(q_indptr.back()) * s.heads, kv_rows = static_cast<size_t>(kv_indptr.back()) * s.heads;
  // A sequence of NaN lies behind the last one: memory that must not be read into a result.
  Buffer<__nv_bfloat16> q(q_rows * 192), k((kv_rows + 128 * s.heads) * 192), v((kv_rows + 128 * s.heads) * 128), out(q_rows * 128);
  Buffer<float> lse(q_rows);
  Buffer<int> q_index(q_indptr), kv_index(kv_indptr), workspace(64);
  k.poison();
  v.poison();
  fill_normal<<<256, 256>>>(q.data, q.count, s.q_scale, random());
  fill_normal<<<256, 256>>>(k.data, kv_rows * 192, 1.0f, random());
  fill_normal<<<256, 256>>>(v.data, kv_rows * 128, 1.0f, random());
  CUDA(cudaMemset(workspace.data, 0, 256));
  call.q = q.data;
  call.k = k.data;
  call.v = v.data;
  call.q_indptr = q_index.data;
  call.kv_indptr = kv_index.data;
  call.out = out.data;
  call.lse = lse.data;
  call.softmax_scale = 1.0f / std::sqrt(192.0f);
  call.batch = static_cast<int>(s.q_lens.size());
  call.heads = s.heads;
  call.q_tokens = q_indptr.back();
  call.kv_tokens = kv_indptr.back() + 128;
  call.causal = s.causal;
  call.workspace = workspace.data;
  call.workspace_bytes = 256;
  std::vector<__nv_bfloat16> first;
  std::vector<float> first_lse;
  bool same = true;
  for (int i = 0; i < repeats; ++i) {
    out.poison();
    lse.poison();
    mla_prefill(call, nullptr);
    finish(describe(s));
    const auto got = out.read();
    if (i == 0) {
      first = got;
      first_lse = lse.read();
    } else {
      same = same && std::memcmp(got.data(), first.data(), out.count * 2) == 0;
    }
  }
  const int stride = sampling(q_rows);
  const size_t compared = (q_rows + stride - 1) / stride;
  Buffer<double> logits(compared * std::max(call.max_kv_tokens, 1)), ref(compared * 128), ref_lse(compared);
  prefill_reference<<<dim3(64, s.heads, call.batch), 128>>>(
      {q.data, k.data, v.data, q_index.data, kv_index.data, logits.data, ref.data, ref_lse.data, s.heads, std::max(call.max_kv_tokens, 1), s.causal, stride, 1.0 / std::sqrt(192.0)});
  CUDA(cudaDeviceSynchronize());
  const auto want = ref.read(), want_lse = ref_lse.read();
  Verdict verdict;
  verdict.same_bits = same;
  require_written(verdict, first, first_lse);
  for (size_t i = 0; i < compared; ++i) {
    const size_t row = i * stride;
    add_row(verdict, first.data() + row * 128, want.data() + i * 128, 128, first_lse[row], want_lse[i]);
  }
  return judge(verdict);
}

Timing time_prefill(const PrefillShape& shape) {
  std::vector<int> q_indptr{0}, kv_indptr{0};
  MlaPrefill call;
  Timing t;
  for (size_t b = 0; b < shape.q_lens.size(); ++b) {
    const double q = shape.q_lens[b], kv = shape.kv_lens[b];
    q_indptr.push_back(q_indptr.back() + shape.q_lens[b]);
    kv_indptr.push_back(kv_indptr.back() + shape.kv_lens[b]);
    call.max_q_tokens = std::max(call.max_q_tokens, shape.q_lens[b]);
    call.max_kv_tokens = std::max(call.max_kv_tokens, shape.kv_lens[b]);
    // Pairs that are not masked, up to the half diagonal block the field leaves out of its counts.
    const double pairs = !shape.causal ? q * kv : q <= kv ? q * kv - q * q / 2 : kv * kv / 2;
    t.flops += 2.0 * pairs * shape.heads * (192 + 128);
    t.bytes += 2.0 * shape.heads * (q * (192 + 128) + kv * (192 + 128));
  }
  const size_t q_rows = static_cast<size_t>(q_indptr.back()) * shape.heads, kv_rows = static_cast<size_t>(kv_indptr.back()) * shape.heads;
  Buffer<__nv_bfloat16> q(q_rows * 192), k(kv_rows * 192), v(kv_rows * 128), out(q_rows * 128);
  Buffer<float> lse(q_rows);
  Buffer<int> q_index(q_indptr), kv_index(kv_indptr), workspace(64);
  CUDA(cudaMemset(workspace.data, 0, 256));
  fill_normal<<<1024, 256>>>(q.data, q.count, 1.0f, 1);
  fill_normal<<<1024, 256>>>(k.data, k.count, 1.0f, 2);
  fill_normal<<<1024, 256>>>(v.data, v.count, 1.0f, 3);
  call.q = q.data;
  call.k = k.data;
  call.v = v.data;
  call.q_indptr = q_index.data;
  call.kv_indptr = kv_index.data;
  call.out = out.data;
  call.lse = lse.data;
  call.softmax_scale = 1.0f / std::sqrt(192.0f);
  call.batch = static_cast<int>(shape.q_lens.size());
  call.heads = shape.heads;
  call.q_tokens = q_indptr.back();
  call.kv_tokens = kv_indptr.back();
  call.causal = shape.causal;
  call.workspace = workspace.data;
  call.workspace_bytes = 256;
  mla_prefill(call, nullptr);
  finish(describe(shape));
  t.ms = time_replay(4, [&](int, cudaStream_t stream) { mla_prefill(call, stream); });
  return t;
}

// ---------------------------------------------------------------- machine

namespace {

// mma.sync on operands in registers: 16 warps a multiprocessor, eight independent accumulators each. What older GPUs can do; Hopper's
// wgmma does more, see sm90_matrix_rate.cu.
__global__ void __launch_bounds__(512) mma_rate_kernel(float* sink, int steps) {
  uint32_t a[4], b[2];
  for (int i = 0; i < 4; ++i) a[i] = 0x3f803f80u ^ (hash(threadIdx.x * 4 + i) & 0x007f807fu);
  for (int i = 0; i < 2; ++i) b[i] = 0x3f803f80u ^ (hash(threadIdx.x * 7 + i) & 0x807f007fu);
  float d[8][4] = {};
  for (int s = 0; s < steps; ++s) {
#pragma unroll
    for (int n = 0; n < 8; ++n) {
      asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
                   : "+f"(d[n][0]), "+f"(d[n][1]), "+f"(d[n][2]), "+f"(d[n][3])
                   : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
    }
  }
  float total = 0;
  for (int n = 0; n < 8; ++n) total += d[n][0] + d[n][1] + d[n][2] + d[n][3];
  if (total == 12345.678f) *sink = total;
}

__global__ void copy_kernel(uint4* to, const uint4* from, size_t count) {
  const size_t step = size_t{gridDim.x} * blockDim.x;
  size_t i = blockIdx.x * size_t{blockDim.x} + threadIdx.x;
  for (; i + 3 * step < count; i += 4 * step) {
    uint4 values[4];
#pragma unroll
    for (int u = 0; u < 4; ++u) values[u] = __ldcs(from + i + u * step);
#pragma unroll
    for (int u = 0; u < 4; ++u) __stcs(to + i + u * step, values[u]);
  }
  for (; i < count; i += step) to[i] = from[i];
}

}  // namespace

MachineRates measure_machine() {
  MachineRates rates;
  int device = 0;
  CUDA(cudaGetDevice(&device));
  cudaDeviceProp properties;
  CUDA(cudaGetDeviceProperties(&properties, device));
  rates.name = properties.name;
  const size_t bytes = size_t{1} << 30;
  {
    Buffer<uint8_t> from(bytes), to(bytes);
    CUDA(cudaMemset(from.data, 1, bytes));
    // The better of the driver's copy and a plain kernel: in a graph the driver's may be the slower one.
    const double driver_ms = time_replay(4, [&](int, cudaStream_t stream) { CUDA(cudaMemcpyAsync(to.data, from.data, bytes, cudaMemcpyDeviceToDevice, stream)); });
    const double kernel_ms = time_replay(4, [&](int, cudaStream_t stream) {
      copy_kernel<<<current_device().multiprocessors * 8, 256, 0, stream>>>(reinterpret_cast<uint4*>(to.data), reinterpret_cast<const uint4*>(from.data), bytes / sizeof(uint4));
    });
    rates.copy_bytes_per_s = 2.0 * bytes / std::min(driver_ms, kernel_ms) * 1e3;
  }
  Buffer<float> sink(1);
  const int blocks = current_device().multiprocessors;
  if (current_device().major == 9) {
    const int steps = 20000;
    const double ms = time_replay(2, [&](int, cudaStream_t stream) { launch_matrix_rate_sm90(sink.data, steps, blocks, stream); });
    rates.matrix_flops_per_s = static_cast<double>(blocks) * steps * matrix_rate_sm90_flops_per_step() / ms * 1e3;
  } else {
    const int steps = 20000;
    const double ms = time_replay(2, [&](int, cudaStream_t stream) { mma_rate_kernel<<<blocks, 512, 0, stream>>>(sink.data, steps); });
    rates.matrix_flops_per_s = static_cast<double>(blocks) * steps * 16 * 8 * (2.0 * 16 * 8 * 16) / ms * 1e3;
  }
  return rates;
}

}  // namespace tpla::cuda
