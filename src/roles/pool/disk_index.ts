/** What the slots of the block file hold; no I/O. The least recently used block makes way. */
import type { BlockRecord } from '../../native/types.js';

interface Entry {
  slot: number;
  record: BlockRecord;
  isWritten: boolean;
}

export class DiskIndex {
  readonly #free: number[];
  /** The least recently used first. */
  readonly #byId = new Map<string, Entry>();

  constructor(slots: number, found: readonly (BlockRecord & { slot: number })[]) {
    const taken = new Set<number>();
    for (const { slot, ...record } of found) {
      if (this.#byId.has(record.id)) continue;
      this.#byId.set(record.id, { slot, record, isWritten: true });
      taken.add(slot);
    }
    this.#free = Array.from({ length: slots }, (_, i) => slots - 1 - i).filter((slot) => !taken.has(slot));
  }

  /** Written ones. */
  get blocks(): number {
    return this.ids().length;
  }

  /** Written, or about to be. */
  has(id: string): boolean {
    return this.#byId.has(id);
  }

  /** A written block, which is used by that. */
  use(id: string): { slot: number; record: BlockRecord } | null {
    const entry = this.#byId.get(id);
    if (!entry?.isWritten) return null;
    this.#byId.delete(id);
    this.#byId.set(id, entry);
    return entry;
  }

  /** A slot to write the block into, or null where every slot is being written. */
  reserve(record: BlockRecord): number | null {
    const slot = this.#free.pop() ?? this.#evictOldest();
    if (slot === undefined) return null;
    this.#byId.set(record.id, { slot, record, isWritten: false });
    return slot;
  }

  commit(id: string): void {
    const entry = this.#byId.get(id);
    if (entry) entry.isWritten = true;
  }

  /** Forgets the block. Its slot, which is used again once it is freed, or null where the block is not here. */
  drop(id: string): number | null {
    const entry = this.#byId.get(id);
    this.#byId.delete(id);
    return entry?.slot ?? null;
  }

  free(slot: number): void {
    this.#free.push(slot);
  }

  ids(): string[] {
    return [...this.#byId].flatMap(([id, { isWritten }]) => (isWritten ? [id] : []));
  }

  #evictOldest(): number | undefined {
    for (const [id, { slot, isWritten }] of this.#byId) if (isWritten) {
      this.#byId.delete(id);
      return slot;
    }
    return undefined;
  }
}
