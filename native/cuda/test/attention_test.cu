// Checks the attention kernels on this machine's GPU; for compute-sanitizer and ncu, where the addon would be in the way.
//   attention_test decode COUNT SEED [sm80]    random shapes against float64, ten runs each
//   attention_test prefill COUNT SEED
//   attention_test time LATENT BATCH HEADS QTOKENS LEN[;LEN...] [PAGE]
#include <cstdio>
#include <cstdlib>
#include <sstream>
#include <string>

#include "attention_bench.h"

using namespace tpla::cuda;

static bool report(const Verdict& verdict, const std::string& name) {
  std::printf("%s error %.2e lse %.1e%s | %s\n", verdict.ok ? "ok  " : "FAIL", verdict.error, verdict.lse_error, verdict.same_bits ? "" : " BITS DIFFER", name.c_str());
  std::fflush(stdout);
  return verdict.ok;
}

static int run(int argc, char** argv) {
  const std::string mode = argc > 1 ? argv[1] : "";
  if ((mode == "decode" || mode == "prefill") && argc >= 4) {
    const int count = std::atoi(argv[2]), seed = std::atoi(argv[3]);
    const AttentionPath path = argc > 4 && std::string(argv[4]) == "sm80" ? AttentionPath::sm80 : AttentionPath::automatic;
    int failures = 0;
    for (int i = 0; i < count; ++i) {
      if (mode == "decode") {
        const DecodeShape shape = random_decode_shape(seed + i, path);
        failures += !report(check_decode(shape, 10), describe(shape));
      } else {
        const PrefillShape shape = random_prefill_shape(seed + i);
        failures += !report(check_prefill(shape, 10), describe(shape));
      }
    }
    std::printf("%d of %d shapes failed\n", failures, count);
    return failures != 0;
  }
  if (mode == "time" && argc >= 7) {
    DecodeShape shape;
    shape.latent = std::atoi(argv[2]);
    shape.heads = std::atoi(argv[4]);
    shape.q_tokens = std::atoi(argv[5]);
    std::stringstream lens(argv[6]);
    for (std::string item; std::getline(lens, item, ';');) shape.kv_lens.push_back(std::atoi(item.c_str()));
    if (shape.kv_lens.size() == 1) shape.kv_lens.assign(std::atoi(argv[3]), shape.kv_lens[0]);
    if (argc > 7) shape.page_size = std::atoi(argv[7]);
    const Timing timing = time_decode(shape);
    std::printf("%s: %.4f ms, %.0f GB/s, %.0f TFLOP/s\n", describe(shape).c_str(), timing.ms, timing.bytes / timing.ms / 1e6, timing.flops / timing.ms / 1e9);
    return 0;
  }
  std::fprintf(stderr, "usage: attention_test decode COUNT SEED [sm80] | prefill COUNT SEED | time LATENT BATCH HEADS QTOKENS LENS [PAGE]\n");
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
