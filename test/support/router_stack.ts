import { spawn, type ChildProcess } from 'node:child_process';
import { once } from 'node:events';
import { mkdtempSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { fileURLToPath } from 'node:url';
import { pino } from 'pino';
import { systemClock } from '../../src/clock.js';
import type { RouteConfig } from '../../src/config/types.js';
import type { RunningRole } from '../../src/roles/role.js';
import { startRouter } from '../../src/roles/router/index.js';
import { TINY_V3 } from './checkpoint.js';
import { FakeDecode, FakePrefill, type WorkerProcessOptions } from './fake_workers.js';
import { writeTokenizer } from './tokenizer.js';

export const CHAT_TEMPLATE = "{% for message in messages %}[{{ message.role }}]{{ message.content }}{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}{% if thinking %}<think>{% endif %}";

/** A router with fake workers, all on sockets of a directory that goes away with it. */
export class RouterStack {
  readonly dir = mkdtempSync(join(tmpdir(), 'tpla-route-'));
  readonly decode: FakeDecode[] = [];
  readonly prefill: FakePrefill[] = [];
  readonly #children: ChildProcess[] = [];
  #role: RunningRole | null = null;

  /** So many workers in this process, then the router. */
  static async start({ decode = 1, prefill = 1, ...config }: { decode?: number; prefill?: number } & Partial<Omit<RouteConfig, 'decode' | 'prefill'>> = {}): Promise<RouterStack> {
    const stack = new RouterStack();
    await stack.startWorkers({ decode, prefill });
    await stack.startRouter(config);
    return stack;
  }

  async startWorkers({ decode, prefill }: { decode: number; prefill: number }): Promise<void> {
    for (let i = 0; i < decode; i++) this.decode.push(await new FakeDecode(join(this.dir, `decode-${i}.sock`)).start());
    for (let i = 0; i < prefill; i++) this.prefill.push(await new FakePrefill(join(this.dir, `prefill-${i}.sock`)).start());
  }

  constructor() {
    writeModel(join(this.dir, 'tiny'));
  }

  async startRouter(config: Partial<RouteConfig> = {}): Promise<void> {
    this.#role = await startRouter({
      listen: ['tcp://127.0.0.1:0'], id: 'route-test', prefill: this.prefill.map(({ address }) => address), decode: this.decode.map(({ address }) => address),
      model: join(this.dir, 'tiny'), model_name: 'tiny', health_interval_ms: 100, request_timeout_ms: 30_000, max_body_bytes: 1_000_000, retries: 2, drain_ms: 5_000, log_level: 'fatal',
      ...config,
    }, { log: pino({ level: process.env['TEST_LOG_LEVEL'] ?? 'silent' }), clock: systemClock });
  }

  get role(): RunningRole {
    return this.#role!;
  }

  get url(): string {
    return this.role.addresses[0]!.replace('tcp://', 'http://');
  }

  /** Starts a fake worker as a process of its own. */
  async child(options: WorkerProcessOptions): Promise<ChildProcess> {
    const child = spawn(process.execPath, ['--import', 'tsx', fileURLToPath(new URL('./fake_workers.ts', import.meta.url)), JSON.stringify(options)], { stdio: ['ignore', 'pipe', 'inherit'] });
    this.#children.push(child);
    await once(child.stdout!, 'data');
    return child;
  }

  post(path: string, body: unknown, init: RequestInit = {}): Promise<Response> {
    const headers = { 'content-type': 'application/json', ...(init.headers as Record<string, string> | undefined) };
    return fetch(`${this.url}${path}`, { method: 'POST', body: typeof body === 'string' ? body : JSON.stringify(body), ...init, headers });
  }

  async state(): Promise<{ running: number; model: unknown; workers: { role: string; address: string; health: string; reason: string | null; legs: number }[] }> {
    return (await fetch(`${this.url}/state`)).json() as never;
  }

  async metrics(): Promise<string> {
    return (await fetch(`${this.url}/metrics`)).text();
  }

  async stop(): Promise<void> {
    await this.#role?.close();
    for (const worker of [...this.decode, ...this.prefill]) await worker.stop();
    for (const child of this.#children) child.kill('SIGKILL');
    rmSync(this.dir, { recursive: true, force: true });
  }
}

/** A model directory without weights: config, tokenizer, chat template. */
export function writeModel(dir: string, generationConfig?: Record<string, unknown>): void {
  writeTokenizer(dir, { chat_template: CHAT_TEMPLATE });
  writeFileSync(join(dir, 'config.json'), JSON.stringify(TINY_V3));
  if (generationConfig) writeFileSync(join(dir, 'generation_config.json'), JSON.stringify(generationConfig));
}

/** Waits until `condition` holds; the test's own limit ends a wait that never does. */
export async function until(condition: () => boolean | Promise<boolean>, what: string, limitMs = 20_000): Promise<void> {
  for (const deadline = performance.now() + limitMs; performance.now() < deadline; await new Promise((resolve) => setTimeout(resolve, 10))) {
    if (await condition()) return;
  }
  throw new Error(`waited ${limitMs} ms in vain: ${what}`);
}

/** Data of the events of a server-sent-event body. */
export function sseData(body: string): string[] {
  return body.split('\n\n').filter((event) => event !== '').map((event) => {
    if (!event.startsWith('data: ')) throw new Error(`not an event: ${event}`);
    return event.slice('data: '.length);
  });
}
