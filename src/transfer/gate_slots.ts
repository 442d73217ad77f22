import { TplaError } from '../errors.js';
import { native } from '../native/loader.js';
import type { WriteGate } from '../native/types.js';
import type { Admission } from './path.js';

/** Hand-offs that one connection can have open. */
export const GATE_SLOTS = 1024;

/** The write gate of one connection, its slots given out one a session. */
export class GateSlots {
  readonly gate: WriteGate = native().WriteGate.create(GATE_SLOTS);
  /** Slots to use next, oldest release first. */
  readonly #free = Array.from({ length: GATE_SLOTS }, (_, slot) => slot);

  admit(): Admission {
    const slot = this.#free.shift();
    if (slot === undefined) throw new TplaError('OVERLOADED', `${GATE_SLOTS} hand-offs are open on this connection, no more are taken`);
    return { slot, epoch: this.gate.open(slot) };
  }

  revoke(slot: number): boolean {
    return this.gate.revoke(slot) === 0;
  }

  isDrained(slot: number): boolean {
    return this.gate.writers(slot) === 0;
  }

  release(slot: number): void {
    this.#free.push(slot);
  }
}
