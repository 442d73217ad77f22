// Checks the attention kernels on this machine's GPU without Node: for compute-sanitizer, ncu and cuda-gdb.
//   attention_test decode COUNT SEED [sm80] [fp8]    random shapes against float64, ten launches each
//   attention_test variants COUNT SEED [sm80] [fp8]  the same with softcap, window, ALiBi and block masks
//   attention_test chunk COUNT SEED [sm80] [fp8]     5 to 512 query tokens, every fourth shape with variants
//   attention_test gqa COUNT SEED              keys and values of their own; every second shape with variants
//   attention_test prefill COUNT SEED [sm80]
//   attention_test mla-chunk COUNT SEED [sm80] [fp8]       chunks from queries to values, in both forms
//   attention_test pod COUNT SEED              both at once
//   attention_test time-gqa HEAD_DIM BATCH HEADS KV_HEADS QTOKENS LEN [PAGE [nhd|hnd]]
//   attention_test time LATENT BATCH HEADS QTOKENS LEN[;LEN...] [fp8] [PAGE]
//   attention_test times [RUNS [REPEATS]]      lines of the same fields from standard input, each checked, then timed
//   attention_test pod-times RUNS [SPLIT...]   lines LATENT BATCH HEADS LEN PREFILL_HEADS PREFILL_LEN PREFILL_QTOKENS from standard input: checked, then
//                                              two launches and one timed, then one with so many multiprocessors that begin with decode
#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <iostream>
#include <random>
#include <sstream>
#include <string>
#include <type_traits>
#include <vector>

#include "cuda/bench/gpu_attention.h"

using namespace tpla::bench;

// Of bf16 probabilities and outputs, of a chunk also of what lies between two products, as in src/bench/attention/run.ts.
struct Limits {
  double row = 8e-3, lse = 2e-3;
};
constexpr Limits kChunkLimits{1.6e-2, 1e-2};

static bool within(const Check& check, const Limits& limits = {}) { return check.same_bits && check.worst_row < limits.row && check.worst_lse < limits.lse; }

static DecodeShape random_decode(unsigned seed, KernelPath path, KvType kv) {
  std::mt19937 random(seed);
  const int latents[] = {512, 256, 320, 128, 288}, pages[] = {16, 32, 48, 64, 80, 128, 256};
  const int heads[] = {1, 2, 5, 8, 16, 16, 24, 32, 40, 64, 64, 96, 128, 128};
  DecodeShape shape;
  shape.path = path;
  shape.kv = kv;
  shape.latent = latents[seed % (kv == KvType::fp8 && path == KernelPath::sm80 ? 4 : 5)];
  shape.heads = heads[random() % 14];
  shape.page_tokens = pages[random() % 7];
  shape.causal = random() % 4 != 0;
  shape.latent_scale = random() % 4 == 0;
  shape.query_scale = random() % 3 == 0 ? 6.0f : 1.0f;
  const int q_tokens = random() % 3 == 0 ? 1 + random() % 4 : 1, batch = 1 + random() % (random() % 3 == 0 ? 40 : 6);
  const int longest = random() % 4 == 0 ? 6000 : random() % 2 ? 700 : 150;
  const bool ragged = random() % 4 == 0;
  for (int b = 0; b < batch; ++b) {
    shape.kv_lens.push_back(random() % 6 == 0 ? 0 : random() % longest);
    shape.q_lens.push_back(ragged ? random() % (q_tokens + 1) : q_tokens);
  }
  if (kv == KvType::fp8 && random() % 4 == 0) {  // scales from far outside the usual range
    shape.latent_deviation = random() % 2 ? 0x1p20f : 0x1p-30f;
    shape.query_scale *= std::min(1.0f, 1 / shape.latent_deviation);
  }
  return shape;
}

// Any combination; lists may be empty, miss the last block and name blocks behind the end.
static LogitVariantShape random_variants(unsigned seed, const std::vector<int32_t>& kv_lens) {
  std::mt19937 random(seed * 7919 + 1);
  const int windows[] = {1, 5, 64, 100, 300, 1000}, blocks[] = {16, 32, 48, 64, 128, 192};
  LogitVariantShape variants;
  do {
    if (random() % 2) variants.softcap = random() % 2 ? 1.5f : 30.0f;
    if (random() % 2) variants.window = windows[random() % 6];
    variants.alibi = random() % 2;
    if (random() % 2) variants.mask_block = blocks[random() % 6];
  } while (!variants.any());
  if (variants.mask_block == 0) return variants;
  for (const int32_t len : kv_lens) {
    const unsigned percent = random() % 4 == 0 ? 100 : random() % 100;
    std::vector<int32_t> list;
    for (int block = 0; block < len / variants.mask_block + 3; ++block) {
      if (random() % 100 < percent) list.push_back(block);
    }
    if (random() % 8 == 0) list.clear();
    variants.blocks.push_back(list);
  }
  return variants;
}

