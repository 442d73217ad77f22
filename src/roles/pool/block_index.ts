/**
 * What the pool's slots hold and who uses them; no I/O. A slot is free, being written by one client, or ready; ready blocks that nobody
 * pins are evicted in order of last use.
 */
import { TplaError } from '../../errors.js';
import type { PageCounts } from '../../kv/page_allocator.js';
import type { Reservation, StoredBlock } from '../../kv/pool_protocol.js';

interface Entry {
  id: string;
  slot: number;
  /** Set while the block is being written. */
  writer: string | null;
  index: number;
  tokens: number;
  checksum: string;
  /** Pins by client. */
  pins: Map<string, number>;
  /** Forgotten while pinned: invisible, freed with the last pin. */
  dropped: boolean;
}

export class BlockIndex {
  readonly #total: number;
  readonly #free: number[];
  readonly #bySlot = new Map<number, Entry>();
  /** Without dropped entries. */
  readonly #byId = new Map<string, Entry>();
  /** Ready and unpinned, the least recently used first. */
  readonly #idle = new Set<Entry>();
  evictions = 0;

  constructor(slots: number) {
    this.#total = slots;
    this.#free = Array.from({ length: slots }, (_, i) => slots - 1 - i);
  }

  get counts(): PageCounts {
    const cached = this.#idle.size;
    return { total: this.#total, used: this.#total - this.#free.length - cached, cached };
  }

  /** Pins, for `client`, the blocks from the start of `ids` up to the first that is not here. */
  lookup(client: string, ids: readonly string[]): StoredBlock[] {
    const found: StoredBlock[] = [];
    for (const id of ids) {
      const entry = this.#byId.get(id);
      if (!entry || entry.writer !== null) break;
      this.#pin(entry, client);
      found.push(stored(entry));
    }
    return found;
  }

  /** Whether the block is here and whole. */
  has(id: string): boolean {
    return this.#byId.get(id)?.writer === null;
  }

  /** Blocks that can be evicted, the next to go first. */
  *idle(): Iterable<{ id: string } & StoredBlock> {
    for (const entry of this.#idle) yield { id: entry.id, ...stored(entry) };
  }

  /** Slots for blocks that `client` is going to write. */
  reserve(client: string, ids: readonly string[], pin: boolean): Reservation[] {
    return ids.map((id) => {
      const entry = this.#byId.get(id);
      if (entry) {
        if (entry.writer !== null) return { state: 'busy' };
        if (pin) this.#pin(entry, client);
        else this.#touch(entry);
        return { state: 'present', ...stored(entry) };
      }
      const slot = this.#free.pop() ?? this.#evictOldest();
      if (slot === undefined) return { state: 'full' };
      const fresh: Entry = { id, slot, writer: client, index: 0, tokens: 0, checksum: '', pins: new Map(), dropped: false };
      this.#bySlot.set(slot, fresh);
      this.#byId.set(id, fresh);
      return { state: 'write', slot };
    });
  }

  /** Whether `client` is still writing block `id` into `slot`. */
  isWriting(client: string, id: string, slot: number): boolean {
    const entry = this.#bySlot.get(slot);
    return entry !== undefined && entry.id === id && entry.writer === client;
  }

  /** Makes a written block visible. */
  commit(client: string, block: { id: string } & StoredBlock, pin: boolean): void {
    if (!this.isWriting(client, block.id, block.slot)) throw new TplaError('PROTOCOL', `slot ${block.slot} is not reserved for block ${block.id} by this client`);
    const entry = this.#bySlot.get(block.slot)!;
    entry.writer = null;
    entry.index = block.index;
    entry.tokens = block.tokens;
    entry.checksum = block.checksum;
    this.#idle.add(entry);
    if (pin) this.#pin(entry, client);
  }

  /** Gives back one pin per mention of a slot, or the slot itself where `client` was writing it. The last mentioned is evicted first. */
  unpin(client: string, slots: readonly number[]): void {
    for (const slot of [...slots].reverse()) {
      const entry = this.#bySlot.get(slot);
      if (entry?.writer === client) this.#discard(entry);
      else if (entry?.pins.has(client)) this.#unpin(entry, client, 1);
    }
  }

  /** Forgets blocks: those named, or all that nobody pins. Returns how many. */
  evict(ids?: readonly string[]): number {
    const entries = ids === undefined ? [...this.#idle] : ids.map((id) => this.#byId.get(id)).filter((entry) => entry !== undefined && entry.writer === null) as Entry[];
    for (const entry of entries) {
      if (entry.pins.size === 0) this.#discard(entry);
      else {
        entry.dropped = true;
        this.#byId.delete(entry.id);
      }
    }
    this.evictions += entries.length;
    return entries.length;
  }

  /** Takes back all that a client held. */
  dropClient(client: string): void {
    for (const entry of [...this.#bySlot.values()]) {
      if (entry.writer === client) this.#discard(entry);
      else if (entry.pins.has(client)) this.#unpin(entry, client, entry.pins.get(client)!);
    }
  }

  /** What contradicts the accounting; empty when all is well. */
  check(): string[] {
    const faults: string[] = [];
    if (this.#free.length + this.#bySlot.size !== this.#total) faults.push(`${this.#free.length} free and ${this.#bySlot.size} held slots of ${this.#total}`);
    for (const slot of this.#free) if (this.#bySlot.has(slot)) faults.push(`slot ${slot} is both free and held`);
    for (const entry of this.#bySlot.values()) {
      const idle = entry.writer === null && entry.pins.size === 0;
      if (idle !== this.#idle.has(entry)) faults.push(`slot ${entry.slot} is ${idle ? 'not ' : ''}listed as evictable`);
      if (entry.dropped === (this.#byId.get(entry.id) === entry)) faults.push(`slot ${entry.slot} is ${entry.dropped ? 'dropped but still' : 'not'} found by its id`);
    }
    return faults;
  }

  #pin(entry: Entry, client: string): void {
    this.#idle.delete(entry);
    entry.pins.set(client, (entry.pins.get(client) ?? 0) + 1);
  }

  #unpin(entry: Entry, client: string, count: number): void {
    const left = entry.pins.get(client)! - count;
    if (left > 0) entry.pins.set(client, left);
    else entry.pins.delete(client);
    if (entry.pins.size > 0) return;
    if (entry.dropped) this.#discard(entry);
    else this.#idle.add(entry);
  }

  #touch(entry: Entry): void {
    if (this.#idle.delete(entry)) this.#idle.add(entry);
  }

  #discard(entry: Entry): void {
    this.#idle.delete(entry);
    this.#bySlot.delete(entry.slot);
    if (this.#byId.get(entry.id) === entry) this.#byId.delete(entry.id);
    this.#free.push(entry.slot);
  }

  #evictOldest(): number | undefined {
    const entry: Entry | undefined = this.#idle.values().next().value;
    if (!entry) return undefined;
    this.#discard(entry);
    this.evictions++;
    return this.#free.pop();
  }
}

function stored({ slot, index, tokens, checksum }: Entry): StoredBlock {
  return { slot, index, tokens, checksum };
}
