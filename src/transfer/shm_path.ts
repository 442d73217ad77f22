import { TplaError } from '../errors.js';
import { native } from '../native/loader.js';
import type { KvArena, KvRegion, WriteGate } from '../native/types.js';
import type { PathOffer } from './messages.js';
import type { Admission, Credit, Landing, Reach, Welcome } from './path.js';

const GATE_SLOTS = 1024;

/** Decode lends its arena's memory; a write gate per connection takes it back. */
export class ShmLanding implements Landing {
  readonly offer: PathOffer = { path: 'shm', gateSlots: GATE_SLOTS };
  readonly fds: number[];
  readonly #gate: WriteGate;
  /** Slots to use next, oldest release first. */
  readonly #free = Array.from({ length: GATE_SLOTS }, (_, slot) => slot);

  constructor(arena: KvArena) {
    this.#gate = native().WriteGate.create(GATE_SLOTS);
    this.fds = [this.#gate.fd, ...arena.fds()];
  }

  admit(): Admission {
    const slot = this.#free.shift();
    if (slot === undefined) throw new TplaError('OVERLOADED', `${GATE_SLOTS} hand-offs are open on this connection, no more are taken`);
    return { slot, epoch: this.#gate.open(slot) };
  }

  revoke(slot: number): boolean {
    return this.#gate.revoke(slot) === 0;
  }

  isDrained(slot: number): boolean {
    return this.#gate.writers(slot) === 0;
  }

  release(slot: number): void {
    this.#free.push(slot);
  }

  close(): void {
    this.#gate.close();
  }
}

/** Prefill writes into decode's memory, mapped here. */
export class ShmReach implements Reach {
  readonly path = 'shm';
  readonly #region: KvRegion;
  readonly #gate: WriteGate;

  constructor({ layout, pages, offer, fds }: Welcome) {
    if (offer.path !== 'shm') throw new TplaError('INTERNAL', `a shared-memory path was built from an offer of ${offer.path}`);
    if (fds.length === 0) throw new TplaError('PROTOCOL', 'decode offered shared memory and sent no descriptor');
    this.#gate = native().WriteGate.map(fds[0]!, offer.gateSlots);
    this.#region = native().mapKvRegion(layout, pages, fds.slice(1));
  }

  put(source: KvArena, srcPages: Int32Array, credit: Credit, layers: [number, number], tokens: [number, number]): Promise<{ bytes: number; checksums: BigUint64Array }> {
    return native().kvPut({
      src: source, dst: this.#region, layers, tokens,
      srcPages: [srcPages], dstPages: credit.pages, dstRank: credit.rank,
      pass: { gate: this.#gate, slot: credit.slot, epoch: credit.epoch },
    });
  }

  close(): void {
    this.#region.close();
    this.#gate.close();
  }
}
