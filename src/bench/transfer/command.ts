import { spawn, type ChildProcess } from 'node:child_process';
import { mkdtempSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { fileURLToPath } from 'node:url';
import type { Logger } from 'pino';
import { TplaError } from '../../errors.js';
import { parseAddress } from '../../http/address.js';
import type { BenchCase } from './cases.js';
import { Control } from './control.js';
import { benchHandoff, type HandoffOptions } from './handoff.js';
import { benchOverlap, type OverlapRow } from './overlap.js';
import { availablePath } from './paths.js';
import type { BenchRow } from './rows.js';
import { serveTarget } from './target.js';

const TPLA = fileURLToPath(new URL('../../../bin/tpla.js', import.meta.url));
const START_MS = 20_000;

export interface BenchOptions extends HandoffOptions {
  onRow(row: BenchRow): void;
}

/** Runs the cases against the end at `address`, or against one that it starts and ends. */
export async function benchTransfer(cases: BenchCase[], address: string | undefined, options: BenchOptions): Promise<BenchRow[]> {
  return onEachCase(cases, address, async (what, end) => {
    const path = availablePath(what.path);
    const rows = 'run' in path ? await path.run(what, options) : await benchHandoff(await end.control(), what, options);
    rows.forEach(options.onRow);
    return rows;
  });
}

/** The same, computing prefill's attention with `heads` heads on the first GPU meanwhile. */
export async function benchTransferBesidePrefill(cases: BenchCase[], heads: number, address: string | undefined, options: HandoffOptions): Promise<OverlapRow[]> {
  return onEachCase(cases, address, async (what, end) => [await benchOverlap(await end.control(), what, heads, options)]);
}

async function onEachCase<Row>(cases: BenchCase[], address: string | undefined, run: (what: BenchCase, end: OtherEnd) => Promise<Row[]>): Promise<Row[]> {
  for (const { path } of cases) availablePath(path);
  const end = new OtherEnd(address);
  try {
    const rows: Row[] = [];
    for (const what of cases) rows.push(...await run(what, end));
    return rows;
  } finally {
    await end.close();
  }
}

/** Decode's end: somebody's at an address, or a process of ours; connected when it is first needed. */
class OtherEnd {
  readonly #address: string | undefined;
  #control: Control | undefined;
  #child: ChildProcess | undefined;
  #directory: string | undefined;
  readonly #stop = () => { this.#child?.kill('SIGTERM'); };

  constructor(address: string | undefined) {
    this.#address = address;
  }

  async control(): Promise<Control> {
    this.#control ??= await (this.#address === undefined ? this.#start() : Control.connect(this.#address));
    return this.#control;
  }

  async close(): Promise<void> {
    this.#control?.close();
    const child = this.#child;
    if (child && child.exitCode === null && child.signalCode === null) {
      const exit = new Promise((resolve) => child.once('exit', resolve));
      this.#stop();
      await exit;
    }
    process.off('exit', this.#stop);
    if (this.#directory !== undefined) rmSync(this.#directory, { recursive: true, force: true });
  }

  async #start(): Promise<Control> {
    this.#directory = mkdtempSync(join(tmpdir(), 'tpla-bench-'));
    const address = `unix:${join(this.#directory, 'control.sock')}`;
    const child = spawn(process.execPath, [TPLA, 'bench-transfer', '--listen', address, '--once'], { stdio: ['ignore', 'ignore', 'inherit'] });
    this.#child = child;
    process.once('exit', this.#stop);
    // It needs a moment until it listens.
    for (const deadline = performance.now() + START_MS; ;) {
      try {
        return await Control.connect(address);
      } catch (error) {
        if (performance.now() > deadline) throw error;
        if (child.exitCode !== null) throw new TplaError('WORKER_FAILED', `the other end of the benchmark ended with status ${child.exitCode} before it listened`);
        await new Promise((resolve) => setTimeout(resolve, 50));
      }
    }
  }
}

/** Serves decode's end until a signal, or with `once` until the first driver has gone. */
export async function serveBench(address: string, log: Logger, once: boolean): Promise<void> {
  parseAddress(address);
  let finish!: () => void;
  const finished = new Promise<void>((resolve) => { finish = resolve; });
  const server = await serveTarget(address, log, () => { if (once) finish(); });
  for (const signal of ['SIGINT', 'SIGTERM'] as const) process.once(signal, finish);
  log.info({ address }, 'ready for bench-transfer --connect');
  await finished;
  server.close();
}
