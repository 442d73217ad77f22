/** POST /generate: what it may say, and what this worker can do about it. */
import { TplaError } from '../../errors.js';
import type { GenerateRequest } from '../../fleet/protocol.js';
import { CHOICES, QOS, REQUEST_ID, SAMPLING, strictObject, TOKENS } from '../request_schema.js';

export const GENERATE_SCHEMA = strictObject({
  id: REQUEST_ID,
  tokens: TOKENS,
  sampling: SAMPLING,
  n: CHOICES,
  max_tokens: { type: 'integer', minimum: 1 },
  stop_token_ids: { type: 'array', items: { type: 'integer', minimum: 0 } },
  qos: QOS,
});

export const STOP_SCHEMA = strictObject({ id: REQUEST_ID, index: { type: 'integer', minimum: 0 } });

export interface DecodeLimits {
  vocabSize: number;
  /** Of the model. */
  contextLength: number;
  /** Tokens that fit into the KV pages of an otherwise empty worker. */
  capacityTokens: number;
  maxBatch: number;
}

/** Tokens a sequence of this worker can have: what the model was made for, or less where the pages hold less. */
export function effectiveContext({ contextLength, capacityTokens }: DecodeLimits): number {
  return Math.min(contextLength, capacityTokens);
}

/** Throws where the request could never run here. `max_tokens` beyond the context is no error: the choice ends there with reason 'length'. */
export function checkGenerate(request: GenerateRequest, limits: DecodeLimits): void {
  const prompt = request.tokens.length;
  if (prompt >= limits.contextLength) {
    throw new TplaError('CONTEXT_LENGTH_EXCEEDED', `the prompt is ${prompt} tokens; the model's context is ${limits.contextLength}, of which one has to stay free for the answer; shorten the prompt`, { param: 'prompt' });
  }
  if (prompt >= limits.capacityTokens) {
    throw new TplaError('CONTEXT_LENGTH_EXCEEDED', `the prompt is ${prompt} tokens; this worker's KV pages hold ${limits.capacityTokens}; shorten the prompt, or raise kv.pages`, { param: 'prompt' });
  }
  if (request.n > limits.maxBatch) {
    throw new TplaError('REQUEST_INVALID', `${request.n} choices were asked for; this worker runs at most ${limits.maxBatch} sequences at a time (max_batch)`, { param: 'n' });
  }
  const unknown = request.tokens.find((token) => token >= limits.vocabSize);
  if (unknown !== undefined) {
    throw new TplaError('REQUEST_INVALID', `token ${unknown} is not in the model's vocabulary of ${limits.vocabSize}`, { param: 'prompt' });
  }
}
