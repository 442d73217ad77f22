/** Logical pages of one sequence, in order, with one reference held on each. */
import { TplaError } from '../errors.js';
import type { PageSpace } from './page_space.js';

/** A page to copy before it may be written (copy-on-write). `rank` is undefined where one number stands for all ranks. */
export interface PageCopy {
  from: number;
  to: number;
  rank: number | undefined;
}

export class PageTable {
  readonly space: PageSpace;
  readonly home: number;
  readonly #pages: number[] = [];
  #tables: Int32Array[] | undefined;

  constructor(space: PageSpace, home: number) {
    this.space = space;
    this.home = home;
  }

  /** Logical pages. */
  get length(): number {
    return this.#pages.length;
  }

  /** Tokens the table has room for. */
  get capacity(): number {
    return this.#pages.length * this.space.pageTokens;
  }

  page(index: number): number {
    return this.#pages[index]!;
  }

  /** Appends a new page; throws NO_PAGES. */
  append(): void {
    this.#pages.push(this.#lane(this.#pages.length).allocate());
    this.#tables = undefined;
  }

  /** Appends new pages until `tokens` fit; all or nothing. Throws NO_PAGES. */
  grow(tokens: number): void {
    const before = this.#pages.length;
    try {
      while (this.capacity < tokens) this.append();
    } catch (error) {
      this.truncate(before);
      throw error;
    }
  }

  /** Appends the cached block `id`, which must be here. */
  adopt(id: string): void {
    const lane = this.#lane(this.#pages.length);
    const page = lane.find(id);
    if (page === undefined) throw new TplaError('INTERNAL', `block ${id} is not cached`);
    lane.retain(page);
    this.#pages.push(page);
    this.#tables = undefined;
  }

  /** Declares logical page `index` to hold block `id`. Where another page holds it already, that one takes this one's place. */
  publish(index: number, id: string): void {
    const lane = this.#lane(index);
    const own = this.#pages[index]!;
    const holder = lane.publish(own, id);
    if (holder === own) return;
    lane.retain(holder);
    lane.release(own);
    this.#pages[index] = holder;
    this.#tables = undefined;
  }

  /** A second sequence over the same pages. */
  fork(): PageTable {
    const twin = new PageTable(this.space, this.home);
    this.#pages.forEach((page, index) => {
      this.#lane(index).retain(page);
      twin.#pages.push(page);
    });
    return twin;
  }

  /** Whether a write to this page would be seen by another sequence, or would change a cached block. */
  isShared(index: number): boolean {
    const lane = this.#lane(index);
    const page = this.#pages[index]!;
    return lane.references(page) > 1 || lane.isPublished(page);
  }

  /** Puts a page of its own in place of a shared one, to which the caller copies the content. Throws NO_PAGES. */
  unshare(index: number): PageCopy {
    const lane = this.#lane(index);
    const from = this.#pages[index]!;
    const to = lane.allocate();
    lane.release(from);
    this.#pages[index] = to;
    this.#tables = undefined;
    return { from, to, rank: this.space.lanes.length > 1 ? this.space.laneOf(index, this.home) : undefined };
  }

  /** Per lane, pages that would be handed back if this table were released. */
  exclusive(): number[] {
    const counts = new Array<number>(this.space.lanes.length).fill(0);
    this.#pages.forEach((page, index) => {
      if (this.#lane(index).references(page) === 1) counts[this.space.laneOf(index, this.home)]!++;
    });
    return counts;
  }

  /** Releases pages from logical page `length` on, the last first: of an idle prefix the tail is evicted before what it hangs on. */
  truncate(length: number): void {
    while (this.#pages.length > length) {
      const page = this.#pages.pop()!;
      this.#lane(this.#pages.length).release(page);
    }
    this.#tables = undefined;
  }

  release(): void {
    this.truncate(0);
  }

  /** Page tables as the addon takes them: with dcp one per rank, else one. */
  tables(): Int32Array[] {
    if (this.#tables) return this.#tables;
    const { form, lanes } = this.space;
    if (form === 'dcp') this.#tables = lanes.map((_, rank) => Int32Array.from(this.#pages.filter((_page, index) => index % lanes.length === rank)));
    else this.#tables = [Int32Array.from(this.#pages)];
    return this.#tables;
  }

  /** The rank argument of the addon's calls: with dp the home, else undefined. */
  get rank(): number | undefined {
    return this.space.form === 'dp' ? this.home : undefined;
  }

  #lane(index: number) {
    return this.space.lanes[this.space.laneOf(index, this.home)]!;
  }
}
