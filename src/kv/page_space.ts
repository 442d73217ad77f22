/**
 * The pages of one worker over all its ranks. A lane is a memory with page numbers of its own: `mla` and `tpla` have one (the same
 * number on every rank), `dcp` and `dp` one per rank. Logical page j of a sequence lies, with dcp, in lane j % ranks; with dp, in
 * the lane of the rank that is the sequence's home.
 */
import type { KvLayout } from '../native/types.js';
import { PageAllocator, type PageCounts } from './page_allocator.js';

export class PageSpace {
  readonly form: KvLayout['form'];
  readonly pageTokens: number;
  readonly lanes: readonly PageAllocator[];

  /** `pages` per rank. */
  constructor(layout: Pick<KvLayout, 'form' | 'ranks' | 'pageTokens'>, pages: number) {
    this.form = layout.form;
    this.pageTokens = layout.pageTokens;
    const lanes = layout.form === 'dcp' || layout.form === 'dp' ? layout.ranks : 1;
    this.lanes = Array.from({ length: lanes }, () => new PageAllocator(pages));
  }

  /** Homes a sequence can have: the ranks of dp, else one. */
  get homes(): number {
    return this.form === 'dp' ? this.lanes.length : 1;
  }

  laneOf(index: number, home: number): number {
    if (this.form === 'dp') return home;
    return this.form === 'dcp' ? index % this.lanes.length : 0;
  }

  pagesFor(tokens: number): number {
    return Math.ceil(tokens / this.pageTokens);
  }

  /** Per lane, how many of the logical pages [begin, end) lie there. */
  spread(begin: number, end: number, home: number): number[] {
    const counts = new Array<number>(this.lanes.length).fill(0);
    for (let index = begin; index < end; index++) counts[this.laneOf(index, home)]!++;
    return counts;
  }

  get available(): number[] {
    return this.lanes.map((lane) => lane.available);
  }

  /** Longest sequence that fits into an otherwise empty worker. */
  get capacityTokens(): number {
    const pages = this.form === 'dcp' ? this.lanes.length * this.lanes[0]!.total : this.lanes[0]!.total;
    return pages * this.pageTokens;
  }

  /** How many blocks from the start of `ids` are here for a sequence of this home. */
  cachedPrefix(ids: readonly string[], home: number): number {
    let count = 0;
    while (count < ids.length && this.lanes[this.laneOf(count, home)]!.find(ids[count]!) !== undefined) count++;
    return count;
  }

  get counts(): PageCounts {
    const sum: PageCounts = { total: 0, used: 0, cached: 0 };
    for (const { counts } of this.lanes) {
      sum.total += counts.total;
      sum.used += counts.used;
      sum.cached += counts.cached;
    }
    return sum;
  }

  /** Ids of cached blocks, at most `limit`, the most recently used last. */
  recentIds(limit: number): string[] {
    return [...new Set(this.lanes.flatMap((lane) => [...lane.ids()].slice(-limit)))].slice(-limit);
  }

  check(): string[] {
    return this.lanes.flatMap((lane, rank) => lane.check().map((fault) => `lane ${rank}: ${fault}`));
  }
}
