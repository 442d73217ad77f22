import type { Clock } from '../../clock.js';
import type { WorkerRegistry } from '../../fleet/registry.js';
import type { Worker } from '../../fleet/worker.js';
import { blockIds } from '../../kv/hash.js';
import { Placement, type Candidate } from '../../policy/placement.js';
import { PrefixMemory, cachedPrefix } from '../../policy/prefix_memory.js';

/** Tokens per block where a worker does not say. */
const BLOCK_TOKENS = 64;
const MEMORY = { blocksPerWorker: 65_536, ttlMs: 10 * 60_000 };

/** Block ids of one prompt, in the form of whichever worker asks. */
export class PromptBlocks {
  readonly #tokens: readonly number[];
  readonly #byForm = new Map<string, string[]>();

  constructor(tokens: readonly number[]) {
    this.#tokens = tokens;
  }

  of(worker: Worker): { ids: string[]; blockTokens: number } {
    const { model, attention: { dtype }, page_tokens: blockTokens = BLOCK_TOKENS } = worker.state!;
    const form = `${dtype}/${blockTokens}`;
    const ids = this.#byForm.get(form) ?? blockIds(this.#tokens, model, { dtype, pageTokens: blockTokens, salt: '' });
    this.#byForm.set(form, ids);
    return { ids, blockTokens };
  }
}

/** Applies the placement policy to the workers of the registry. */
export class Placer {
  readonly #placement: Placement;
  readonly #prefixes: PrefixMemory;

  constructor(registry: WorkerRegistry, clock: Clock) {
    this.#placement = new Placement(clock);
    this.#prefixes = new PrefixMemory(clock, MEMORY);
    registry.onDown((worker) => {
      this.#placement.forget(worker.address);
      this.#prefixes.forget(worker.address);
    });
  }

  pick(workers: readonly Worker[], promptTokens: number, blocks: PromptBlocks): Worker | null {
    const candidates = workers.map((worker) => ({ ...this.#candidate(worker, blocks), worker }));
    return this.#placement.pick(candidates, { promptTokens, kvTokens: promptTokens + 1 })?.worker ?? null;
  }

  /** The prompt's KV is on `worker` now. */
  remember(worker: Worker, blocks: PromptBlocks): void {
    if (worker.state !== null) this.#prefixes.remember(worker.address, blocks.of(worker).ids);
  }

  #candidate(worker: Worker, blocks: PromptBlocks): Candidate {
    const { ids, blockTokens } = blocks.of(worker);
    const { pages } = worker.state!;
    const { requests, tokens } = worker.load;
    return {
      id: worker.address,
      requests,
      pendingTokens: tokens,
      cachedTokens: cachedPrefix(ids, this.#caches(worker)) * blockTokens,
      freeTokens: (pages.total - pages.used) * blockTokens,
    };
  }

  /** A worker's own list of its blocks is the truth as of its last report; what was placed since is added from memory. */
  #caches(worker: Worker): (block: string) => boolean {
    const reported = worker.cachedBlocks;
    if (reported === null) return (block) => this.#prefixes.has(worker.address, block);
    return (block) => reported.has(block) || this.#prefixes.has(worker.address, block, worker.stateAt);
  }
}
