/** serve-decode's HTTP surface. */
import type { FastifyInstance } from 'fastify';
import type { GenerateRequest, StopRequest } from '../../fleet/protocol.js';
import { ndjsonStream } from '../../http/server.js';
import { clientGone } from '../client_gone.js';
import { GENERATE_SCHEMA, STOP_SCHEMA } from './request.js';
import type { DecodeWorker } from './worker.js';

/** `worker` throws while there is none yet. */
export function addDecodeRoutes(app: FastifyInstance, worker: () => DecodeWorker): void {
  app.post<{ Body: GenerateRequest }>('/generate', { schema: { body: GENERATE_SCHEMA } }, async ({ body }, reply) => {
    const job = await worker().accept(body, clientGone(reply));
    job.attach(ndjsonStream(reply));
    return reply;
  });
  app.post<{ Body: StopRequest }>('/stop', { schema: { body: STOP_SCHEMA } }, async ({ body }) => {
    worker().stop(body.id, body.index);
    return {};
  });
}
