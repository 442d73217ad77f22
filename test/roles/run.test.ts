import { spawn, spawnSync, type ChildProcessWithoutNullStreams } from 'node:child_process';
import { mkdtempSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { fileURLToPath } from 'node:url';
import { suite } from 'uvu';
import * as assert from 'uvu/assert';

const test = suite('roles/run');
const dir = mkdtempSync(join(tmpdir(), 'tpla-run-'));
test.after(() => rmSync(dir, { recursive: true }));

const FIXTURE = fileURLToPath(new URL('fixture_role.ts', import.meta.url));

interface Started {
  child: ChildProcessWithoutNullStreams;
  said: string[];
  /** Resolves when the role has printed `word`. */
  saying(word: string): Promise<void>;
  ended: Promise<number | string>;
  log(): string;
}

function start(words: string[], env: Record<string, string> = {}): Started {
  const child = spawn(process.execPath, ['--import', 'tsx', FIXTURE, ...words], { env: { ...process.env, ...env } });
  const said: string[] = [];
  let log = '';
  child.stderr.on('data', (chunk: Buffer) => { log += chunk.toString(); });
  child.stdout.on('data', (chunk: Buffer) => said.push(...chunk.toString().split('\n').filter((line) => line !== '')));
  const ended = new Promise<number | string>((resolve) => child.on('exit', (code, signal) => resolve(code ?? String(signal))));
  const saying = async (word: string) => {
    while (!said.includes(word)) {
      if (child.exitCode !== null) throw new Error(`ended before it said "${word}": ${log}`);
      await new Promise((resolve) => setTimeout(resolve, 10));
    }
  };
  return { child, said, saying, ended, log: () => log };
}

for (const signal of ['SIGTERM', 'SIGINT', 'SIGHUP'] as const) {
  test(`${signal} drains, closes and ends with 0`, async () => {
    const role = start(['drain=100']);
    await role.saying('ready');
    role.child.kill(signal);
    assert.is(await role.ended, 0);
    assert.equal(role.said, ['starting', 'ready', 'draining', 'drained', 'closed']);
  });
}

test('a second signal ends at once, with 128 + the first', async () => {
  const role = start(['drain=60000']);
  await role.saying('ready');
  role.child.kill('SIGTERM');
  await role.saying('draining');
  role.child.kill('SIGINT');
  assert.is(await role.ended, 143);
  assert.equal(role.said.slice(-2), ['draining', 'closed']);
});

test('draining has a deadline', async () => {
  const role = start(['drain=60000', 'drain_ms=100']);
  await role.saying('ready');
  role.child.kill('SIGINT');
  assert.is(await role.ended, 130);
  assert.match(role.log(), 'time is up');
  assert.is(role.said.at(-1), 'closed');
});

test('a signal while starting closes what comes up', async () => {
  const role = start(['start=300']);
  await role.saying('starting');
  role.child.kill('SIGTERM');
  assert.is(await role.ended, 143);
  assert.equal(role.said, ['starting', 'ready', 'closed']);
});

test('a start that fails ends with the status of its error', async () => {
  assert.is(await start(['fail=yes']).ended, 73);
});

test('an error nobody catches is logged, and ends the role with 70', async () => {
  const role = start(['crash=50']);
  assert.is(await role.ended, 70);
  assert.match(role.log(), 'nobody catches this');
  assert.is(role.said.at(-1), 'closed');
});

test('a supervised role ends when its standard input closes, ready or not', async () => {
  const ready = start(['supervised=yes', 'drain=60000']);
  await ready.saying('ready');
  ready.child.stdin.end();
  assert.is(await ready.ended, 129);
  assert.is(ready.said.at(-1), 'closed');
  const starting = start(['supervised=yes', 'start=200']);
  await starting.saying('starting');
  starting.child.stdin.end();
  assert.is(await starting.ended, 129);
});

test('log lines are JSON with role, id and pid', async () => {
  const role = start([]);
  await role.saying('ready');
  role.child.kill('SIGTERM');
  await role.ended;
  const lines = role.log().trim().split('\n').map((line) => JSON.parse(line) as Record<string, unknown>);
  assert.equal(lines.map(({ msg }) => msg), ['ready', 'draining', 'stopped']);
  for (const line of lines) assert.equal([line.role, line.id, line.pid], ['pool', 'fixture', role.child.pid]);
});

// ---------------------------------------------------------------- systemd

/** Prints each datagram as one line, newlines in it as `|`. Node has no Unix datagram sockets. */
const RECEIVER = `
#include <cstddef>
#include <cstdio>
#include <cstring>
#include <sys/socket.h>
#include <sys/un.h>
int main(int, char** argv) {
  sockaddr_un address{};
  address.sun_family = AF_UNIX;
  const size_t length = strlen(argv[1]);
  memcpy(address.sun_path, argv[1], length);
  const bool abstract = argv[1][0] == '@';
  if (abstract) address.sun_path[0] = 0;
  const int fd = socket(AF_UNIX, SOCK_DGRAM, 0);
  if (bind(fd, (sockaddr*)&address, offsetof(sockaddr_un, sun_path) + length + !abstract) != 0) return 1;
  puts("bound");
  for (char text[4096];;) {
    fflush(stdout);
    const ssize_t got = recv(fd, text, sizeof text - 1, 0);
    if (got < 0) return 1;
    text[got] = 0;
    for (char* c = text; *c; ++c) if (*c == '\\n') *c = '|';
    puts(text);
  }
}`;

async function receiver(socket: string): Promise<{ datagrams: string[]; stop(): void }> {
  const program = join(dir, 'receiver');
  writeFileSync(`${program}.cpp`, RECEIVER);
  const compiled = spawnSync('g++', ['-o', program, `${program}.cpp`]);
  assert.is(compiled.status, 0, compiled.stderr.toString());
  const child = spawn(program, [socket], { stdio: ['ignore', 'pipe', 'inherit'] });
  const datagrams: string[] = [];
  child.stdout.on('data', (chunk: Buffer) => datagrams.push(...chunk.toString().split('\n').filter((line) => line !== '')));
  while (!datagrams.includes('bound')) await new Promise((resolve) => setTimeout(resolve, 10));
  datagrams.shift();
  return { datagrams, stop: () => child.kill('SIGKILL') };
}

for (const [kind, socket] of [['a path', join(dir, 'notify.sock')], ['an abstract name', `@tpla-test-${process.pid}`]] as const) {
  test(`systemd hears of readiness, life and the end, through ${kind}`, async () => {
    const manager = await receiver(socket);
    try {
      const role = start([], { NOTIFY_SOCKET: socket, WATCHDOG_USEC: '300000' });
      while (manager.datagrams.length < 4) await new Promise((resolve) => setTimeout(resolve, 10));
      role.child.kill('SIGTERM');
      assert.is(await role.ended, 0);
      while (!manager.datagrams.some((text) => text.startsWith('STOPPING'))) await new Promise((resolve) => setTimeout(resolve, 10));
      assert.is(manager.datagrams[0], 'READY=1|STATUS=serving on unix:/fixture.sock');
      assert.equal(new Set(manager.datagrams.slice(1, -1)), new Set(['WATCHDOG=1']));
      assert.is(manager.datagrams.at(-1), 'STOPPING=1|STATUS=draining');
    } finally {
      manager.stop();
    }
  });
}

test('a hung event loop stops the heartbeat', async () => {
  const manager = await receiver(join(dir, 'hang.sock'));
  const role = start(['hang=300'], { NOTIFY_SOCKET: join(dir, 'hang.sock'), WATCHDOG_USEC: '150000' });
  try {
    while (!manager.datagrams.includes('WATCHDOG=1')) await new Promise((resolve) => setTimeout(resolve, 10));
    for (let before = -1; before !== manager.datagrams.length; await new Promise((resolve) => setTimeout(resolve, 500))) before = manager.datagrams.length;
    assert.is(role.child.exitCode, null);
  } finally {
    role.child.kill('SIGKILL');
    manager.stop();
  }
});

test('a service manager that is gone costs a warning, no more', async () => {
  const role = start([], { NOTIFY_SOCKET: join(dir, 'nobody.sock') });
  await role.saying('ready');
  role.child.kill('SIGTERM');
  assert.is(await role.ended, 0);
  assert.match(role.log(), 'cannot notify the service manager');
});

test.run();
