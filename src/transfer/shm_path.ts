import { TplaError } from '../errors.js';
import { native } from '../native/loader.js';
import type { Channel, KvArena, KvPutResult, KvRegion, WriteGate } from '../native/types.js';
import { GATE_SLOTS, GateSlots } from './gate_slots.js';
import type { PathOffer } from './messages.js';
import type { Admission, Credit, Landing, Reach, Rectangle, Welcome } from './path.js';

/** Decode lends its arena's memory; a write gate per connection takes it back. */
export class ShmLanding implements Landing {
  readonly offer: PathOffer = { path: 'shm', gateSlots: GATE_SLOTS };
  readonly fds: number[];
  readonly peerWrites = true;
  readonly #slots = new GateSlots();

  constructor(arena: KvArena) {
    this.fds = [this.#slots.gate.fd, ...arena.fds()];
  }

  admit(): Admission { return this.#slots.admit(); }
  revoke(slot: number): boolean { return this.#slots.revoke(slot); }
  isDrained(slot: number): boolean { return this.#slots.isDrained(slot); }
  release(slot: number): void { this.#slots.release(slot); }
  abandon(): void {}
  close(): void { this.#slots.gate.close(); }
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

  put(source: KvArena, srcPages: Int32Array, credit: Credit, rectangle: Rectangle, channel: Channel): Promise<KvPutResult> {
    return native().kvPut({
      src: source, dst: this.#region, ...rectangle,
      srcPages: [srcPages], dstPages: credit.pages, dstRank: credit.rank,
      pass: { gate: this.#gate, slot: credit.slot, epoch: credit.epoch }, announce: { channel, session: credit.session },
    });
  }

  close(): void {
    this.#region.close();
    this.#gate.close();
  }
}
