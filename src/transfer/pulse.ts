import type { Clock } from '../clock.js';

/**
 * The beat that heartbeats and leases share. It runs only while somebody holds a lease, four times in the shortest one, and does not
 * keep the process alive. A beat that comes late, because this process was stopped or busy, is not used to judge others: their messages
 * may be waiting behind it.
 */
export class Pulse {
  readonly #clock: Clock;
  readonly #beat: (isLate: boolean) => void;
  #timer: NodeJS.Timeout | undefined;
  #period = 0;
  #last = 0;

  constructor(clock: Clock, beat: (isLate: boolean) => void) {
    this.#clock = clock;
    this.#beat = beat;
  }

  /** Follows the shortest lease that is held; none stops it. */
  follow(leases: Iterable<number>): void {
    const shortest = Math.min(...leases);
    const period = Number.isFinite(shortest) ? Math.min(Math.max(shortest / 4, 1), 1000) : 0;
    if (period === this.#period) return;
    this.stop();
    if (period === 0) return;
    this.#period = period;
    this.#last = this.#clock.now();
    this.#timer = setInterval(() => this.#tick(), period);
    this.#timer.unref();
  }

  stop(): void {
    clearInterval(this.#timer);
    this.#timer = undefined;
    this.#period = 0;
  }

  #tick(): void {
    const now = this.#clock.now();
    const isLate = now - this.#last > 3 * this.#period;
    this.#last = now;
    this.#beat(isLate);
  }
}
