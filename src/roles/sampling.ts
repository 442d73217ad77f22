/** Sampling parameters as they travel, and as the addon's Sampler takes them. */
import type { SamplingRequest } from '../fleet/protocol.js';
import type { SamplingParams } from '../native/types.js';

/** 2^64 / golden ratio, odd: choices of one request get seeds far apart. */
const SEED_STRIDE = 0x9e3779b97f4a7c15n;

/** The parameters of one choice. Prefill draws a choice's first token and decode the others, so both must derive the same seed. */
export function samplingParams(request: SamplingRequest, choice: number): SamplingParams {
  return {
    temperature: request.temperature,
    topK: request.top_k,
    topP: request.top_p,
    minP: request.min_p,
    repetitionPenalty: request.repetition_penalty,
    presencePenalty: request.presence_penalty,
    frequencyPenalty: request.frequency_penalty,
    seed: BigInt.asUintN(64, BigInt(request.seed) + BigInt(choice) * SEED_STRIDE),
    logprobs: request.logprobs,
    logitBias: request.logit_bias,
  };
}
