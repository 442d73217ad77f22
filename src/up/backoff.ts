import type { Clock } from '../clock.js';

export interface BackoffOptions {
  first_ms: number;
  max_ms: number;
  /** A run of at least this long counts as sound: the next wait is the first again. */
  reset_after_ms: number;
}

/** How long to wait before each restart of something that keeps ending: doubling from the first wait to the longest. */
export class Backoff {
  readonly #options: BackoffOptions;
  readonly #clock: Clock;
  #failures = 0;
  #startedAt: number;

  constructor(options: BackoffOptions, clock: Clock) {
    this.#options = options;
    this.#clock = clock;
    this.#startedAt = clock.now();
  }

  started(): void {
    this.#startedAt = this.#clock.now();
  }

  /** Milliseconds to wait now that it has ended. */
  ended(): number {
    const { first_ms, max_ms, reset_after_ms } = this.#options;
    if (this.#clock.now() - this.#startedAt >= reset_after_ms) this.#failures = 0;
    return Math.min(first_ms * 2 ** this.#failures++, max_ms);
  }
}
