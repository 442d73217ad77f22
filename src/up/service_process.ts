import { fileURLToPath } from 'node:url';
import { execa } from 'execa';
import { childEnvironment } from '../config/env.js';
import type { RoleName } from '../config/types.js';

const TPLA = fileURLToPath(new URL('../../bin/tpla.js', import.meta.url));
const COMMANDS: Record<RoleName, string> = { pool: 'kv-pool', prefill: 'serve-prefill', decode: 'serve-decode', route: 'route' };

/** How many of a process's last lines are told when it ends. */
const KEPT_LINES = 20;

export interface ProcessExit {
  status: number | null;
  signal: string | null;
  lastLines: string[];
}

/** The command line that serves a role from a configuration file. */
export function serveCommand(role: RoleName, configFile: string): string[] {
  return [process.execPath, TPLA, COMMANDS[role], '--config', configFile, '--supervised'];
}

/**
 * One running service. It has a process group of its own, so that a terminal's Ctrl-C reaches the supervisor alone; its standard input is a
 * pipe that closes when the supervisor dies in whatever way, upon which the service ends by itself.
 */
export class ServiceProcess {
  readonly pid: number;
  /** Addresses it serves on; rejects when it ends before it is ready. */
  readonly ready: Promise<string[]>;
  readonly exited: Promise<ProcessExit>;
  readonly #lines: string[] = [];
  #alive = true;

  constructor(command: string[], onLine: (line: string) => void) {
    const [file, ...args] = command as [string, ...string[]];
    const child = execa(file, args, {
      detached: true, cleanup: false, reject: false, buffer: false,
      stdin: 'pipe', stdout: 'pipe', stderr: 'pipe',
      env: childEnvironment(), extendEnv: false,
    });
    if (child.pid === undefined) throw new Error(`cannot start ${file}`);
    this.pid = child.pid;
    child.stdin.on('error', () => undefined); // the process ended while we hold its input open
    const lines = this.#lines;
    const read = async (from: 'stdout' | 'stderr', onEach: (line: string) => void) => {
      try {
        for await (const line of child.iterable({ from })) onEach(line);
      } catch { /* how it ended is told by `exited` */ }
    };
    const keep = (line: string) => {
      lines.push(line);
      if (lines.length > KEPT_LINES) lines.shift();
      onLine(line);
    };
    let becomeReady: (addresses: string[]) => void;
    const announced = new Promise<string[]>((resolve) => { becomeReady = resolve; });
    const drained = Promise.all([
      read('stderr', keep),
      read('stdout', (line) => {
        const addresses = readyAddresses(line);
        if (addresses === null) keep(line);
        else becomeReady(addresses);
      }),
    ]);
    this.exited = child.then(async (result) => {
      this.#alive = false;
      await drained;
      return { status: result.exitCode ?? null, signal: result.signal ?? null, lastLines: lines };
    });
    this.ready = Promise.race([announced, this.exited.then(() => Promise.reject(new Error('ended before it was ready')))]);
    this.ready.catch(() => undefined);
  }

  signal(signal: NodeJS.Signals): void {
    if (this.#alive) process.kill(this.pid, signal);
  }

  /** Ends the process and whatever it started, at once. Synchronous, for the last moments of the supervisor itself. */
  kill(): void {
    if (!this.#alive) return;
    try {
      process.kill(-this.pid, 'SIGKILL');
    } catch { /* it has just ended */ }
  }
}

function readyAddresses(line: string): string[] | null {
  if (!line.startsWith('{"ready":')) return null;
  return (JSON.parse(line) as { ready: string[] }).ready;
}

export function exitText({ status, signal }: ProcessExit): string {
  return signal === null ? `status ${status}` : `signal ${signal}`;
}
