// Attention in float64 on the CPU, written down as the formula reads; what every other result is held against.
#pragma once

#include <cstdint>
#include <functional>
#include <vector>

#include "bench/attention_shape.h"
#include "bench/logit_rule.h"

namespace tpla::bench {

struct HostAttention {
  std::vector<int32_t> q_lens, kv_lens;  // per sequence
  int heads = 1;
  int key_dim = 0;
  int value_dim = 0;
  bool causal = true;  // query i of q_len sees keys j <= kv_len - q_len + i, else all
  double scale = 1;
  const float* q = nullptr;  // [query tokens][heads][key_dim]
  LogitRule rule;
  // Token `t` of a sequence as head `h` sees it.
  std::function<const float*(int sequence, int t, int head)> key, value;
};

struct HostResult {
  std::vector<float> out;  // [query tokens][heads][value_dim]
  std::vector<float> lse;  // [query tokens][heads]; empty where the call gives none
};

// Reference for every query row, compared with `got`. Fills the error fields of a Check.
Check compare_with_reference(const HostAttention& problem, const HostResult& got);

}  // namespace tpla::bench
