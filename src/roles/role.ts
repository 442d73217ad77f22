import type { Logger } from 'pino';
import type { Clock } from '../clock.js';

/** What the process gives a role. */
export interface RoleContext {
  log: Logger;
  clock: Clock;
}

/** A role that serves. `start…(config, context)` resolves to one when it is ready. */
export interface RunningRole {
  /** The addresses it listens on, as bound (a port of 0 resolved). */
  readonly addresses: string[];
  /** Stops taking new work and resolves when what runs has finished. */
  drain(): Promise<void>;
  /** Ends at once: open requests fail with DRAINING, sockets and shared memory are gone afterwards. */
  close(): Promise<void>;
}
