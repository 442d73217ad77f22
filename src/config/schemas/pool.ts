import type { PoolConfig } from '../types.js';
import { drainMs, id, listen, logLevel, type ObjectSchema } from './schema.js';

export const poolSchema: ObjectSchema<PoolConfig> = {
  description: 'A pool of KV blocks shared by the workers of one host',
  type: 'object',
  additionalProperties: false,
  required: ['listen'],
  properties: {
    listen: listen('of the pool'),
    id: id('pool'),
    channel_listen: {
      description: 'Unix socket over which workers get the shared memory; by default beside a Unix `listen`, as NAME.channel.sock',
      type: 'string', address: true, flag: 'channel-listen',
    },
    dram_bytes: {
      description: 'Memory for blocks; touched only as it fills',
      bytes: { minimum: 1_048_576 }, default: 4_294_967_296, flag: 'dram-bytes',
    },
    drain_ms: drainMs,
    log_level: logLevel,
  },
};
