#include "core/sampler.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <string>

#include "core/error.h"
#include "cpu/kernels.h"

namespace tpla {

namespace {

void require(bool condition, const char* name, float value, const char* expected) {
  if (!condition) throw Error("REQUEST_INVALID", std::string(name) + " is " + std::to_string(value) + "; expected " + expected);
}

// SplitMix64's finaliser: every bit of the input reaches every bit of the output.
uint64_t mix(uint64_t x) {
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9ULL;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebULL;
  return x ^ (x >> 31);
}

// In [0, 1), from counter and key.
float uniform_of(uint64_t seed, uint64_t step) {
  const uint64_t key = mix(seed + 0x9e3779b97f4a7c15ULL);
  return float(mix(key + (step + 1) * 0x9e3779b97f4a7c15ULL) >> 40) * 0x1p-24f;
}

int32_t argmax(std::span<const float> logits) {
  int32_t best = -1;
  float top = -std::numeric_limits<float>::infinity();
  for (size_t i = 0; i < logits.size(); ++i) {
    if (logits[i] > top) {
      top = logits[i];
      best = int32_t(i);
    }
  }
  if (best < 0) throw Error("INTERNAL", "the model produced logits without a finite value");
  return best;
}

const cpu::Kernels& kernels() {
  static const cpu::Kernels& chosen = cpu::select_kernels(nullptr);
  return chosen;
}

}  // namespace

Sampler::Sampler(SamplingParams params) : params_(std::move(params)) {
  const SamplingParams& p = params_;
  require(p.temperature >= 0 && std::isfinite(p.temperature), "temperature", p.temperature, "0 or more");
  require(p.top_k >= 0, "topK", float(p.top_k), "0 (off) or more");
  require(p.top_p >= 0 && p.top_p <= 1, "topP", p.top_p, "0 to 1");
  require(p.min_p >= 0 && p.min_p <= 1, "minP", p.min_p, "0 to 1");
  require(p.repetition_penalty > 0 && std::isfinite(p.repetition_penalty), "repetitionPenalty", p.repetition_penalty, "a positive number");
  require(std::isfinite(p.presence_penalty), "presencePenalty", p.presence_penalty, "a number");
  require(std::isfinite(p.frequency_penalty), "frequencyPenalty", p.frequency_penalty, "a number");
  require(p.logprobs >= -1, "logprobs", float(p.logprobs), "-1 (none) or more");
  for (const auto& [token, bias] : p.logit_bias) {
    require(token >= 0, "logitBias token", float(token), "a token id");
    require(!std::isnan(bias), "logitBias", bias, "a number");
  }
}

void Sampler::accept(std::span<const int32_t> tokens, bool is_prompt) {
  for (const int32_t token : tokens) {
    require(token >= 0, "accepted token", float(token), "a token id");
    Count& count = counts_[token];
    ++(is_prompt ? count.prompt : count.output);
  }
}

SampledToken Sampler::sample(std::span<const float> logits, uint64_t step) {
  const bool penalised = params_.repetition_penalty != 1 || params_.presence_penalty != 0 || params_.frequency_penalty != 0;
  std::span<const float> effective = logits;
  if (penalised || !params_.logit_bias.empty()) {
    adjusted_.assign(logits.begin(), logits.end());
    adjust(adjusted_);
    effective = adjusted_;
  }
  SampledToken sampled{};
  sampled.token = params_.temperature == 0 ? argmax(effective) : draw(effective, uniform_of(params_.seed, step));
  sampled.logprob = std::numeric_limits<float>::quiet_NaN();
  if (params_.logprobs < 0) return sampled;
  const float top = logits[size_t(argmax(logits))];
  weights_.resize(logits.size());
  const double normaliser = top + std::log(kernels().exp_shifted(logits.data(), int64_t(logits.size()), top, 1.0f, weights_.data()));
  sampled.logprob = float(double(logits[size_t(sampled.token)]) - normaliser);
  const size_t count = std::min(size_t(params_.logprobs), logits.size());
  candidates_.resize(logits.size());
  for (size_t i = 0; i < logits.size(); ++i) candidates_[i] = int32_t(i);
  std::partial_sort(candidates_.begin(), candidates_.begin() + long(count), candidates_.end(), [&](int32_t a, int32_t b) {
    return logits[size_t(a)] != logits[size_t(b)] ? logits[size_t(a)] > logits[size_t(b)] : a < b;
  });
  for (size_t i = 0; i < count; ++i) sampled.top.push_back({candidates_[i], float(double(logits[size_t(candidates_[i])]) - normaliser)});
  return sampled;
}

void Sampler::adjust(std::span<float> logits) const {
  const auto at = [&](int32_t token) -> float& {
    if (size_t(token) >= logits.size()) {
      throw Error("REQUEST_INVALID", "token " + std::to_string(token) + " is outside the vocabulary of " + std::to_string(logits.size()));
    }
    return logits[size_t(token)];
  };
  for (const auto& [token, bias] : params_.logit_bias) at(token) += bias;
  for (const auto& [token, count] : counts_) {
    float& logit = at(token);
    logit = logit > 0 ? logit / params_.repetition_penalty : logit * params_.repetition_penalty;
    if (count.output > 0) logit -= params_.presence_penalty + params_.frequency_penalty * float(count.output);
  }
}

// Number of leading candidates, most probable first, that it takes to reach `target`; they are moved to the front, in any order. Linear in
// their number, since each round halves what is still undecided.
template <typename MoreProbable>
size_t nucleus(std::vector<int32_t>& candidates, const std::vector<float>& weights, double target, MoreProbable more_probable) {
  size_t begin = 0;
  size_t end = candidates.size();
  double mass = 0;
  while (end - begin > 1) {
    const size_t middle = (begin + end) / 2;
    std::nth_element(candidates.begin() + long(begin), candidates.begin() + long(middle), candidates.begin() + long(end), more_probable);
    double front = 0;
    for (size_t i = begin; i < middle; ++i) front += weights[size_t(candidates[i])];
    if (mass + front >= target) {
      end = middle;
    } else {
      mass += front;
      begin = middle;
    }
  }
  return end;
}

// Inverse of the cumulative distribution, in the order of the vocabulary, over what the filters leave.
int32_t Sampler::draw(std::span<const float> logits, float uniform) {
  const int32_t best = argmax(logits);
  // Weights relative to the most probable token's 1.
  weights_.resize(logits.size());
  const double total = kernels().exp_shifted(logits.data(), int64_t(logits.size()), logits[size_t(best)], 1.0f / params_.temperature, weights_.data());
  const auto more_probable = [&](int32_t a, int32_t b) { return weights_[size_t(a)] != weights_[size_t(b)] ? weights_[size_t(a)] > weights_[size_t(b)] : a < b; };
  int32_t last = -1;  // least probable token kept; -1: all
  if (params_.top_k > 0 || params_.top_p < 1) {
    // Tokens this improbable weigh less than 1 - top_p all together, so none of them can be among the kept.
    float threshold = params_.min_p;
    if (params_.top_k == 0) threshold = std::max(threshold, float((1.0 - params_.top_p) * total / double(logits.size()) * 0.999));
    candidates_.clear();
    for (size_t i = 0; i < weights_.size(); ++i) {
      if (weights_[i] >= threshold && weights_[i] > 0) candidates_.push_back(int32_t(i));
    }
    if (params_.top_k > 0 && size_t(params_.top_k) < candidates_.size()) {
      // A heap of a few is quicker than partitioning everything.
      std::partial_sort(candidates_.begin(), candidates_.begin() + params_.top_k, candidates_.end(), more_probable);
      candidates_.resize(size_t(params_.top_k));
    }
    // Top-p counts within what min-p and top-k have left; without them the pruned tail still counts.
    double mass = total;
    if (params_.top_k > 0 || params_.min_p > 0) {
      mass = 0;
      for (const int32_t token : candidates_) mass += weights_[size_t(token)];
    }
    if (params_.top_p < 1) candidates_.resize(nucleus(candidates_, weights_, double(params_.top_p) * mass, more_probable));
    last = *std::max_element(candidates_.begin(), candidates_.end(), more_probable);
  }
  const auto kept = [&](size_t i) { return weights_[i] > 0 && weights_[i] >= params_.min_p && (last < 0 || !more_probable(last, int32_t(i))); };
  double mass = 0;
  for (size_t i = 0; i < weights_.size(); ++i) mass += kept(i) ? weights_[i] : 0;
  double rest = uniform * mass;
  for (size_t i = 0; i < weights_.size(); ++i) {
    if (!kept(i)) continue;
    rest -= weights_[i];
    if (rest < 0) return int32_t(i);
  }
  return best;
}

}  // namespace tpla
