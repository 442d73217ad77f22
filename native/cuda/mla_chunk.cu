// Chunked prefill over cached latents: the two forms, put together from decode, prefill and matrix products.
#include <cuda_bf16.h>
#include <cuda_fp8.h>
#include <cuda_runtime.h>

#include <algorithm>

#include "attention.h"
#include "chunk_form.h"
#include "cublaslt.h"
#include "decode_plan.h"
#include "device.h"

namespace tpla::cuda {
namespace {

constexpr int kLatent = 512, kRope = 64, kHead = 128;  // kHead: columns of a head without position, and of its values
constexpr int kToken = kLatent + kRope;                // values of a cached token
constexpr int kTokenUnits = kToken / 8;                // of 16 bytes
constexpr int kQuery = kHead + kRope;
constexpr size_t kProductBytes = 32 << 20;             // cuBLASLt's workspace

// Begins with what must stay zero between launches: kArrivalBytes in either form, so that both may take turns at one workspace.
struct Workspace {
  size_t attention, product, first, second, total;

  Workspace(size_t attention_bytes, size_t first_bytes, size_t second_bytes)
      : attention(0), product(align_up(std::max(attention_bytes, kArrivalBytes))), first(product + kProductBytes), second(first + align_up(first_bytes)), total(second + align_up(second_bytes)) {}
};

MlaDecode decode_of(const MlaChunk& call) {
  MlaDecode decode;
  decode.kv = call.kv;
  decode.block_table = call.block_table;
  decode.kv_lens = call.kv_lens;
  decode.q_indptr = call.q_indptr;
  decode.lse = call.lse;
  decode.softmax_scale = call.softmax_scale;
  decode.batch = call.batch;
  decode.heads = call.heads;
  decode.q_tokens = call.max_q_tokens;
  decode.latent = kLatent;
  decode.rope = kRope;
  decode.page_size = call.page_size;
  decode.page_stride = call.page_stride;
  decode.num_pages = call.num_pages;
  decode.block_table_stride = call.block_table_stride;
  decode.causal = call.causal;
  decode.format = call.format;
  decode.path = call.path;
  return decode;
}

MlaPrefill prefill_of(const MlaChunk& call) {
  MlaPrefill prefill;
  prefill.q = call.q;
  prefill.q_indptr = call.q_indptr;
  prefill.kv_indptr = call.kv_indptr;
  prefill.out = call.out;
  prefill.lse = call.lse;
  prefill.softmax_scale = call.softmax_scale;
  prefill.batch = call.batch;
  prefill.heads = call.heads;
  prefill.q_tokens = call.q_tokens;
  prefill.kv_tokens = call.kv_tokens;
  prefill.max_q_tokens = call.max_q_tokens;
  prefill.max_kv_tokens = call.max_kv_tokens;
  prefill.causal = call.causal;
  prefill.path = call.path;
  return prefill;
}

ChunkWork work_of(const MlaChunk& call) {
  return {call.heads, call.batch, call.q_tokens, call.kv_tokens, call.format == KvFormat::fp8, mla_prefill_path(prefill_of(call)) == AttentionPath::sm80};
}

// Throws for what decode does not take, so that a call is refused or not whatever its form.
Workspace workspace_of(const MlaChunk& call) {
  const size_t rows = static_cast<size_t>(call.q_tokens) * call.heads, decode_bytes = mla_decode_workspace_bytes(decode_of(call));
  if (mla_chunk_form(call) == ChunkForm::absorbed) return {decode_bytes, rows * kToken * 2, rows * kLatent * 2};
  const size_t tokens = static_cast<size_t>(call.kv_tokens);
  return {mla_prefill_workspace_bytes(prefill_of(call)), tokens * kToken * 2, tokens * call.heads * 2 * kHead * 2};
}

// Rotated columns of the queries -> their place behind the absorbed ones. A unit is 16 bytes.
__global__ void copy_rope(const uint4* __restrict__ q, uint4* __restrict__ absorbed, int64_t rows) {
  constexpr int kUnits = kRope / 8;
  for (int64_t i = blockIdx.x * int64_t{blockDim.x} + threadIdx.x; i < rows * kUnits; i += int64_t{gridDim.x} * blockDim.x) {
    const int64_t row = i / kUnits, unit = i % kUnits;
    absorbed[row * (kToken / 8) + kLatent / 8 + unit] = q[row * (kQuery / 8) + kHead / 8 + unit];
  }
}

// A warp copies a cached token of bf16.
struct CopyToken {
  __device__ void operator()(const uint4* token, uint4* to, int lane) const {
#pragma unroll
    for (int unit = lane; unit < kTokenUnits; unit += 32) to[unit] = token[unit];
  }
};

// A warp widens a cached token of fp8, 16 latent values a lane: e4m3 times a power of two is exact in bf16.
struct WidenToken {
  static_assert(kLatent == 32 * 16);
  static constexpr int kScales = kLatent / 16, kTail = kScales + 1;  // in units of 16 bytes: where scales and rope values begin

