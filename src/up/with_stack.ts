import { rmSync } from 'node:fs';
import { systemClock } from '../clock.js';
import type { UpConfig } from '../config/types.js';
import { TplaError } from '../errors.js';
import { makeRuntimeDir, sweepRuntimeDirs } from './runtime_dir.js';
import { planServices } from './stack_config.js';
import { Supervisor, type SupervisorEvent } from './supervisor.js';

export interface RunningStack {
  addressesOf(name: string): string[];
  /** Aborts at the first SIGINT, SIGTERM or SIGHUP. */
  stopping: AbortSignal;
}

export interface StackOptions {
  /** Names the configuration in errors. */
  where: string;
  onEvent(event: SupervisorEvent): void;
  /** Told before services are drained. */
  onStopping?(): void;
}

const SIGNALS = ['SIGINT', 'SIGTERM', 'SIGHUP'] as const;

/** Makes a stack's configuration once signals are caught, and heeds them; `directory` is the stack's own and goes away with it. */
export type PrepareStack = (directory: string, stopping: AbortSignal) => Promise<UpConfig>;

/**
 * Runs `body` beside a stack of its own; afterwards, however it ends, no process, socket or file of the stack is left. A first signal aborts
 * `stopping` and drains; a second ends everything at once with status 130. Throws CANCELLED when a signal came before everything was ready.
 */
export async function withStack<T>(prepare: PrepareStack, options: StackOptions, body: (stack: RunningStack) => Promise<T>): Promise<T> {
  await sweepRuntimeDirs();
  const directory = makeRuntimeDir();
  let supervisor: Supervisor | null = null;
  const abandon = () => {
    supervisor?.kill();
    rmSync(directory, { recursive: true, force: true });
  };
  const signals = catchSignals(abandon);
  process.once('exit', abandon);
  try {
    const stack = await prepare(directory, signals.first);
    const running = supervisor = new Supervisor({
      services: planServices(stack, directory, options.where), directory,
      startTimeoutMs: stack.start_timeout_ms, restart: stack.restart, clock: systemClock, onEvent: options.onEvent,
    });
    await untilAborted(running.start(), signals.first);
    return await body({ addressesOf: (name) => running.addressesOf(name), stopping: signals.first });
  } finally {
    if (supervisor) {
      options.onStopping?.();
      await supervisor.stop();
    }
    abandon();
    process.removeListener('exit', abandon);
    signals.release();
  }
}

function catchSignals(onSecond: () => void): { first: AbortSignal; release(): void } {
  const first = new AbortController();
  const onSignal = () => {
    if (!first.signal.aborted) {
      first.abort();
      return;
    }
    onSecond();
    process.exit(130);
  };
  for (const signal of SIGNALS) process.on(signal, onSignal);
  return { first: first.signal, release: () => { for (const signal of SIGNALS) process.removeListener(signal, onSignal); } };
}

async function untilAborted<T>(pending: Promise<T>, signal: AbortSignal): Promise<T> {
  pending.catch(() => undefined); // it may fail after the signal, when nobody waits any more
  const cancelled = () => new TplaError('CANCELLED', 'stopped before everything was ready');
  if (signal.aborted) throw cancelled();
  return Promise.race([pending, new Promise<never>((_, reject) => signal.addEventListener('abort', () => reject(cancelled()), { once: true }))]);
}
