/** The one place that reads the environment. */
import { join } from 'node:path';
import { tmpdir, homedir } from 'node:os';

type Environment = Record<string, string | undefined>;

/** Variables of ours that are no setting of a role. */
const OTHER_VARIABLES = ['TPLA_CONFIG', 'TPLA_CUDA'];

/** Values of the named TPLA_… variables; an empty one counts as unset. */
export function readVariables(names: string[], env: Environment = process.env): Map<string, string> {
  return new Map(names.flatMap((name) => {
    const value = env[name];
    return value === undefined || value === '' ? [] : [[name, value] as const];
  }));
}

/** Variables that begin with TPLA_ and mean nothing to us: perhaps misspelt. */
export function unknownVariables(known: Iterable<string>, env: Environment = process.env): string[] {
  const names = new Set([...known, ...OTHER_VARIABLES]);
  return Object.keys(env).filter((name) => name.startsWith('TPLA_') && env[name] !== '' && !names.has(name));
}

/** The configuration file named by the environment, for a command without --config. */
export function configFileFromEnv(env: Environment = process.env): string | undefined {
  return env['TPLA_CONFIG'] || undefined;
}

/** The libnixl_capi.so that the environment names (as the flag --nixl-library would), for commands that are no role. */
export function nixlLibraryFromEnv(env: Environment = process.env): string | null {
  return env['TPLA_NIXL_LIBRARY'] || null;
}

/** The libucp.so that the environment names (as the flag --ucx-library would), for commands that are no role. */
export function ucxLibraryFromEnv(env: Environment = process.env): string | null {
  return env['TPLA_UCX_LIBRARY'] || null;
}

/** What a supervised child inherits: everything but our own settings, which its file holds in full. */
export function childEnvironment(env: Environment = process.env): Record<string, string> {
  const own = (name: string) => name.startsWith('TPLA_') || ['NOTIFY_SOCKET', 'WATCHDOG_USEC', 'WATCHDOG_PID'].includes(name);
  return Object.fromEntries(Object.entries(env).filter((entry): entry is [string, string] => entry[1] !== undefined && !own(entry[0])));
}

export interface ServiceManager {
  /** Where systemd wants to be told of readiness (NOTIFY_SOCKET), or null. */
  socket: string | null;
  /** Milliseconds within which systemd must hear from this process, or null without a watchdog. */
  watchdogMs: number | null;
}

export function serviceManager(env: Environment = process.env, pid: number = process.pid): ServiceManager {
  const usec = Number(env['WATCHDOG_USEC']);
  const forUs = env['WATCHDOG_PID'] === undefined || Number(env['WATCHDOG_PID']) === pid;
  return { socket: env['NOTIFY_SOCKET'] || null, watchdogMs: usec > 0 && forUs ? usec / 1000 : null };
}

/** Where sockets of a private stack go: the user's runtime directory, else the temporary one. */
export function runtimeBase(env: Environment = process.env): string {
  return env['XDG_RUNTIME_DIR'] || tmpdir();
}

/** Where derived files that may be deleted at any time are kept between runs. */
export function cacheDirectory(env: Environment = process.env): string {
  return join(env['XDG_CACHE_HOME'] || join(homedir(), '.cache'), 'tpla');
}

/**
 * Settings of UCX that suit a server with threads: its log apart from our output, signals left to us, and no hooks patched into memory calls
 * that other threads are in the middle of (we register what is sent). What the user has set stays.
 */
const UCX_DEFAULTS = { UCX_LOG_FILE: 'stderr', UCX_HANDLE_ERRORS: 'none', UCX_MEM_EVENTS: 'n' };

/** Hands settings to NIXL and to UCX under it, which read them when an agent is made; what is configured goes over what is inherited. */
export function setNixlEnvironment(options: Record<string, string>, env: Environment = process.env): void {
  setUcxEnvironment(options, env);
}

/** Hands settings to UCX, which reads its environment when it is loaded and whenever a worker is made; what is configured goes over what is inherited. */
export function setUcxEnvironment(options: Record<string, string>, env: Environment = process.env): void {
  for (const [name, value] of Object.entries(UCX_DEFAULTS)) env[name] ??= value;
  Object.assign(env, options);
}

/** cuFile keeps a log in cufile.log of the current directory unless it is told where; where it cannot open one it says so on our standard output. What the user has set stays. */
export function setCuFileEnvironment(env: Environment = process.env): void {
  env['CUFILE_LOGFILE_PATH'] ??= '/dev/null';
}
