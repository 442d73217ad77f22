/** Roles as real processes, started from a configuration and ended with the test. */
import { spawn, type ChildProcess } from 'node:child_process';
import { fileURLToPath } from 'node:url';
import type { RoleConfigs, RoleName } from '../../src/config/types.js';
import { WorkerClient } from '../../src/http/client.js';

const CHILD = fileURLToPath(new URL('./role_child.ts', import.meta.url));
const READY_MS = 60_000;

export class RoleProcess {
  readonly client: WorkerClient;
  /** Structured log and whatever else it wrote. */
  stderr = '';
  readonly exited: Promise<{ status: number | null; signal: NodeJS.Signals | null }>;
  readonly #child: ChildProcess;
  #ended = false;
  #ready = false;

  private constructor(name: RoleName, config: { listen: string | string[] }) {
    this.#child = spawn(process.execPath, ['--import', 'tsx', CHILD, name, JSON.stringify(config)], { stdio: ['pipe', 'pipe', 'pipe'] });
    this.#child.stdout!.on('data', (chunk: Buffer) => { this.#ready ||= chunk.toString().includes('"ready"'); });
    this.#child.stderr!.on('data', (chunk: Buffer) => { this.stderr += chunk.toString(); });
    this.exited = new Promise((resolve) => this.#child.on('exit', (status, signal) => { this.#ended = true; resolve({ status, signal }); }));
    this.client = new WorkerClient([config.listen].flat()[0]!);
  }

  /** Starts a role and waits until it is ready. */
  static async start<R extends RoleName>(name: R, config: RoleConfigs[R]): Promise<RoleProcess> {
    const role = new RoleProcess(name, config);
    const deadline = performance.now() + READY_MS;
    for (;;) {
      if (role.#ended) throw new Error(`${name} ended before it was ready:\n${role.stderr}`);
      if (performance.now() > deadline) throw new Error(`${name} is not ready after ${READY_MS} ms:\n${role.stderr}`);
      if (role.#ready) return role;
      await new Promise((resolve) => setTimeout(resolve, 20));
    }
  }

  get pid(): number {
    return this.#child.pid!;
  }

  state<T>(): Promise<T> {
    return this.client.json<T>('GET', '/state');
  }

  kill(signal: NodeJS.Signals): void {
    this.#child.kill(signal);
  }

  async stop(signal: NodeJS.Signals = 'SIGKILL'): Promise<{ status: number | null; signal: NodeJS.Signals | null }> {
    if (!this.#ended) this.kill(signal);
    const result = await this.exited;
    await this.client.close();
    return result;
  }
}

/** Polls until `condition` holds. */
export async function eventually(condition: () => boolean | Promise<boolean>, what: string, limitMs = 20_000): Promise<void> {
  const deadline = performance.now() + limitMs;
  while (!(await condition())) {
    if (performance.now() > deadline) throw new Error(`still waiting for ${what} after ${limitMs} ms`);
    await new Promise((resolve) => setTimeout(resolve, 20));
  }
}
