// Attention kernels over paged KV, for NVIDIA GPUs from sm_80 up. Plain C++: device pointers and a stream, no framework types.
#pragma once

#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <string>

struct CUstream_st;

namespace tpla::cuda {

using Stream = CUstream_st*;

class CublasLt;

// What the kernels do not take, or what the driver refused; the message says what was expected and what came.
class AttentionError : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

enum class KvFormat {
  bf16,  // token: latent + 64 rope values of bf16
  fp8,   // token: latent e4m3, one fp32 power-of-two scale per 128 of them, 64 rope values of bf16; 656 bytes for a latent of 512
};

// The launch code and the kernels both need it.
#if defined(__CUDACC__)
__host__ __device__
#endif
inline constexpr int kv_token_bytes(KvFormat format, int latent) {
  return format == KvFormat::bf16 ? (latent + 64) * 2 : latent + (latent + 127) / 128 * 4 + 128;
}

// Which implementation runs; automatic takes the fastest one the GPU has.
enum class AttentionPath { automatic, sm90, sm80 };

// What decode may do to its logits beside scaling them; the defaults do nothing. For a query at position p = kv_len - query tokens + i
// and a token at t, in this order:
//   softcap   logit := softcap · tanh(logit / softcap)
//   ALiBi     logit := logit - slope_h · |p - t|
//   window    t is hidden unless t > p - window
//   blocks    t is hidden unless its block of mask_block tokens is listed
// Hidden tokens are neither scheduled nor loaded (but for those that share a run of 16 to 64 tokens with a visible one), so their pages
// need not exist. A query that sees nothing gives zeros and lse = -inf.
struct LogitVariants {
  float softcap = 0.0f;                    // 0: off
  int window = 0;                          // tokens, the query's own included; 0: off
  const float* alibi_slopes = nullptr;     // [query heads]; null: off
  const int32_t* block_list = nullptr;     // [batch, block_list_stride]: numbers of the visible blocks, ascending; null: off
  const int32_t* block_counts = nullptr;   // [batch], entries of each list; those past the end of the sequence are ignored
  int block_list_stride = 0;
  int mask_block = 0;                      // tokens, a multiple of 16

