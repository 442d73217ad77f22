/** What every role answers: GET /health, /state, /metrics. */
import type { FastifyInstance } from 'fastify';
import type { Registry } from 'prom-client';

/** 'unavailable': it serves nobody for now, through no fault of its own. */
export type RoleStatus = 'starting' | 'ok' | 'draining' | 'unavailable';

export interface RoleEndpoints {
  status(): RoleStatus;
  state(): unknown;
  metrics(): Registry;
}

export function addRoleEndpoints(app: FastifyInstance, role: RoleEndpoints): void {
  app.get('/health', async (_request, reply) => {
    const status = role.status();
    return reply.code(status === 'starting' || status === 'unavailable' ? 503 : 200).send({ status });
  });
  app.get('/state', async () => role.state());
  app.get('/metrics', async (_request, reply) => {
    const metrics = role.metrics();
    return reply.type(metrics.contentType).send(await metrics.metrics());
  });
}
