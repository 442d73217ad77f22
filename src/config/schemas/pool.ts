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
    nvme: {
      description: 'Blocks kept on disk when memory is needed for others, also over a restart',
      type: 'object', default: {}, additionalProperties: false,
      properties: {
        path: { description: 'Block file on an NVMe disk, one a pool, or null for none (`none` as a flag)', type: ['string', 'null'], path: true, default: null, flag: 'nvme-path' },
        bytes: { description: 'Size of the file; taken from the disk as it fills', bytes: { minimum: 1_048_576 }, default: 68_719_476_736, flag: 'nvme-bytes' },
        queue_depth: { description: 'Reads or writes of one block that are under way at a time', type: 'integer', minimum: 1, maximum: 1024, default: 16, flag: 'nvme-queue-depth' },
      },
    },
    drain_ms: drainMs,
    log_level: logLevel,
  },
};
