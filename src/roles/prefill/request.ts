/** POST /prefill: what it may say, and what this worker can do about it. */
import { TplaError } from '../../errors.js';
import type { PrefillRequest } from '../../fleet/protocol.js';
import { CHOICES, QOS, REQUEST_ID, SAMPLING, strictObject, TOKENS } from '../request_schema.js';

export const PREFILL_SCHEMA = strictObject({
  id: REQUEST_ID,
  tokens: TOKENS,
  ticket: strictObject({
    address: { type: 'string', minLength: 1, maxLength: 1024 },
    session: { type: 'string', minLength: 1, maxLength: 256 },
    tokens: { type: 'array', items: { type: 'integer', minimum: 0 }, minItems: 2, maxItems: 2 },
  }),
  sampling: SAMPLING,
  n: CHOICES,
  qos: QOS,
});

export interface PrefillLimits {
  vocabSize: number;
  /** Of the model. */
  contextLength: number;
  /** Tokens that fit into the KV pages of an otherwise idle worker. */
  capacityTokens: number;
}

/** Throws where the request could never run here. */
export function checkPrefill({ tokens, ticket }: PrefillRequest, limits: PrefillLimits): void {
  if (tokens.length > limits.contextLength) {
    throw new TplaError('CONTEXT_LENGTH_EXCEEDED', `the prompt is ${tokens.length} tokens; the model's context is ${limits.contextLength}; shorten the prompt`, { param: 'prompt' });
  }
  if (tokens.length > limits.capacityTokens) {
    throw new TplaError('CONTEXT_LENGTH_EXCEEDED', `the prompt is ${tokens.length} tokens; this worker's KV pages hold ${limits.capacityTokens}; shorten the prompt, or raise kv.pages`, { param: 'prompt' });
  }
  const unknown = tokens.find((token) => token >= limits.vocabSize);
  if (unknown !== undefined) {
    throw new TplaError('REQUEST_INVALID', `token ${unknown} is not in the model's vocabulary of ${limits.vocabSize}`, { param: 'prompt' });
  }
  const [begin, end] = ticket.tokens;
  if (begin >= end || end !== tokens.length) {
    throw new TplaError('REQUEST_INVALID', `the ticket grants tokens [${begin}, ${end}) of a prompt of ${tokens.length}; it has to end with the prompt`, { param: 'ticket' });
  }
}
