// Checks attention kernels against float64 and times them: what `tpla bench-attention`, the GPU tests and the native test program run.
#pragma once

#include <string>
#include <vector>

#include "attention.h"

namespace tpla::cuda {

struct DecodeShape {
  int latent = 512;
  int heads = 16;
  int q_tokens = 1;
  int page_size = 64;
  std::vector<int> kv_lens;   // one a sequence
  bool causal = true;
  bool latent_scale = false;  // random mu per head
  bool ragged = false;        // 0 to q_tokens query tokens a sequence
  float q_scale = 1.0f;       // standard deviation of the query
  AttentionPath path = AttentionPath::automatic;
  unsigned seed = 1;
};

struct PrefillShape {
  int heads = 16;
  std::vector<int> q_lens;   // one a sequence
  std::vector<int> kv_lens;
  bool causal = true;
  float q_scale = 1.0f;
  unsigned seed = 1;
};

struct Verdict {
  bool ok = false;
  double error = 0;      // worst row: ‖out - reference‖ / ‖reference‖
  double lse_error = 0;  // worst, absolute
  bool same_bits = true; // over the repeats
};

struct Timing {
  double ms = 0;     // median of graph replays, buffers rotated beyond L2, everything the call launches
  double bytes = 0;  // each input read once, each output written once
  double flops = 0;  // that the definition needs
};

struct MachineRates {
  std::string name;
  double copy_bytes_per_s = 0;   // device to device, read + written
  double matrix_flops_per_s = 0; // dense bf16 on random operands
};

constexpr double kErrorLimit = 8e-3;  // bf16 probabilities and outputs leave 2e-3 to 5e-3
constexpr double kLseLimit = 2e-3;

// Fresh random inputs; NaN in unused pages, unused tokens and outputs; page tables shuffled, garbage beyond their use. Every output must be
// written; of large problems every n-th row is compared, so that some kReferenceRows rows are.
constexpr int kReferenceRows = 2048;
Verdict check_decode(const DecodeShape& shape, int repeats);
Verdict check_prefill(const PrefillShape& shape, int repeats);

// A shape from the whole range the kernels take, the same for the same seed.
DecodeShape random_decode_shape(unsigned seed, AttentionPath path);
PrefillShape random_prefill_shape(unsigned seed);

Timing time_decode(const DecodeShape& shape);
Timing time_prefill(const PrefillShape& shape);
MachineRates measure_machine();

std::string describe(const DecodeShape& shape);
std::string describe(const PrefillShape& shape);

}  // namespace tpla::cuda