  bool any() const { return softcap > 0.0f || window > 0 || alibi_slopes || block_list; }
};

// Absorbed MLA decode: for query row (token i, head h) of sequence b, over its cached tokens t < limit
//   logit_t = scale · (mu_h · q_latent · c_t + q_rope · k_t),   out = sum_t softmax(logit)_t · c_t
// where one cached token is the row [c_t | k_t]. limit = kv_len, or with `causal` kv_len - (query tokens of b - 1 - i).
struct MlaDecode {
  const void* q = nullptr;                 // bf16 [query tokens of the batch, heads, latent + rope]
  const void* kv = nullptr;                // pages, each [page_size][token]
  const int32_t* block_table = nullptr;    // [batch, block_table_stride], page numbers
  const int32_t* kv_lens = nullptr;        // [batch], including the query tokens; 0 gives zeros and lse = -inf
  const int32_t* q_indptr = nullptr;       // [batch + 1] offsets of query tokens; null: q_tokens for each sequence
  void* out = nullptr;                     // bf16 [query tokens of the batch, heads, latent]; begins at a multiple of 16 bytes
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
  LogitVariants variants;
  AttentionPath path = AttentionPath::automatic;
  void* workspace = nullptr;               // mla_decode_workspace_bytes(); zeroed once after allocation; one launch at a time may use it
  size_t workspace_bytes = 0;
};

size_t mla_decode_workspace_bytes(const MlaDecode& call);

// One kernel launch, capturable into a graph; lengths and tables are read on the device at each replay.
void mla_decode(const MlaDecode& call, Stream stream);

// Decode with ordinary keys and values (GQA, MQA, MHA): query head h reads KV head h / (heads / kv_heads), otherwise as MlaDecode:
//   logit_t = scale · q_h · k_t,   out = sum_t softmax(logit)_t · v_t
// Keys and values lie in pages that one block table names. Strides are bytes and the same for both, so that pages may be
// [token][KV head][head_dim] or [KV head][token][head_dim], with keys and values apart or in one page.
struct GqaDecode {
  const void* q = nullptr;                 // bf16 [query tokens of the batch, heads, head_dim]
  const void* k = nullptr;                 // bf16, first token and KV head of page 0
  const void* v = nullptr;
  const int32_t* block_table = nullptr;    // [batch, block_table_stride], page numbers
  const int32_t* kv_lens = nullptr;        // [batch], including the query tokens; 0 gives zeros and lse = -inf
  const int32_t* q_indptr = nullptr;       // [batch + 1] offsets of query tokens; null: q_tokens for each sequence
  void* out = nullptr;                     // bf16 [query tokens of the batch, heads, head_dim]
  float* lse = nullptr;                    // [query tokens of the batch, heads], natural logarithm; may be null
  float softmax_scale = 1.0f;
  int batch = 0;
  int heads = 0;                           // query heads, a multiple of kv_heads
  int kv_heads = 0;
  int head_dim = 128;                      // 64 or 128
  int q_tokens = 1;                        // per sequence; with q_indptr the largest of them
  int page_size = 64;                      // tokens, a multiple of 16
  int64_t page_stride = 0;                 // bytes, multiples of 16; 0: dense [page][token][KV head][head_dim]
  int64_t token_stride = 0;
  int64_t head_stride = 0;
  int block_table_stride = 0;
  bool causal = true;
  LogitVariants variants;
  AttentionPath path = AttentionPath::automatic;
  void* workspace = nullptr;               // gqa_decode_workspace_bytes(); zeroed once after allocation; one launch at a time may use it
  size_t workspace_bytes = 0;
};

size_t gqa_decode_workspace_bytes(const GqaDecode& call);

// One kernel launch, capturable into a graph; lengths and tables are read on the device at each replay.
void gqa_decode(const GqaDecode& call, Stream stream);

// Un-absorbed prefill of one or more sequences: query i of a sequence of q_len queries and kv_len keys sees keys
// j < kv_len, or with `causal` j <= kv_len - q_len + i (a chunk at the end of its cached prefix).
struct MlaPrefill {
  const void* q = nullptr;            // bf16 [q_tokens, heads, key_dim]
  const void* k = nullptr;            // bf16 [kv_tokens, heads, key_dim]
  const void* v = nullptr;            // bf16 [kv_tokens, heads, value_dim]
  const void* k_rope = nullptr;       // bf16 [kv_tokens, 64], the last 64 columns of every head's keys; null: they are in k
  int64_t k_token_stride = 0;         // values, multiples of 8; 0: dense
  int64_t k_head_stride = 0;
  int64_t v_token_stride = 0;
  int64_t v_head_stride = 0;
  int64_t k_rope_stride = 0;
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
  AttentionPath path = AttentionPath::automatic;
  void* workspace = nullptr;          // zeroed once after allocation; one launch at a time may use it
  size_t workspace_bytes = 0;
};

size_t mla_prefill_workspace_bytes(const MlaPrefill& call);

// The path that would run: sm90 or sm80.
AttentionPath mla_prefill_path(const MlaPrefill& call);

void mla_prefill(const MlaPrefill& call, Stream stream);

// How a chunk of prefill is computed over cached latents; automatic takes the form that is estimated to be faster (chunk_form.h).
enum class ChunkForm { automatic, absorbed, unabsorbed };

// Chunked prefill over cached latents (latent 512, rope 64), from queries before absorption to values:
//   absorbed:    q̃ = [q W_UK | q_rope] per head, decode over the latents, values = outputs · W_UVᵀ
//   un-absorbed: latents gathered from their pages (and widened to bf16), [keys | values] = latents · W_KVᵀ, prefill
// The chunk's own tokens are in the cache. The matrix products are cuBLASLt's.
struct MlaChunk {
  const void* q = nullptr;               // bf16 [q_tokens, heads, 192]: 128 columns without position, 64 rotated ones
  const void* kv_b = nullptr;            // bf16 [heads, 256, 512]: W_UK (128 rows), W_UV (128 rows) of each head
  const void* kv = nullptr;              // as in MlaDecode
  const int32_t* block_table = nullptr;  // [batch, block_table_stride]
  const int32_t* kv_lens = nullptr;      // [batch], including the query tokens
  const int32_t* q_indptr = nullptr;     // [batch + 1]
  const int32_t* kv_indptr = nullptr;    // [batch + 1], prefix sums of kv_lens
  void* out = nullptr;                   // bf16 [q_tokens, heads, 128]
  float* lse = nullptr;                  // [q_tokens, heads], natural logarithm; may be null
  float softmax_scale = 1.0f;
  int batch = 0;
  int heads = 0;
  int64_t q_tokens = 0;                  // of the batch
  int64_t kv_tokens = 0;
  int max_q_tokens = 0;                  // of one sequence
  int max_kv_tokens = 0;
  int page_size = 64;
  int64_t page_stride = 0;               // bytes; 0: dense
  int num_pages = 0;
  int block_table_stride = 0;
  bool causal = true;
  KvFormat format = KvFormat::bf16;
  ChunkForm form = ChunkForm::automatic;
  AttentionPath path = AttentionPath::automatic;
  void* workspace = nullptr;             // zeroed once after allocation; one launch at a time may use it, in whatever form
  size_t workspace_bytes = 0;
};

// The form that would run.
ChunkForm mla_chunk_form(const MlaChunk& call);

// For the form that would run.
size_t mla_chunk_workspace_bytes(const MlaChunk& call);

void mla_chunk(const MlaChunk& call, CublasLt& products, Stream stream);

// Prefill and decode in one launch (POD): multiprocessors begin with one or the other in proportion to the work, so that the tensor cores and
// the memory are busy at the same time, and go on with what is left.
struct PodBatch {
  MlaPrefill prefill;            // their own workspaces are not used
  MlaDecode decode;
  int decode_multiprocessors = 0;  // that begin with decode; 0: from the lengths
  void* workspace = nullptr;     // zeroed once after allocation; one launch at a time may use it
  size_t workspace_bytes = 0;
};

// Empty where the batch runs as one launch; otherwise why it takes two, one after the other: other GPUs than Hopper, more than 32 decode rows
// (heads × q_tokens), more than 1024 decode sequences, fp8 KV, logit variants, an empty side.
std::string pod_unfused_reason(const PodBatch& batch);

size_t pod_workspace_bytes(const PodBatch& batch);

void pod(const PodBatch& batch, Stream stream);

// New tokens into the cache: RMSNorm over the whole latent, weight, this rank's columns of it; rope rotation of the key; fp8 conversion where asked.
struct KvAppend {
  const void* latent = nullptr;          // bf16 [tokens, latent_stride], before the norm
  const void* rope = nullptr;            // bf16 [tokens, rope_stride], before the rotation
  const float* norm_weight = nullptr;    // [latent_width]; null: 1
  const float* cos_sin = nullptr;        // [positions, 64]: 32 cosines, 32 sines
  const int32_t* positions = nullptr;    // [tokens]
  const int64_t* slots = nullptr;        // [tokens]: page · page_size + offset; negative: skip the token
  void* kv = nullptr;
  float eps = 1e-6f;
  bool norm = true;
  bool interleaved = true;               // rope pairs (2i, 2i + 1) as in DeepSeek checkpoints, else (i, i + 32)
  int tokens = 0;
  int latent_width = 512;
  int64_t latent_stride = 512;
  int64_t rope_stride = 64;
  int shared_width = 0;                  // columns [0, shared_width) of the latent, which every rank keeps; a row begins with them
  int slice_begin = 0;                   // the rank's own columns, behind those
  int slice_width = 512;
  int page_size = 64;
  int64_t page_stride = 0;               // bytes; 0: dense
  KvFormat format = KvFormat::bf16;
};

void kv_append(const KvAppend& call, Stream stream);

// Copies token rows from slots to slots (eviction, prefix compaction). A slot must not be both read and written.
struct KvGather {
  const void* from = nullptr;
  void* to = nullptr;
  const int64_t* from_slots = nullptr;   // [tokens]
  const int64_t* to_slots = nullptr;
  int tokens = 0;
  int token_bytes = 0;
  int page_size = 64;
  int64_t from_page_stride = 0;          // bytes; 0: dense
  int64_t to_page_stride = 0;
};

void kv_gather(const KvGather& call, Stream stream);

}  // namespace tpla::cuda
