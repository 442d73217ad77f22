/** Remembers which prefixes were placed on which worker, for workers that do not report what they cache, or have not yet. */
import type { Clock } from '../clock.js';

export interface PrefixMemoryOptions {
  /** Blocks remembered per worker; the least recently placed is forgotten first. */
  blocksPerWorker: number;
  /** After so long a worker is assumed to have evicted a block. */
  ttlMs: number;
}

export class PrefixMemory {
  readonly #clock: Clock;
  readonly #options: PrefixMemoryOptions;
  /** worker → block id → when it was placed, oldest first. */
  readonly #placed = new Map<string, Map<string, number>>();

  constructor(clock: Clock, options: PrefixMemoryOptions) {
    this.#clock = clock;
    this.#options = options;
  }

  remember(worker: string, blocks: readonly string[]): void {
    const placed = this.#placed.get(worker) ?? new Map<string, number>();
    this.#placed.set(worker, placed);
    const now = this.#clock.now();
    // last block first: when room runs out, ends of prefixes go before their beginnings, without which they are worth nothing
    for (const block of blocks.toReversed()) {
      placed.delete(block);
      placed.set(block, now);
    }
    for (const block of placed.keys()) {
      if (placed.size <= this.#options.blocksPerWorker) break;
      placed.delete(block);
    }
  }

  /** Whether `block` was placed on `worker` at `since` or later, and lately enough. */
  has(worker: string, block: string, since = -Infinity): boolean {
    const at = this.#placed.get(worker)?.get(block);
    return at !== undefined && at >= since && this.#clock.now() - at <= this.#options.ttlMs;
  }

  /** The worker was restarted: its memory is empty. */
  forget(worker: string): void {
    this.#placed.delete(worker);
  }
}

/** How many leading blocks of `blocks` are `cached`. */
export function cachedPrefix(blocks: readonly string[], cached: (block: string) => boolean): number {
  const missing = blocks.findIndex((block) => !cached(block));
  return missing < 0 ? blocks.length : missing;
}
