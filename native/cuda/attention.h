// Attention kernels over paged KV, for NVIDIA GPUs from sm_80 up. Plain C++: device pointers and a stream, no framework types.
#pragma once

#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <string>

struct CUstream_st;

namespace tpla::cuda {

using Stream = CUstream_st*;

// What the kernels do not take, or what the driver refused; the message says what was expected and what came.
class AttentionError : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

enum class KvFormat {
  bf16,      // token: latent + rope values of bf16
  fp8_656,   // token: 512 e4m3, 4 fp32 power-of-two scales (one per 128), 64 bf16 rope: 656 bytes
};

// Which implementation runs; automatic takes the fastest one the GPU has.
enum class AttentionPath { automatic, sm90, sm80 };

// Absorbed MLA decode: for query row (token i, head h) of sequence b, over its cached tokens t < limit
//   logit_t = scale · (mu_h · q_latent · c_t + q_rope · k_t),   out = sum_t softmax(logit)_t · c_t
// where one cached token is the row [c_t | k_t]. limit = kv_len, or with `causal` kv_len - (query tokens of b - 1 - i).
struct MlaDecode {
  const void* q = nullptr;                 // bf16 [query tokens of the batch, heads, latent + rope]
  const void* kv = nullptr;                // pages, each [page_size][token]
  const int32_t* block_table = nullptr;    // [batch, block_table_stride], page numbers
  const int32_t* kv_lens = nullptr;        // [batch], including the query tokens; 0 gives zeros and lse = -inf
  const int32_t* q_indptr = nullptr;       // [batch + 1] offsets of query tokens; null: q_tokens for each sequence
  void* out = nullptr;                     // bf16 [query tokens of the batch, heads, latent]
  float* lse = nullptr;                    // [query tokens of the batch, heads], natural logarithm; may be null
  const float* latent_scale = nullptr;     // mu, [heads]; null: 1. Applied to q_latent, rounded to bf16
  float softmax_scale = 1.0f;
  int batch = 0;
  int heads = 0;
  int q_tokens = 1;                        // per sequence; with q_indptr the largest of them
  int latent = 0;
  int rope = 64;
  int page_size = 64;                      // tokens, a multiple of 16
  int64_t page_stride = 0;                 // bytes between pages; 0: dense
  int num_pages = 0;
  int block_table_stride = 0;
  bool causal = true;
  KvFormat format = KvFormat::bf16;
  AttentionPath path = AttentionPath::automatic;
  void* workspace = nullptr;               // mla_decode_workspace_bytes(); zeroed once after allocation; one launch at a time may use it
  size_t workspace_bytes = 0;
};

size_t mla_decode_workspace_bytes(const MlaDecode& call);

// One kernel launch, capturable into a graph; lengths and tables are read on the device at each replay.
void mla_decode(const MlaDecode& call, Stream stream);

// Un-absorbed prefill of one or more sequences: query i of a sequence of q_len queries and kv_len keys sees keys
// j < kv_len, or with `causal` j <= kv_len - q_len + i (a chunk at the end of its cached prefix).
struct MlaPrefill {
  const void* q = nullptr;            // bf16 [q_tokens, heads, key_dim]
  const void* k = nullptr;            // bf16 [kv_tokens, heads, key_dim]
  const void* v = nullptr;            // bf16 [kv_tokens, heads, value_dim]
  const int32_t* q_indptr = nullptr;  // [batch + 1]
  const int32_t* kv_indptr = nullptr; // [batch + 1]
  void* out = nullptr;                // bf16 [q_tokens, heads, value_dim]; zeros where a query sees nothing
  float* lse = nullptr;               // [q_tokens, heads], natural logarithm; may be null
  float softmax_scale = 1.0f;
  int batch = 0;
  int heads = 0;
  int key_dim = 192;
  int value_dim = 128;
  int64_t q_tokens = 0;               // of the batch
  int64_t kv_tokens = 0;
  int max_q_tokens = 0;               // of one sequence
  int max_kv_tokens = 0;
  bool causal = true;
  void* workspace = nullptr;          // zeroed once after allocation; one launch at a time may use it
  size_t workspace_bytes = 0;
};

size_t mla_prefill_workspace_bytes(const MlaPrefill& call);

void mla_prefill(const MlaPrefill& call, Stream stream);

}  // namespace tpla::cuda
