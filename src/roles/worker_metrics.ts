/** Metrics that both kinds of worker have. */
import type { Registry } from 'prom-client';
import type { PageSpace } from '../kv/page_space.js';
import type { PoolClient } from '../kv/pool_client.js';
import { observedCounter, observedGauge } from './metrics.js';

export interface WorkerLoad {
  running: number;
  waiting: number;
  pendingTokens: number;
  counters: { requests: number; failed: number; cancelled: number; accountingErrors: number };
}

export function addWorkerMetrics(registry: Registry, role: 'prefill' | 'decode', space: PageSpace, worker: WorkerLoad, pool: PoolClient | null): void {
  const gauge = (name: string, help: string, value: () => number) => observedGauge(registry, `tpla_${role}_${name}`, help, value);
  const counter = (name: string, help: string, value: () => number) => observedCounter(registry, `tpla_${role}_${name}`, help, value);
  gauge('running', 'Requests running', () => worker.running);
  gauge('waiting', 'Requests that wait for a place', () => worker.waiting);
  gauge('pending_tokens', role === 'prefill' ? 'Prompt tokens still to compute' : 'Tokens of the sequences in flight', () => worker.pendingTokens);
  gauge('pages', 'KV pages', () => space.counts.total);
  gauge('pages_used', 'KV pages that requests hold', () => space.counts.used);
  gauge('pages_cached', 'KV pages nobody holds that keep a known block', () => space.counts.cached);
  counter('requests_total', 'Requests taken in', () => worker.counters.requests);
  counter('failed_total', 'Requests that broke off', () => worker.counters.failed);
  counter('cancelled_total', 'Requests whose client left', () => worker.counters.cancelled);
  counter('page_accounting_errors_total', 'Contradictions that the check at rest found', () => worker.counters.accountingErrors);
  if (!pool) return;
  gauge('pool_connected', '1 while kv-pool is there', () => Number(pool.connected));
  counter('pool_loaded_blocks_total', 'Blocks loaded from kv-pool', () => pool.counters.loadedBlocks);
  counter('pool_stored_blocks_total', 'Blocks stored in kv-pool', () => pool.counters.storedBlocks);
  counter('pool_corrupt_blocks_total', 'Blocks of kv-pool whose checksum did not match', () => pool.counters.corruptBlocks);
  counter('pool_disconnects_total', 'Times that kv-pool was lost', () => pool.counters.disconnects);
}
