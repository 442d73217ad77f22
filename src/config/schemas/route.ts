import type { RouteConfig } from '../types.js';
import { drainMs, id, logLevel, model, modelName, type ObjectSchema, type Schema } from './schema.js';

function workers(kind: string): Schema {
  return {
    description: `Addresses of the ${kind} workers`,
    type: 'array', minItems: 1, flag: kind,
    items: { description: 'unix:/path or tcp://host:port', type: 'string', address: true },
  };
}

export const routeSchema: ObjectSchema<RouteConfig> = {
  description: 'The OpenAI-compatible front door',
  type: 'object',
  additionalProperties: false,
  required: ['model', 'prefill', 'decode'],
  properties: {
    listen: {
      description: 'Public addresses',
      type: 'array', minItems: 1, default: ['tcp://127.0.0.1:8000'], flag: 'listen',
      items: { description: 'unix:/path or tcp://host:port', type: 'string', address: true },
    },
    id: id('route'),
    prefill: workers('prefill'),
    decode: workers('decode'),
    model: { ...model, description: 'Directory with tokenizer.json, tokenizer_config.json and config.json of the served model' },
    model_name: modelName,
    health_interval_ms: {
      description: 'Milliseconds between two looks at each worker',
      type: 'integer', minimum: 50, default: 1000, flag: 'health-interval-ms',
    },
    request_timeout_ms: {
      description: 'A request that takes longer is cancelled',
      type: 'integer', minimum: 100, default: 600_000, flag: 'request-timeout-ms',
    },
    max_body_bytes: {
      description: 'Largest request body',
      bytes: { minimum: 1024 }, default: 16_777_216, flag: 'max-body-bytes',
    },
    retries: {
      description: 'How often a request that has produced no token yet is tried on other workers',
      type: 'integer', minimum: 0, maximum: 10, default: 1, flag: 'retries',
    },
    drain_ms: drainMs,
    log_level: logLevel,
  },
};
