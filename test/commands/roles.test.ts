import { spawn, type ChildProcess } from 'node:child_process';
import { existsSync, mkdtempSync, rmSync } from 'node:fs';
import { createServer } from 'node:net';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { fileURLToPath } from 'node:url';
import { suite } from 'uvu';
import * as assert from 'uvu/assert';
import { WorkerClient } from '../../src/http/client.js';
import { TPLA } from '../support/cli.js';

const test = suite('role commands');
const dir = mkdtempSync(join(tmpdir(), 'tpla-roles-'));
const started: ChildProcess[] = [];
test.after(() => {
  for (const child of started) child.kill('SIGKILL');
  rmSync(dir, { recursive: true });
});

const MODEL = fileURLToPath(new URL('../../models/demo', import.meta.url));

interface Role {
  child: ChildProcess;
  stderr(): string;
  ended: Promise<number | string>;
}

function start(...args: string[]): Role {
  const child = spawn(process.execPath, [TPLA, ...args], { stdio: ['ignore', 'ignore', 'pipe'] });
  started.push(child);
  let stderr = '';
  child.stderr!.on('data', (chunk: Buffer) => { stderr += chunk.toString(); });
  return { child, stderr: () => stderr, ended: new Promise((resolve) => child.on('close', (code, signal) => resolve(code ?? String(signal)))) };
}

const pool = (socket: string) => start('kv-pool', '--listen', `unix:${socket}`, '--dram-bytes', '16MiB');

async function health(address: string, role: Role): Promise<unknown> {
  const client = new WorkerClient(address);
  try {
    for (;;) {
      if (role.child.exitCode !== null) throw new Error(`it ended: ${role.stderr()}`);
      const answer = await client.json('GET', '/health', undefined, { timeoutMs: 5000 }).catch(() => null);
      if (answer !== null) return answer;
      await new Promise((resolve) => setTimeout(resolve, 20));
    }
  } finally {
    await client.close();
  }
}

test('a role serves on its socket, and leaves none behind', async () => {
  const socket = join(dir, 'a.sock');
  const role = pool(socket);
  assert.equal(await health(`unix:${socket}`, role), { status: 'ok' });
  role.child.kill('SIGTERM');
  assert.is(await role.ended, 0, role.stderr());
  assert.not.ok(existsSync(socket));
  assert.not.ok(existsSync(join(dir, 'a.channel.sock')));
});

test('a socket that somebody answers on is refused with 73 and left alone; one left by kill -9 is replaced', async () => {
  const socket = join(dir, 'b.sock');
  const first = pool(socket);
  await health(`unix:${socket}`, first);
  const second = pool(socket);
  assert.is(await second.ended, 73);
  assert.match(second.stderr(), /^tpla: ADDRESS_IN_USE: unix:.*\/b(\.channel)?\.sock is in use by another process; stop it or choose another address$/m);
  assert.equal(await health(`unix:${socket}`, first), { status: 'ok' });
  first.child.kill('SIGKILL');
  assert.is(await first.ended, 'SIGKILL');
  assert.ok(existsSync(socket));
  const third = pool(socket);
  assert.equal(await health(`unix:${socket}`, third), { status: 'ok' });
  third.child.kill('SIGINT');
  assert.is(await third.ended, 0);
});

test('a port in use is refused with 73', async () => {
  const holder = createServer().listen(0, '127.0.0.1');
  await new Promise((resolve) => holder.once('listening', resolve));
  const { port } = holder.address() as { port: number };
  const role = start('route', '--listen', `tcp://127.0.0.1:${port}`, '--model', MODEL, '--prefill', `unix:${dir}/p.sock`, '--decode', `unix:${dir}/d.sock`);
  assert.is(await role.ended, 73);
  assert.match(role.stderr(), `tpla: ADDRESS_IN_USE: tcp://127.0.0.1:${port} is in use by another process`);
  holder.close();
});

test('a checkpoint that is not there ends route with 65', async () => {
  const role = start('route', '--listen', 'tcp://127.0.0.1:0', '--model', join(dir, 'nowhere'), '--prefill', `unix:${dir}/p.sock`, '--decode', `unix:${dir}/d.sock`);
  assert.is(await role.ended, 65);
  assert.match(role.stderr(), /tpla: CHECKPOINT_INVALID: .*nowhere/);
});

test.run();
