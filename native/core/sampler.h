#pragma once
#include <cstdint>
#include <span>
#include <unordered_map>
#include <vector>

namespace tpla {

struct SamplingParams {
  float temperature = 1;  // 0: greedy
  int top_k = 0;          // 0: off
  float top_p = 1;
  float min_p = 0;
  float repetition_penalty = 1;  // of tokens in prompt and output
  float presence_penalty = 0;    // of tokens in the output
  float frequency_penalty = 0;
  uint64_t seed = 0;
  int logprobs = -1;  // alternatives to report; -1: no logprobs
  std::vector<std::pair<int32_t, float>> logit_bias;
};

struct TokenLogprob {
  int32_t token;
  float logprob;
};

struct SampledToken {
  int32_t token;
  float logprob;  // under the unmodified softmax; NaN when not asked for
  std::vector<TokenLogprob> top;
};

// Draws the tokens of one sequence. The order is bias, penalties, temperature, min-p, top-k, top-p, as vLLM has it. Randomness is a
// function of (seed, step) alone, so that a sequence can be replayed or resumed anywhere.
class Sampler {
 public:
  // Throws REQUEST_INVALID naming the parameter.
  explicit Sampler(SamplingParams params);

  void accept(std::span<const int32_t> tokens, bool is_prompt);
  // Throws INTERNAL when no logit is finite.
  SampledToken sample(std::span<const float> logits, uint64_t step);

 private:
  struct Count {
    int prompt = 0;
    int output = 0;
  };

  void adjust(std::span<float> logits) const;
  int32_t draw(std::span<const float> logits, float uniform);

  SamplingParams params_;
  std::unordered_map<int32_t, Count> counts_;
  std::vector<float> adjusted_;
  std::vector<float> weights_;
  std::vector<int32_t> candidates_;
};

}  // namespace tpla
