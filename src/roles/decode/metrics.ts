import { Counter, Histogram, Registry } from 'prom-client';
import type { PageSpace } from '../../kv/page_space.js';
import type { PoolClient } from '../../kv/pool_client.js';
import type { HandoffReceiver } from '../../transfer/types.js';
import { histogram, observedCounter, observedGauge, STEP_SECONDS } from '../metrics.js';
import { addWorkerMetrics } from '../worker_metrics.js';
import type { DecodeWorker } from './worker.js';

const HANDOFF_SECONDS = [0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10];
const BATCH_ROWS = [1, 2, 4, 8, 16, 32, 64, 128, 256, 512];

/** Also hooks into the worker's steps and hand-offs. */
export function decodeMetrics(worker: DecodeWorker, space: PageSpace, pool: PoolClient | null, receiver: HandoffReceiver): Registry {
  const registry = new Registry();
  const counter = observedCounter.bind(null, registry);
  addWorkerMetrics(registry, 'decode', space, worker, pool);
  counter('tpla_decode_tokens_total', 'Tokens generated', () => worker.counters.tokens);
  counter('tpla_decode_preemptions_total', 'Sequences moved out to make room', () => worker.counters.preemptions);
  counter('tpla_decode_relanded_tokens_total', 'Tokens whose KV was lost with kv-pool and pushed anew by a prefill worker', () => worker.counters.relandedTokens);
  counter('tpla_decode_recomputed_tokens_total', 'Tokens whose KV was lost with kv-pool and computed again by decode steps', () => worker.counters.recomputedTokens);
  const seconds = histogram(registry, 'tpla_decode_step_seconds', 'Time of one decode step', STEP_SECONDS);
  const rows = histogram(registry, 'tpla_decode_step_sequences', 'Sequences in one decode step', BATCH_ROWS);
  worker.onStep = (ms, sequences) => {
    seconds.observe(ms / 1000);
    rows.observe(sequences);
  };
  observeHandoffs(registry, worker, receiver);
  return registry;
}

function observeHandoffs(registry: Registry, worker: DecodeWorker, receiver: HandoffReceiver): void {
  const registers = [registry];
  const bytes = new Counter({ name: 'tpla_decode_landed_bytes_total', help: 'KV bytes that prefill workers pushed here, by path', labelNames: ['path'], registers });
  const seconds = new Histogram({
    name: 'tpla_decode_handoff_seconds', help: 'Time from the first push of a hand-off to its commit, by path', labelNames: ['path'], buckets: HANDOFF_SECONDS, registers,
  });
  worker.onLanded = (commit) => {
    bytes.inc({ path: commit.path }, commit.bytes);
    seconds.observe({ path: commit.path }, commit.transferMs / 1000);
  };
  observedGauge(registry, 'tpla_decode_handoffs_open', 'Hand-offs under way', () => receiver.stats().open);
  observedGauge(registry, 'tpla_decode_handoffs_draining', 'Failed hand-offs whose pages wait for a writer to leave', () => receiver.stats().draining);
  new Counter({
    name: 'tpla_decode_handoffs_failed_total', help: 'Hand-offs that failed, by code', labelNames: ['code'], registers,
    collect() {
      this.reset();
      for (const [code, count] of Object.entries(receiver.stats().failed)) this.inc({ code }, count);
    },
  });
}