static DecodeShape random_variant_decode(unsigned seed, KernelPath path, KvType kv) {
  DecodeShape shape = random_decode(seed, path, kv);
  shape.variants = random_variants(seed, shape.kv_lens);
  return shape;
}

// Chunks of many query tokens, some behind a cached prefix; every fourth with variants.
static DecodeShape random_chunk(unsigned seed, KernelPath path, KvType kv) {
  std::mt19937 random(seed * 17 + 3);
  DecodeShape shape = random_decode(seed, path, kv);
  const int heads[] = {1, 3, 8, 16, 24, 64, 128};
  shape.heads = heads[random() % 7];
  const int longest = std::min(512, 24000 / shape.heads);
  const int batch = 1 + random() % 3;
  const bool ragged = random() % 2;
  const int q_tokens = 5 + random() % (longest - 4);
  shape.q_lens.clear();
  shape.kv_lens.clear();
  for (int b = 0; b < batch; ++b) {
    const int q_len = ragged ? random() % (q_tokens + 1) : q_tokens;
    shape.q_lens.push_back(q_len);
    shape.kv_lens.push_back(random() % 8 == 0 ? random() % (q_len + 1) : q_len + random() % (random() % 2 ? 300 : 2000));
  }
  if (seed % 4 == 0) shape.variants = random_variants(seed, shape.kv_lens);
  return shape;
}

static GqaShape random_gqa(unsigned seed) {
  std::mt19937 random(seed * 31 + 5);
  const DecodeShape like = random_decode(seed, KernelPath::automatic, KvType::bf16);
  const int groups[] = {1, 1, 2, 3, 4, 7, 8, 8, 12, 16, 32, 70}, kv_heads[] = {1, 1, 2, 3, 8};
  GqaShape shape;
  shape.kv_lens = like.kv_lens;
  shape.q_lens = like.q_lens;
  shape.page_tokens = like.page_tokens;
  shape.causal = like.causal;
  shape.query_scale = like.query_scale;
  shape.head_dim = random() % 2 ? 64 : 128;
  shape.kv_heads = kv_heads[random() % 5];
  shape.heads = shape.kv_heads * groups[random() % 12];
  shape.layout = random() % 2 ? KvOrder::nhd : KvOrder::hnd;
  shape.page_gap_bytes = random() % 3 == 0 ? 16 * static_cast<int>(random() % 50) : 0;
  if (seed % 2) shape.variants = random_variants(seed, shape.kv_lens);
  return shape;
}

static PrefillShape random_prefill(unsigned seed, KernelPath path = KernelPath::automatic) {
  std::mt19937 random(seed);
  PrefillShape shape;
  shape.path = path;
  shape.heads = 1 + random() % 5;
  shape.causal = random() % 4 != 0;
  shape.query_scale = random() % 3 == 0 ? 6.0f : 1.0f;
  const int batch = 1 + random() % 4;
  for (int b = 0; b < batch; ++b) {
    const int q_len = random() % 5 == 0 ? random() % 3 : random() % 700;
    shape.q_lens.push_back(q_len);
    shape.kv_lens.push_back(random() % 2 ? q_len : random() % 6 == 0 ? random() % 100 : q_len + random() % 500);
  }
  return shape;
}

static ChunkShape random_mla_chunk(unsigned seed, KernelPath path, KvType kv) {
  const DecodeShape like = random_chunk(seed, path, KvType::bf16);
  ChunkShape shape;
  shape.q_lens = like.q_lens;
  shape.kv_lens = like.kv_lens;
  shape.heads = like.heads;
  shape.page_tokens = like.page_tokens;
  shape.causal = like.causal;
  shape.kv = kv;
  shape.path = path;
  return shape;
}

static PodShape random_pod(unsigned seed) {
  PodShape shape{random_prefill(seed), random_decode(seed, KernelPath::automatic, KvType::bf16)};
  while (shape.decode.heads * *std::max_element(shape.decode.q_lens.begin(), shape.decode.q_lens.end()) > 32) shape.decode.heads = (shape.decode.heads + 1) / 2;
  shape.decode_multiprocessors = seed % 3 == 0 ? seed % 133 : 0;
  return shape;
}

