import type { LogLevel } from '../types.js';

/**
 * The part of JSON Schema our configurations use, and four keywords of our own:
 * - `flag`: name of the command-line flag; the environment variable is TPLA_ and the same name in capitals. On leaves only.
 * - `bytes`: a number of bytes, also written as text with a unit (`512MiB`, `2GB`); a plain number after validation.
 * - `path`: a file or directory; relative ones in a file are taken from that file's directory.
 * - `address`: `unix:/path` or `tcp://host:port`.
 */
export interface Schema {
  description: string;
  type?: 'object' | 'array' | 'string' | 'integer' | 'number' | 'boolean' | ['string', 'null'];
  default?: unknown;
  enum?: readonly (string | number | null)[];
  minimum?: number;
  maximum?: number;
  multipleOf?: number;
  minLength?: number;
  minItems?: number;
  pattern?: string;
  items?: Schema;
  properties?: Record<string, Schema>;
  required?: readonly string[];
  additionalProperties?: boolean | Schema;
  flag?: string;
  bytes?: { minimum: number };
  path?: true;
  address?: true;
}

/** A schema whose properties are exactly the keys of the configuration's type. */
export interface ObjectSchema<T> extends Schema {
  type: 'object';
  properties: { [K in keyof T]-?: Schema };
}

export const LOG_LEVELS = ['fatal', 'error', 'warn', 'info', 'debug', 'trace'] as const satisfies readonly LogLevel[];

export const logLevel: Schema = {
  description: 'Least severe log line that is written',
  type: 'string', enum: LOG_LEVELS, default: 'info', flag: 'log-level',
};

export const drainMs: Schema = {
  description: 'After SIGTERM, milliseconds that running requests get to finish',
  type: 'integer', minimum: 0, default: 30_000, flag: 'drain-ms',
};

export const threads: Schema = {
  description: 'Compute threads; 0 takes every core this process may use',
  type: 'integer', minimum: 0, maximum: 1024, default: 0, flag: 'threads',
};

export const model: Schema = {
  description: 'Checkpoint directory (config.json, *.safetensors, tokenizer.json)',
  type: 'string', minLength: 1, path: true, flag: 'model',
};

export const modelName: Schema = {
  description: "Name clients ask for; by default the checkpoint directory's own",
  type: 'string', minLength: 1, flag: 'model-name',
};

export const pool: Schema = {
  description: 'Address of kv-pool, or null for none (`none` as a flag)',
  type: ['string', 'null'], address: true, default: null, flag: 'pool',
};

export const maxWaiting: Schema = {
  description: 'Requests that may wait for a place; one more is refused with OVERLOADED',
  type: 'integer', minimum: 0, default: 256, flag: 'max-waiting',
};

export function listen(what: string): Schema {
  return { description: `Address ${what}: unix:/path or tcp://host:port`, type: 'string', address: true, flag: 'listen' };
}

export function id(role: string): Schema {
  return {
    description: 'Name of this process in logs, metrics and /state',
    type: 'string', pattern: '^[A-Za-z0-9][A-Za-z0-9._-]*$', default: `${role}-0`, flag: 'id',
  };
}

export function kv(pages: number): Schema {
  return {
    description: 'KV cache memory',
    type: 'object', default: {}, additionalProperties: false,
    properties: {
      dtype: { description: 'Type of cached values', type: 'string', enum: ['f32', 'bf16', 'fp8'], default: 'bf16', flag: 'kv-dtype' },
      page_tokens: { description: 'Tokens per page', type: 'integer', minimum: 16, maximum: 1024, multipleOf: 16, default: 64, flag: 'kv-page-tokens' },
      pages: { description: 'Pages per rank', type: 'integer', minimum: 1, maximum: 16_777_216, default: pages, flag: 'kv-pages' },
    },
  };
}
