import { Gauge, Registry } from 'prom-client';
import { observedCounter, observedGauge } from '../metrics.js';
import type { BlockPool } from './block_pool.js';

export function poolMetrics(pool: BlockPool): Registry {
  const registry = new Registry();
  const gauge = observedGauge.bind(null, registry);
  const counter = observedCounter.bind(null, registry);
  gauge('tpla_pool_blocks', 'Blocks the memory has room for', () => pool.pages.total);
  gauge('tpla_pool_blocks_used', 'Blocks pinned or being written', () => pool.pages.used);
  gauge('tpla_pool_blocks_cached', 'Blocks that can be evicted', () => pool.pages.cached);
  gauge('tpla_pool_clients', 'Workers connected', () => pool.clients);
  gauge('tpla_pool_memory_bytes', 'Size of the memory', () => pool.memory.bytes);
  counter('tpla_pool_lookups_total', 'Prefix lookups', () => pool.counters.lookups);
  counter('tpla_pool_hit_blocks_total', 'Blocks looked up and found', () => pool.counters.hitBlocks);
  counter('tpla_pool_missed_blocks_total', 'Blocks looked up and not found', () => pool.counters.missedBlocks);
  counter('tpla_pool_stored_blocks_total', 'Blocks written and verified', () => pool.counters.storedBlocks);
  counter('tpla_pool_refused_blocks_total', 'Blocks written whose checksum did not match', () => pool.counters.refusedBlocks);
  counter('tpla_pool_evicted_blocks_total', 'Blocks evicted to make room, or on request', () => pool.evictions);
  new Gauge({
    name: 'tpla_pool_nvme_info', help: 'What moves blocks to and from the disk, and whether past the page cache', labelNames: ['engine', 'direct'], registers: [registry],
    collect() {
      this.reset();
      if (pool.nvme) this.set({ engine: pool.nvme.engine, direct: String(pool.nvme.direct) }, 1);
    },
  });
  gauge('tpla_pool_nvme_blocks', 'Blocks on disk', () => pool.nvme?.blocks ?? 0);
  gauge('tpla_pool_nvme_slots', 'Blocks the disk has room for', () => pool.nvme?.slots ?? 0);
  counter('tpla_pool_nvme_spilled_blocks_total', 'Blocks written to disk', () => pool.nvmeCounters.spilledBlocks);
  counter('tpla_pool_nvme_loaded_blocks_total', 'Blocks read back from disk and verified', () => pool.nvmeCounters.loadedBlocks);
  counter('tpla_pool_nvme_corrupt_blocks_total', 'Blocks on disk that were not what was written', () => pool.nvmeCounters.corruptBlocks);
  counter('tpla_pool_nvme_failed_writes_total', 'Blocks that could not be written to disk', () => pool.nvmeCounters.failedWrites);
  return registry;
}
