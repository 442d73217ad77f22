import type { PrefillConfig } from '../types.js';
import { drainMs, id, kv, listen, logLevel, maxWaiting, model, modelName, pool, threads, type ObjectSchema } from './schema.js';
import { sending } from './transfer.js';

export const prefillSchema: ObjectSchema<PrefillConfig> = {
  description: 'A prefill worker',
  type: 'object',
  additionalProperties: false,
  required: ['listen', 'model'],
  properties: {
    listen: listen('of the worker'),
    id: id('prefill'),
    model,
    model_name: modelName,
    pool,
    kv: kv(1024),
    chunk_tokens: {
      description: 'Tokens of one prompt computed at a time; KV leaves layer by layer after each chunk',
      type: 'integer', minimum: 1, maximum: 65_536, default: 512, flag: 'chunk-tokens',
    },
    max_batch_tokens: {
      description: 'Tokens of all prompts computed in one batch',
      type: 'integer', minimum: 1, maximum: 1_048_576, default: 2048, flag: 'max-batch-tokens',
    },
    max_waiting: maxWaiting,
    transfer: sending,
    threads,
    drain_ms: drainMs,
    log_level: logLevel,
  },
};