static int heads_of(const PodShape& shape) { return shape.decode.heads; }
template <class Shape>
static int heads_of(const Shape& shape) {
  return shape.heads;
}
static size_t sequences_of(const PodShape& shape) { return shape.decode.kv_lens.size(); }
template <class Shape>
static size_t sequences_of(const Shape& shape) {
  return shape.kv_lens.size();
}

template <class Shape>
static bool right(const Shape& shape, unsigned seed) {
  const Outcome outcome = run_on_gpu(0, shape, {seed, 10, false, 0});
  const Check& check = *outcome.check;
  const bool ok = within(check, std::is_same_v<Shape, ChunkShape> ? kChunkLimits : Limits{});
  std::printf("%s seed %u %s, %d heads, %zu sequences: error %.2e lse %.1e%s\n", ok ? "ok  " : "FAIL", seed, outcome.kernel.c_str(), heads_of(shape), sequences_of(shape), check.worst_row,
              check.worst_lse, check.same_bits ? "" : " BITS DIFFER");
  std::fflush(stdout);
  return ok;
}

// LATENT BATCH HEADS QTOKENS LENS [fp8] [PAGE]
static DecodeShape parse_shape(const std::string& line) {
  DecodeShape shape;
  std::stringstream fields(line);
  int batch = 0, q_tokens = 0;
  std::string lens;
  fields >> shape.latent >> batch >> shape.heads >> q_tokens >> lens;
  std::stringstream items(lens);
  for (std::string item; std::getline(items, item, ';');) shape.kv_lens.push_back(std::atoi(item.c_str()));
  if (shape.kv_lens.size() == 1) shape.kv_lens.assign(batch, shape.kv_lens[0]);
  shape.q_lens.assign(shape.kv_lens.size(), q_tokens);
  for (std::string option; fields >> option;) {
    if (option == "fp8") shape.kv = KvType::fp8;
    else shape.page_tokens = std::atoi(option.c_str());
  }
  return shape;
}

static int time_shape(int argc, char** argv) {
  std::string line;
  for (int i = 2; i < argc; ++i) line += std::string(argv[i]) + " ";
  const Timing timing = *run_on_gpu(0, parse_shape(line), {1, 0, false, 20}).timing;
  std::printf("%.4f ms, from %.4f to %.4f\n", timing.median_ms, timing.min_ms, timing.max_ms);
  return 0;
}

static int time_gqa(int argc, char** argv) {
  GqaShape shape;
  shape.head_dim = std::atoi(argv[2]);
  shape.kv_lens.assign(std::atoi(argv[3]), std::atoi(argv[7]));
  shape.heads = std::atoi(argv[4]);
  shape.kv_heads = std::atoi(argv[5]);
  shape.q_lens.assign(shape.kv_lens.size(), std::atoi(argv[6]));
  if (argc > 8) shape.page_tokens = std::atoi(argv[8]);
  if (argc > 9) shape.layout = std::string(argv[9]) == "hnd" ? KvOrder::hnd : KvOrder::nhd;
  const Timing timing = *run_on_gpu(0, shape, {1, 0, false, 10}).timing;
  const double bytes = 4.0 * shape.kv_heads * shape.head_dim * static_cast<double>(shape.kv_lens.size()) * shape.kv_lens[0];
  std::printf("%.4f ms, from %.4f to %.4f, %.0f GB/s\n", timing.median_ms, timing.min_ms, timing.max_ms, bytes / timing.median_ms / 1e6);
  return 0;
}

static int time_shapes(int runs, int repeats) {
  int failures = 0;
  for (std::string line; std::getline(std::cin, line);) {
    const Outcome outcome = run_on_gpu(0, parse_shape(line), {1, repeats, false, runs});
    const bool ok = !outcome.check || within(*outcome.check);
    failures += !ok;
    std::printf("%s %-44s", ok ? "ok  " : "FAIL", line.c_str());
    if (outcome.timing) std::printf(" %8.1f us, from %.1f", outcome.timing->median_ms * 1e3, outcome.timing->min_ms * 1e3);
    if (outcome.check) std::printf(", error %.1e lse %.1e%s", outcome.check->worst_row, outcome.check->worst_lse, outcome.check->same_bits ? "" : " BITS DIFFER");
    std::printf("\n");
    std::fflush(stdout);
  }
  return failures != 0;
}

