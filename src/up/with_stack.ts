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

/**
 * Runs `body` beside a stack of its own; afterwards, however it ends, no process, socket or file of the stack is left. A first signal aborts
 * `stopping` and drains; a second ends everything at once with status 130. Throws CANCELLED when a signal came before everything was ready.
 */
export async function withStack<T>(config: UpConfig, options: StackOptions, body: (stack: RunningStack) => Promise<T>): Promise<T> {
  await sweepRuntimeDirs();
  const directory = makeRuntimeDir();
  const removeDirectory = () => rmSync(directory, { recursive: true, force: true });
  let supervisor: Supervisor;
  try {
    const services = planServices(config, directory, options.where);
    supervisor = new Supervisor({ services, directory, startTimeoutMs: config.start_timeout_ms, restart: config.restart, clock: systemClock, onEvent: options.onEvent });
  } catch (error) {
    removeDirectory();
    throw error;
  }
  const abandon = () => {
    supervisor.kill();
    removeDirectory();
  };
  const signals = catchSignals(abandon);
  process.once('exit', abandon);
  try {
    await untilAborted(supervisor.start(), signals.first);
    return await body({ addressesOf: (name) => supervisor.addressesOf(name), stopping: signals.first });
  } finally {
    options.onStopping?.();
    await supervisor.stop();
    removeDirectory();
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

async function untilAborted(starting: Promise<void>, signal: AbortSignal): Promise<void> {
  starting.catch(() => undefined);
  const cancelled = () => new TplaError('CANCELLED', 'stopped before everything was ready');
  if (signal.aborted) throw cancelled();
  await Promise.race([starting, new Promise<never>((_, reject) => signal.addEventListener('abort', () => reject(cancelled()), { once: true }))]);
}
