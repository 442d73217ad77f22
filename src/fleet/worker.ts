import type { Clock } from '../clock.js';
import { TplaError } from '../errors.js';
import { WorkerClient } from '../http/client.js';
import type { WorkerAddress, WorkerRole } from './discovery.js';
import { WorkerHealth } from './health.js';
import type { WorkerState } from './protocol.js';

/** A request's part on one worker. */
export interface Leg {
  tokens: number;
  /** Called when the worker goes down. */
  fail(error: TplaError): void;
}

/** One worker as route knows it: its health, what it last said of itself, and what route has running there. */
export class Worker {
  readonly role: WorkerRole;
  readonly address: string;
  readonly client: WorkerClient;
  readonly health: WorkerHealth;
  readonly #clock: Clock;
  readonly #legs = new Map<Leg, number>();
  #state: WorkerState | null = null;
  #cachedBlocks: ReadonlySet<string> | null = null;
  /** When the poll that brought `state` was sent. */
  #stateAt = -Infinity;
  /** Legs that `state` counts and that have ended since. */
  #endedRequests = 0;
  #endedTokens = 0;

  constructor({ role, address }: WorkerAddress, clock: Clock, pollIntervalMs: number) {
    this.role = role;
    this.address = address;
    this.client = new WorkerClient(address);
    this.health = new WorkerHealth(clock, pollIntervalMs);
    this.#clock = clock;
  }

  get state(): WorkerState | null { return this.#state; }
  get stateAt(): number { return this.#stateAt; }
  get usable(): boolean { return this.health.status === 'up' && this.#state !== null; }
  get legs(): number { return this.#legs.size; }

  /** Blocks it says it caches; null if it does not say. */
  get cachedBlocks(): ReadonlySet<string> | null { return this.#cachedBlocks; }

  /** Requests and tokens there: what it reported, corrected by what route started and ended since; other routes' requests are in the report. */
  get load(): { requests: number; tokens: number } {
    const since = [...this.#legs].filter(([, begun]) => begun >= this.#stateAt).map(([leg]) => leg);
    const own = [...this.#legs.keys()];
    return {
      requests: Math.max(own.length, (this.#state ? this.#state.running + this.#state.waiting : 0) - this.#endedRequests + since.length),
      tokens: Math.max(0, (this.#state?.pending_tokens ?? 0) - this.#endedTokens) + sum(since),
    };
  }

  update(state: WorkerState, sentAt: number): void {
    this.#state = state;
    this.#cachedBlocks = state.cached_blocks === undefined ? null : new Set(state.cached_blocks);
    this.#stateAt = sentAt;
    this.#endedRequests = this.#endedTokens = 0;
  }

  /** Counts a leg until the returned function is called. */
  begin(leg: Leg): () => void {
    this.#legs.set(leg, this.#clock.now());
    return () => {
      const begun = this.#legs.get(leg);
      if (begun === undefined || !this.#legs.delete(leg) || begun >= this.#stateAt) return;
      this.#endedRequests++;
      this.#endedTokens += leg.tokens;
    };
  }

  /** Ends every leg there: the worker is gone. */
  failLegs(error: TplaError): void {
    for (const leg of [...this.#legs.keys()]) leg.fail(error);
  }
}

function sum(legs: readonly Leg[]): number {
  return legs.reduce((total, { tokens }) => total + tokens, 0);
}
