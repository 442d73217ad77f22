import { Counter, Gauge, Registry } from 'prom-client';
import type { BlockPool } from './block_pool.js';

/** Prometheus view of the pool, read when scraped. */
export function poolMetrics(pool: BlockPool): Registry {
  const registry = new Registry();
  const registers = [registry];
  const count = (name: string, help: string, value: () => number) =>
    new Counter({ name, help, registers, collect() { this.reset(); this.inc(value()); } });
  const gauge = (name: string, help: string, value: () => number) =>
    new Gauge({ name, help, registers, collect() { this.set(value()); } });
  gauge('tpla_pool_blocks', 'Blocks the memory has room for.', () => pool.pages.total);
  gauge('tpla_pool_blocks_used', 'Blocks pinned or being written.', () => pool.pages.used);
  gauge('tpla_pool_blocks_cached', 'Blocks that can be evicted.', () => pool.pages.cached);
  gauge('tpla_pool_clients', 'Workers connected.', () => pool.clients);
  gauge('tpla_pool_memory_bytes', 'Size of the memory.', () => pool.memory.bytes);
  count('tpla_pool_lookups_total', 'Prefix lookups.', () => pool.counters.lookups);
  count('tpla_pool_hit_blocks_total', 'Blocks looked up and found.', () => pool.counters.hitBlocks);
  count('tpla_pool_missed_blocks_total', 'Blocks looked up and not found.', () => pool.counters.missedBlocks);
  count('tpla_pool_stored_blocks_total', 'Blocks written and verified.', () => pool.counters.storedBlocks);
  count('tpla_pool_refused_blocks_total', 'Blocks written whose checksum did not match.', () => pool.counters.refusedBlocks);
  count('tpla_pool_evicted_blocks_total', 'Blocks evicted to make room, or on request.', () => pool.evictions);
  return registry;
}
