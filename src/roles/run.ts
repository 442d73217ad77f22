import type { Logger } from 'pino';
import { systemClock } from '../clock.js';
import type { LogLevel, RoleName } from '../config/types.js';
import { TplaError, toTplaError } from '../errors.js';
import { createLogger } from '../log.js';
import type { RoleContext, RunningRole } from './role.js';
import { connectServiceManager } from './systemd.js';

/** A role's entry: resolves when it is ready to serve. */
export type StartRole<C> = (config: C, context: RoleContext) => Promise<RunningRole>;

interface LifeCycleConfig {
  id: string;
  log_level: LogLevel;
  drain_ms: number;
}

interface LifeCycleOptions {
  /** Say `readyLine` on standard output, and stop also when standard input closes, which is how a supervisor's death is noticed. */
  supervised: boolean;
}

/** How long close() may take before the process ends regardless. */
const CLOSE_LIMIT_MS = 5000;

const SIGNAL_STATUS = { SIGHUP: 129, SIGINT: 130, SIGTERM: 143 } as const;
type StopSignal = keyof typeof SIGNAL_STATUS;
const STOP_SIGNALS = Object.keys(SIGNAL_STATUS) as StopSignal[];

/**
 * Runs a role from start to end and resolves to the exit status: 0 when it was told to stop and everything had drained,
 * 128 + signal when running requests had to be cut off. Throws what start() throws.
 * The first SIGTERM, SIGINT or SIGHUP drains for at most `drain_ms`; the second ends at once.
 */
export async function runRole<C extends LifeCycleConfig>(name: RoleName, start: StartRole<C>, config: C, options: LifeCycleOptions): Promise<number> {
  const log = createLogger(name, config.id, config.log_level);
  const stops = watchStops(options.supervised);
  const manager = connectServiceManager(log);
  const crash = watchCrashes(log);
  const began = performance.now();

  const starting = start(config, { log, clock: systemClock });
  starting.catch(() => undefined); // judged by the race below; a failure after it must not be an unhandled rejection
  const role = await Promise.race([starting, stops.first, crash]);
  if (!isRunning(role)) {
    log.warn({ reason: reasonOf(role) }, 'stopped before it was ready');
    await within(CLOSE_LIMIT_MS, starting.then((late) => late.close(), () => undefined));
    return statusOf(role);
  }
  log.info({ addresses: role.addresses, ms: Math.round(performance.now() - began) }, 'ready');
  if (options.supervised) process.stdout.write(readyLine(role.addresses));
  manager.ready(`serving on ${role.addresses.join(', ')}`);

  const stop = await Promise.race([stops.first, crash]);
  manager.stopping();
  const drained = stop === 'orphaned' || stop instanceof TplaError ? false : await drain(role, config.drain_ms, stops.second, stop, log);
  await close(role, log);
  manager.close();
  return drained ? 0 : statusOf(stop);
}

/** What a supervised process says once, when it serves: the addresses as bound. */
export function readyLine(addresses: readonly string[]): string {
  return `${JSON.stringify({ ready: addresses })}\n`;
}

/** Why a role stops: a signal, its supervisor's death, or an error nobody caught. */
type Stop = StopSignal | 'orphaned' | TplaError;

function isRunning(outcome: RunningRole | Stop): outcome is RunningRole {
  return typeof outcome === 'object' && 'addresses' in outcome;
}

function reasonOf(stop: Stop): string {
  return stop instanceof TplaError ? stop.message : stop;
}

function statusOf(stop: Stop): number {
  if (stop instanceof TplaError) return stop.exitStatus;
  return stop === 'orphaned' ? SIGNAL_STATUS.SIGHUP : SIGNAL_STATUS[stop];
}

function watchStops(supervised: boolean): { first: Promise<Stop>; second: Promise<Stop> } {
  const waiting: ((stop: Stop) => void)[] = [];
  const next = () => new Promise<Stop>((resolve) => waiting.push(resolve));
  const stops = { first: next(), second: next() };
  const tell = (stop: Stop) => waiting.shift()?.(stop);
  for (const signal of STOP_SIGNALS) process.on(signal, () => tell(signal));
  setInterval(() => undefined, 2 ** 30); // waiting for a signal does not keep Node alive
  if (supervised) {
    process.stdin.on('error', () => undefined);
    process.stdin.once('close', () => {
      // Whatever phase it is in: nobody is left to wait for.
      tell('orphaned');
      tell('orphaned');
    });
    process.stdin.resume();
  }
  return stops;
}

/** Resolves on an error nobody caught: the role's state is unknown from then on, so it ends. */
function watchCrashes(log: Logger): Promise<TplaError> {
  return new Promise((resolve) => {
    for (const event of ['uncaughtException', 'unhandledRejection'] as const) {
      process.on(event, (thrown: unknown) => {
        log.fatal({ err: thrown }, 'uncaught error');
        resolve(toTplaError(thrown));
      });
    }
  });
}

/** Whether everything that ran has finished. */
async function drain(role: RunningRole, limitMs: number, second: Promise<Stop>, signal: StopSignal, log: Logger): Promise<boolean> {
  log.info({ signal, limit_ms: limitMs }, 'draining');
  const outcome = await Promise.race([
    within(limitMs, role.drain().then(() => 'drained' as const)),
    second.then(() => 'second signal' as const),
  ]).catch((thrown: unknown) => {
    log.error({ err: thrown }, 'drain failed');
    return 'failed' as const;
  });
  if (outcome === 'drained') return true;
  log.warn({ reason: outcome ?? 'time is up' }, 'ending with requests unfinished');
  return false;
}

async function close(role: RunningRole, log: Logger): Promise<void> {
  const closed = await within(CLOSE_LIMIT_MS, role.close().then(() => true)).catch((thrown: unknown) => {
    log.error({ err: thrown }, 'close failed');
    return true;
  });
  if (closed === undefined) log.error({ limit_ms: CLOSE_LIMIT_MS }, 'close did not finish');
  else log.info('stopped');
}

/** The promise's value, or undefined when it takes longer. */
async function within<T>(ms: number, promise: Promise<T>): Promise<T | undefined> {
  let timer: NodeJS.Timeout | undefined;
  const late = new Promise<undefined>((resolve) => { timer = setTimeout(() => resolve(undefined), ms); });
  try {
    return await Promise.race([promise, late]);
  } finally {
    clearTimeout(timer);
  }
}