  __device__ void operator()(const uint4* token, uint4* to, int lane) const {
    const uint4 stored = token[lane];
    const float scale = reinterpret_cast<const float*>(token + kScales)[lane / 8];
    const __nv_fp8_e4m3* narrow = reinterpret_cast<const __nv_fp8_e4m3*>(&stored);
    uint4 wide[2];
    __nv_bfloat162* pairs = reinterpret_cast<__nv_bfloat162*>(wide);
#pragma unroll
    for (int i = 0; i < 8; ++i) pairs[i] = __floats2bfloat162_rn(float(narrow[2 * i]) * scale, float(narrow[2 * i + 1]) * scale);
    to[2 * lane] = wide[0];
    to[2 * lane + 1] = wide[1];
    if (lane < kRope / 8) to[kLatent / 8 + lane] = token[kTail + lane];
  }
};

// Cached tokens of each sequence -> one after another in bf16. Blocks (x, sequence); a warp takes a token at a time.
template <class Take>
__global__ void gather_tokens(const uint8_t* __restrict__ kv, const int32_t* __restrict__ block_table, int block_table_stride, const int32_t* __restrict__ kv_indptr, int page_size,
                              int64_t page_stride, int token_bytes, uint4* __restrict__ tokens) {
  const int sequence = blockIdx.y, lane = threadIdx.x % 32, warps = blockDim.x / 32;
  const int64_t begin = kv_indptr[sequence];
  const int count = kv_indptr[sequence + 1] - kv_indptr[sequence];
  for (int t = blockIdx.x * warps + threadIdx.x / 32; t < count; t += gridDim.x * warps) {
    const int64_t page = block_table[static_cast<int64_t>(sequence) * block_table_stride + t / page_size];
    Take()(reinterpret_cast<const uint4*>(kv + page * page_stride + t % page_size * token_bytes), tokens + (begin + t) * kTokenUnits, lane);
  }
}

void multiply(CublasLt& products, const Bf16Product& product, void* workspace, Stream stream) {
  if (!products.multiply(product, workspace, kProductBytes, stream)) {
    throw AttentionError("MLA chunk: " + products.name() + " refuses a product of " + std::to_string(product.m) + " × " + std::to_string(product.n) + " × " + std::to_string(product.k));
  }
}

const __nv_bfloat16* bf16(const void* data) { return static_cast<const __nv_bfloat16*>(data); }

void run_absorbed(const MlaChunk& call, const Workspace& at, CublasLt& products, Stream stream) {
  uint8_t* workspace = static_cast<uint8_t*>(call.workspace);
  const int64_t rows = call.q_tokens * call.heads;
  __nv_bfloat16* absorbed = reinterpret_cast<__nv_bfloat16*>(workspace + at.first);
  __nv_bfloat16* latents = reinterpret_cast<__nv_bfloat16*>(workspace + at.second);

  Bf16Product up;  // of each head: [query tokens, 128] · [128, 512]
  up.a = call.q;
  up.b = call.kv_b;
  up.c = absorbed;
  up.m = call.q_tokens;
  up.n = kLatent;
  up.k = kHead;
  up.lda = static_cast<int64_t>(call.heads) * kQuery;
  up.ldb = kLatent;
  up.ldc = static_cast<int64_t>(call.heads) * kToken;
  up.step_a = kQuery;
  up.step_b = 2 * kHead * kLatent;
  up.step_c = kToken;
  up.count = call.heads;
  up.transpose_b = false;
  multiply(products, up, workspace + at.product, stream);
  copy_rope<<<512, 256, 0, stream>>>(static_cast<const uint4*>(call.q), reinterpret_cast<uint4*>(absorbed), rows);
  check(cudaGetLastError(), "copy_rope");

  MlaDecode decode = decode_of(call);
  decode.q = absorbed;
  decode.out = latents;
  decode.workspace = workspace + at.attention;
  decode.workspace_bytes = at.product;
  mla_decode(decode, stream);

  Bf16Product down;  // of each head: [query tokens, 512] · [128, 512]ᵀ
  down.a = latents;
  down.b = bf16(call.kv_b) + kHead * kLatent;
  down.c = call.out;
  down.m = call.q_tokens;
  down.n = kHead;
  down.k = kLatent;
  down.lda = static_cast<int64_t>(call.heads) * kLatent;
  down.ldc = static_cast<int64_t>(call.heads) * kHead;
  down.step_a = kLatent;
  down.step_b = 2 * kHead * kLatent;
  down.step_c = kHead;
  down.count = call.heads;
  multiply(products, down, workspace + at.product, stream);
}

void run_unabsorbed(const MlaChunk& call, const Workspace& at, CublasLt& products, Stream stream) {
  uint8_t* workspace = static_cast<uint8_t*>(call.workspace);
  __nv_bfloat16* tokens = reinterpret_cast<__nv_bfloat16*>(workspace + at.first);
  __nv_bfloat16* keys_values = reinterpret_cast<__nv_bfloat16*>(workspace + at.second);
  const int token_bytes = kv_token_bytes(call.format, kLatent);
  const int64_t page_stride = call.page_stride ? call.page_stride : static_cast<int64_t>(call.page_size) * token_bytes;
  constexpr int kWarps = 8;
  const dim3 blocks(static_cast<unsigned>(std::min((call.max_kv_tokens + kWarps - 1) / kWarps, 4096)), static_cast<unsigned>(call.batch));
  const auto gather = call.format == KvFormat::fp8 ? gather_tokens<WidenToken> : gather_tokens<CopyToken>;
  gather<<<blocks, kWarps * 32, 0, stream>>>(static_cast<const uint8_t*>(call.kv), call.block_table, call.block_table_stride, call.kv_indptr, call.page_size, page_stride, token_bytes,
                                             reinterpret_cast<uint4*>(tokens));
  check(cudaGetLastError(), "gather_tokens");

  Bf16Product up;
  up.a = tokens;
  up.b = call.kv_b;
  up.c = keys_values;
  up.m = call.kv_tokens;
  up.n = static_cast<int64_t>(call.heads) * 2 * kHead;
  up.k = kLatent;
  up.lda = kToken;
  multiply(products, up, workspace + at.product, stream);

  MlaPrefill prefill = prefill_of(call);
  prefill.k = keys_values;
  prefill.v = keys_values + kHead;
  prefill.k_token_stride = prefill.v_token_stride = static_cast<int64_t>(call.heads) * 2 * kHead;
  prefill.k_head_stride = prefill.v_head_stride = 2 * kHead;
  prefill.k_rope = tokens + kLatent;
  prefill.k_rope_stride = kToken;
  prefill.workspace = workspace + at.attention;
  prefill.workspace_bytes = at.product;
  mla_prefill(prefill, stream);
}

}  // namespace

ChunkForm mla_chunk_form(const MlaChunk& call) {
  if (call.kv_tokens == 0) return ChunkForm::absorbed;  // nothing to multiply up
  return call.form == ChunkForm::automatic ? faster_chunk_form(work_of(call)) : call.form;
}

size_t mla_chunk_workspace_bytes(const MlaChunk& call) { return workspace_of(call).total; }

void mla_chunk(const MlaChunk& call, CublasLt& products, Stream stream) {
  if (call.batch == 0 || call.q_tokens == 0) return;
  const Workspace at = workspace_of(call);
  if (call.workspace_bytes < at.total) {
    throw AttentionError("MLA chunk needs a workspace of " + std::to_string(at.total) + " bytes; got " + std::to_string(call.workspace_bytes));
  }
  if (mla_chunk_form(call) == ChunkForm::absorbed) run_absorbed(call, at, products, stream);
  else run_unabsorbed(call, at, products, stream);
}

}  // namespace tpla::cuda
