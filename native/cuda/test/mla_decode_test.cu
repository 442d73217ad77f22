// Checks and times MLA decode on this machine's GPU.
//   mla_decode_test check COUNT SEED [sm80|auto [LATENT [HEADS]]]      random shapes against float64, NaN in everything unused, ten equal runs
//   mla_decode_test bench ANCHORS.csv [latent]   the rows of the file for this GPU, times beside those of the file
//   mla_decode_test shape LATENT BATCH HEADS QTOKENS LEN[;LEN...] [PAGE]
#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <random>
#include <sstream>
#include <string>
#include <vector>

#include "attention.h"
#include "support.cuh"

using namespace tpla::cuda;

// Tokens in use only; the rest of the pool keeps its NaN.
__global__ void fill_tokens(__nv_bfloat16* kv, const int* table, const int* lens, int table_stride, int page_size, int width, uint64_t seed) {
  const int sequence = blockIdx.y;
  for (int token = blockIdx.x; token < lens[sequence]; token += gridDim.x) {
    const int64_t row = static_cast<int64_t>(table[sequence * table_stride + token / page_size]) * page_size + token % page_size;
    for (int c = threadIdx.x; c < width; c += blockDim.x) kv[row * width + c] = __float2bfloat16(normal(row * width + c, seed));
  }
}

struct Reference {
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
  double scale;
};

__global__ void reference_kernel(Reference r) {
  const int sequence = blockIdx.y;
  const int tokens = r.indptr[sequence + 1] - r.indptr[sequence];
  const int width = r.latent + 64;
  __shared__ double reduce[256];
  for (int row = blockIdx.x; row < tokens * r.heads; row += gridDim.x) {
    const int64_t q_row = static_cast<int64_t>(r.indptr[sequence]) * r.heads + row;
    const int limit = r.causal ? r.lens[sequence] - (tokens - 1 - row / r.heads) : r.lens[sequence];
    double* logits = r.logits + q_row * r.max_len;
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
      r.out[q_row * r.latent + c] = limit > 0 ? sum / total : 0;
    }
    if (threadIdx.x == 0) r.lse[q_row] = limit > 0 ? top + log(total) : -INFINITY;
    __syncthreads();
  }
}

struct Shape {
  int latent = 512, batch = 1, heads = 16, q_tokens = 1, page_size = 64;
  std::vector<int> lens;
  bool causal = true, mu = false, ragged = false;
  float q_scale = 1.0f;
  AttentionPath path = AttentionPath::automatic;

  std::string name() const {
    char text[160];
    int longest = 0;
    for (int l : lens) longest = std::max(longest, l);
    std::snprintf(text, sizeof text, "latent %d batch %d heads %d q %d page %d longest %d%s%s%s scale %.0f", latent, batch, heads, q_tokens, page_size, longest,
                  causal ? " causal" : "", mu ? " mu" : "", ragged ? " ragged" : "", q_scale);
    return text;
  }
};

// Device tensors of one problem.
struct Problem {
  Shape shape;
  int pages_per_sequence = 1, pages = 1;
  std::vector<int> table, indptr;
  int query_tokens = 0;

  Problem(const Shape& s, std::mt19937& random) : shape(s) {
    int needed = 0;
    for (int l : s.lens) {
      pages_per_sequence = std::max(pages_per_sequence, (l + s.page_size - 1) / s.page_size);
      needed += (l + s.page_size - 1) / s.page_size;
    }
    pages = needed + 3;
    std::vector<int> order(pages);
    for (int i = 0; i < pages; ++i) order[i] = i;
    std::shuffle(order.begin(), order.end(), random);
    table.assign(static_cast<size_t>(s.batch) * pages_per_sequence, -123456);
    int next = 0;
    for (int b = 0; b < s.batch; ++b) {
      for (int p = 0; p < (s.lens[b] + s.page_size - 1) / s.page_size; ++p) table[b * pages_per_sequence + p] = order[next++];
    }
    indptr.push_back(0);
    for (int b = 0; b < s.batch; ++b) indptr.push_back(indptr.back() + (s.ragged ? static_cast<int>(random() % (s.q_tokens + 1)) : s.q_tokens));
    query_tokens = indptr.back();
  }

