/**
 * Pages of one memory. A page is in exactly one of three places: free, used (referenced by page tables), or idle (referenced by nobody
 * but still holding a block known by its id, so that a later request can take it up). Idle pages are given away oldest first.
 */
import { TplaError } from '../errors.js';

export interface PageCounts {
  total: number;
  used: number;
  /** Pages nobody references that still hold a known block; they are handed out when the free ones are gone. */
  cached: number;
}

export class PageAllocator {
  readonly total: number;
  readonly #references: Int32Array;
  readonly #free: number[];
  /** Insertion order is age: the first was released longest ago. */
  readonly #idle = new Set<number>();
  readonly #idOf: (string | undefined)[];
  /** Insertion order is recency of publication or use. */
  readonly #pageOf = new Map<string, number>();

  constructor(total: number) {
    this.total = total;
    this.#references = new Int32Array(total);
    this.#free = Array.from({ length: total }, (_, i) => total - 1 - i);
    this.#idOf = new Array<string | undefined>(total);
  }

  /** Pages that allocate() can still give. */
  get available(): number {
    return this.#free.length + this.#idle.size;
  }

  get counts(): PageCounts {
    return { total: this.total, used: this.total - this.available, cached: this.#idle.size };
  }

  /** A page with one reference and unknown content; throws NO_PAGES when all are referenced. */
  allocate(): number {
    const page = this.#free.pop() ?? this.#evictOldest();
    this.#references[page] = 1;
    return page;
  }

  references(page: number): number {
    return this.#references[page]!;
  }

  /** Adds a reference to a page that is used, or idle with a known block. */
  retain(page: number): void {
    if (this.#references[page]! === 0) {
      if (!this.#idle.delete(page)) throw new TplaError('INTERNAL', `page ${page} is free and cannot be retained`);
      this.#refresh(page);
    }
    this.#references[page]!++;
  }

  /** Drops a reference. The last one leaves the page idle if its block is known, else free. */
  release(page: number): void {
    const left = --this.#references[page]!;
    if (left > 0) return;
    if (left < 0) {
      this.#references[page] = 0;
      throw new TplaError('INTERNAL', `page ${page} was released more often than retained`);
    }
    if (this.#idOf[page] === undefined) this.#free.push(page);
    else this.#idle.add(page);
  }

  /** The page that holds a block, used or idle. */
  find(id: string): number | undefined {
    return this.#pageOf.get(id);
  }

  /** Whether the content of a page is known by an id, so that it must not change. */
  isPublished(page: number): boolean {
    return this.#idOf[page] !== undefined;
  }

  /** Declares what a used page holds. Returns the page known for `id`: this one, or another that held the block already. */
  publish(page: number, id: string): number {
    const holder = this.#pageOf.get(id);
    if (holder !== undefined) return holder;
    if (this.#idOf[page] !== undefined) throw new TplaError('INTERNAL', `page ${page} holds block ${this.#idOf[page]} and cannot hold ${id}`);
    this.#idOf[page] = id;
    this.#pageOf.set(id, page);
    return page;
  }

  /** Ids of known blocks, the most recently used last. */
  *ids(): IterableIterator<string> {
    yield* this.#pageOf.keys();
  }

  /** What contradicts the accounting; empty when all is well. */
  check(): string[] {
    const faults: string[] = [];
    const free = new Set(this.#free);
    if (free.size !== this.#free.length) faults.push('a page is twice on the free list');
    for (let page = 0; page < this.total; page++) {
      const places = Number(free.has(page)) + Number(this.#idle.has(page)) + Number(this.#references[page]! > 0);
      if (places !== 1) faults.push(`page ${page} is in ${places} places (free ${free.has(page)}, idle ${this.#idle.has(page)}, references ${this.#references[page]})`);
      const id = this.#idOf[page];
      if (this.#idle.has(page) && id === undefined) faults.push(`idle page ${page} holds no known block`);
      if (id !== undefined && this.#pageOf.get(id) !== page) faults.push(`page ${page} claims block ${id}, which is elsewhere`);
    }
    for (const [id, page] of this.#pageOf) if (this.#idOf[page] !== id) faults.push(`block ${id} points at page ${page}, which holds something else`);
    return faults;
  }

  #evictOldest(): number {
    const page = this.#idle.values().next().value;
    if (page === undefined) throw new TplaError('NO_PAGES', `all ${this.total} KV pages are in use`);
    this.#idle.delete(page);
    this.#pageOf.delete(this.#idOf[page]!);
    this.#idOf[page] = undefined;
    return page;
  }

  #refresh(page: number): void {
    const id = this.#idOf[page]!;
    this.#pageOf.delete(id);
    this.#pageOf.set(id, page);
  }
}
