#include "core/routing.h"

#include <algorithm>
#include <cmath>
#include <functional>
#include <limits>
#include <numeric>
#include <vector>

namespace tpla {

namespace {

void softmax(const float* logits, int count, float* out) {
  const float top = *std::max_element(logits, logits + count);
  float sum = 0;
  for (int i = 0; i < count; ++i) sum += out[i] = std::exp(logits[i] - top);
  for (int i = 0; i < count; ++i) out[i] /= sum;
}

// Indices of the k largest values, largest first; the lower index wins a tie.
std::vector<int32_t> top_indices(const float* values, int count, int k) {
  std::vector<int32_t> order(count);
  std::iota(order.begin(), order.end(), 0);
  std::partial_sort(order.begin(), order.begin() + k, order.end(), [&](int32_t a, int32_t b) { return values[a] != values[b] ? values[a] > values[b] : a < b; });
  order.resize(k);
  return order;
}

float sum_of_two_largest(const float* values, int count) {
  float first = -std::numeric_limits<float>::infinity();
  float second = first;
  for (int i = 0; i < count; ++i) {
    if (values[i] > first) {
      second = first;
      first = values[i];
    } else {
      second = std::max(second, values[i]);
    }
  }
  return count > 1 ? first + second : first;
}

// Rules out the experts of groups that are not among the best `top_groups`.
void mask_groups(const MoeSpec& moe, float* choice) {
  const int size = moe.experts / moe.groups;
  std::vector<float> group_scores(moe.groups);
  for (int g = 0; g < moe.groups; ++g) {
    const float* scores = choice + g * size;
    group_scores[g] = moe.selection == MoeSpec::Selection::noaux_tc ? sum_of_two_largest(scores, size) : *std::max_element(scores, scores + size);
  }
  std::vector<bool> kept(moe.groups);
  for (const int32_t g : top_indices(group_scores.data(), moe.groups, moe.top_groups)) kept[g] = true;
  for (int g = 0; g < moe.groups; ++g) {
    if (!kept[g]) std::fill_n(choice + g * size, size, -std::numeric_limits<float>::infinity());
  }
}

}  // namespace

void route_token(const MoeSpec& moe, const float* logits, const float* bias, int32_t* experts, float* weights) {
  std::vector<float> scores(moe.experts);
  if (moe.scoring == MoeSpec::Scoring::softmax) {
    softmax(logits, moe.experts, scores.data());
  } else {
    for (int e = 0; e < moe.experts; ++e) scores[e] = 1.0f / (1.0f + std::exp(-logits[e]));
  }
  std::vector<float> choice = scores;
  if (moe.selection == MoeSpec::Selection::noaux_tc) {
    for (int e = 0; e < moe.experts; ++e) choice[e] += bias[e];
  }
  if (moe.selection != MoeSpec::Selection::greedy) mask_groups(moe, choice.data());
  const std::vector<int32_t> chosen = top_indices(choice.data(), moe.experts, moe.top_k);
  float sum = 0;
  for (int k = 0; k < moe.top_k; ++k) {
    experts[k] = chosen[k];
    weights[k] = scores[chosen[k]];
    sum += weights[k];
  }
  // V3 scales what it has normalised; with V2's gate normalisation takes the place of the scale.
  const bool scaled = !moe.norm_top_k || moe.scoring == MoeSpec::Scoring::sigmoid;
  const float factor = (moe.norm_top_k ? 1.0f / (sum + 1e-20f) : 1.0f) * (scaled ? moe.routed_scale : 1.0f);
  for (int k = 0; k < moe.top_k; ++k) weights[k] *= factor;
}

}  // namespace tpla
