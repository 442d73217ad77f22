import { spawn, type ChildProcess } from 'node:child_process';
import { mkdtempSync, readdirSync, readFileSync, readlinkSync, rmSync, statSync, writeFileSync } from 'node:fs';
import { createServer } from 'node:net';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { fileURLToPath } from 'node:url';
import { suite } from 'uvu';
import * as assert from 'uvu/assert';
import type { WorkerState } from '../../src/fleet/protocol.js';
import { WorkerClient } from '../../src/http/client.js';
import type { Completion } from '../../src/http/openai_types.js';
import { tpla, TPLA } from '../support/cli.js';
import { noneLeft, processesWith } from '../support/processes.js';

const test = suite('up');
/** Everything a stack starts inherits this in its environment, and keeps its files here. */
const runtime = mkdtempSync(join(tmpdir(), 'tpla-uptest-'));
const env = { XDG_RUNTIME_DIR: runtime };
const stackFile = join(tmpdir(), `tpla-stack-${process.pid}.yaml`);
const MODEL = fileURLToPath(new URL('../../models/demo', import.meta.url));

test.after(() => {
  for (const pid of processesWith(runtime)) process.kill(pid, 'SIGKILL');
  rmSync(runtime, { recursive: true });
  rmSync(stackFile, { force: true });
});
test.after.each(async () => {
  try {
    await noneLeft(runtime);
    assert.equal(readdirSync(runtime), []);
  } finally {
    for (const pid of processesWith(runtime)) process.kill(pid, 'SIGKILL');
    for (const name of readdirSync(runtime)) rmSync(join(runtime, name), { recursive: true });
  }
});

interface Up {
  child: ChildProcess;
  stderr(): string;
  ended: Promise<number | string>;
  saying(pattern: RegExp): Promise<RegExpExecArray>;
  /** Address a service said it serves on. */
  addressOf(name: string): Promise<string>;
}

function start(listen: string, extra = ''): Up {
  writeFileSync(stackFile, `
model: ${MODEL}
log_level: info
services:
  pool: { role: pool, dram_bytes: 16MiB }
  prefill: { role: prefill, threads: 1, kv: { pages: 128 } }
  decode: { role: decode, threads: 1, attention: { form: dcp, ranks: 2 }, kv: { pages: 128 }, lease_ms: 2000 }
  front: { role: route, listen: ['${listen}'], health_interval_ms: 100 }
restart: { first_ms: 50 }
${extra}`);
  const child = spawn(process.execPath, [TPLA, 'up', '-c', stackFile], { env: { ...process.env, ...env }, stdio: ['ignore', 'ignore', 'pipe'] });
  let stderr = '';
  child.stderr!.on('data', (chunk: Buffer) => { stderr += chunk.toString(); });
  const saying = async (pattern: RegExp) => {
    for (;;) {
      const match = pattern.exec(stderr);
      if (match) return match;
      if (child.exitCode !== null) throw new Error(`it ended before it said ${pattern}: ${stderr}`);
      await new Promise((resolve) => setTimeout(resolve, 10));
    }
  };
  return {
    child, saying,
    stderr: () => stderr,
    ended: new Promise((resolve) => child.on('close', (code, signal) => resolve(code ?? String(signal)))),
    addressOf: async (name) => (await saying(new RegExp(`${name} serves on ([^,\\s]+)`)))[1]!,
  };
}

async function complete(route: WorkerClient, prompt: string): Promise<Completion> {
  return route.json<Completion>('POST', '/v1/completions', { model: 'demo', prompt, max_tokens: 8, temperature: 0 });
}

/** Until the fleet serves again. */
async function completeEventually(route: WorkerClient, prompt: string): Promise<Completion> {
  for (const deadline = Date.now() + 60_000; ; await new Promise((resolve) => setTimeout(resolve, 100))) {
    try {
      return await complete(route, prompt);
    } catch (error) {
      if (Date.now() > deadline) throw error;
    }
  }
}

/** Inodes of the shared memory that a process maps or holds a descriptor of. */
function sharedMemory(pid: number): Set<number> {
  try {
    const mapped = readFileSync(`/proc/${pid}/maps`, 'utf8').split('\n').filter((line) => line.includes(' /memfd:')).map((line) => Number(line.split(/\s+/)[4]));
    const held = readdirSync(`/proc/${pid}/fd`).map((fd) => `/proc/${pid}/fd/${fd}`).filter((path) => readlinkSync(path).startsWith('/memfd:')).map((path) => statSync(path).ino);
    return new Set([...mapped, ...held]);
  } catch {
    return new Set(); // it ended while we looked
  }
}

