import { writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { setTimeout as sleep } from 'node:timers/promises';
import { stringify } from 'yaml';
import type { Clock } from '../clock.js';
import { ERRORS, TplaError, type ErrorCode } from '../errors.js';
import { formatAddress, parseAddress } from '../http/address.js';
import { WorkerClient } from '../http/client.js';
import { Backoff, type BackoffOptions } from './backoff.js';
import { exitText, serveCommand, ServiceProcess, type ProcessExit } from './service_process.js';
import { startTiers, type Service } from './stack_config.js';

export type SupervisorEvent =
  | { kind: 'starting'; names: string[] }
  | { kind: 'ready'; name: string; addresses: string[] }
  | { kind: 'ended'; name: string; exit: ProcessExit; restartMs: number }
  /** Something a service wrote. */
  | { kind: 'line'; name: string; line: string };

export interface SupervisorOptions {
  services: Service[];
  /** Where the services' configuration files are written. */
  directory: string;
  startTimeoutMs: number;
  restart: BackoffOptions;
  clock: Clock;
  onEvent(event: SupervisorEvent): void;
  /** Command line of a service; tests bring their own. */
  command?: (service: Service, configFile: string) => string[];
}

/** Beyond a service's own drain time, how long it may take to end before it is killed. */
const STOP_MARGIN_MS = 7000;
const HEALTH_POLL_MS = 25;

/** Starts services in order, restarts those that end, and stops them all. */
export class Supervisor {
  readonly #tiers: Keeper[][];
  readonly #onEvent: (event: SupervisorEvent) => void;

  constructor(options: SupervisorOptions) {
    this.#onEvent = options.onEvent;
    this.#tiers = startTiers(options.services).map((tier) => tier.map((service) => new Keeper(service, options)));
  }

  /** Resolves when everything is healthy. Throws the error of the first service that ended or took too long; the others then still run. */
  async start(): Promise<void> {
    for (const tier of this.#tiers) {
      this.#onEvent({ kind: 'starting', names: tier.map(({ name }) => name) });
      await Promise.all(tier.map((keeper) => keeper.start()));
    }
  }

  /** Drains and ends everything, last started first. */
  async stop(): Promise<void> {
    for (const tier of this.#tiers) for (const keeper of tier) keeper.retire();
    for (const tier of [...this.#tiers].reverse()) await Promise.all(tier.map((keeper) => keeper.stop()));
  }

  /** Ends everything at once; synchronous. */
  kill(): void {
    for (const tier of this.#tiers) for (const keeper of tier) keeper.kill();
  }

  addressesOf(name: string): string[] {
    return this.#tiers.flat().find((keeper) => keeper.name === name)?.addresses ?? [];
  }
}

/** Keeps one service running. */
class Keeper {
  readonly name: string;
  addresses: string[] = [];
  readonly #service: Service;
  readonly #options: SupervisorOptions;
  readonly #command: string[];
  readonly #backoff: Backoff;
  readonly #retired = new AbortController();
  #process: ServiceProcess | null = null;

  constructor(service: Service, options: SupervisorOptions) {
    this.name = service.name;
    this.#service = service;
    this.#options = options;
    const file = join(options.directory, `${service.name}.yaml`);
    writeFileSync(file, stringify(service.config), { mode: 0o600 });
    this.#command = options.command?.(service, file) ?? serveCommand(service.role, file);
    this.#backoff = new Backoff(options.restart, options.clock);
  }

  async start(): Promise<void> {
    if (this.#retired.signal.aborted) throw stopped(this.name);
    const process = this.#launch();
    await Promise.race([
      this.#serving(process),
      process.exited.then((exit) => { throw this.#retired.signal.aborted ? stopped(this.name) : startFailure(this.name, exit); }),
      sleep(this.#options.startTimeoutMs, undefined, { ref: false }).then(() => {
        throw new TplaError('WORKER_FAILED', `${this.name} is not ready after ${this.#options.startTimeoutMs} ms (start_timeout_ms)`);
      }),
    ]);
    void this.#keep(process);
  }

  /** From now on an end is no reason to restart. */
  retire(): void {
    this.#retired.abort();
  }

  async stop(): Promise<void> {
    this.retire();
    const process = this.#process;
    if (process === null) return;
    process.signal('SIGTERM');
    const late = setTimeout(() => process.kill(), this.#service.config.drain_ms + STOP_MARGIN_MS);
    await process.exited;
    clearTimeout(late);
  }

  kill(): void {
    this.retire();
    this.#process?.kill();
  }

  #launch(): ServiceProcess {
    this.#backoff.started();
    this.#process = new ServiceProcess(this.#command, (line) => this.#options.onEvent({ kind: 'line', name: this.name, line }));
    return this.#process;
  }

  async #serving(process: ServiceProcess): Promise<void> {
    const addresses = await process.ready;
    await healthy(dialable(addresses[0]!), process);
    this.addresses = addresses;
    this.#options.onEvent({ kind: 'ready', name: this.name, addresses });
  }

  async #keep(process: ServiceProcess): Promise<void> {
    const { signal } = this.#retired;
    for (;;) {
      const exit = await process.exited;
      if (signal.aborted) return;
      const restartMs = this.#backoff.ended();
      this.#options.onEvent({ kind: 'ended', name: this.name, exit, restartMs });
      await sleep(restartMs, undefined, { signal }).catch(() => undefined);
      if (signal.aborted) return;
      process = this.#launch();
      this.#serving(process).catch(() => undefined); // its end, if that is why, comes round the loop
    }
  }
}

/** Asks /health until it is 200, or the process has ended. */
async function healthy(address: string, process: ServiceProcess): Promise<void> {
  const client = new WorkerClient(address);
  let ended = false;
  void process.exited.then(() => { ended = true; });
  try {
    for (; !ended; await sleep(HEALTH_POLL_MS)) {
      if (await client.json('GET', '/health', undefined, { timeoutMs: 2000 }).then(() => true, () => false)) return;
    }
    throw new Error('ended before it was healthy');
  } finally {
    await client.close();
  }
}

/** An address to reach a server by that listens on every interface. */
function dialable(address: string): string {
  const parsed = parseAddress(address);
  if (parsed.kind === 'unix') return address;
  const host = parsed.host === '0.0.0.0' ? '127.0.0.1' : parsed.host === '::' ? '::1' : parsed.host;
  return formatAddress({ ...parsed, host });
}

function stopped(name: string): TplaError {
  return new TplaError('CANCELLED', `${name} was told to stop before it was ready`);
}

/** Why a service did not start, with the code it ended with where its last words name one. */
function startFailure(name: string, exit: ProcessExit): TplaError {
  const spoken = exit.lastLines.map((line) => /^tpla: ([A-Z_]+): (.*)$/.exec(line)).find((match) => match !== null && Object.hasOwn(ERRORS, match[1]!));
  const code = (spoken?.[1] ?? 'WORKER_FAILED') as ErrorCode;
  const lines = exit.lastLines.map((line) => `  ${line}`).join('\n');
  return new TplaError(code, `${name} ended with ${exitText(exit)} while starting${lines === '' ? '' : `; its last lines:\n${lines}`}`);
}
