import type { Clock } from '../clock.js';

/**
 * - unknown: not asked yet
 * - up: takes requests
 * - draining: finishes what runs
 * - refused: answers, but must not be used (another model, another role)
 * - down: does not answer
 */
export type HealthStatus = 'unknown' | 'up' | 'draining' | 'refused' | 'down';

/** Polls without an answer in time that mean down; a busy machine may miss one or two. */
const SILENT_POLLS = 3;
/** A worker that is down is asked less and less often, at last every so often. */
const MAX_BACKOFF_MS = 5_000;

/** Health of one worker as a state machine over the results of polls and requests. */
export class WorkerHealth {
  readonly #clock: Clock;
  readonly #intervalMs: number;
  #status: HealthStatus = 'unknown';
  #reason: string | null = null;
  #since: number;
  #nextPollAt: number;
  /** Failed polls in a row. */
  #failures = 0;

  constructor(clock: Clock, intervalMs: number) {
    this.#clock = clock;
    this.#intervalMs = intervalMs;
    this.#since = this.#nextPollAt = clock.now();
  }

  get status(): HealthStatus { return this.#status; }
  /** Why it is not up. */
  get reason(): string | null { return this.#reason; }
  get sinceMs(): number { return this.#clock.now() - this.#since; }
  get nextPollInMs(): number { return Math.max(0, this.#nextPollAt - this.#clock.now()); }

  answered(status: 'up' | 'draining' | 'refused', reason: string | null = null): void {
    this.#failures = 0;
    this.#set(status, reason);
    this.#nextPollAt = this.#clock.now() + this.#intervalMs;
  }

  /** A poll that failed; `silent`: it ran out of time, so the worker may only be slow. */
  failed(reason: string, silent: boolean): void {
    this.#failures++;
    if (!silent || this.#failures >= SILENT_POLLS) this.#set('down', reason);
    this.#nextPollAt = this.#clock.now() + (this.#status === 'down' ? this.#backoff() : this.#intervalMs);
  }

  /** A request found the connection refused or broken. Polls start over at the normal pace. */
  broke(reason: string): void {
    this.#failures = 0;
    this.#set('down', reason);
    this.#nextPollAt = this.#clock.now() + this.#intervalMs;
  }

  #backoff(): number {
    return Math.min(this.#intervalMs * 2 ** Math.min(this.#failures - 1, 10), Math.max(MAX_BACKOFF_MS, this.#intervalMs));
  }

  #set(status: HealthStatus, reason: string | null): void {
    if (status !== this.#status) this.#since = this.#clock.now();
    this.#status = status;
    this.#reason = reason;
  }
}