static int time_pods(int runs, const std::vector<int>& splits) {
  int failures = 0;
  for (std::string line; std::getline(std::cin, line);) {
    PodShape shape;
    std::stringstream fields(line);
    int batch = 0, len = 0, prefill_len = 0, prefill_q_tokens = 0;
    fields >> shape.decode.latent >> batch >> shape.decode.heads >> len >> shape.prefill.heads >> prefill_len >> prefill_q_tokens;
    shape.decode.kv_lens.assign(batch, len);
    shape.decode.q_lens.assign(batch, 1);
    shape.prefill.kv_lens = {prefill_len};
    shape.prefill.q_lens = {prefill_q_tokens};
    std::vector<Timing> of_splits;
    const Outcome outcome = run_on_gpu(0, shape, {1, 3, false, runs}, splits, of_splits);
    const bool ok = within(*outcome.check);
    failures += !ok;
    const double serial = outcome.serial->median_ms;
    std::printf("%s %-36s %s serial %.4f ms, chosen %.4f (%.3f)", ok ? "ok  " : "FAIL", line.c_str(), outcome.kernel.c_str(), serial, outcome.timing->median_ms, serial / outcome.timing->median_ms);
    for (size_t i = 0; i < splits.size(); ++i) std::printf(", %d: %.4f (%.3f)", splits[i], of_splits[i].median_ms, serial / of_splits[i].median_ms);
    std::printf("\n");
    std::fflush(stdout);
  }
  return failures != 0;
}

static int run(int argc, char** argv) {
  const std::string mode = argc > 1 ? argv[1] : "";
  if ((mode == "decode" || mode == "variants" || mode == "chunk" || mode == "mla-chunk" || mode == "gqa" || mode == "prefill" || mode == "pod") && argc >= 4) {
    const int count = std::atoi(argv[2]), first = std::atoi(argv[3]);
    const std::vector<std::string> options(argv + 4, argv + argc);
    const auto given = [&](const char* name) { return std::find(options.begin(), options.end(), name) != options.end(); };
    const KernelPath path = given("sm80") ? KernelPath::sm80 : KernelPath::automatic;
    const KvType kv = given("fp8") ? KvType::fp8 : KvType::bf16;
    int failures = 0;
    for (int seed = first; seed < first + count; ++seed) {
      if (mode == "decode") failures += !right(random_decode(seed, path, kv), seed);
      else if (mode == "variants") failures += !right(random_variant_decode(seed, path, kv), seed);
      else if (mode == "mla-chunk") failures += !right(random_mla_chunk(seed, path, kv), seed);
      else if (mode == "chunk") failures += !right(random_chunk(seed, path, kv), seed);
      else if (mode == "gqa") failures += !right(random_gqa(seed), seed);
      else if (mode == "prefill") failures += !right(random_prefill(seed, path), seed);
      else failures += !right(random_pod(seed), seed);
    }
    std::printf("%d of %d shapes failed\n", failures, count);
    return failures != 0;
  }
  if (mode == "time-gqa" && argc >= 8) return time_gqa(argc, argv);
  if (mode == "time" && argc >= 7) return time_shape(argc, argv);
  if (mode == "pod-times" && argc >= 3) {
    std::vector<int> splits;
    for (int i = 3; i < argc; ++i) splits.push_back(std::atoi(argv[i]));
    return time_pods(std::atoi(argv[2]), splits);
  }
  if (mode == "times") return time_shapes(argc > 2 ? std::atoi(argv[2]) : 20, argc > 3 ? std::atoi(argv[3]) : 3);
  std::fprintf(stderr, "usage: attention_test decode|variants|chunk COUNT SEED [sm80] [fp8] | gqa COUNT SEED | prefill COUNT SEED [sm80] | mla-chunk COUNT SEED [sm80] [fp8] | pod COUNT SEED | time-gqa HEAD_DIM BATCH HEADS KV_HEADS QTOKENS LEN [PAGE [nhd|hnd]] | time LATENT BATCH HEADS QTOKENS LENS [fp8] [PAGE] | times [RUNS [REPEATS]] | pod-times RUNS [SPLIT...]\n");
  return 2;
}

int main(int argc, char** argv) {
  try {
    return run(argc, argv);
  } catch (const std::exception& error) {
    std::printf("FAIL %s\n", error.what());
    std::fflush(stdout);
    std::_Exit(1);  // a hung kernel must not hold the process
  }
}
