import type { Worker } from '../../fleet/worker.js';
import type { Router } from './router.js';

/** What GET /state answers. */
export function routerState(router: Router) {
  return {
    role: 'route',
    id: router.id,
    model: router.registry.identity,
    model_name: router.model.name,
    context_length: router.contextLength,
    draining: router.draining,
    running: router.running,
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