/** Resolves when no process of the stack has any of that memory; throws after 20 s. */
async function memoryGone(inodes: number[]): Promise<void> {
  for (const deadline = Date.now() + 20_000; ; await new Promise((resolve) => setTimeout(resolve, 50))) {
    const left = processesWith(runtime).filter((pid) => inodes.some((inode) => sharedMemory(pid).has(inode)));
    if (left.length === 0) return;
    if (Date.now() > deadline) throw new Error(`process ${left.join(', ')} still has memory of a worker that was killed`);
  }
}

test('serves; survives kill -9 of either worker; leaves no memory, page, process or file behind', async () => {
  const up = start('tcp://127.0.0.1:0');
  const route = new WorkerClient(await up.addressOf('front'));
  const decode = new WorkerClient(await up.addressOf('decode'));
  const first = await complete(route, 'The kernel allocates memory in pages.');
  assert.ok(first.choices[0]!.text.length > 0);

  const pidOf = (name: string) => processesWith(`/${name}.yaml`)[0]!;
  // A worker also maps what others own: all of them the pool's memory, prefill that of decode.
  for (const [name, owners] of [['decode', ['pool']], ['prefill', ['pool', 'decode']]] as const) {
    const pid = pidOf(name);
    const others = new Set(owners.flatMap((owner) => [...sharedMemory(pidOf(owner))]));
    const own = [...sharedMemory(pid)].filter((inode) => !others.has(inode));
    assert.ok(own.length > 0, `${name} has no shared memory of its own`);
    process.kill(pid, 'SIGKILL');
    await up.saying(new RegExp(`${name} ended with signal SIGKILL, starting again in 50 ms; its last lines:\\n +\\{"level"`));
    await up.saying(new RegExp(`${name} is back on`));
    const again = await completeEventually(route, 'The kernel allocates memory in pages.');
    assert.is(again.choices[0]!.text, first.choices[0]!.text);
    await memoryGone(own);
  }

  for (const deadline = Date.now() + 20_000; ; await new Promise((resolve) => setTimeout(resolve, 50))) {
    const { pages } = await decode.json<WorkerState>('GET', '/state');
    if (pages.used === 0) break;
    assert.ok(Date.now() < deadline, `${pages.used} pages in use with nothing running`);
  }
  await route.close();
  await decode.close();
  up.child.kill('SIGINT');
  assert.is(await up.ended, 0, up.stderr());
});

test('kill -9 of up takes its services along', async () => {
  const up = start(`unix:${runtime}/front.sock`);
  await up.addressOf('front');
  up.child.kill('SIGKILL');
  assert.is(await up.ended, 'SIGKILL');
  await noneLeft(runtime);
  assert.equal(readdirSync(runtime).filter((name) => name.endsWith('.sock')), []);
  // Its directory goes with the next stack's start.
  const next = start(`unix:${runtime}/front.sock`);
  await next.addressOf('pool');
  assert.is(readdirSync(runtime).length, 1);
  next.child.kill('SIGTERM');
  assert.is(await next.ended, 130);
});

test('a port in use ends the start with 73 and takes down what had started', async () => {
  const holder = createServer().listen(0, '127.0.0.1');
  await new Promise((resolve) => holder.once('listening', resolve));
  const { port } = holder.address() as { port: number };
  const up = start(`tcp://127.0.0.1:${port}`);
  assert.is(await up.ended, 73);
  assert.match(up.stderr(), `tpla: ADDRESS_IN_USE: front ended with status 73 while starting; its last lines:\n`);
  assert.match(up.stderr(), `tcp://127.0.0.1:${port} is in use by another process`);
  holder.close();
});

test('a wrong stack is refused before anything starts', async () => {
  writeFileSync(stackFile, `model: ${MODEL}\nservices: { r: { role: route }, d: { role: decode, kv: { pages: none } } }\n`);
  const { status, stderr } = await tpla(['up', '-c', stackFile], { env });
  assert.is(status, 78);
  assert.is(stderr, `tpla: CONFIG_INVALID: ${stackFile} has 2 errors:
  services.d.kv.pages: "none" is not a whole number
  services.r.prefill: [] is too short; at least 1 entry is needed
`);
});

test('--print-config prints the stack with its defaults', async () => {
  const { status, stdout } = await tpla(['up', '--print-config', '--json'], { env });
  assert.is(status, 0);
  const stack = JSON.parse(stdout) as { model: string; start_timeout_ms: number };
  assert.equal([stack.model, stack.start_timeout_ms], [MODEL, 600_000]);
});

test.run();

