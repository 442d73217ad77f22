/** One sequence being generated: a choice of a request. */
import type { Sampler } from '../../native/types.js';
import type { BlockLease } from '../../kv/pool_client.js';
import type { PageTable } from '../../kv/page_table.js';
import type { Job } from './job.js';

/**
 * - running: holds pages and takes part in steps
 * - leaving: preempted, its KV is being copied to the pool; still holds its pages
 * - parked: holds no pages
 * - returning: holds pages into which its KV is being copied back, or pushed anew by a prefill worker
 * - finished: holds nothing
 */
export type ChoicePhase = 'running' | 'leaving' | 'parked' | 'returning' | 'finished';

export class Choice {
  readonly job: Job;
  readonly index: number;
  readonly sampler: Sampler;
  /** The prompt, then what was generated. */
  readonly tokens: number[];
  /** Positions 0..computed-1 have their KV in `table`, or in `lease` while parked. */
  computed: number;
  table: PageTable;
  /** Leading blocks of the prompt whose KV is what prefill computes, so that it may be shared under their ids. */
  exactBlocks: number;
  lease: BlockLease | null = null;
  /** The hand-off of KV that was lost while it was parked. */
  session: string | null = null;
  phase: ChoicePhase = 'running';
  stopRequested = false;
  /** When its first and its last token came. */
  firstAt = 0;
  lastAt = 0;

  constructor(job: Job, index: number, sampler: Sampler, table: PageTable, computed: number) {
    this.job = job;
    this.index = index;
    this.sampler = sampler;
    this.tokens = [...job.request.tokens];
    this.table = table;
    this.computed = computed;
    this.exactBlocks = job.ids.length;
  }

  get generated(): number {
    return this.tokens.length - this.job.request.tokens.length;
  }

  /** Tokens whose KV is still to be computed; after the last of them the next token is drawn. */
  get pending(): number {
    return this.tokens.length - this.computed;
  }

  /** Tokens this choice can come to. */
  get maxLength(): number {
    return this.job.maxLength;
  }

  get exactIds(): readonly string[] {
    return this.job.ids.slice(0, this.exactBlocks);
  }

  get live(): boolean {
    return this.phase !== 'finished';
  }
}
