/** serve-prefill's HTTP surface. */
import type { FastifyInstance } from 'fastify';
import type { PrefillRequest } from '../../fleet/protocol.js';
import { ndjsonStream } from '../../http/server.js';
import { clientGone } from '../client_gone.js';
import { PREFILL_SCHEMA } from './request.js';
import type { PrefillWorker } from './worker.js';

/** `worker` throws while there is none yet. */
export function addPrefillRoutes(app: FastifyInstance, worker: () => PrefillWorker): void {
  app.post<{ Body: PrefillRequest }>('/prefill', { schema: { body: PREFILL_SCHEMA } }, async ({ body }, reply) => {
    const job = await worker().accept(body, clientGone(reply));
    job.attach(ndjsonStream(reply));
    return reply;
  });
}
