import { Registry } from 'prom-client';
import type { PageSpace } from '../../kv/page_space.js';
import type { PoolClient } from '../../kv/pool_client.js';
import { histogram, observedCounter, STEP_SECONDS } from '../metrics.js';
import { addWorkerMetrics } from '../worker_metrics.js';
import type { PrefillWorker } from './worker.js';

const STEP_TOKENS = [16, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768];

/** Also hooks into the worker's steps. */
export function prefillMetrics(worker: PrefillWorker, space: PageSpace, pool: PoolClient | null): Registry {
  const registry = new Registry();
  const counter = observedCounter.bind(null, registry);
  addWorkerMetrics(registry, 'prefill', space, worker, pool);
  counter('tpla_prefill_computed_tokens_total', 'Prompt tokens computed', () => worker.counters.computedTokens);
  counter('tpla_prefill_cached_tokens_total', 'Prompt tokens found in the own cache or in kv-pool', () => worker.counters.cachedTokens);
  counter('tpla_prefill_pushed_bytes_total', 'KV bytes pushed to decode workers', () => worker.counters.pushedBytes);
  const seconds = histogram(registry, 'tpla_prefill_step_seconds', 'Time of one prefill step', STEP_SECONDS);
  const tokens = histogram(registry, 'tpla_prefill_step_tokens', 'Tokens in one prefill step', STEP_TOKENS);
  worker.onStep = (ms, count) => {
    seconds.observe(ms / 1000);
    tokens.observe(count);
  };
  return registry;
}
