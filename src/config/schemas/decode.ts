import type { DecodeConfig } from '../types.js';
import { drainMs, id, kv, listen, logLevel, maxWaiting, model, modelName, pool, threads, type ObjectSchema } from './schema.js';
import { receiving } from './transfer.js';

export const decodeSchema: ObjectSchema<DecodeConfig> = {
  description: 'A decode worker',
  type: 'object',
  additionalProperties: false,
  required: ['listen', 'model'],
  properties: {
    listen: listen('of the worker'),
    id: id('decode'),
    model,
    model_name: modelName,
    pool,
    handoff_listen: {
      description: 'Address prefill workers push KV to; by default beside a Unix `listen`, as NAME.handoff.sock',
      type: 'string', address: true, flag: 'handoff-listen',
    },
    attention: {
      description: 'How KV lies over the ranks, and so how attention is computed',
      type: 'object', default: {}, additionalProperties: false,
      properties: {
        form: {
          description: 'mla: every rank holds all; tpla: a slice of the latent each; dcp: every n-th page each; dp: whole sequences each',
          type: 'string', enum: ['mla', 'tpla', 'dcp', 'dp'], default: 'mla', flag: 'attention',
        },
        ranks: { description: 'Ranks of the group', type: 'integer', minimum: 1, maximum: 64, default: 1, flag: 'ranks' },
      },
    },
    kv: kv(4096),
    max_batch: {
      description: 'Sequences decoded together',
      type: 'integer', minimum: 1, maximum: 4096, default: 64, flag: 'max-batch',
    },
    max_waiting: maxWaiting,
    handoff_direction: {
      description: "Who moves KV: prefill writes into decode's pages (push), or decode reads prefill's (pull; same host only)",
      type: 'string', enum: ['push', 'pull'], default: 'push', flag: 'handoff-direction',
    },
    first_token: {
      description: "Who draws the first token: prefill, which sends it along, or decode, from a step of its own over the last prompt token",
      type: 'string', enum: ['prefill', 'decode'], default: 'prefill', flag: 'first-token',
    },
    lease_ms: {
      description: 'A hand-off that is silent for so many milliseconds is cut off',
      type: 'integer', minimum: 100, default: 10_000, flag: 'lease-ms',
    },
    transfer: receiving,
    threads,
    drain_ms: drainMs,
    log_level: logLevel,
  },
};
