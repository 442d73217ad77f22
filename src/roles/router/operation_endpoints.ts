import type { FastifyInstance } from 'fastify';
import type { Worker } from '../../fleet/worker.js';
import type { Router } from './router.js';

/** Endpoints for those who run it. */
export function addOperationEndpoints(app: FastifyInstance, router: Router): void {
  app.get('/health', (_request, reply) => {
    const status = router.draining ? 'draining' : router.ready ? 'ok' : 'unavailable';
    return reply.code(status === 'unavailable' ? 503 : 200).send({ status });
  });
  app.get('/metrics', async (_request, reply) => reply.type(router.metrics.registry.contentType).send(await router.metrics.registry.metrics()));
  app.get('/state', () => routerState(router));
}

function routerState(router: Router) {
  return {
    role: 'route',
    id: router.id,
    model: router.registry.identity,
    model_name: router.model.name,
    context_length: router.contextLength,
    draining: router.draining,
    running: router.metrics.running,
    workers: router.registry.workers.map(workerState),
  };
}

function workerState(worker: Worker) {
  const { role, address, health, state, load, legs } = worker;
  return {
    role,
    address,
    id: state?.id ?? null,
    health: health.status,
    reason: health.reason,
    since_ms: Math.round(health.sinceMs),
    /** Requests that this route has running there. */
    legs,
    /** Requests and tokens there as placement counts them. */
    load,
    pages: state?.pages ?? null,
    attention: state?.attention ?? null,
  };
}
