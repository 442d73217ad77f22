import { Registry } from 'prom-client';
import type { PageSpace } from '../../kv/page_space.js';
import type { PoolClient } from '../../kv/pool_client.js';
import { histogram, observedCounter, STEP_SECONDS } from '../metrics.js';
import { addWorkerMetrics } from '../worker_metrics.js';
import type { DecodeWorker } from './worker.js';

const BATCH_ROWS = [1, 2, 4, 8, 16, 32, 64, 128, 256, 512];

/** Also hooks into the worker's steps. */
export function decodeMetrics(worker: DecodeWorker, space: PageSpace, pool: PoolClient | null): Registry {
  const registry = new Registry();
  const counter = observedCounter.bind(null, registry);
  addWorkerMetrics(registry, 'decode', space, worker, pool);
  counter('tpla_decode_tokens_total', 'Tokens generated', () => worker.counters.tokens);
  counter('tpla_decode_landed_bytes_total', 'KV bytes that prefill workers pushed here', () => worker.counters.landedBytes);
  counter('tpla_decode_preemptions_total', 'Sequences moved out to make room', () => worker.counters.preemptions);
  counter('tpla_decode_relanded_tokens_total', 'Tokens whose KV was lost with kv-pool and pushed anew by a prefill worker', () => worker.counters.relandedTokens);
  counter('tpla_decode_recomputed_tokens_total', 'Tokens whose KV was lost with kv-pool and computed again by decode steps', () => worker.counters.recomputedTokens);
  const seconds = histogram(registry, 'tpla_decode_step_seconds', 'Time of one decode step', STEP_SECONDS);
  const rows = histogram(registry, 'tpla_decode_step_sequences', 'Sequences in one decode step', BATCH_ROWS);
  worker.onStep = (ms, sequences) => {
    seconds.observe(ms / 1000);
    rows.observe(sequences);
  };
  return registry;
}
