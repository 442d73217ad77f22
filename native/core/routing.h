#pragma once
#include <cstdint>

#include "core/model_spec.h"

namespace tpla {

// Chooses experts for one token from its gate logits [experts] and writes top_k expert ids with their weights.
// greedy and group_limited_greedy are DeepSeek-V2's gates, noaux_tc DeepSeek-V3's (`bias` [experts] steers the choice, not the weights).
void route_token(const MoeSpec& moe, const float* logits, const float* bias, int32_t* experts, float* weights);

}  // namespace tpla