  MlaDecode call() const {
    MlaDecode c;
    c.batch = shape.batch;
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

bool check(const Shape& shape, std::mt19937& random, int repeats) {
  Problem problem(shape, random);
  const int width = shape.latent + 64;
  const size_t rows = static_cast<size_t>(problem.query_tokens) * shape.heads;
  Buffer<__nv_bfloat16> q(rows * width), kv(static_cast<size_t>(problem.pages) * shape.page_size * width), out(rows * shape.latent);
  Buffer<float> lse(rows);
  Buffer<int> table(problem.table), lens(shape.lens), indptr(problem.indptr);
  std::vector<float> mu_host(shape.heads);
  for (float& m : mu_host) m = 0.5f + (random() % 1000) / 500.0f;
  Buffer<float> mu(mu_host);
  fill_normal<<<256, 256>>>(q.data, q.count, shape.q_scale, random());
  kv.poison();
  fill_tokens<<<dim3(64, shape.batch), 128>>>(kv.data, table.data, lens.data, problem.pages_per_sequence, shape.page_size, width, random());

  MlaDecode call = problem.call();
  call.q = q.data;
  call.kv = kv.data;
  call.block_table = table.data;
  call.kv_lens = lens.data;
  call.q_indptr = shape.ragged ? indptr.data : nullptr;
  call.out = out.data;
  call.lse = lse.data;
  call.latent_scale = shape.mu ? mu.data : nullptr;
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
    finish(shape.name().c_str());
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
  for (int l : shape.lens) max_len = std::max(max_len, l);
  Buffer<double> logits(rows * max_len), ref_out(rows * shape.latent), ref_lse(rows);
  reference_kernel<<<dim3(std::min(shape.heads * shape.q_tokens, 512), shape.batch), 256>>>(
      {q.data, kv.data, table.data, lens.data, indptr.data, shape.mu ? mu.data : nullptr, logits.data, ref_out.data, ref_lse.data, shape.heads, shape.latent,
       shape.page_size, problem.pages_per_sequence, max_len, shape.causal, 1.0 / std::sqrt(192.0)});
  CUDA(cudaDeviceSynchronize());
  const auto want_out = ref_out.read();
  const auto want_lse = ref_lse.read();
  double worst = 0, worst_lse = 0, error = 0, norm = 0;
  for (size_t row = 0; row < rows; ++row) {
    double row_error = 0, row_norm = 0;
    for (int c = 0; c < shape.latent; ++c) {
      const double want = want_out[row * shape.latent + c], got = __bfloat162float(first_out[row * shape.latent + c]);
      row_error += (got - want) * (got - want);
      row_norm += want * want;
    }
    error += row_error;
    norm += row_norm;
    const double relative = row_norm > 0 ? std::sqrt(row_error / row_norm) : std::sqrt(row_error);
    if (!(relative <= worst)) worst = relative;
    const double d = std::isinf(want_lse[row]) ? (first_lse[row] == -INFINITY ? 0.0 : NAN) : std::abs(first_lse[row] - want_lse[row]);
    if (!(d <= worst_lse)) worst_lse = d;
  }
  const bool ok = same && worst < 8e-3 && worst_lse < 2e-3;
  std::printf("%s rel %.2e worst row %.2e lse %.1e%s | %s\n", ok ? "ok  " : "FAIL", norm > 0 ? std::sqrt(error / norm) : 0.0, worst, worst_lse,
              same ? "" : " BITS DIFFER", shape.name().c_str());
  std::fflush(stdout);
  return ok;
}

int run_checks(int count, unsigned seed, AttentionPath path, int only_latent, int only_heads) {
  std::mt19937 random(seed);
  const int latents[] = {512, 256, 320, 128}, pages[] = {16, 32, 48, 64, 80, 128, 256};
  const int heads[] = {1, 2, 5, 8, 16, 16, 24, 32, 40, 64, 64, 96, 128, 128};
  int failures = 0;
  for (int i = 0; i < count; ++i) {
    Shape s;
    s.path = path;
    s.latent = only_latent ? only_latent : latents[i % 4];
    s.heads = only_heads ? only_heads : heads[random() % 14];
    s.q_tokens = random() % 3 == 0 ? 1 + random() % 4 : 1;
    s.page_size = pages[random() % 7];
    s.batch = 1 + random() % (random() % 3 == 0 ? 40 : 6);
    s.causal = random() % 4 != 0;
    s.mu = random() % 4 == 0;
    s.ragged = random() % 4 == 0;
    s.q_scale = random() % 3 == 0 ? 6.0f : 1.0f;
    const int longest = random() % 4 == 0 ? 6000 : random() % 2 ? 700 : 150;
    for (int b = 0; b < s.batch; ++b) s.lens.push_back(random() % 6 == 0 ? 0 : random() % longest);
    failures += !check(s, random, 10);
  }
  std::printf("%d of %d shapes failed\n", failures, count);
  return failures != 0;
}

struct Timing {
  double ms = 0, bytes = 0, flops = 0;
};

Timing measure(const Shape& shape) {
  std::mt19937 random(1);
  Problem problem(shape, random);
  const int width = shape.latent + 64;
  const size_t rows = static_cast<size_t>(problem.query_tokens) * shape.heads;
  const size_t kv_count = static_cast<size_t>(problem.pages) * shape.page_size * width;
  const int sets = static_cast<int>(std::clamp<size_t>(400'000'000 / (kv_count * 2), 2, 16));
  std::vector<Buffer<__nv_bfloat16>*> kvs;
  for (int i = 0; i < sets; ++i) {
    kvs.push_back(new Buffer<__nv_bfloat16>(kv_count));
    fill_normal<<<1024, 256>>>(kvs[i]->data, kv_count, 1.0f, 7 + i);
  }
  Buffer<__nv_bfloat16> q(rows * width), out(rows * shape.latent);
  Buffer<float> lse(rows);
  Buffer<int> table(problem.table), lens(shape.lens);
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
  finish(shape.name().c_str());
  Timing t;
  t.ms = time_replay(std::max(sets, 8), [&](int i, cudaStream_t stream) {
    call.kv = kvs[i % sets]->data;
    mla_decode(call, stream);
  });
  for (int l : shape.lens) {
    t.bytes += static_cast<double>(l) * width * 2;
    t.flops += 2.0 * l * shape.heads * shape.q_tokens * (width + shape.latent);
  }
  t.bytes += rows * (width + shape.latent) * 2.0;
  for (auto* b : kvs) delete b;
  return t;
}

void print_timing(const Shape& s, const char* lens, const Timing& t, double anchor) {
  std::printf("%d,%d,%d,%s,%d,%.4f,%.0f,%.0f", s.latent, s.batch, s.heads, lens, s.q_tokens, t.ms, t.bytes / t.ms / 1e6, t.flops / t.ms / 1e9);
  if (anchor > 0) std::printf(",%.4f,%.2f", anchor, anchor / t.ms);
  std::printf("\n");
  std::fflush(stdout);
}

std::vector<int> parse_lens(const std::string& text, int batch) {
  std::vector<int> lens;
  std::stringstream stream(text);
  for (std::string item; std::getline(stream, item, ';');) lens.push_back(std::atoi(item.c_str()));
  if (lens.size() == 1) lens.assign(batch, lens[0]);
  return lens;
}

// Columns by name: gpu, latent (512 where absent), batch, heads, kv_len, q_tokens, kv_lens, ms.
void run_bench(const char* path, int only_latent) {
  std::ifstream file(path);
  std::string line;
  std::getline(file, line);
  std::vector<std::string> names;
  {
    std::stringstream stream(line);
    for (std::string item; std::getline(stream, item, ',');) names.push_back(item);
  }
  std::printf("latent,batch,heads,kv_len,q_tokens,ms,gb_per_s,tflops,anchor_ms,ratio\n");
  while (std::getline(file, line)) {
    std::vector<std::string> fields(names.size());
    std::stringstream stream(line);
    for (size_t i = 0; i < names.size(); ++i) std::getline(stream, fields[i], ',');
    const auto field = [&](const char* name) {
      for (size_t i = 0; i < names.size(); ++i) {
        if (names[i] == name) return fields[i];
      }
      return std::string();
    };
    if (field("gpu") != "H100") continue;
    Shape s;
    s.latent = field("latent").empty() ? 512 : std::stoi(field("latent"));
    if (only_latent && s.latent != only_latent) continue;
    s.batch = std::stoi(field("batch"));
    s.heads = std::stoi(field("heads"));
    s.q_tokens = std::stoi(field("q_tokens"));
    const std::string lens = field("kv_lens").empty() ? field("kv_len") : field("kv_lens");
    s.lens = parse_lens(lens, s.batch);
    print_timing(s, lens.c_str(), measure(s), std::stod(field("ms")));
  }
}

int main(int argc, char** argv) {
  const std::string mode = argc > 1 ? argv[1] : "";
  if (mode == "check" && argc >= 4) {
    return run_checks(std::atoi(argv[2]), std::atoi(argv[3]), argc > 4 && std::string(argv[4]) == "sm80" ? AttentionPath::sm80 : AttentionPath::automatic,
                      argc > 5 ? std::atoi(argv[5]) : 0, argc > 6 ? std::atoi(argv[6]) : 0);
  }
  if (mode == "bench" && argc >= 3) {
    run_bench(argv[2], argc > 3 ? std::atoi(argv[3]) : 0);
    return 0;
  }
  if (mode == "thunder") {
    const struct { int batch, q_tokens; const char* lens; double ms; } rows[] = {
        {4, 4, "4641;45118;1730;1696", 0.041}, {1, 1, "65536", 0.0445}, {64, 2, "512", 0.0286}, {132, 4, "4096", 0.210}};
    for (const auto& row : rows) {
      Shape s;
      s.batch = row.batch;
      s.q_tokens = row.q_tokens;
      s.lens = parse_lens(row.lens, row.batch);
      print_timing(s, row.lens, measure(s), row.ms);
    }
    return 0;
  }
  if (mode == "shape" && argc >= 7) {
    Shape s;
    s.latent = std::atoi(argv[2]);
    s.batch = std::atoi(argv[3]);
    s.heads = std::atoi(argv[4]);
    s.q_tokens = std::atoi(argv[5]);
    s.lens = parse_lens(argv[6], s.batch);
    if (argc > 7) s.page_size = std::atoi(argv[7]);
    print_timing(s, argv[6], measure(s), 0);
    return 0;
  }
  std::fprintf(stderr, "usage: mla_decode_test check COUNT SEED [sm80|auto [LATENT [HEADS]]] | bench ANCHORS.csv [latent] | thunder | shape LATENT BATCH HEADS QTOKENS LENS [PAGE]\n");
  return 2;
}
