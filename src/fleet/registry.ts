import type { Logger } from 'pino';
import type { Clock } from '../clock.js';
import { TplaError, toTplaError } from '../errors.js';
import { isConnectionFailure, isTimeout } from '../http/client.js';
import type { ModelIdentity } from '../model/spec.js';
import type { WorkerAddress, WorkerRole } from './discovery.js';
import type { WorkerState } from './protocol.js';
import { Worker } from './worker.js';

export interface RegistryOptions {
  workers: WorkerAddress[];
  /** Whose workers are used; null: those of the first worker that answers, in the order of `workers`. */
  identity: ModelIdentity | null;
  pollIntervalMs: number;
  clock: Clock;
  log: Logger;
}

/** A poll is given up after this long or two intervals, whichever is longer. */
const MIN_POLL_TIMEOUT_MS = 2_000;

/** Knows every worker of the fleet and follows its health by polling /state. */
export class WorkerRegistry {
  readonly workers: readonly Worker[];
  readonly #options: RegistryOptions;
  readonly #timers = new Map<Worker, NodeJS.Timeout>();
  readonly #downListeners: ((worker: Worker) => void)[] = [];
  #adopted: ModelIdentity | null = null;
  #closed = false;

  constructor(options: RegistryOptions) {
    this.#options = options;
    this.workers = options.workers.map((worker) => new Worker(worker, options.clock, options.pollIntervalMs));
  }

  /** Asks every worker once, then keeps asking. Workers that do not answer are no error: they may come later. */
  async start(): Promise<void> {
    const answers = await Promise.all(this.workers.map((worker) => this.#ask(worker)));
    this.workers.forEach((worker, i) => this.#apply(worker, answers[i]!));
    for (const worker of this.workers) this.#schedule(worker);
  }

  /** The model that is served: route's own, or the one adopted from the workers. */
  get identity(): ModelIdentity | null {
    return this.#options.identity ?? this.#adopted;
  }

  usable(role: WorkerRole): Worker[] {
    return this.workers.filter((worker) => worker.role === role && worker.usable);
  }

  /** What a request ran into; a connection that is refused or broken takes the worker out at once. */
  report(worker: Worker, error: TplaError): void {
    if (!isConnectionFailure(error) || worker.health.status === 'down') return;
    worker.health.broke(reasonOf(error));
    this.#wentDown(worker);
    this.#schedule(worker);
  }

  onDown(listener: (worker: Worker) => void): void {
    this.#downListeners.push(listener);
  }

  async close(): Promise<void> {
    this.#closed = true;
    for (const timer of this.#timers.values()) clearTimeout(timer);
    await Promise.all(this.workers.map((worker) => worker.client.close()));
  }

  #schedule(worker: Worker): void {
    if (this.#closed) return;
    clearTimeout(this.#timers.get(worker));
    this.#timers.set(worker, setTimeout(() => void this.#poll(worker), worker.health.nextPollInMs));
  }

  async #poll(worker: Worker): Promise<void> {
    const answer = await this.#ask(worker);
    if (this.#closed) return;
    this.#apply(worker, answer);
    this.#schedule(worker);
  }

  async #ask(worker: Worker): Promise<Answer> {
    const sentAt = this.#options.clock.now();
    try {
      const timeoutMs = Math.max(MIN_POLL_TIMEOUT_MS, 2 * this.#options.pollIntervalMs);
      return { sentAt, state: await worker.client.json<WorkerState>('GET', '/state', undefined, { timeoutMs }) };
    } catch (thrown) {
      return { sentAt, error: toTplaError(thrown) };
    }
  }

  #apply(worker: Worker, answer: Answer): void {
    const before = worker.health.status;
    if ('error' in answer) {
      worker.health.failed(reasonOf(answer.error), isTimeout(answer.error));
      if (worker.health.status === 'down' && before !== 'down') this.#wentDown(worker);
      return;
    }
    const { state, sentAt } = answer;
    const refusal = this.#refusal(worker, state);
    if (refusal !== null) {
      worker.health.answered('refused', refusal);
      if (before !== 'refused') this.#options.log.error({ worker: worker.address }, `worker refused: ${refusal}`);
      return;
    }
    worker.update(state, sentAt);
    worker.health.answered(state.draining ? 'draining' : 'up');
    if (before !== worker.health.status) this.#options.log.info({ worker: worker.address, worker_role: worker.role }, `worker is ${worker.health.status}`);
  }

  /** Why an answering worker must not be used, or null. */
  #refusal(worker: Worker, state: WorkerState): string | null {
    if (typeof state?.model?.fingerprint !== 'string' || typeof state.attention !== 'object' || typeof state.pages !== 'object') {
      return 'its /state is not that of a tpla worker; check the address';
    }
    if (state.role !== worker.role) return `it is listed under ${worker.role} and is a ${state.role} worker; move its address to ${state.role}`;
    const identity = this.#options.identity ?? this.#adopt(worker, state.model);
    if (sameModel(identity, state.model)) return null;
    return `it serves another model: ${describe(state.model)}; expected ${describe(identity)}`;
  }

  /** The identity that holds as long as a worker with it is in use; otherwise the asking worker's. */
  #adopt(asking: Worker, identity: ModelIdentity): ModelIdentity {
    const held = this.workers.some((worker) => worker !== asking && ['up', 'draining'].includes(worker.health.status));
    if (this.#adopted === null || !held) this.#adopted = identity;
    return this.#adopted;
  }

  #wentDown(worker: Worker): void {
    const reason = worker.health.reason ?? 'no answer';
    this.#options.log.warn({ worker: worker.address, worker_role: worker.role, running: worker.legs }, `worker is down: ${reason}`);
    worker.failLegs(new TplaError('WORKER_FAILED', `${worker.role} worker ${worker.address} went down: ${reason}`));
    for (const listener of this.#downListeners) listener(worker);
  }
}

type Answer = { sentAt: number } & ({ state: WorkerState } | { error: TplaError });

/** The system's own words where there are some: the worker is named beside them anyway. */
function reasonOf({ message, cause }: TplaError): string {
  return (cause instanceof Error && cause.message) || message;
}

function sameModel(a: ModelIdentity, b: ModelIdentity): boolean {
  return a.name === b.name && a.fingerprint === b.fingerprint && a.reparam === b.reparam;
}

function describe({ name, fingerprint, reparam }: ModelIdentity): string {
  return `${name} (fingerprint ${fingerprint}, reparameterisation ${reparam})`;
}
