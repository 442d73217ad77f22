// Attention problems as tests and benchmarks state them: a shape goes in, errors and times come out. Data are drawn from a seed.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <optional>
#include <string>
#include <vector>

namespace tpla::bench {

enum class KernelPath { automatic, sm90, sm80 };
enum class KvType { bf16, fp8, f32 };
enum class KvOrder { nhd, hnd };  // of a page: [token][KV head][value] or [KV head][token][value]

// What decode does to its logits beside scaling them; see cuda/attention.h.
struct LogitVariantShape {
  float softcap = 0;   // 0: none
  int window = 0;      // tokens; 0: none
  bool alibi = false;  // with the slopes 2^(-8 (h + 1) / heads)
  int mask_block = 0;  // tokens; 0: no block mask
  std::vector<std::vector<int32_t>> blocks;  // per sequence, the visible ones in ascending order

  bool any() const { return softcap > 0 || window > 0 || alibi || mask_block > 0; }
};

// Absorbed MLA or TPLA decode over paged latents; every head of a sequence reads the same rows.
struct DecodeShape {
  std::vector<int32_t> kv_lens;  // tokens per sequence, its query tokens included
  std::vector<int32_t> q_lens;   // query tokens per sequence
  int heads = 1;
  int latent = 512;
  int rope = 64;
  int page_tokens = 64;
  int page_gap_bytes = 0;  // between one page and the next
  bool causal = true;      // among the query tokens
  KvType kv = KvType::bf16;
  bool latent_scale = false;  // draws mu per head
  float query_scale = 1;      // standard deviation of the queries
  float latent_deviation = 1;  // standard deviation of the cached latents
  LogitVariantShape variants;
  KernelPath path = KernelPath::automatic;
};

// Decode with keys and values of their own: GQA, MQA and MHA over paged KV. Query head h reads KV head h / (heads / kv_heads).
struct GqaShape {
  std::vector<int32_t> kv_lens;
  std::vector<int32_t> q_lens;
  int heads = 32;
  int kv_heads = 8;
  int head_dim = 128;
  int page_tokens = 64;
  int page_gap_bytes = 0;
  KvOrder layout = KvOrder::nhd;
  bool causal = true;
  float query_scale = 1;
  LogitVariantShape variants;
  KernelPath path = KernelPath::automatic;
};

// Un-absorbed prefill: a chunk of q_lens[i] queries at the end of kv_lens[i] keys, every head with keys and values of its own.
struct PrefillShape {
  std::vector<int32_t> q_lens;
  std::vector<int32_t> kv_lens;
  int heads = 1;
  int key_dim = 192;
  int value_dim = 128;
  bool causal = true;
  float query_scale = 1;
  KernelPath path = KernelPath::automatic;
};

// A chunk of q_lens[i] queries at the end of kv_lens[i] cached tokens, from queries before absorption to values, with DeepSeek's dimensions.
constexpr int kChunkLatent = 512, kChunkRope = 64, kChunkHead = 128;  // kChunkHead: columns of a head without position, and of its values

enum class ChunkFormChoice { automatic, absorbed, unabsorbed };

struct ChunkShape {
  std::vector<int32_t> q_lens;
  std::vector<int32_t> kv_lens;
  int heads = 1;
  int page_tokens = 64;
  bool causal = true;
  KvType kv = KvType::bf16;
  float query_scale = 1;
  ChunkFormChoice form = ChunkFormChoice::automatic;
  KernelPath path = KernelPath::automatic;
};

// Prefill and decode of one step; in one launch where the GPU has a kernel for it.
struct PodShape {
  PrefillShape prefill;
  DecodeShape decode;
  int decode_multiprocessors = 0;  // that begin with decode; 0: chosen on the device
};

struct RunOptions {
  uint64_t seed = 1;
  int repeats = 0;              // launches whose results must have the same bits; 0: no check
  bool host_reference = false;  // computes the reference on the CPU even where a GPU could
  int runs = 0;                 // timed repetitions; 0: no timing
};

struct Check {
  double worst_row = 0;  // largest ‖out - reference‖ / ‖reference‖ of a query row; absolute where the reference is zero; NaN where out is
  double overall = 0;    // the same over the whole output
  double worst_lse = 0;  // largest |lse - reference|; 0 where the call gives none
  bool same_bits = true;
  int repeats = 0;
  std::string reference;  // what computed it
};

struct Timing {
  double median_ms = 0, min_ms = 0, max_ms = 0;  // of one call
  int runs = 0;
  int calls_per_run = 0;
  int buffers = 0;  // sets of inputs that calls take in turn
};

struct Outcome {
  std::string kernel;  // "sm90", "sm80", "sm90 fused", or the CPU's instruction set; before it, of a ChunkShape, the form
  std::optional<Check> check;
  std::optional<Timing> timing;
  std::optional<Timing> serial;  // of a PodShape: prefill, then decode, in two launches
  std::optional<Timing> absorbed, unabsorbed;  // of a ChunkShape whose form was chosen
};

struct Rates {
  double copy_bytes_per_s = 0;  // read + written
  double matrix_flops_per_s = 0;
  std::string matrix_source;  // how the second was measured
};

// Softmax scale of a DeepSeek head before absorption: 128 + 64 values.
constexpr double kDecodeScale = 0.07216878364870323;

// Softmax scale of an ordinary head.
inline double gqa_scale(int head_dim) { return 1 / std::sqrt(static_cast<double>(head_dim)); }

}  // namespace tpla::bench
