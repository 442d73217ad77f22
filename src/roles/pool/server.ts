/** kv-pool's HTTP surface. */
import type { FastifyInstance } from 'fastify';
import type { CommitReply, CommitRequest, EvictReply, EvictRequest, LookupReply, LookupRequest, ReserveReply, ReserveRequest, UnpinRequest } from '../../kv/pool_protocol.js';
import { strictObject } from '../request_schema.js';
import type { BlockPool } from './block_pool.js';

const CLIENT = { type: 'string', minLength: 1, maxLength: 64 } as const;
const ID = { type: 'string', pattern: '^[0-9a-f]{32}$' } as const;
const IDS = { type: 'array', items: ID, maxItems: 1 << 20 } as const;
/** Tokens are counted in 31 bits. */
const INDEX = { type: 'integer', minimum: 0, maximum: 1 << 24 } as const;
const SLOT = { type: 'integer', minimum: 0 } as const;

const LOOKUP = strictObject({ client: CLIENT, ids: IDS });
const RESERVE = strictObject({ client: CLIENT, ids: IDS, pin: { type: 'boolean' } });
const COMMIT = strictObject({
  client: CLIENT,
  blocks: { type: 'array', items: strictObject({ id: ID, slot: SLOT, index: INDEX, tokens: { type: 'integer', minimum: 1 }, checksum: { type: 'string', pattern: '^[0-9]{1,20}$' } }) },
  pin: { type: 'boolean' },
});
const UNPIN = strictObject({ client: CLIENT, slots: { type: 'array', items: SLOT } });
const EVICT = { type: 'object', properties: { ids: IDS }, additionalProperties: false };

export function addPoolRoutes(app: FastifyInstance, pool: BlockPool): void {
  app.post<{ Body: LookupRequest }>('/lookup', { schema: { body: LOOKUP } }, async ({ body }): Promise<LookupReply> => ({ blocks: await pool.lookup(body) }));
  app.post<{ Body: ReserveRequest }>('/reserve', { schema: { body: RESERVE } }, async ({ body }): Promise<ReserveReply> => ({ blocks: pool.reserve(body) }));
  app.post<{ Body: CommitRequest }>('/commit', { schema: { body: COMMIT } }, async ({ body }): Promise<CommitReply> => ({ stored: await pool.commit(body) }));
  app.post<{ Body: UnpinRequest }>('/unpin', { schema: { body: UNPIN } }, async ({ body }) => { pool.unpin(body); return {}; });
  app.post<{ Body: EvictRequest }>('/evict', { schema: { body: EVICT } }, async ({ body }): Promise<EvictReply> => ({ evicted: await pool.evict(body.ids) }));
}
