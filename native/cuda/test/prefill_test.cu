// Checks and times un-absorbed prefill on this machine's GPU.
//   prefill_test check COUNT SEED
//   prefill_test bench
#include <cmath>
#include <cstring>
#include <random>
#include <string>

#include "attention.h"
#include "support.cuh"

using namespace tpla::cuda;

struct Reference {
  const __nv_bfloat16 *q, *k, *v;
  const int *q_indptr, *kv_indptr;
  double *logits, *out, *lse;
  int heads, max_kv, causal;
  double scale;
};

__global__ void reference_kernel(Reference r) {
  const int sequence = blockIdx.z, head = blockIdx.y;
  const int q_begin = r.q_indptr[sequence], q_len = r.q_indptr[sequence + 1] - q_begin;
  const int kv_begin = r.kv_indptr[sequence], kv_len = r.kv_indptr[sequence + 1] - kv_begin;
  __shared__ double top, total;
  for (int i = blockIdx.x; i < q_len; i += gridDim.x) {
    const int64_t row = static_cast<int64_t>(q_begin + i) * r.heads + head;
    const int limit = r.causal ? max(0, min(kv_len, kv_len - q_len + i + 1)) : kv_len;
    double* logits = r.logits + row * r.max_kv;
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
      r.lse[row] = limit > 0 ? top + log(total) : -INFINITY;
    }
    __syncthreads();
    for (int c = threadIdx.x; c < 128; c += blockDim.x) {
      double sum = 0;
      for (int t = 0; t < limit; ++t) sum += exp(logits[t] - top) * __bfloat162float(r.v[(static_cast<int64_t>(kv_begin + t) * r.heads + head) * 128 + c]);
      r.out[row * 128 + c] = limit > 0 ? sum / total : 0;
    }
    __syncthreads();
  }
}

struct Shape {
  int heads = 1;
  bool causal = true;
  float q_scale = 1.0f;
  std::vector<int> q_lens, kv_lens;
};

bool check(const Shape& s, std::mt19937& random, int repeats) {
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
  char name[160];
  std::snprintf(name, sizeof name, "batch %d heads %d q max %d kv max %d%s scale %.0f", call.batch, s.heads, call.max_q_tokens, call.max_kv_tokens, s.causal ? " causal" : "",
                s.q_scale);
  std::vector<__nv_bfloat16> first;
  std::vector<float> first_lse;
  bool same = true;
  for (int i = 0; i < repeats; ++i) {
    out.poison();
    lse.poison();
    mla_prefill(call, nullptr);
    finish(name);
    const auto got = out.read();
    if (i == 0) {
      first = got;
      first_lse = lse.read();
    } else {
      same = same && std::memcmp(got.data(), first.data(), out.count * 2) == 0;
    }
  }
  Buffer<double> logits(q_rows * std::max(call.max_kv_tokens, 1)), ref(q_rows * 128), ref_lse(q_rows);
  reference_kernel<<<dim3(64, s.heads, call.batch), 128>>>(
      {q.data, k.data, v.data, q_index.data, kv_index.data, logits.data, ref.data, ref_lse.data, s.heads, std::max(call.max_kv_tokens, 1), s.causal, 1.0 / std::sqrt(192.0)});
  CUDA(cudaDeviceSynchronize());
  const auto want = ref.read(), want_lse = ref_lse.read();
  double worst = 0, worst_lse = 0;
  for (size_t row = 0; row < q_rows; ++row) {
    double error = 0, norm = 0;
    for (int c = 0; c < 128; ++c) {
      const double w = want[row * 128 + c], g = __bfloat162float(first[row * 128 + c]);
      error += (g - w) * (g - w);
      norm += w * w;
    }
    const double relative = norm > 0 ? std::sqrt(error / norm) : std::sqrt(error);
    if (!(relative <= worst)) worst = relative;
    const double d = std::isinf(want_lse[row]) ? (first_lse[row] == -INFINITY ? 0.0 : NAN) : std::abs(first_lse[row] - want_lse[row]);
    if (!(d <= worst_lse)) worst_lse = d;
  }
  const bool ok = same && worst < 8e-3 && worst_lse < 2e-3;
  std::printf("%s worst row %.2e lse %.1e%s | %s\n", ok ? "ok  " : "FAIL", worst, worst_lse, same ? "" : " BITS DIFFER", name);
  std::fflush(stdout);
  return ok;
}

int main(int argc, char** argv) {
  const std::string mode = argc > 1 ? argv[1] : "";
  if (mode == "check" && argc >= 4) {
    std::mt19937 random(std::atoi(argv[3]));
    int failures = 0;
    const int count = std::atoi(argv[2]);
    for (int i = 0; i < count; ++i) {
      Shape s;
      s.heads = 1 + random() % 5;
      s.causal = random() % 4 != 0;
      s.q_scale = random() % 3 == 0 ? 6.0f : 1.0f;
      const int batch = 1 + random() % 4;
      for (int b = 0; b < batch; ++b) {
        const int q_len = random() % 5 == 0 ? random() % 3 : random() % 700;
        s.q_lens.push_back(q_len);
        s.kv_lens.push_back(random() % 2 ? q_len : random() % 6 == 0 ? random() % 100 : q_len + random() % 500);
      }
      failures += !check(s, random, 5);
    }
    std::printf("%d of %d shapes failed\n", failures, count);
    return failures != 0;
  }
  if (mode == "bench") {
    std::printf("batch,heads,tokens,causal,ms,tflops\n");
    for (const bool causal : {true, false}) {
      for (const int tokens : {2048, 4096, 8192, 16384}) {
        const int heads = 128;
        const size_t rows = static_cast<size_t>(tokens) * heads;
        Buffer<__nv_bfloat16> q(rows * 192), k(rows * 192), v(rows * 128), out(rows * 128);
        Buffer<float> lse(rows);
        Buffer<int> index(std::vector<int>{0, tokens}), workspace(64);
        CUDA(cudaMemset(workspace.data, 0, 256));
        fill_normal<<<1024, 256>>>(q.data, q.count, 1.0f, 1);
        fill_normal<<<1024, 256>>>(k.data, k.count, 1.0f, 2);
        fill_normal<<<1024, 256>>>(v.data, v.count, 1.0f, 3);
        MlaPrefill call;
        call.q = q.data;
        call.k = k.data;
        call.v = v.data;
        call.q_indptr = call.kv_indptr = index.data;
        call.out = out.data;
        call.lse = lse.data;
        call.softmax_scale = 1.0f / std::sqrt(192.0f);
        call.batch = 1;
        call.heads = heads;
        call.q_tokens = call.kv_tokens = tokens;
        call.max_q_tokens = call.max_kv_tokens = tokens;
        call.causal = causal;
        call.workspace = workspace.data;
        call.workspace_bytes = 256;
        mla_prefill(call, nullptr);
        finish("prefill bench");
        const double ms = time_replay(4, [&](int, cudaStream_t stream) { mla_prefill(call, stream); });
        const double flops = 2.0 * tokens * tokens * heads * 320 * (causal ? 0.5 : 1.0);
        std::printf("1,%d,%d,%d,%.4f,%.0f\n", heads, tokens, causal, ms, flops / ms / 1e9);
        std::fflush(stdout);
      }
    }
    return 0;
  }
  std::fprintf(stderr, "usage: prefill_test check COUNT SEED | bench\n");
  return 2;
}
