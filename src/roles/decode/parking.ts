/** The way of a preempted sequence's KV to the pool and back, and what is done where the pool has lost it. */
import type { Logger } from 'pino';
import type { PageSpace } from '../../kv/page_space.js';
import type { BlockStore, KvSequence } from '../../kv/pool_client.js';
import type { KvArena, KvLayout } from '../../native/types.js';
import type { HandoffCommit, HandoffReceiver } from '../../transfer/types.js';
import type { Choice } from './choice.js';

export interface ParkingParts {
  arena: KvArena;
  space: PageSpace;
  store: BlockStore | null;
  receiver: HandoffReceiver;
  log: Logger;
}

export interface ParkingSettings {
  leaseMs: number;
  /** Lost tokens beyond what one decode step takes in are prefill's to compute. */
  maxBatch: number;
}

export interface ParkingCounters {
  /** Tokens whose KV was lost with the pool: pushed anew by a prefill worker, or computed again by decode steps. */
  relandedTokens: number;
  recomputedTokens: number;
}

/** Whether decode steps compute other KV than prefill: the attention of sliced latents is approximate. */
export function decodesApproximately({ form, ranks }: KvLayout): boolean {
  return form === 'tpla' && ranks > 1;
}

/** From here on `choice` computes KV by decode steps, which may not be what prefill would have computed. */
export function noteDecoded(choice: Choice, layout: KvLayout): void {
  if (decodesApproximately(layout)) choice.exactBlocks = Math.min(choice.exactBlocks, Math.floor(choice.computed / layout.pageTokens));
}

export class Parking {
  readonly #parts: ParkingParts;
  readonly #settings: ParkingSettings;
  readonly #counters: ParkingCounters;
  readonly #onLanded: (commit: HandoffCommit) => void;

  constructor(parts: ParkingParts, settings: ParkingSettings, counters: ParkingCounters, onLanded: (commit: HandoffCommit) => void) {
    this.#parts = parts;
    this.#settings = settings;
    this.#counters = counters;
    this.#onLanded = onLanded;
  }

  /** Copies a sequence's KV to the pool; `choice.lease` names what is there. Where the pool takes less than all, the rest is computed again later. */
  async park(choice: Choice): Promise<void> {
    const { store, log } = this.#parts;
    choice.lease = store ? await store.park(choice.exactIds, choice.computed, this.#sequence(choice)) : null;
    log.info({ request: choice.job.request.id, choice: choice.index, blocks: choice.lease?.blocks ?? 0, tokens: choice.computed }, 'preempted');
  }

  /**
   * Fills the pages that `choice` has got. `parked`: tokens whose KV went to the pool; `choice.computed`: those that are here already, and
   * afterwards those whose KV is here; what is missing still is fed through decode steps.
   */
  async bringBack(choice: Choice, parked: number): Promise<void> {
    const { store, space } = this.#parts;
    const { lease, job } = choice;
    const here = choice.computed / space.pageTokens;
    const loaded = lease && store ? await store.load(lease, here, lease.blocks, this.#sequence(choice)) : here;
    lease?.release();
    choice.lease = null;
    publishPrompt(choice, here, loaded);
    choice.computed = Math.min(Math.max(loaded, here) * space.pageTokens, parked);
    if (choice.computed < parked && !job.cancelled) await this.#restore(choice, parked);
  }

  /** A prompt's KV is computed by prefill again, so that it is exact in every form, and so is anything long; the rest is decode's. */
  async #restore(choice: Choice, end: number): Promise<void> {
    const { log, arena } = this.#parts;
    const { job, index, computed } = choice;
    const lost = end - computed;
    log.warn({ request: job.request.id, choice: index, tokens: lost }, 'KV of a preempted sequence was lost with the pool; computing it again');
    if (computed < job.request.tokens.length || lost > this.#settings.maxBatch) {
      try {
        await this.#reland(choice, end);
        this.#counters.relandedTokens += lost;
        return;
      } catch (error) {
        if (job.cancelled) return;
        log.warn({ request: job.request.id, choice: index, reason: (error as Error).message }, 'no prefill worker delivered lost KV; decode computes it by itself');
      }
    }
    this.#counters.recomputedTokens += lost;
    noteDecoded(choice, arena.layout);
  }

  /** One more hand-off, of tokens [choice.computed, end). */
  async #reland(choice: Choice, end: number): Promise<void> {
    const { receiver, space } = this.#parts;
    const { table, computed, index, job } = choice;
    const { ticket, committed } = receiver.open({
      tokens: [computed, end], pages: table.tables(), leaseMs: this.#settings.leaseMs, ...(table.rank === undefined ? {} : { rank: table.rank }),
    });
    choice.session = ticket.session;
    try {
      job.emit({ event: 'recompute', index, tokens: choice.tokens.slice(0, end), ticket });
      this.#onLanded(await committed);
      choice.computed = end;
      if (choice.exactBlocks * space.pageTokens >= computed) choice.exactBlocks = job.ids.length;
      publishPrompt(choice, Math.ceil(computed / space.pageTokens), Math.floor(end / space.pageTokens));
    } finally {
      choice.session = null;
    }
  }

  #sequence({ table }: Choice): KvSequence {
    return { arena: this.#parts.arena, pages: table.tables(), rank: table.rank };
  }
}

/** Names the prompt's blocks among logical pages [begin, end), so that others can share them. */
function publishPrompt({ table, job, exactBlocks }: Choice, begin: number, end: number): void {
  for (let index = begin; index < Math.min(end, exactBlocks); index++) table.publish(index, job.ids[index]!);
}
